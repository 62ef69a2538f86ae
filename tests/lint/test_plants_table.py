"""The table in docs/explorer.md has every planted bug, and each still applies to the core's sources."""

from __future__ import annotations

import importlib.util
import re
import sys

import pytest

from tests.helpers.sources import CSRC, ROOT

HERE = ROOT / "tests" / "c" / "explore"
MARKED = re.compile(r"<!-- plants:begin -->\n(.*?)<!-- plants:end -->", re.DOTALL)


def load():
    spec = importlib.util.spec_from_file_location("plants_table", HERE / "plants_table.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclass
    spec.loader.exec_module(module)
    return module.PLANTS


PLANTS = load()


def rows():
    lines = MARKED.search((ROOT / "docs" / "explorer.md").read_text())[1].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_has_every_plant():
    assert [row[:4] for row in rows()] == [[p.name, p.rule, p.what, p.scenario] for p in PLANTS], (
        "run `make -C csrc plants-table`"
    )


def test_names_are_unique():
    assert len({plant.name for plant in PLANTS}) == len(PLANTS)


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_it_applies(plant):
    source = (CSRC / plant.file).read_text()
    for before, after in plant.changes:
        assert source.count(before) == 1, before
        assert before != after


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_its_rule_is_one_of_the_core(plant):
    assert re.search(rf"\b{plant.rule}\b", (CSRC / "README.md").read_text())


def test_scenarios_exist():
    text = "".join(path.read_text() for path in HERE.glob("scenarios_*.h"))
    assert {p.scenario for p in PLANTS} <= set(re.findall(r'^    "(\w+)", "', text, re.MULTILINE))
