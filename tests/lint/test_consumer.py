"""The types of the installed package are what a user's strict type checker needs."""

from __future__ import annotations

import ast
import json
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import shmengine
from tests.helpers import ROOT, run_script

CONSUMER = Path(__file__).with_name("consumer.py")

WRONG = """
import shmengine as shm

with shm.Engine(worker=2) as engine:
    engine.map_block(len, "abc")
    number: str = engine.submit(len, "abc").result()
queue: shm.Queue[int] = shm.Queue()
queue.put("one")
shm.Engne(2)
shm.joblib.registr()
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment into which the package has been installed, but for its C core, which has no types of its own."""
    directory = tmp_path_factory.mktemp("installed")
    venv.create(directory, symlinks=True)
    packages = directory / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    tree = directory / "tree"  # setup.py leaves things behind
    skipped = shutil.ignore_patterns(".*", "build", "tests", "docs", "__pycache__", "*.so", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=skipped)
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(packages)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    shutil.rmtree(tree)
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))  # NumPy's types
    return directory / "bin" / "python"


def strict(python, source, cache):
    """mypy's verdict on a program, of the environment of `python`."""
    options = ["--strict", "--warn-unreachable", "--no-error-summary", "--output", "json"]
    command = [sys.executable, "-m", "mypy", *options, "--python-executable", str(python)]
    command += ["--cache-dir", str(cache), "--config-file", "", source.name]
    result = subprocess.run(command, cwd=source.parent, capture_output=True, text=True, check=False)
    assert not result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def cache(request):
    return request.config.cache.mkdir("mypy-consumer")  # NumPy's types take mypy ten seconds, once


def test_mypy_is_content_with_all_public_names(installed, cache, tmp_path):
    shutil.copy(CONSUMER, tmp_path)
    assert strict(installed, tmp_path / "consumer.py", cache) == []


def test_mypy_sees_mistakes(installed, cache, tmp_path):
    source = tmp_path / "wrong.py"
    source.write_text(WRONG)
    found = [(each["line"], each["code"]) for each in strict(installed, source, cache)]
    missing = [(line, "attr-defined") for line in (5, 9, 10)]
    assert found == sorted([(4, "call-arg"), *missing, (6, "assignment"), (8, "arg-type")])


def test_the_consumer_takes_every_public_name():
    taken = {
        node.attr
        for node in ast.walk(ast.parse(CONSUMER.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "shm"
    }
    assert taken == {*shmengine.__all__, "joblib"}


def test_the_consumer_runs():
    assert run_script(CONSUMER, check=True).stdout == f"shmengine {shmengine.__version__}\n"
