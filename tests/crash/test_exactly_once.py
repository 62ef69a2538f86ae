"""A worker that dies beside its answer: each task has one outcome, and is begun again only if it has none."""

from __future__ import annotations

import os
import signal
import sys

import numpy as np
import pytest

from shmengine.errors import WorkerDied
from tests.helpers import poll_until


class Log:
    """Counts the runs of each task, in whatever process."""

    def __init__(self, path):
        self.path = str(path)
        open(self.path, "w").close()

    def add(self, i):
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        os.write(fd, b"%d\n" % i)
        os.close(fd)

    def runs(self, count):
        with open(self.path) as file:
            return np.bincount([int(line) for line in file], minlength=count).tolist()


@pytest.fixture
def log(tmp_path):
    return Log(tmp_path / "log")


def die_at(step):
    """Let this worker be killed when it comes to a step of its own, once the task has returned."""
    from shmengine.workers.child import Worker

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(Worker, step, die)


def await_deaths(engine, count):
    """Wait until so many deaths have been settled: the results were there before."""
    poll_until(lambda: engine.stats().worker_deaths == count, what=f"{count} workers have died")
    assert engine.map_blocks(np.sqrt, np.ones(3)).sum() == 3  # behind what their deaths have made due


# The last thing before a task is released is that its answer is committed; see `Worker.settle`.
RELEASE = "settle"
MORTAL = {5, 100, 200}
RESULTS = {
    "numbers": lambda i: i * 3,
    "values": str,
    "arrays": lambda i: np.full(10_000, i),
}


@pytest.mark.parametrize(
    ("kind", "retries"), [("numbers", 0), ("values", 1), ("arrays", 1)]
)  # without retries: one task a batch
def test_what_was_answered_is_not_run_again(make_engine, log, kind, retries):
    engine = make_engine(retries=retries)
    make = RESULTS[kind]

    def task(i):
        log.add(i)
        if i in MORTAL:
            die_at(RELEASE)
        return make(i)

    results = list(engine.map(task, range(300)))
    assert all(np.array_equal(result, make(i)) for i, result in enumerate(results))
    await_deaths(engine, 3)
    assert log.runs(300) == [1] * 300
    stats = engine.stats()
    assert (stats.tasks_done, stats.tasks_failed, stats.retries) == (301, 0, 0)


def test_a_future_that_was_answered_is_not_run_again(make_engine, log):
    engine = make_engine(1, retries=0)

    def task(i):
        log.add(i)
        die_at(RELEASE)
        return i

    for i in range(3):
        assert engine.submit(task, i).result() == i
    await_deaths(engine, 3)
    assert log.runs(3) == [1] * 3


def test_blocks_that_were_answered_are_not_run_again(make_engine, log):
    engine = make_engine(retries=0)

    def task(block):
        i = int(block[0]) // 1000
        log.add(i)
        if i % 10 == 7:
            die_at(RELEASE)
        return block + 1

    x = np.arange(40_000)
    assert np.array_equal(engine.map_blocks(task, x, block_bytes=8000), x + 1)
    await_deaths(engine, 4)
    assert log.runs(40) == [1] * 40


def test_what_was_not_answered_is_run_again_and_has_one_outcome(make_engine, log):
    engine = make_engine()

    def task(i):
        if i in MORTAL and not log.runs(300)[i]:
            die_at("answer")
        log.add(i)
        return str(i)

    assert list(engine.map(task, range(300))) == [str(i) for i in range(300)]
    runs = log.runs(300)
    assert all(runs[i] == 2 for i in MORTAL)
    assert set(runs) <= {1, 2}  # those of the same batch, whose results went with it
    stats = engine.stats()
    assert (stats.tasks_done, stats.tasks_failed) == (300, 0)


def test_tasks_whose_arguments_are_kept_are_not_run_again(make_engine, log):
    """However many: each keeps its message leased, long after it was answered."""
    engine = make_engine(1, retries=0)

    def task(i, array):
        log.add(i)
        sys.__dict__.setdefault("kept", []).append(array)
        if i == 200:
            os._exit(1)
        return int(array[0])

    arrays = [np.full(5000, i) for i in range(300)]
    results = list(engine.map(task, range(300), arrays, on_error="return"))
    assert isinstance(results.pop(200), WorkerDied)
    assert results == [i for i in range(300) if i != 200]
    assert log.runs(300) == [1] * 300


def test_neighbours_of_a_poison_task_keep_their_attempts(make_engine, log):
    """Batch mates, and what waits in the ring: only who was running is to blame."""
    engine = make_engine(1, retries=1)

    def task(i):
        log.add(i)
        if i in (150, 151, 152, 290):
            os._exit(1)
        return i

    results = list(engine.map(task, range(300), on_error="return"))
    poison = [i for i, result in enumerate(results) if isinstance(result, WorkerDied)]
    assert poison == [150, 151, 152, 290]
    assert all(results[i].attempts == 2 for i in poison)
    assert all(results[i] == i for i in range(300) if i not in poison)
    assert engine.stats().retries == len(poison)
    runs = log.runs(300)
    assert all(runs[i] == 2 for i in poison)
