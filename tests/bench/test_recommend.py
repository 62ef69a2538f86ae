"""Which mechanism is recommended, from made-up numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shmengine.bench.plan import KIB, MIB
from shmengine.bench.recommend import bands, recommend
from tests.bench.conftest import made_up

SIZES = (64, 4 * KIB, 64 * KIB, MIB)


def found(rows):
    return [(band.mechanism, band.first, band.last) for band in bands(rows)]


def test_the_best_is_taken_and_neighbours_are_joined():
    rows = [made_up("shm", size, 1000, 10) for size in SIZES] + [
        made_up("pipe", size, 100, 100) for size in SIZES
    ]
    assert found(rows) == [("shm", 64, MIB)]


def test_where_two_are_about_as_good_the_simpler_one_is_taken():
    rows = [made_up("shm", 64, 1000, 10), made_up("pipe", 64, 900, 12), made_up("mqueue", 64, 1100, 10)]
    assert found(rows) == [("pipe", 64, 64)]


def test_one_that_is_fast_but_answers_late_is_not_as_good():
    rows = [made_up("shm", 64, 1000, 10), made_up("pipe", 64, 1000, 50)]
    assert found(rows) == [("shm", 64, 64)]


def test_if_none_is_good_at_both_the_one_least_behind_is_taken():
    rows = [made_up("pipe", 64, 1000, 30), made_up("shm", 64, 500, 10), made_up("socket", 64, 100, 100)]
    assert found(rows) == [("shm", 64, 64)]  # 2 x 1 behind, the pipe 1 x 3


def test_sizes_are_sorted_whatever_the_order_of_the_rows(report):
    assert found(reversed(report.rows)) == [("pipe", 64, 64), ("shm", MIB, MIB)]


def test_only_whole_rows_of_mechanisms_that_copy_count():
    rows = [
        made_up("shm", 64, 100, 100),
        made_up("pipe", 64, 1000, 10, error="hung"),
        made_up("Ring", 64, 1000, 10, group="ours"),
        made_up("shm", 64, 10_000, 1, mode="block"),
        replace(made_up("socket", 64, 1000, 10), latency=None),
    ]
    assert found(rows) == [("shm", 64, 64)]
    assert recommend(rows) == []  # nothing to compare with


def test_sentences(report):
    said = recommend(report.rows)
    assert said[0].startswith("Up to 64 B: pipe. It is the simplest, and at 64 B within 3% of shm")
    assert said[1].startswith(
        "From 1 MiB: shm. At 1 MiB it passes 21 GB/s, 10 times as much as socket (2.1 GB/s)"
    )
    assert "a round trip takes 60 us, not 900 us" in said[1]
    assert "it needs 2% of the CPU time" in said[1]
    assert said[2] == "The pipe stops paying at 1 MiB: from there on shm is twice as fast, or more."
    assert said[3].endswith("(claim, lease) pass up to 2 times as fast over shm (1 MiB).")
    assert said[4] == "Faster than anything of ours that does the same: <rival> (2.2 times at 64 B)."
    assert said[-1] == "To another machine only the socket reaches."


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ((1000, 1000, 1000, 1000), "The pipe pays at all these sizes"),
        ((10, 10, 10, 10), "The pipe never pays here: at 64 B already shm passes 1e+02 times"),
        ((1000, 1000, 10, 10), "The pipe stops paying at 64 KiB"),
        ((1000, 10, 1000, 10), "The pipe stops paying at 1 MiB"),  # not at the dent
        ((1000, 10, 1000, 1000), None),
    ],
)
def test_where_the_pipe_stops_paying(rates, said):
    rows = [made_up("shm", size, 1000, 10) for size in SIZES]
    rows += [made_up("pipe", size, rate, 10) for size, rate in zip(SIZES, rates, strict=True)]
    sentences = [sentence for sentence in recommend(rows) if sentence.startswith("The pipe")]
    assert [s for s in sentences if said and s.startswith(said)] == sentences


@pytest.mark.parametrize(
    ("load", "noise", "warned"), [(0.1, 0.05, False), (0.9, 0.05, True), (0.1, 0.5, True)]
)
def test_a_machine_that_was_not_quiet(load, noise, warned):
    rows = [made_up("shm", 64, 1000, 10, noise=noise), made_up("pipe", 64, 100, 10)]
    assert any("not quiet" in sentence for sentence in recommend(rows, load)) == warned


def test_a_rival_within_the_noise_is_not_called_faster():
    rows = [made_up("shm", 64, 1000, 10), made_up("pipe", 64, 100, 10)]
    rows.append(made_up("rival", 64, 1300, 10, group="rival", noise=0.4))
    assert not any("Faster" in sentence for sentence in recommend(rows))


def test_a_rival_of_a_single_round_is_not_called_faster():
    rows = [made_up("shm", 64, 1000, 10), made_up("pipe", 64, 100, 10)]
    rows.append(replace(made_up("rival", 64, 9000, 10, group="rival"), rounds=1))
    assert not any("Faster" in sentence for sentence in recommend(rows))


def test_nothing_measured():
    assert recommend([]) == []
