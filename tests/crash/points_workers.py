"""A worker dies at its nth access of shared memory: while it starts, in a task's whole life, while it ends.

Needs the test build, so `test_kill_points.py` runs this file. A task's life is: leased, its arguments held, called,
its result published, the task released. Its worker is told by a task before it when to die.
"""

from __future__ import annotations

import collections
import functools
import os
import signal
import sys

import numpy as np
import pytest

from shmengine._native import lib
from shmengine.engine import Engine
from shmengine.workers import process
from shmengine.workers.child import Worker
from tests.helpers.fault_points import SEED, SOAK, points
from tests.helpers.memory import can_have_half
from tests.helpers.scripts import poll_until

MIB = 1 << 20
TASKS = 24
pytestmark = pytest.mark.watchdog(3600 if SOAK else 120)


# --- in the worker ---------------------------------------------------------------------------------


def write(path, what, i=0):
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{os.getpid()} {what} {i}\n".encode())
    os.close(fd)


def arm_after_this_task(path, nth):
    """Die at the nth access after the task that calls this; say when results are published and tasks released."""
    answer, answer_placed, settle = Worker.answer, Worker.answer_placed, Worker.settle
    settled = []

    def say_published(method):
        @functools.wraps(method)
        def call(self, *args, **options):
            method(self, *args, **options)
            if settled:
                write(path, "published")

        return call

    def settle_and_say(self, *args):
        settle(self, *args)
        if settled:
            write(path, "released", lib.shmr_fault_count())
        else:
            settled.append(1)
            lib.shmr_fault_arm(nth, 0)

    Worker.answer, Worker.answer_placed = say_published(answer), say_published(answer_placed)
    Worker.settle = settle_and_say


def arm_at_the_end(nth):
    """Die at the nth access after the last task."""

    def look(frame, event, argument):
        if event == "return" and frame.f_code.co_name == "serve":
            lib.shmr_fault_arm(nth, 0)

    sys.setprofile(look)


# --- what they work on -----------------------------------------------------------------------------


def small(engine, path):
    def fn(i):
        write(path, "run", i)
        return 2 * i

    assert list(engine.map(fn, range(TASKS))) == list(range(0, 2 * TASKS, 2))


def by_reference(engine, path):
    def fn(array, i):
        write(path, "run", i)
        return int(array[i]) + array.size

    arrays = [engine.full(20_000, i) for i in range(4)]
    given = [arrays[i % 4] for i in range(TASKS)]
    assert list(engine.map(fn, given, range(TASKS))) == [i % 4 + 20_000 for i in range(TASKS)]


def born_shared(engine, path):
    def fn(i):
        write(path, "run", i)
        return np.full(50_000 * (1 + i % 3), i)

    for i, array in enumerate(engine.map(fn, range(TASKS))):
        assert (array == i).all()
        assert array.size == 50_000 * (1 + i % 3)


def large_and_inline(engine, path):
    def fn(array, i):
        write(path, "run", i)
        return {"twice": (array * 2)[:2000], "of": i}

    arrays = [np.full(30_000, i) for i in range(TASKS)]
    for i, result in enumerate(engine.map(fn, arrays, range(TASKS))):
        assert result["of"] == i
        assert (result["twice"] == 2 * i).all()


def blocks(engine, path):
    def fn(b):
        write(path, "run", int(b[0]) // 5000)
        return b + 1

    x = np.arange(5000.0 * TASKS)
    assert np.array_equal(engine.map_blocks(fn, x, block_bytes=40_000), x + 1)


def blocks_to_shared(engine, path):
    def fn(b):
        write(path, "run", int(b[0]) // 5000)
        return b + 1

    x, out = engine.asarray(np.arange(5000.0 * TASKS)), engine.zeros(5000 * TASKS)
    engine.map_blocks(fn, x, out=out, block_bytes=40_000)
    assert np.array_equal(out, x + 1)


def futures(engine, path):
    def fn(i):
        write(path, "run", i)
        return [i]

    assert [f.result(60) for f in [engine.submit(fn, i) for i in range(TASKS)]] == [[i] for i in range(TASKS)]


WORK = (small, by_reference, born_shared, large_and_inline, blocks, blocks_to_shared, futures)


# --- tests -------------------------------------------------------------------------------------------


@pytest.fixture
def engine():
    with Engine(2, memory="32 MiB") as engine:
        assert list(engine.map(abs, range(100))) == list(range(100))
        yield engine


def deaths(engine):
    return engine.stats().worker_deaths


def assert_whole(engine):
    assert list(engine.map(abs, range(100))) == list(range(100))
    core = engine._backend._core
    poll_until(lambda: engine.stats().tasks_in_flight == 0, what="nothing is on its way any more")
    assert core.region.counters().held == 0
    poll_until(lambda: can_have_half(engine), what="memory is whole again")
    poll_until(lambda: core.region.counters().used < MIB, what="main holds nothing more")
    assert engine.stats().rescued_wakeups == 0


def read(path):
    """(pid, what, number) of each line."""
    with open(path) as file:
        return [(int(pid), what, int(i)) for pid, what, i in (line.split() for line in file)]


def accesses_of_a_task(engine, work, path):
    """Return after how many accesses the worker of an arming task has released the next one."""
    while True:
        engine.submit(arm_after_this_task, path, 0).result(60)
        work(engine, path)
        for _, what, number in read(path):
            if what == "released":
                return number


def check_log(path, victim):
    """No task runs twice but one that the victim had begun and whose result it had not published."""
    runs = collections.Counter()
    open_tasks = set()
    for pid, what, i in read(path):
        if what == "run":
            runs[i] += 1
            if pid == victim:
                open_tasks.add(i)
        elif what == "published" and pid == victim:
            open_tasks.clear()
    assert set(runs) == set(range(TASKS))
    again = {i for i, times in runs.items() if times > 1}
    assert again <= open_tasks, f"tasks {again} ran twice; only {open_tasks} were not published"
    assert max(runs.values()) <= 2


@pytest.mark.parametrize("work", WORK)
def test_death_in_a_task_s_life(engine, work, tmp_path):
    total = accesses_of_a_task(engine, work, str(tmp_path / "total"))
    chosen = points(total, 4)
    print(total, "points:", chosen)
    assert total > 8
    for nth in chosen:
        before, there = deaths(engine), set(engine._backend.pids)
        engine.submit(arm_after_this_task, str(tmp_path / "log"), nth).result(60)
        path = str(tmp_path / "log")
        died = False
        while not died:  # it may be dead already, before it took anything of the work
            if os.path.exists(path):
                os.unlink(path)
            work(engine, path)
            died = deaths(engine) > before
        assert deaths(engine) == before + 1
        (victim,) = there - set(engine._backend.pids)
        check_log(path, victim)
        assert engine.stats().tasks_failed == 0
    assert_whole(engine)


def test_death_while_starting(engine, monkeypatch):
    normal = process.BOOTSTRAP
    arming = "from shmengine._native import lib; lib.shmr_fault_arm({nth}, 0); main("

    def replace_one(nth):
        """Kill a worker; its successor is to die at its nth access."""
        before, there = deaths(engine), set(engine._backend.pids)
        monkeypatch.setattr(
            process, "BOOTSTRAP", normal.replace("main(", arming.replace("{nth}", str(nth)), 1)
        )
        os.kill(min(there), signal.SIGKILL)
        poll_until(lambda: deaths(engine) > before and len(engine._backend.pids) == 2, what="it is replaced")
        monkeypatch.setattr(process, "BOOTSTRAP", normal)

    assert "main(" in normal.replace("import main", "")
    for nth in points(30, 4):  # joins, takes memory, looks for a task
        before = deaths(engine)
        replace_one(nth)
        while deaths(engine) < before + 2:
            assert list(engine.map(abs, range(200))) == list(range(200))
        assert engine.stats().tasks_failed == 0
    assert_whole(engine)


def test_death_while_ending():
    start, step = (1, 1) if SOAK else (1 + SEED % 2, 2)
    nth, died = start - step, 1
    while died:
        nth += step
        with Engine(1, memory="32 MiB") as engine:
            engine.submit(arm_at_the_end, nth).result(60)
            array = engine.submit(np.ones, 100_000).result(60)
        assert (array == 1).all()
        died = engine._backend._core.pool.deaths
    assert nth > start
