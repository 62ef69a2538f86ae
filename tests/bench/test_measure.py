"""Measuring: all that is installed, and what goes wrong."""

from __future__ import annotations

import multiprocessing.heap
import os
import signal
import threading

import pytest

from shmengine.bench import registry
from shmengine.bench.crew import Crew, Died, Failed, Hung
from shmengine.bench.measure import Interrupted, Pair, Wrong, measure
from shmengine.bench.ours import RingLink
from shmengine.bench.plan import KIB, MIB, Plan
from shmengine.bench.registry import Target
from shmengine.bench.rivals import PipeLink
from shmengine.bench.target import PRIME, Link, checks
from tests.helpers.limits import queues_for

TINY = Plan(sizes=(64, 64 * KIB), repeats=1, round_seconds=0.001, patience=30.0)
INSTALLED = [target for target in registry.TARGETS if registry.missing(target) is None]


@pytest.fixture
def heap():
    """The standard library keeps small pieces of its shared memory for ever; faster-fifo takes from them."""
    whole = multiprocessing.heap.BufferWrapper._heap
    multiprocessing.heap.BufferWrapper._heap = multiprocessing.heap.Heap()
    yield
    multiprocessing.heap.BufferWrapper._heap = whole


@pytest.mark.usefixtures("heap")
@pytest.mark.parametrize("target", INSTALLED, ids=lambda target: target.name)
def test_every_target_gets_every_message_right(target):
    with queues_for(target.name):
        rows = measure(TINY, [target])
    assert [row.error for row in rows] == [None] * len(rows)
    modes = {row.mode for row in rows}
    assert {(row.nbytes, row.mode) for row in rows} == {(size, mode) for size in TINY.sizes for mode in modes}
    for row in rows:
        assert row.rate.low <= row.rate.median <= row.rate.high
        assert row.rate.low > 0
        assert row.latency.median > 0
        assert row.cpu.median >= 0
        assert row.messages >= 2
        assert row.trips >= 2


def test_a_ring_wraps_in_each_round():
    with Pair(RingLink(MIB, 3)) as pair:
        assert pair.one_way("block", 50) == 50
        assert pair.round_trips("copy", 20) == 20
        assert len(pair.run("round trip", "block", 7).trips) == 7


def test_repeats_take_turns():
    seen = []
    plan = Plan(sizes=(64,), modes=("copy",), repeats=3, round_seconds=0.001)
    targets = [Target("a", "rival", PipeLink), Target("b", "rival", PipeLink)]
    measure(plan, targets, lambda done, total, text: seen.append((done, text)))
    names = [text for done, text in seen if done and text in ("a", "b")]
    assert names == ["a", "a", "b", "b"] * 3  # one way and round trip each
    assert seen[-1] == (4, "done")


def test_sizes_that_were_done_before_control_c_are_kept():
    def interrupt(done, _total, _text):
        if done >= until:
            raise KeyboardInterrupt

    until, targets = 3, [Target("a", "rival", PipeLink)]  # each size takes two steps
    with pytest.raises(Interrupted) as caught:
        measure(TINY, targets, interrupt)
    assert ({row.nbytes for row in caught.value.rows}, caught.value.sizes) == ({64}, 1)
    until = 1
    with pytest.raises(KeyboardInterrupt) as before_any:
        measure(TINY, targets, interrupt)
    assert before_any.type is KeyboardInterrupt


def test_the_least_is_done_when_time_is_short(monkeypatch):
    monkeypatch.setattr("shmengine.bench.measure.PATIENT", float("inf"))
    plan = Plan(sizes=(64,), modes=("copy",), repeats=1000, round_seconds=10.0, total_seconds=1e-9)
    (row,) = measure(plan, [Target("a", "rival", PipeLink)])
    assert (row.error, row.messages, row.trips) == (None, 2, 2)


def test_nothing_is_begun_when_time_is_over():
    plan = Plan(sizes=(64, 64 * KIB), modes=("copy",), repeats=1000, round_seconds=0.001, total_seconds=1e-9)
    rows = measure(plan, [Target("a", "rival", PipeLink)])
    assert [row.error for row in rows] == ["there was no time left"] * 2


# --- what goes wrong ------------------------------------------------------------------------------


class Broken(PipeLink):
    """A pipe with one fault, in the right end, at message 5."""

    AT = 5

    def fault(self, take):
        raise NotImplementedError

    def open(self, side):
        end = super().open(side)
        if side == "right":
            take = end.take["copy"]
            end.take["copy"] = lambda number: self.fault(take) if number == self.AT else take(number)
        return end


class Hangs(Broken):
    def fault(self, take):
        threading.Event().wait()


class IsKilled(Broken):
    def fault(self, take):
        os.kill(os.getpid(), signal.SIGKILL)


class Exits(Broken):
    def fault(self, take):
        os.write(2, b"thread 'main' panicked: explained here\n")
        os._exit(101)


class Raises(Broken):
    def fault(self, take):
        raise RuntimeError("the rival's own words")


class Loses(Broken):
    """One that reads the next message instead."""

    def open(self, side):
        end = super().open(side)
        if side == "left":
            put = end.put["copy"]
            end.put["copy"] = lambda number: put(number + 1 if number == self.AT else number)
        return end

    def fault(self, take):
        return take(self.AT)


class CannotOpen(Link):
    def __init__(self, nbytes, slots):
        raise OSError("no such thing here")

    def open(self, side):
        raise NotImplementedError


class CannotOpenInChild(PipeLink):
    def open(self, side):
        raise ImportError("libsomething.so")


@pytest.mark.parametrize(
    ("link", "says"),
    [
        (Hangs, "no answer within 1 s"),
        (IsKilled, "was killed by SIGKILL"),
        (Exits, "exited with 101: thread 'main' panicked: explained here"),
        (Raises, "RuntimeError: the rival's own words (test_measure.py:"),
        (Loses, "message 5 arrived wrong"),
        (CannotOpen, "OSError: no such thing here"),
        (CannotOpenInChild, "ImportError: libsomething.so"),
    ],
)
def test_a_broken_rival_is_reported_and_the_others_go_on(link, says):
    plan = Plan(sizes=(64, 4 * KIB), modes=("copy",), repeats=2, round_seconds=0.005, patience=1)
    rows = measure(plan, [Target("broken", "rival", link), Target("sound", "rival", PipeLink)])
    broken = [row for row in rows if row.target == "broken"]
    assert len(broken) == 1, "it is not tried again at the next size"
    assert says in broken[0].error
    sound = [row for row in rows if row.target == "sound"]
    assert [row.error for row in sound] == [None, None]


def test_a_pair_that_is_broken_stays_so():
    with Pair(Loses(64, 16), patience=30.0) as pair:
        for _ in range(2):
            with pytest.raises(Wrong, match="message 5"):
                pair.one_way("copy", 100)


@pytest.mark.parametrize("nbytes", [8, 64, 4 * KIB, 4 * KIB + 1, MIB])
def test_every_other_message_looks_different(nbytes):
    where, expected = checks(nbytes)
    assert len(set(expected)) == PRIME
    assert all(len(each) == len(range(nbytes)[where]) for each in expected)


# --- crews ----------------------------------------------------------------------------------------


def member(answer):
    return lambda: (answer, lambda: None)


def test_a_crew_answers():
    with Crew([member(lambda request: request + 1), member(lambda request: request * 10)]) as crew:
        assert crew.ask(1, 2) == [2, 20]
        assert crew.ask(5, 6) == [6, 60]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda _: threading.Event().wait(), Hung),
        (lambda _: os.kill(os.getpid(), signal.SIGKILL), Died),
        (lambda _: 1 / 0, Failed),
        (lambda _: os._exit(0), Died),
    ],
)
def test_a_crew_does_not_wait_for_the_lost(answer, error):
    with Crew([member(answer), member(lambda _: "well")], patience=0.5) as crew, pytest.raises(error):
        crew.ask(None, None)


def test_a_member_that_cannot_start():
    def broken():
        raise RuntimeError("not today")

    with pytest.raises(Failed, match="RuntimeError: not today"):
        Crew([broken, member(lambda _: None)])


def test_one_that_does_not_leave_is_killed(monkeypatch):
    monkeypatch.setattr("shmengine.bench.crew.LEAVE_SECONDS", 0.1)
    stays = lambda: (lambda request: request, threading.Event().wait)
    with Crew([stays]) as crew:
        assert crew.ask(1) == [1]


# --- choosing -------------------------------------------------------------------------------------


def test_targets_are_chosen_by_name_or_group():
    assert [t.name for t in registry.choose(["Queue", "Ring"])] == ["Ring", "Queue"]
    assert [t.name for t in registry.choose(["mechanism"])] == list(registry.MECHANISMS)
    assert len({target.name for target in registry.TARGETS}) == len(registry.TARGETS)


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match=r"no 'carrier pigeon' to measure: .*shm; pipe; mqueue"):
        registry.choose(["Ring", "carrier pigeon"])


def test_what_is_not_installed_is_said():
    target = Target("x", "rival", PipeLink, "no_such_module", "no-such-package")
    assert registry.missing(target) == "not installed: pip install no-such-package"
