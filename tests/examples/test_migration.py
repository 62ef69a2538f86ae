"""Both halves of each pair in docs/migration.md run, and print the same."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import sys
from typing import NamedTuple

import pytest

from tests.helpers import ROOT, run_script

PAGE = (ROOT / "docs" / "migration.md").read_text()
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REQUIRED = {"multiprocessing.Pool", "joblib", "mpire", "pasha", "NumPy's wrappers"}
"""Whose halves run in each test of the project; the `test` extra brings them."""


class Pair(NamedTuple):
    library: str
    theirs: str
    ours: str


def pairs():
    found = {}
    for section in re.split(r"^## From ", PAGE, flags=re.MULTILINE)[1:]:
        library, text = section.split("\n", 1)
        snippets = SNIPPET.findall(text)
        assert len(snippets) % 2 == 0, library
        for number, (theirs, ours) in enumerate(zip(snippets[::2], snippets[1::2], strict=True), start=1):
            found[f"{library}-{number}"] = Pair(library, theirs, ours)
    return found


PAIRS = pairs()


def imported(source):
    """Names of the modules that a snippet imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


@functools.cache
def printed(source):
    return run_script(source, check=True, timeout=100).stdout


def test_every_library_has_its_section():
    assert {pair.library for pair in PAIRS.values()} == REQUIRED | {"Ray"}


@pytest.mark.parametrize("name", PAIRS)
def test_ours_runs(name):
    pair = PAIRS[name]
    assert set(imported(pair.ours)) <= {"numpy", "shmengine", *sys.stdlib_module_names}
    assert "__main__" not in pair.ours
    assert printed(pair.ours)


@pytest.mark.parametrize("name", PAIRS)
def test_theirs_prints_the_same(name):
    pair = PAIRS[name]
    assert "shmengine" not in pair.theirs
    missing = [module for module in imported(pair.theirs) if importlib.util.find_spec(module) is None]
    if missing and pair.library not in REQUIRED:
        compile(pair.theirs, name, "exec")
        pytest.skip(f"{' and '.join(missing)} not installed: this half was compiled, and not run")
    assert printed(pair.theirs) == printed(pair.ours)
