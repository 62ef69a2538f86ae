"""Who waits costs nothing, and is woken: the periodic second look never finds what a wake-up should have told."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time

import numpy as np
import pytest

from shmengine.engine import Engine
from shmengine.queues import Queue
from shmengine.ring import Ring
from tests.helpers import poll_until
from tests.helpers.leftovers import describe_process

ctx = multiprocessing.get_context("fork")
IDLE_SECONDS = 3.0


def cpu_seconds(pid):
    """What all threads of a process have computed, to the nanosecond (clock_getcpuclockid)."""
    return time.clock_gettime(~pid << 3 | 2)


@contextlib.contextmanager
def child(function, *args):
    """A process that calls the function; it ends by being killed."""
    process = ctx.Process(target=function, args=args)
    process.start()
    try:
        yield process.pid
    finally:
        process.kill()
        process.join()


def sleeps(pid):
    return "state S" in describe_process(pid)


def lease_one(ring):
    ring.lease()


def claim_twice(ring):
    """Wait for room in a full ring."""
    for _ in range(2):
        with ring.claim(1) as frame:
            frame[:] = 0


@pytest.mark.slow
def test_idle_waiters_use_less_than_a_hundredth_of_a_cpu():
    """Of each kind of waiting: for a message, a slot, an object, a task; and main, with nothing to do."""
    with (
        Ring(1, "4 MiB") as empty,
        Ring(1, "4 MiB") as full,
        contextlib.closing(Queue(memory="4 MiB")) as queue,
        Engine(2, memory="32 MiB") as engine,
        child(lease_one, empty) as lessee,
        child(claim_twice, full) as claimer,
        child(queue.get) as getter,
    ):
        assert list(engine.map(np.sum, [np.ones(1000)] * 100)) == [1000] * 100
        waiters = {"lessee": lessee, "claimer": claimer, "getter": getter, "main": os.getpid()}
        waiters |= {f"worker {i}": pid for i, pid in enumerate(engine._backend.pids)}
        for name, pid in waiters.items():
            if name != "main":
                poll_until(lambda pid=pid: sleeps(pid), what=f"the {name} sleeps")
        poll_until(lambda: full.approx_fill() == 1)
        before = {name: cpu_seconds(pid) for name, pid in waiters.items()}
        start = time.monotonic()
        time.sleep(IDLE_SECONDS)  # the time over which they are to be idle
        passed = time.monotonic() - start
        used = {name: (cpu_seconds(pid) - before[name]) / passed for name, pid in waiters.items()}
        print({name: f"{share:.3%}" for name, share in used.items()})
        assert max(used.values()) < 0.01, used


def put_some(queue, count):
    for i in range(count):
        queue.put(i)
    queue.close()


def get_some(queue, back, count):
    for _ in range(count):
        back.put(queue.get())
    for each in (queue, back):
        each.close()


def rescued(*queues):
    return sum(queue._region.counters().rescued_wakeups for queue in queues)


@pytest.mark.parametrize(("producers", "consumers", "maxsize"), [(1, 1, 1), (3, 3, 2), (1, 4, 100)])
def test_queues_never_miss_a_wakeup(producers, consumers, maxsize):
    """With one place each message depends on two wake-ups; with many each waiter may take another's."""
    count = 3000
    queue, back = Queue(maxsize, memory="16 MiB"), Queue(maxsize, memory="16 MiB")
    processes = [ctx.Process(target=put_some, args=(queue, count // producers)) for _ in range(producers)]
    processes += [
        ctx.Process(target=get_some, args=(queue, back, count // consumers)) for _ in range(consumers)
    ]
    for process in processes:
        process.start()
    found = sorted(back.get() for _ in range(count))
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert found == sorted(list(range(count // producers)) * producers)
    assert rescued(queue, back) == 0
    queue.close()
    back.close()


def test_an_engine_never_misses_a_wakeup():
    """One task at a time: each way ends at a sleeper; then as many as fit, of all kinds."""
    with Engine(2, memory="64 MiB") as engine:
        for i in range(300):
            assert engine.submit(abs, -i).result() == i
        for block_bytes in ("64 KiB", "auto"):
            x = np.arange(1_000_000.0)
            assert np.array_equal(engine.map_blocks(np.sqrt, x, block_bytes=block_bytes), np.sqrt(x))
        assert list(engine.map(abs, range(5000))) == list(range(5000))
        stats = engine.stats()
        assert (stats.rescued_wakeups, stats.worker_deaths) == (0, 0)
