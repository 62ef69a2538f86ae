"""The main process dies at its nth access of shared memory in a call of its engine: its workers end, nothing stays.

Needs the test build, so `test_kill_points.py` runs this file. Main processes are forked from this one, which has
imported everything.
"""

from __future__ import annotations

import contextlib
import os
import signal

import numpy as np
import pytest

from shmengine._native import lib
from shmengine.engine import Engine
from tests.helpers.fault_points import SOAK, Victim, points
from tests.helpers.leftovers import children, shm_names
from tests.helpers.scripts import poll_until

pytestmark = pytest.mark.watchdog(3600 if SOAK else 120)


def make():
    """An engine that has worked."""
    engine = Engine(1, memory="32 MiB")
    assert list(engine.map(abs, range(20))) == list(range(20))
    return engine


# Each gets an engine and what its preparation returned.


def submit(engine, _):
    assert engine.submit(np.sum, np.ones(10_000)).result(60) == 10_000


def result_that_is_kept(engine, _):
    (array,) = engine.map(np.ones, [100_000])
    half = array[::2]
    del array
    assert half.sum() == 50_000


def map_blocks(engine, _):
    x = np.arange(100_000.0)
    assert np.array_equal(engine.map_blocks(np.negative, x, block_bytes=80_000), -x)


def map_blocks_to_shared(engine, arrays):
    x, out = arrays
    engine.map_blocks(np.negative, x, out=out, block_bytes=80_000)
    assert np.array_equal(out, -x)


def put(engine, _):
    there = engine.put({"a": np.ones(100_000)})
    assert engine.submit(lambda d: d["a"].size, there).result(60) == 100_000


def replace(engine, _):
    deaths = engine.stats().worker_deaths
    os.kill(engine._backend.pids[0], signal.SIGKILL)
    assert engine.submit(abs, -1).result(60) == 1
    assert engine.stats().worker_deaths > deaths


def close(engine, _):
    engine.close()


def start(*_):
    make()


PREPARE = {map_blocks_to_shared: lambda engine: (engine.full(100_000, 2.0), engine.zeros(100_000))}
CALLS = (submit, result_that_is_kept, map_blocks, map_blocks_to_shared, put, replace, close, start)


def run(call, nth, say):
    """Make an engine, then die at the nth access within the call."""
    engine = None if call is start else make()
    prepared = PREPARE[call](engine) if call in PREPARE else None
    lib.shmr_fault_arm(nth, 0)
    call(engine, prepared)
    count = lib.shmr_fault_count()
    lib.shmr_fault_arm(0, 0)
    for byte in count.to_bytes(4, "big"):
        say(byte)
    return engine


def die(call, nth):
    """Let a main process die; return what it counted if it survived. Then all that it had must go."""
    names, before = shm_names(), children()
    victim = Victim(lambda say: run(call, nth, say))
    heard = bytes(victim.hear() for _ in range(4)) if nth == 0 else b""
    killed, _ = victim.end()
    left = set()

    def all_gone():
        left.update(children() - before)  # its workers are ours now
        for pid in list(left):
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0] == pid:
                    left.discard(pid)
        return not children() - before

    poll_until(all_gone, what="its workers have ended")
    poll_until(lambda: shm_names() <= names, what="its names are gone")
    return killed, int.from_bytes(heard, "big")


@pytest.mark.parametrize("call", CALLS)
def test_death_of_main_in(call):
    killed, total = die(call, 0)
    assert not killed
    chosen = points(total, 4)
    print(total, "accesses; points:", chosen)
    assert total > 3
    for nth in chosen:
        die(call, nth)  # at the last ones it may survive: a wait may be shorter
