"""Results as JSON, CSV and tables."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import pytest

from shmengine.bench.page import page
from shmengine.bench.plan import KIB, MIB, parse_size, show_size, slots_for
from shmengine.bench.results import Promise, Report, Row, Spread, spread
from shmengine.bench.table import failures, markdown, plain, tables


def test_json_and_back(report):
    text = report.to_json()
    assert Report.from_json(text) == report


def test_json_has_this_shape(report):
    found = json.loads(report.to_json())
    assert list(found) == ["format", "version", *(field.name for field in dataclasses.fields(Report))]
    assert (found["format"], found["version"]) == ("shmengine bench", 1)
    for row in found["rows"]:
        assert list(row) == [field.name for field in dataclasses.fields(Row)]
        for name in ("rate", "cpu", "latency"):
            assert row[name] is None or list(row[name]) == ["median", "low", "high"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Expecting value"),
        ("[]", "list indices"),
        ("{}", "'format' is missing"),
        ('{"format": "something"}', "its format is 'something'"),
        ('{"format": "shmengine bench", "version": 99}', "its version is 99, this program reads 1"),
        ('{"format": "shmengine bench", "version": 1, "rows": [{}]}', "'target' is missing"),
    ],
)
def test_what_is_no_result_is_refused(text, why):
    with pytest.raises(ValueError, match="no results of `shmengine bench --json`") as caught:
        Report.from_json(text)
    assert why in str(caught.value)


def test_csv(report):
    lines = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert len(lines) == len(report.rows)
    first, last = lines[0], lines[-1]
    assert (first["target"], first["bytes"], first["error"]) == ("shm", "64", "")
    assert float(first["bytes_per_second"]) == 400_000 * 64
    assert float(first["latency_us"]) == pytest.approx(9)
    assert float(lines[1]["cpu_seconds_per_gib"]) == pytest.approx(1e-5 * 1024)
    assert (last["messages_per_second"], last["error"]) == ("", "no answer within 5 s")


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0], (3, 3, 3)), ([1.0, 2.0, 3.0], (2, 1.5, 2.5)), ([5.0, 1.0, 9.0], (5, 3, 7))],
)
def test_spread(values, expected):
    assert spread(values) == Spread(*expected)


# --- tables ---------------------------------------------------------------------------------------


def test_tables_have_the_best_of_each_size_marked(report):
    throughput, trip, cpu = tables(report)
    names = [name for name, _ in throughput.lines]
    assert names == ["shm", "pipe", "socket", "shm, in place", "<rival>", "lost"]
    best = {(names[line], throughput.sizes[column]) for line, column in throughput.best}
    assert best == {("<rival>", "64 B"), ("shm, in place", "1 MiB")}
    assert dict(throughput.lines)["shm"] == ("25.6 ±5%", "21,000 ±5%")
    assert dict(trip.lines)["pipe"] == ("10.0 (30.0)", "4,000 (12,000)")
    assert dict(cpu.lines)["lost"] == ("-", "-")


@pytest.mark.parametrize("width", [40, 60, 200])
def test_plain_text_keeps_to_the_width(report, width):
    text = plain(report, width)
    assert max(len(line) for line in text.splitlines() if "distance of the quartiles" not in line) <= max(
        width, 60
    )
    for part in ("25.6 ±5%", "57.6 ±5%*", "lost, 64 B: no answer", "iceoryx2: not installed", "At all sizes"):
        assert part.split(":", maxsplit=1)[0] in text
    assert "processor made up" in " ".join(text.split())


def test_markdown(report):
    text = markdown(report)
    rows = [line for line in text.splitlines() if line.startswith("| shm |")]
    assert rows[0] == "| shm | 25.6 ±5% | 21,000 ±5% |"
    assert "| <rival> | **57.6 ±5%** | - |" in text
    assert "- At all sizes: <shm>." in text


def test_what_the_engine_does_is_written_and_read(work):
    assert Report.from_json(work.to_json()) == work
    (table,) = tables(work)
    assert table.lines[0] == ("map & more; <pool>", ("2 us", "50 us", "25.0 ±4%"))
    assert "| start; python | 200 ms | 100 ms | 0.50 ±20% |" in markdown(work)
    assert work.to_csv().splitlines()[1] == "map & more,<pool>,2.0,50.0,25.0,24.0,26.0,9"
    assert "&lt;pool&gt;" in page(work, with_plot=False)
    assert "The engine at work" in page(work, with_plot=False)


def test_what_the_benches_reach_is_written_and_read():
    promises = [
        Promise("map", "to <pool>", "9.1x", ">= 10x", False),
        Promise("map", "alone", "2 s", "", None),
    ]
    report = Report({"processor": "made up"}, {}, {}, [], [], promises=promises)
    assert Report.from_json(report.to_json()) == report
    (table,) = tables(report)
    assert table.lines == (
        ("map: to <pool>", ("9.1x", ">= 10x", "missed")),
        ("map: alone", ("2 s", "-", "")),
    )
    assert report.to_csv().splitlines()[:2] == [
        "bench,what,value,bound,met",
        "map,to <pool>,9.1x,>= 10x,False",
    ]
    assert "to &lt;pool&gt;" in page(report, with_plot=False)
    assert "<h1>What is to be reached</h1>" in page(report, with_plot=False)


def test_failures_are_told_once(report):
    doubled = dataclasses.replace(
        report, rows=[*report.rows, dataclasses.replace(report.rows[-1], nbytes=MIB)]
    )
    assert (
        failures(doubled)
        == failures(report)
        == [
            "iceoryx2: not installed: pip install iceoryx2",
            "lost, 64 B: no answer within 5 s",
        ]
    )


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("64", 64), ("64 B", 64), ("4KiB", 4 * KIB), ("16 MiB", 16 * MIB), (" 1 GiB ", 1 << 30)],
)
def test_sizes_are_read_and_written(text, nbytes):
    assert parse_size(text) == nbytes
    assert parse_size(show_size(nbytes)) == nbytes


@pytest.mark.parametrize("text", ["", "7", "2 GiB", "much", "-64", "1.5.2"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"\w"):
        parse_size(text)


def test_few_slots_for_large_messages():
    assert [slots_for(n) for n in (64, 4 * MIB, 16 * MIB, 1 << 30)] == [16, 16, 4, 2]
