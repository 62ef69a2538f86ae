"""What `make test-all` and `make test-lowest` install, and what they say when they cannot."""

from __future__ import annotations

import pytest
from packaging.requirements import Requirement

from tests.helpers import ROOT, run_script
from tests.helpers.interpreters import interpreter
from tests.versions.__main__ import SUPPORTED, copy_tree, lower_bound, lower_bounds, project

TABLE = {
    "name": "ours",
    "dependencies": ["numpy>=2"],
    "optional-dependencies": {
        "plot": ["matplotlib>=3.9"],
        "all": ["ours[plot,more]"],
        "more": ["dask[array]>=2024.12,<2030"],
    },
}


def test_lower_bounds_of_all_extras():
    assert lower_bounds(TABLE) == ["dask==2024.12", "matplotlib==3.9", "numpy==2"]


@pytest.mark.parametrize("text", ["numpy", "numpy<3", "numpy>2"])
def test_a_requirement_without_a_lower_bound(text):
    with pytest.raises(ValueError, match="no lower bound: give it one that is tested"):
        lower_bound(Requirement(text))


def test_the_supported_versions_are_those_that_the_package_names():
    table = project()
    named = [
        text.rpartition(" ")[2]
        for text in table["classifiers"]
        if text.startswith("Programming Language :: Python :: 3.")
    ]
    assert tuple(named) == SUPPORTED
    assert table["requires-python"] == f">={SUPPORTED[0]}"


def test_a_missing_interpreter_is_said_before_anything_runs():
    assert interpreter("3.99") is None
    result = run_script(
        "import sys\nfrom tests.versions.__main__ import main\nsys.exit(main())",
        args=["3.99"],
        env={"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 2
    assert "no interpreter for Python 3.99" in result.stderr
    assert "pyenv install 3.99" in result.stderr


def test_a_copy_follows_the_tree(tmp_path):
    copy_tree(tmp_path)
    copy = tmp_path / "setup.py"
    assert copy.stat().st_mtime_ns == (ROOT / "setup.py").stat().st_mtime_ns
    copy.write_text("changed")
    built = tmp_path / "shmengine" / "built.so"
    built.touch()
    copy_tree(tmp_path)
    assert copy.read_text() == (ROOT / "setup.py").read_text()
    assert built.exists()
