"""Workers die while blocks are on their way as bare bytes: results are right or reported, nothing hangs or leaks."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time

import numpy as np
import pytest

from shmengine.engine import Engine
from shmengine.errors import TaskTimeout, WorkerDied
from tests.helpers import poll_until
from tests.helpers.memory import can_have_half

MIB = 1 << 20


class Killer:
    """Kills a worker at random moments, until the end of the block; something gets done between two kills."""

    def __init__(self, engine, pause):
        self.seed = random.SystemRandom().randrange(1 << 32)
        print("seed of the killer:", self.seed)
        self.random = random.Random(self.seed)
        self.engine, self.pause = engine, pause
        self.kills = self.calls = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self):
        while not self.stop.wait(self.random.uniform(0, self.pause)):
            calls = self.calls
            busy = [pid for pid, *_ in self.engine._backend._core.pool.busy()]
            for pid in self.random.sample(busy, min(1, len(busy))):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                self.kills += 1
            while self.calls == calls and not self.stop.wait(0.002):
                pass

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()


def assert_whole(engine):
    assert list(engine.map(abs, range(100))) == list(range(100))
    x = np.arange(3000.0)
    assert np.array_equal(engine.map_blocks(lambda b: b * 2, x, block_bytes=800), x * 2)
    poll_until(lambda: engine.stats().tasks_in_flight == 0, what="nothing is on its way any more")
    assert engine._backend._core.region.counters().held == 0
    poll_until(lambda: can_have_half(engine), what="memory is whole again")
    poll_until(lambda: engine._backend._core.region.counters().used < MIB, what="main holds nothing more")


OUTS = {
    "fresh": lambda engine, x: None,
    "ordinary": lambda engine, x: np.zeros(x.shape),
    "strided": lambda engine, x: np.zeros(2 * x.size)[::2],
    "shared": lambda engine, x: engine.zeros(x.shape),
    "Fortran": lambda engine, x: np.zeros(x.shape, order="F"),
}


# --- SIGKILL from outside -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "into"),
    [
        *(("ordinary", into) for into in OUTS),
        ("shared", "fresh"),
        ("shared", "ordinary"),
        ("shared", "shared"),
    ],
)
def test_random_kills(make_engine, source, into):
    engine = make_engine(retries=100, memory="32 MiB")
    x = (engine.zeros if source == "shared" else np.zeros)(400_000)
    x[:] = np.arange(400_000)
    out = OUTS[into](engine, x)
    with Killer(engine, 0.03) as killer:
        while killer.kills < 3:
            if out is not None:
                out[:] = -1
            killer.calls += 1
            result = engine.map_blocks(lambda b: b * 2 + 1, x, out=out, block_bytes=100_000)
            assert np.array_equal(result, x * 2 + 1)
            assert (
                engine.reduce(lambda b: int(b.sum()), x, combine=int.__add__, block_bytes=50_000) == x.sum()
            )
            del result
    del x, out
    assert engine.stats().retries <= killer.kills
    assert_whole(engine)


@pytest.mark.parametrize("shared", [False, True])
def test_random_kills_over_the_input(make_engine, shared):
    """A block may have been written already: it is not begun again. The call is right, or says who died."""
    engine = make_engine(retries=100, memory="32 MiB")
    x = (engine.zeros if shared else np.zeros)(400_000)
    right = lost = 0
    with Killer(engine, 0.03) as killer:
        while killer.kills < 6 or not right:
            x[:] = np.arange(400_000)
            killer.calls += 1
            try:
                engine.map_blocks(lambda b: b * 2 + 1, x, out=x, block_bytes=100_000)
            except WorkerDied:
                lost += 1
                low, high = np.arange(400_000), np.arange(400_000) * 2 + 1
                poll_until(lambda: engine.stats().tasks_in_flight == 0, what="all blocks are back")
                assert ((x == low) | (x == high)).all()  # no block twice
            else:
                assert np.array_equal(x, np.arange(400_000.0) * 2 + 1)
                right += 1
    assert lost <= killer.kills
    del x
    assert_whole(engine)


def test_random_kills_with_ghost_cells_and_large_results(make_engine):
    engine = make_engine(retries=100, memory="32 MiB")
    x = np.random.default_rng(0).random((4000, 60))
    fn = lambda b: np.cumsum(b[::-1], 1)
    with Engine(backend="serial") as serial:
        expected = serial.map_overlap(fn, x, (2, 5), "periodic", block_bytes=60_000)
    with Killer(engine, 0.03) as killer:
        while killer.kills < 6:
            killer.calls += 1
            assert np.array_equal(engine.map_overlap(fn, x, (2, 5), "periodic", block_bytes=60_000), expected)
            parts = engine.reduce(
                lambda b: [b.copy()], x, combine=lambda p, q: p + q, block_bytes=60_000, initial=[]
            )
            assert np.array_equal(np.concatenate(parts), x)
            del parts
    assert_whole(engine)


# --- a worker that kills itself -----------------------------------------------------------------------------


def once(path):
    """Tell whether this is the first time."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def when_the_worker_is(place):
    """Kill the process that calls this as soon as it comes to a line in a function of the worker's of this name."""

    def look(frame, event, argument):
        if frame.f_code.co_name == place:
            die()

    sys.setprofile(look)


@pytest.mark.parametrize(
    ("into", "chosen"),
    [(into, {1, 9}) for into in ("fresh", "strided", "Fortran")]
    + [("fresh", {0}), ("ordinary", {*range(10)}), ("shared", {0, 5})],
    ids=str,
)
def test_each_chosen_block_kills_once(make_engine, into, chosen, tmp_path):
    engine = make_engine(retries=2, memory="32 MiB")
    path = str(tmp_path)

    def fn(b):
        k = int(b[0]) // 20_000
        result = b * 3
        if k in chosen and once(f"{path}/{k}"):
            die()
        return result

    x = np.arange(200_000.0)
    out = OUTS[into](engine, x)
    result = engine.map_blocks(fn, x, out=out, block_bytes=160_000)
    assert np.array_equal(result, x * 3)
    del result, out
    assert len(os.listdir(path)) == len(chosen)
    stats = engine.stats()
    assert (stats.worker_deaths, stats.retries, stats.tasks_failed) == (len(chosen), len(chosen), 0)
    assert_whole(engine)


@pytest.mark.parametrize("place", ["copy_array", "answer_placed", "write_bare", "settle"])
@pytest.mark.parametrize("into", ["ordinary", "shared"])
def test_death_on_the_way_of_a_result(make_engine, into, place, tmp_path):
    """Before it is written, half way, before and after it has been said where it is."""
    engine = make_engine(retries=3, memory="32 MiB")
    path = str(tmp_path)

    def fn(b):
        k = int(b[0]) // 20_000
        if k in (3, 7) and once(f"{path}/{k}"):
            when_the_worker_is(place)
        return b * 3

    x = np.arange(200_000.0)
    out = OUTS[into](engine, x)
    for _ in range(3):
        out[:] = 0
        assert np.array_equal(engine.map_blocks(fn, x, out=out, block_bytes=160_000), x * 3)
    del out
    assert engine.stats().tasks_failed == 0
    assert_whole(engine)


@pytest.mark.parametrize("place", ["pack_number", "write_number", "write_bare", "settle"])
def test_death_on_the_way_of_a_number(make_engine, place, tmp_path):
    engine = make_engine(retries=3, memory="32 MiB")
    path = str(tmp_path)

    def fn(b):
        if b[0] in (0, 800) and once(f"{path}/{b[0]}"):
            when_the_worker_is(place)
        return int(b.sum())

    x = np.arange(2000)
    partials = engine.reduce(fn, x, combine=lambda p, q: [*p, q], initial=[], block_bytes=800)
    assert partials == [int(x[i : i + 100].sum()) for i in range(0, 2000, 100)]
    assert engine.stats().tasks_failed == 0
    assert_whole(engine)


@pytest.mark.parametrize("into", ["fresh", "strided", "shared"])
def test_a_block_that_always_kills_is_named(make_engine, into):
    engine = make_engine(retries=1, memory="32 MiB")
    x = np.arange(200_000.0)
    fn = lambda b: die() if b[0] == 120_000 else b + 1
    out = OUTS[into](engine, x)
    with pytest.raises(WorkerDied, match=r"task 6 of map_blocks\(<lambda>\); tried 2 times"):
        engine.map_blocks(fn, x, out=out, block_bytes=160_000)
    with pytest.raises(WorkerDied, match=r"task 6 of reduce\(<lambda>\)"):
        engine.reduce(fn, x, combine=np.add, block_bytes=160_000)
    del out
    assert_whole(engine)


@pytest.mark.parametrize("shared", [False, True])
def test_over_the_input_nothing_is_begun_twice(make_engine, shared, tmp_path):
    engine = make_engine(retries=5)
    path = str(tmp_path)

    def fn(b):
        if b[0] == 40_000 and once(f"{path}/died"):
            die()
        return b * 2

    x = (engine.zeros if shared else np.zeros)(200_000)
    x[:] = np.arange(200_000)
    with pytest.raises(WorkerDied, match=r"task 2 of map_blocks\(fn\)"):
        engine.map_blocks(fn, x, out=x, block_bytes=160_000)
    assert np.array_equal(x[40_000:60_000], np.arange(40_000.0, 60_000))
    assert engine.stats().retries == 0
    del x
    assert_whole(engine)


# --- what ends a worker otherwise ---------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["place", "settle", "answer"])
def test_an_error_of_the_worker_s_own_is_a_death_like_any_other(make_engine, place, tmp_path):
    """It ends the process; what it had is run again. (Nobody waits for ever.)"""
    engine = make_engine(1, retries=2, memory="32 MiB")
    path = str(tmp_path)

    def fn(i):
        if i == 3 and once(f"{path}/died"):

            def look(frame, event, argument):
                if (
                    event == "call"
                    and frame.f_code.co_name == place
                    and "workers" in frame.f_code.co_filename
                ):
                    raise OSError(5, "of the worker itself")

            sys.setprofile(look)
        return i

    if place == "place":
        x = np.arange(10.0)
        call = lambda b: b + fn(int(b[0])) * 0
        try:
            assert np.array_equal(engine.map_blocks(call, x, block_bytes=8), x)
        except OSError:
            pass  # it may be taken for the function's own
    else:
        assert engine.submit(fn, 3).result(60) == 3
    assert_whole(engine)


# --- time limits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("into", "slow"), [("fresh", 0), ("ordinary", 6), ("strided", 0), ("shared", 6)])
def test_a_time_limit_kills_the_block_that_is_late(make_engine, into, slow):
    engine = make_engine(memory="32 MiB")
    x = np.arange(200_000.0)
    fn = lambda b: time.sleep(1000) if b[0] == slow * 20_000 else b + 1
    out = OUTS[into](engine, x)
    with pytest.raises(TaskTimeout, match=rf"task {slow} of map_blocks\(<lambda>\) did not end within 2 s"):
        engine.map_blocks(fn, x, out=out, block_bytes=160_000, timeout=2)
    assert np.array_equal(
        engine.map_blocks(lambda b: b + 1, x, out=out, block_bytes=160_000, timeout=60), x + 1
    )
    del out
    assert engine.stats().worker_deaths == 1
    assert engine.stats().retries == 0
    assert_whole(engine)
