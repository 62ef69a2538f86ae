"""csrc/README.md and the sources agree on invariants, and the tests that it names exist."""

from __future__ import annotations

import re

from tests.helpers.sources import CSRC, ROOT, c_comments, c_files

README = (CSRC / "README.md").read_text()
TESTS = ROOT / "tests" / "c"


def section(title):
    """The text below a heading, up to the next one."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)[1]


def cited_invariants():
    for path in c_files():
        if path.parent == CSRC:
            for comment in c_comments(path.read_text()):
                yield from re.findall(r"\bI\d+\b", comment)


def test_every_invariant_is_listed_and_every_listed_one_is_cited():
    listed = re.findall(r"^- \*\*(I\d+)\*\*", section("Invariants"), re.MULTILINE)
    assert listed == [f"I{n + 1}" for n in range(len(listed))]
    assert set(listed) == set(cited_invariants())


def test_every_source_file_is_in_the_list():
    for path in c_files():
        if path.parent == CSRC:
            assert f"`{path.name}`" in section("In one page"), path.name


def test_the_tests_in_the_crash_table_exist():
    rows = [line for line in section("Where one may die").splitlines() if line.startswith("|")][2:]
    assert len(rows) > 10
    run = {name for path in TESTS.glob("*.c") for name in re.findall(r"\bRUN\((\w+)\)", path.read_text())}
    planted = re.findall(r"\*planted:\* (.*?) \|", (CSRC / "model" / "README.md").read_text())
    for row in rows:
        shown_by = row.strip("| ").rpartition("|")[2].split(",")
        for shown in (name.strip() for name in shown_by):
            if shown.startswith("model: "):
                assert shown.removeprefix("model: ") in planted, row
            else:
                assert shown.strip("`") in run, row
