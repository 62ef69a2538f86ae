"""docs/memory-orders.md and the sources agree on ordered accesses, and whatever survives being weaker is argued."""

from __future__ import annotations

import importlib.util
import re

from tests.helpers import ROOT
from tests.helpers.sources import CSRC, c_files
from tests.lint.test_sync_labels import read

HERE = ROOT / "tests" / "c" / "explore"
spec = importlib.util.spec_from_file_location("explore_orders", HERE / "orders.py")
orders = importlib.util.module_from_spec(spec)
spec.loader.exec_module(orders)

DOCUMENT = (ROOT / "docs/memory-orders.md").read_text()
SITES = orders.read_sites()
ROWS = orders.ACCESS_ROW.findall(DOCUMENT)


def part(name):
    return re.search(rf"<!-- {name}:begin -->(.*)<!-- {name}:end -->(.*)", DOCUMENT, re.DOTALL)


def test_each_label_has_its_row_and_what_survives_is_argued():
    sources = [(path.name, path.read_text()) for path in c_files() if path.name != "shmr_atomics.h"]
    _, places = read(sources)
    table, below = part("labels").groups()
    fates = dict(re.findall(r"^\| ([RAS]\d+) \| \d+ \| ([^|]+?) \|", table, re.MULTILINE))
    assert set(fates) == set(places)
    argued = re.findall(r"^\| ([^|`]+) \|", below.partition("<!-- accesses:begin -->")[0], re.MULTILINE)
    survivors = {label for label, fate in fates.items() if not fate.startswith("caught")}
    assert survivors == {label for cell in argued for label in re.findall(r"[RAS]\d+", cell)}


def test_the_sites_are_those_that_the_labels_are_checked_for():
    sources = [(path.name, path.read_text()) for path in c_files() if path.name != "shmr_atomics.h"]
    _, places = read(sources)
    labelled = {place for where in places.values() for place in where}
    assert labelled == {f"{site.file}:{site.line}" for site in SITES}


def test_each_access_has_its_row_in_order():
    assert [row[:4] for row in ROWS] == [site.columns for site in SITES], "make -C csrc orders"


def test_each_weaker_order_is_caught_or_argued_in_the_code():
    for site, row in zip(SITES, ROWS, strict=True):
        fates = dict(re.findall(r"(\w+): ([^;|]+?)(?:;|\s*$)", row[4]))
        assert set(fates) == set(orders.one_step(site)), row
        argued = [fate for fate in fates.values() if not fate.startswith("caught by `")]
        assert all(tuple(fate.split()) == site.cited for fate in argued), row
        assert bool(site.cited) == bool(argued), (
            f"{row}: cite an argument where, and only where, it is needed"
        )


def test_every_argument_is_listed_and_every_listed_one_is_cited():
    section = (CSRC / "README.md").read_text().partition("### Why one of them alone may be weaker")[2]
    listed = re.findall(r"^- \*\*(W\d+)\*\*", section.partition("\n## ")[0], re.MULTILINE)
    assert listed == [f"W{n + 1}" for n in range(len(listed))]
    assert set(listed) == {argument for site in SITES for argument in site.cited}


def test_an_access_is_read_with_its_labels_and_arguments():
    text = (
        "static int f(shmr *h) {\n    /* W9 */\n"
        "    if (shmr_cas_acq_rel(&x, &y,\n            z)) /* A1 R2 W3 W4: why */\n        return 1;\n"
        "    return shmr_load_relaxed(&x); /* after A1 */\n}\n"
    )
    (site,) = orders.sites_in("shmr_x.c", text)
    assert site == ("shmr_x.c", 3, "f", "cas", "acq_rel", ("A1", "R2"), ("W3", "W4"))
    unargued, needless = orders.complaints([site], {"0>acquire": "caught x 1 y", "0>release": "survives"})
    assert (unargued, needless) == ([], [])
    unargued, needless = orders.complaints([site], {"0>acquire": "caught x 1 y", "0>release": "caught x 2 z"})
    assert needless
    unargued, needless = orders.complaints(
        [site._replace(cited=())], {"0>acquire": "unmet", "0>release": "caught x 2 z"}
    )
    assert unargued
