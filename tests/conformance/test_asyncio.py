"""`await engine.asubmit(...)` and ``async for`` over `engine.amap`: same results, and cancellation reaches the task."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import weakref

import numpy as np
import pytest

from shmengine.errors import Closed, RemoteError, SerializationError, TaskTimeout
from tests.helpers import poll_until


def square(x):
    return x * x


def reciprocal(x):
    return 1 / x


async def collect(results):
    return [each async for each in results]


# --- results ------------------------------------------------------------------------------------


def test_results_and_errors(engine):
    async def main():
        assert await engine.asubmit(pow, 3, 4) == 81
        assert await engine.asubmit(dict, fn=1, self=2) == {"fn": 1, "self": 2}
        assert np.array_equal(await engine.asubmit(np.arange, 5), np.arange(5))
        with pytest.raises(ZeroDivisionError) as caught:
            await engine.asubmit(reciprocal, 0)
        assert caught.value.__notes__ == ["asubmit(reciprocal)"]
        assert await asyncio.gather(*(engine.asubmit(square, i) for i in range(50))) == [
            i * i for i in range(50)
        ]

    asyncio.run(main())


@pytest.mark.parametrize("window", [None, 1, 3, 1000])
def test_amap_is_in_order(engine, window):
    results = engine.amap(pow, range(30), range(30), window=window)
    assert asyncio.run(collect(results)) == [i**i for i in range(30)]


def test_amap_is_lazy_and_bounded(engine):
    taken = []

    def numbers():
        number = 0
        while True:
            taken.append(number)
            yield number
            number += 1

    async def main():
        results = engine.amap(square, numbers(), window=5)
        assert not taken
        assert await anext(results) == 0
        assert len(taken) == 5
        assert await anext(results) == 1
        assert len(taken) == 6
        await results.aclose()

    asyncio.run(main())


def test_errors_of_amap(engine):
    items = [1, 0, 2]
    with pytest.raises(ZeroDivisionError):
        asyncio.run(collect(engine.amap(reciprocal, items)))
    assert asyncio.run(collect(engine.amap(reciprocal, items, on_error="skip"))) == [1, 0.5]
    first, error, last = asyncio.run(collect(engine.amap(reciprocal, items, on_error="return")))
    assert (first, type(error), last) == (1, ZeroDivisionError, 0.5)


def fail_with(error):
    raise error


@pytest.mark.parametrize("error", [StopIteration(3), asyncio.CancelledError()])
def test_errors_that_mean_something_to_coroutines_are_wrapped(engine, error):
    async def main():
        with pytest.raises(RuntimeError) as caught:
            await engine.asubmit(fail_with, error)
        assert isinstance(caught.value.__cause__, (type(error), RemoteError))

    asyncio.run(main())


def test_a_time_limit(make_engine, gate):
    engine = make_engine()
    if engine.backend != "process":
        with pytest.raises(ValueError, match="amap has a timeout with worker processes only"):
            engine.amap(gate.wait, [1], timeout=0.2)
        return

    async def main():
        with pytest.raises(TaskTimeout):
            await collect(engine.amap(gate.wait, [1], timeout=0.2))

    asyncio.run(main())
    gate.open()


# --- bad input ----------------------------------------------------------------------------------


def test_bad_input(engine):
    async def main():
        with pytest.raises(TypeError, match="fn must be callable"):
            engine.asubmit(3)
        with pytest.raises(TypeError, match="amap needs at least one iterable"):
            engine.amap(square)
        with pytest.raises(ValueError, match="window must be an integer of at least 1"):
            engine.amap(square, [1], window=0)
        with pytest.raises(ValueError, match="on_error must be one of"):
            engine.amap(square, [1], on_error="ignore")
        if engine.backend == "process":
            with pytest.raises(SerializationError, match="lock"):
                engine.asubmit(id, threading.Lock())
            with pytest.raises(SerializationError, match="lock"):
                await collect(engine.amap(id, [1, threading.Lock()]))

    asyncio.run(main())
    with pytest.raises(RuntimeError, match="no running event loop"):
        engine.asubmit(square, 1)


def test_a_closed_engine(make_engine):
    engine = make_engine()
    engine.close()

    async def main():
        with pytest.raises(Closed):
            engine.asubmit(square, 1)
        with pytest.raises(Closed):
            engine.amap(square, [1])

    asyncio.run(main())


# --- cancellation -------------------------------------------------------------------------------


@pytest.fixture
def processes(make_engine, backend):
    if backend != "process":
        pytest.skip("nothing waits there")
    return make_engine(1)


def test_what_nobody_has_begun_never_runs(processes, gate, tmp_path):
    async def main():
        first = processes.asubmit(gate.wait, 1)
        others = [processes.asubmit((tmp_path / str(i)).touch) for i in range(30)]
        await until_busy(processes)
        for future in others[::-1]:
            assert future.cancel()
            assert future.cancelled()
        gate.open()
        assert await first == 1
        assert await processes.asubmit(square, 3) == 9

    asyncio.run(main())
    assert not list(tmp_path.glob("[0-9]*"))


async def until_busy(engine):
    """Wait until a worker runs a task whose result is not here."""
    await asyncio.to_thread(
        poll_until,
        lambda: any(stall.function.startswith(("asubmit", "amap")) for stall in engine.stalls(after=0)),
    )


def test_cancelling_the_coroutine_cancels_the_task(processes, gate):
    async def main():
        first = processes.asubmit(gate.wait)
        await until_busy(processes)
        second = asyncio.ensure_future(awaiting(processes, square, 3))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        gate.open()
        await first

    asyncio.run(main())
    assert processes.stats().tasks_done == 1


async def awaiting(engine, fn, *args):
    return await engine.asubmit(fn, *args)


def test_what_runs_goes_on_and_its_result_is_dropped(processes, gate, tmp_path):
    async def main():
        future = processes.asubmit(wait_and_touch, gate.wait, tmp_path / "done")
        await until_busy(processes)
        future.cancel()
        gate.open()
        assert await processes.asubmit(square, 3) == 9

    asyncio.run(main())
    assert (tmp_path / "done").exists()
    assert processes.stats().worker_deaths == 0


def wait_and_touch(wait, path):
    wait()
    path.touch()


def test_kill_on_cancel_ends_the_worker(processes, gate):
    async def main():
        pid = await processes.asubmit(os.getpid)
        future = processes.asubmit(gate.wait).kill_on_cancel()
        await until_busy(processes)
        future.cancel()
        assert await processes.asubmit(os.getpid) != pid

    asyncio.run(main())
    stats = processes.stats()
    assert (stats.worker_deaths, stats.retries) == (1, 0)


def test_leaving_amap_cancels_what_is_left(processes, gate, tmp_path):
    async def main():
        results = processes.amap(
            run, [int, gate.wait, *[(tmp_path / str(i)).touch for i in range(20)]], window=10
        )
        assert await anext(results) == 0
        await until_busy(processes)
        await results.aclose()
        gate.open()
        assert await processes.asubmit(square, 3) == 9

    asyncio.run(main())
    assert not list(tmp_path.glob("[0-9]*"))


def run(fn):
    return fn()


def test_amap_can_kill(processes, gate):
    async def main():
        with pytest.raises(asyncio.TimeoutError):
            async with asyncio.timeout(0.5):
                await collect(processes.amap(gate.wait, range(10), kill=True))
        assert await processes.asubmit(square, 3) == 9

    asyncio.run(main())
    assert processes.stats().worker_deaths <= 1


def test_others_that_were_sent_are_not_lost(processes, gate):
    async def main():
        futures = [processes.asubmit(gate.wait, i) for i in range(4)]
        await until_busy(processes)
        futures[2].cancel()
        gate.open()
        assert await asyncio.gather(futures[0], futures[1], futures[3]) == [0, 1, 3]

    asyncio.run(main())


# --- nothing left -------------------------------------------------------------------------------


class Thing:
    pass


def make_thing(_):
    return Thing()


def test_amap_keeps_no_result(engine):
    async def main():
        async for thing in engine.amap(make_thing, range(10)):
            reference = weakref.ref(thing)
            del thing
            # The loop keeps what has just woken a coroutine, and the thread that brought it has to let go of it.
            while reference() is not None:  # noqa: ASYNC110
                await asyncio.sleep(0)

    gc.collect()
    gc.disable()
    try:
        asyncio.run(main())
    finally:
        gc.enable()


def test_a_loop_that_is_gone_when_the_result_comes(processes, gate):
    async def main():
        processes.asubmit(gate.wait)
        await until_busy(processes)

    asyncio.run(main())
    gate.open()
    assert processes.submit(square, 3).result(60) == 9


def test_no_thread_for_each_call(processes, gate):
    async def main():
        before = threading.active_count()
        futures = [processes.asubmit(gate.wait, i) for i in range(50)]
        assert threading.active_count() <= before + 1  # the one that takes results
        gate.open()
        assert await asyncio.gather(*futures) == list(range(50))

    asyncio.run(main())
    poll_until(lambda: processes.stats().tasks_in_flight == 0)
