"""What is C and knows Python (csrc/handles.c and its siblings) under AddressSanitizer: the unit tests once more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers.scripts import ROOT

TESTS = [
    "tests/unit/test_ring.py",
    "tests/unit/test_directions.py",
    "tests/unit/test_channel_shm.py",
    "tests/unit/test_wire.py",
    "tests/lifetime/test_views.py",
]
# What takes most of the time, and calls nothing there that the others do not: many views, fresh interpreters.
LEFT_OUT = "not 100_000 and not spawn and not forkserver"


def library(name):
    found = subprocess.run(["cc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


@pytest.mark.slow
@pytest.mark.watchdog(400)
def test_the_ring_under_address_sanitizer(tmp_path):
    tree = tmp_path / "tree"
    skipped = shutil.ignore_patterns(".*", "build", "__pycache__", "*.so", "_core.c", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=skipped)
    environment = {**os.environ, "SHMENGINE_SANITIZE": "address"}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=tree, env=environment, check=True, capture_output=True)
    environment |= {
        "LD_PRELOAD": library("libasan.so"),
        # Python's own small blocks would hide what is written beyond ours.
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={tmp_path / 'report'}",
        "PYTHONPATH": str(tree),
    }
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", LEFT_OUT, *TESTS]
    done = subprocess.run(
        run, cwd=tree, env=environment, check=False, capture_output=True, text=True, start_new_session=True
    )
    reports = [path.read_text() for path in tmp_path.glob("report*")]
    assert not reports, reports[0]
    assert done.returncode == 0, done.stdout + done.stderr
    where = [sys.executable, "-c", "import shmengine._native._handles as h; print(h.__file__)"]
    loaded = subprocess.run(where, cwd=tree, env=environment, check=True, capture_output=True, text=True)
    assert loaded.stdout.startswith(str(tree))
