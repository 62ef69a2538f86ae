"""Quick tasks travel together; one that takes long holds up none of those that travelled with it.

`run` is called often and quickly first, so that many calls go into one message.
"""

from __future__ import annotations

import concurrent.futures
import os
import signal
import threading

import pytest

import shmengine as shm
from shmengine.errors import MemoryBudgetExceeded, WorkerDied
from tests.helpers import poll_until

WARM = 2000


def run(fn):
    return fn()


@pytest.fixture
def executor():
    with shm.Executor(2, memory="64 MiB") as made:
        list(made.map(run, [int] * WARM))
        yield made


@pytest.fixture
def engine():
    with shm.Engine(2, memory="64 MiB") as made:
        list(made.map(run, [int] * WARM))
        yield made


def test_calls_do_travel_together(executor):
    before = executor._backend.stats().bytes_copied
    assert list(executor.map(run, [int] * WARM)) == [0] * WARM
    assert executor._backend.stats().tasks_done == 2 * WARM
    assert before == 0
    assert executor._backend._core.in_flight.reserve() < 2 * WARM  # one tag a message


@pytest.mark.parametrize("position", [0, 1, 50, 199])
def test_tasks_that_wait_for_each_other(executor, gate, position):
    calls = [int] * 200
    calls[position] = gate.wait
    futures = [executor.submit(run, call) for call in [*calls, gate_opener(gate)]]
    concurrent.futures.wait(futures)
    assert [future.result() for future in futures] == [0 if call is int else None for call in calls] + [None]


def gate_opener(gate):
    path = gate.path

    def open_it():
        with open(path, "w"):
            pass

    return open_it


def test_in_a_stream_too(engine, gate):
    calls = [int] * 300
    calls[100:100] = [gate.wait, int, gate_opener(gate)]
    results = list(engine.map(run, calls, window=1000))
    assert results == [0] * 100 + [None, 0, None] + [0] * 200


def test_what_has_ended_is_not_kept_back(executor, gate):
    """Main opens the gate when it has the results of all others, which may have travelled with the one that waits."""
    futures = [executor.submit(run, call) for call in [*[int] * 100, gate.wait, *[int] * 100]]
    waits = futures.pop(100)
    assert [future.result() for future in futures] == [0] * 200
    assert not waits.done()
    gate.open()
    assert waits.result() is None


def test_each_is_run_once(executor, gate, tmp_path):
    path = tmp_path / "log"

    def note(index):
        with open(path, "a") as file:
            file.write(f"{index}\n")

    class Note:
        def __init__(self, index):
            self.index = index

        def __call__(self):
            note(self.index)

    futures = [executor.submit(run, gate.wait if i % 50 == 7 else Note(i)) for i in range(300)]
    rest = [future for i, future in enumerate(futures) if i % 50 != 7]
    opened = threading.Timer(0.2, gate.open)
    opened.start()
    concurrent.futures.wait(rest)
    concurrent.futures.wait(futures)
    opened.join()
    assert sorted(map(int, path.read_text().split())) == [i for i in range(300) if i % 50 != 7]


def test_arrays_that_have_ended(executor, gate):
    import numpy as np

    def make(size):
        return np.full(size, 7.0)

    calls = [lambda n=n: make(n) for n in (10, 10_000, 100_000)]
    futures = [executor.submit(run, call) for call in [*calls, gate.wait, *calls]]
    waits = futures.pop(3)
    for future in futures:
        assert (future.result() == 7).all()
    gate.open()
    waits.result()


class Unsendable:
    def __reduce__(self):
        raise LookupError("not this one")


def test_a_result_that_cannot_be_pickled_among_those_that_have_ended(executor, gate):
    futures = [executor.submit(run, call) for call in [*[int] * 50, Unsendable, *[int] * 10, gate.wait, int]]
    waits, bad = futures.pop(61), futures.pop(50)
    assert [future.result() for future in futures] == [0] * 61
    assert type(bad.exception()) is LookupError
    gate.open()
    waits.result()


def take(x):
    return 0


def test_an_argument_that_cannot_be_pickled_among_others(executor):
    list(executor.map(take, range(WARM)))
    futures = [executor.submit(take, Unsendable() if i == 150 else i) for i in range(300)]
    bad = futures.pop(150)
    assert [future.result() for future in futures] == [0] * 299
    assert type(bad.exception()) is LookupError


def test_what_finds_no_room_among_others(executor):
    """They are divided until each part fits; the one that never does fails, and no other."""
    list(executor.map(take, range(WARM)))
    pids = list(executor._processes)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        out = [executor.submit(take, b"") for _ in pids]
        small, large = executor.submit(take, b"small"), executor.submit(take, bytes(100 << 20))
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert [future.result() for future in [*out, small]] == [0] * (len(pids) + 1)
    with pytest.raises(MemoryBudgetExceeded, match="100 MiB are more than the whole memory budget"):
        large.result()


def die():
    os._exit(3)


def test_a_death_after_the_others_were_handed_over(engine, gate):
    def die_later():
        gate.wait()
        die()

    calls = [*[int] * 100, die_later, *[int] * 100]
    results = engine.map(run, calls, on_error="return", window=1000)
    assert [next(results) for _ in range(100)] == [0] * 100
    gate.open()
    assert isinstance(next(results), WorkerDied)
    assert list(results) == [0] * 100


def test_the_thread_that_watches_sleeps_when_there_is_nothing():
    def threads():
        return [thread.name for thread in threading.enumerate()]

    with shm.Executor(1, memory="64 MiB") as executor:
        list(executor.map(run, [int] * WARM))
        assert "shmengine-held" in executor.submit(threads).result()
        (pid,) = executor._processes

        def switches():
            total = 0
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/status") as status:
                    total += sum(int(line.split()[1]) for line in status if "ctxt_switches" in line)
            return total

        def quiet():
            before = switches()
            threading.Event().wait(0.3)
            return switches() - before < 5  # not one every 20 ms

        poll_until(quiet)
