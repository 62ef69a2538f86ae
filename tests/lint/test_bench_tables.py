"""Numbers in documents are those of a committed run of `shmengine bench`."""

from __future__ import annotations

import re

import pytest

from benches.tables import BLOCK, documents, renewed
from shmengine.bench.results import Promise, Report
from tests.helpers.sources import ROOT


@pytest.mark.parametrize("path", list(documents()), ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_those_of_their_results(path):
    text = path.read_text()
    assert renewed(text) == text, "run: python -m benches.tables"


CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
SPEED = re.compile(
    r"\b\d[\d.,]*\s?(?:x\b|us\b|ns\b|microseconds|nanoseconds|[KMG]i?B/s|[KMG]i?B a second|times as)"
)


def speeds(text):
    return SPEED.findall(CODE.sub("", BLOCK.sub("", text)))


@pytest.mark.parametrize("path", list(documents()), ids=lambda path: str(path.relative_to(ROOT)))
def test_speeds_stand_in_these_tables_and_nowhere_else(path):
    assert speeds(path.read_text()) == []


def test_a_speed_is_seen():
    for text in ("took 4.3 us", "1.21x of it", "some 50 microseconds", "9 GB/s", "5 times as fast"):
        assert len(speeds(text)) == 1, text
    assert speeds("every 50 ms\n```\n2.1 us\n```\n<!-- bench run -->\n9.1x\n<!-- bench end -->\n") == []


def test_results_can_be_read_and_name_their_machine():
    for path in (ROOT / "docs" / "results").glob("*.json"):
        named = {"processor", "kernel", "python", "numpy", "load", "date"}
        assert named <= set(Report.from_json(path.read_text()).environment), path.name


def test_what_the_benches_reach(tmp_path):
    promises = [Promise("idle", "CPU", "9 %", "<= 1 %", False), Promise("idle", "of two", "5 %", "", None)]
    run = Report({"processor": "made up"}, {}, {}, [], [], promises=promises)
    (tmp_path / "run.json").write_text(run.to_json())
    assert Report.from_json(run.to_json()) == run
    made = renewed("<!-- bench run -->\n<!-- bench end -->\n", tmp_path)
    assert "| idle: CPU | 9 % | <= 1 % | missed |\n| idle: of two | 5 % | - |  |\n" in made
    assert renewed(made, tmp_path) == made


EMPTY = Report({"processor": "made up"}, {}, {"pipe": "not installed"}, [], ["Take shm."]).to_json()
DOCUMENT = "before\n\n<!-- bench run -->\n{}<!-- bench end -->\n\nafter `<!-- bench run -->`\n"


def test_this_test_sees(tmp_path):
    (tmp_path / "run.json").write_text(EMPTY)
    made = renewed(DOCUMENT.format("9 GB/s\n"), tmp_path)
    assert "9 GB/s" not in made
    assert "- Take shm." in made
    assert made.startswith("before\n\n<!-- bench run -->\n")
    assert made.endswith("<!-- bench end -->\n\nafter `<!-- bench run -->`\n")
    assert renewed(made, tmp_path) == made


def test_a_brief_table_is_of_few_sizes(tmp_path):
    whole = ROOT / "docs" / "results" / "epyc-2-cores.json"
    (tmp_path / "run.json").write_text(whole.read_text())
    made = renewed(DOCUMENT.format("").replace("bench run -->\n", "bench run brief -->\n", 1), tmp_path)
    assert "| | 64 B | 4 KiB | 64 KiB | 1 MiB | 16 MiB |\n" in made
    assert "| multiprocessing.Pipe |" in made
    assert "| pyzmq |" not in made
    assert renewed(made, tmp_path) == made


def test_a_document_without_tables_stays_as_it_is():
    assert (
        renewed("`<!-- bench NAME -->` and `<!-- bench end -->`\n")
        == "`<!-- bench NAME -->` and `<!-- bench end -->`\n"
    )


def test_a_result_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run\.json"):
        renewed(DOCUMENT.format(""), tmp_path)
