"""The package offers what it promises, each name explained."""

from __future__ import annotations

import inspect
import tomllib
import types

import pytest

import shmengine
from shmengine import errors
from tests.helpers import ROOT

PROMISED = {
    "Engine",
    "EngineStats",
    "Executor",
    "JoinableQueue",
    "Queue",
    "Ring",
    "RingStats",
    "__version__",
    "map",
    "map_blocks",
    "reduce",
}


def test_what_is_promised_is_there():
    missing = (PROMISED | set(errors.__all__)) - set(shmengine.__all__)
    assert not missing


@pytest.mark.parametrize("name", sorted(getattr(shmengine, "__all__", ())))
def test_each_public_name_is_explained(name):
    thing = getattr(shmengine, name)
    if isinstance(thing, str):  # __version__
        return
    assert inspect.getdoc(thing), name
    if isinstance(thing, type):
        undocumented = [
            member
            for member, value in vars(thing).items()
            if not member.startswith("_")
            and isinstance(value, types.FunctionType | property | classmethod | staticmethod)
            and not inspect.getdoc(getattr(thing, member))
        ]
        assert not undocumented


def test_all_is_sorted_and_has_no_doubles():
    assert list(shmengine.__all__) == sorted(set(shmengine.__all__), key=str.lower) or list(
        shmengine.__all__
    ) == sorted(set(shmengine.__all__))


def test_nothing_else_is_public():
    public = {
        name
        for name, value in vars(shmengine).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("shmengine")
    }
    assert public <= set(shmengine.__all__)
    assert set(dir(shmengine)) == set(shmengine.__all__)


def test_one_version():
    with open(ROOT / "pyproject.toml", "rb") as file:
        assert tomllib.load(file)["project"]["version"] == shmengine.__version__
    assert f"## {shmengine.__version__} " in (ROOT / "CHANGELOG.md").read_text()
