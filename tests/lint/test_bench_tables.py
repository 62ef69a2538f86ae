"""Numbers in documents are those of a committed run of `shmengine bench`."""

from __future__ import annotations

import pytest

from benches.reached import Reached, Target
from benches.tables import documents, renewed
from shmengine.bench.results import Report
from tests.helpers.sources import ROOT


@pytest.mark.parametrize("path", list(documents()), ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_those_of_their_results(path):
    text = path.read_text()
    assert renewed(text) == text, "run: python -m benches.tables"


def test_results_can_be_read_and_name_their_machine():
    for path in (ROOT / "docs" / "results").glob("*.json"):
        read = Reached.read if path.stem.endswith("-targets") else of_bench
        named = {"processor", "kernel", "python", "numpy", "load", "date"}
        assert named <= set(read(path).environment), path.name


def of_bench(path):
    return Report.from_json(path.read_text())


def test_targets_are_read_back(tmp_path):
    path = tmp_path / "run-targets.json"
    run = Reached({"processor": "made up", "pinned": "no"}, [Target("idle", "CPU", "9 %", "<= 1 %", False)])
    run.save(path)
    assert Reached.read(path) == run
    made = renewed("<!-- targets run-targets -->\n<!-- targets end -->\n", tmp_path)
    assert "| idle | CPU | 9 % | <= 1 % | **missed** |\n\nMeasured on: processor made up.\n" in made
    assert renewed(made, tmp_path) == made


def test_results_of_the_one_are_not_taken_for_the_other(tmp_path):
    (tmp_path / "run.json").write_text(EMPTY)
    with pytest.raises(ValueError, match=r"run\.json is not of pytest benches --save-targets"):
        renewed("<!-- targets run -->\n<!-- targets end -->\n", tmp_path)


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
    whole = ROOT / "docs" / "results" / "xeon-2-cores.json"
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
