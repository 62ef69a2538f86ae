"""What an installed package must bring along."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import shmengine
from tests.helpers import ROOT, run_script
from tests.versions.__main__ import LOWEST_TESTS, lower_bound, requirements

PACKAGE = Path(shmengine.__file__).parent


def test_types_come_along():
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "_native" / "_core.pyi").is_file()
    assert (PACKAGE / "_native" / "_handles.pyi").is_file()


def project():
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["project"]


def extras_for_users(table):
    ours = {"all", "bench", "rivals", "test", "fuzz", "coverage", "demo"}
    return set(table["optional-dependencies"]) - ours


def modules_of_extras(table):
    """What can be imported of the libraries that extras bring."""
    brought = {each.name for each in requirements(table)} - {each.name for each in requirements(table, [])}
    modules = {name for name, names in packages_distributions().items() if brought.intersection(names)}
    assert {"zmq", "tqdm", "ipywidgets", "matplotlib"} <= modules
    return modules


def test_all_has_every_extra_that_is_for_users():
    table = project()
    asked = {requirement.name for requirement in requirements(table)}
    extras = extras_for_users(table)
    assert {each.name for extra in extras for each in requirements(table, [extra])} == asked


@pytest.mark.parametrize(
    ("name", "before"), [("README.md", "by parts:"), ("CHANGELOG.md", "Extras for users:")]
)
def test_the_documents_name_every_extra_that_is_for_users(name, before):
    _, _, text = (ROOT / name).read_text().partition(before)
    named = set(re.findall(r"`(\w+)`", text.partition(". ")[0].partition(".\n")[0]))
    assert named - {"all"} == extras_for_users(project())


def test_the_oldest_libraries_are_tested_by_all_tests_of_them():
    mentions = re.compile(
        rf"(?:^\s*(?:import|from)\s+|importorskip\(\")(?:{'|'.join(modules_of_extras(project()))})\b",
        re.MULTILINE,
    )
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "peers" not in path.parts and mentions.search(path.read_text())
    }
    assert "tests/bench/test_pictures.py" in files
    assert [file for file in sorted(files) if not file.startswith(LOWEST_TESTS)] == []


def test_everything_has_a_lower_bound():
    table = project()
    for requirement in requirements(table, list(table["optional-dependencies"])):
        assert lower_bound(requirement)


def test_no_public_name_imports_what_an_extra_brings():
    modules = sorted(modules_of_extras(project()))
    source = f"""
        import sys
        import shmengine
        for name in set(shmengine.__all__) - {{"Server", "connect", "listen"}}:  # which are the socket extra's
            getattr(shmengine, name)
        print([name for name in {modules} if name in sys.modules])
    """
    assert run_script(source, check=True).stdout == "[]\n"
