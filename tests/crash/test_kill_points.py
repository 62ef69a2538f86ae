"""SIGKILL at the nth access of shared memory, in every operation: the tests of ``points_*.py``, in a test build."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers.fault_points import SEED, SOAK, build
from tests.helpers.scripts import ROOT

FILES = sorted(path.name for path in (ROOT / "tests" / "crash").glob("points_*.py"))


@pytest.fixture(scope="session")
def fault_build(tmp_path_factory):
    """The test build: its tree, and the environment that uses it."""
    tree = tmp_path_factory.mktemp("fault-points") / "tree"
    return tree, build(tree)


@pytest.mark.slow
@pytest.mark.watchdog(7200 if SOAK else 400)
@pytest.mark.parametrize("file", FILES)
def test_death_at_each_point(file, fault_build):
    tree, environment = fault_build
    environment = {**environment, "SHMENGINE_TEST_SEED": str(SEED)}
    run = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--durations=0",
        f"tests/crash/{file}",
    ]
    done = subprocess.run(
        run, cwd=tree, env=environment, check=False, capture_output=True, text=True, start_new_session=True
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_build_is_for_tests_alone(fault_build):
    """The switch does what it says, and only where it is set."""
    tree, environment = fault_build
    look = [sys.executable, "-c", "from shmengine._native import lib; print(hasattr(lib, 'shmr_fault_arm'))"]
    for cwd, env, found in ((tree, environment, "True\n"), (ROOT, os.environ, "False\n")):
        said = subprocess.run(look, cwd=cwd, env=env, check=True, capture_output=True, text=True)
        assert said.stdout == found
