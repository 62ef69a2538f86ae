"""Planted bugs (tests/c/explore/plants.txt) still apply to the core's sources, and their table has them all."""

from __future__ import annotations

import importlib.util
import re
import sys

import pytest

from tests.helpers.sources import CSRC, ROOT

HERE = ROOT / "tests" / "c" / "explore"


def load():
    spec = importlib.util.spec_from_file_location("plants", HERE / "plants.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


plants = load()
PLANTS = plants.read()


def test_the_table_has_every_plant():
    lines = plants.MARKED.search((ROOT / "docs" / "explorer.md").read_text())[2].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:4] for row in rows] == [[p.name, p.rule, p.what, p.scenario] for p in PLANTS], (
        "run `make -C csrc plants-table`"
    )


def test_every_plant_is_read():
    text = (HERE / "plants.txt").read_text()
    assert len(PLANTS) == len(re.findall(r"^plant ", text, re.MULTILINE))
    assert sum(len(plant.changes) for plant in PLANTS) == len(re.findall(r"^@@ instead$", text, re.MULTILINE))
    assert len({plant.name for plant in PLANTS}) == len(PLANTS)


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_it_applies(plant):
    assert plants.planted(plant) != (CSRC / plant.file).read_text()


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_its_rule_is_one_of_the_core(plant):
    assert re.search(rf"\b{plant.rule}\b", (CSRC / "README.md").read_text())


def test_scenarios_exist():
    text = "".join(path.read_text() for path in HERE.glob("scenarios_*.h"))
    assert {plant.scenario for plant in PLANTS} <= set(re.findall(r'^    "(\w+)", "', text, re.MULTILINE))
