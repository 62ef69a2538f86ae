"""What an installed package must bring along."""

from __future__ import annotations

import tomllib
from pathlib import Path

import shmengine
from tests.helpers import ROOT, run_script
from tests.versions.__main__ import lower_bound, requirements

PACKAGE = Path(shmengine.__file__).parent


def test_types_come_along():
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "_native" / "_core.pyi").is_file()
    assert (PACKAGE / "_native" / "_handles.pyi").is_file()


def project():
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["project"]


def test_all_has_every_extra_that_is_for_users():
    table = project()
    extras = set(table["optional-dependencies"]) - {
        "all",
        "bench",
        "rivals",
        "test",
        "fuzz",
        "coverage",
        "demo",
    }
    asked = {requirement.name for requirement in requirements(table)}
    assert {each.name for extra in extras for each in requirements(table, [extra])} == asked


def test_everything_has_a_lower_bound():
    table = project()
    for requirement in requirements(table, list(table["optional-dependencies"])):
        assert lower_bound(requirement)


def test_no_public_name_imports_what_an_extra_brings():
    modules = [
        "zmq",
        "blosc2",
        "joblib",
        "dask",
        "distributed",
        "pandas",
        "pyarrow",
        "polars",
        "xarray",
        "matplotlib",
    ]
    source = f"""
        import sys
        import shmengine
        for name in set(shmengine.__all__) - {{"Server", "connect", "listen"}}:  # which are the socket extra's
            getattr(shmengine, name)
        print([name for name in {modules} if name in sys.modules])
    """
    assert run_script(source, check=True).stdout == "[]\n"
