"""docs/memory-orders.md has a row for each label of the sources, and an argument for each that survives."""

from __future__ import annotations

import re

from tests.helpers import ROOT
from tests.helpers.sources import c_files
from tests.lint.test_sync_labels import read

DOCUMENT = (ROOT / "docs/memory-orders.md").read_text()
TABLE, ARGUMENTS = DOCUMENT.split("<!-- orders:end -->")
ROWS = dict(re.findall(r"^\| ([RAS]\d+) \| \d+ \| ([^|]+?) \|", TABLE, re.MULTILINE))


def test_each_label_has_its_row():
    sources = [(path.name, path.read_text()) for path in c_files() if path.name != "shmr_atomics.h"]
    _, places = read(sources)
    assert set(ROWS) == set(places)


def test_what_survives_is_argued():
    argued = {
        label
        for cell in re.findall(r"^\| ([^|]+) \|", ARGUMENTS, re.MULTILINE)
        for label in re.findall(r"[RAS]\d+", cell)
    }
    survivors = {label for label, fate in ROWS.items() if not fate.startswith("caught")}
    assert survivors == argued
