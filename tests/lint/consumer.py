"""A user's program that takes every public name: `test_consumer.py` checks its types, and runs it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

import shmengine as shm


def double(block: NDArray[np.float64]) -> NDArray[np.float64]:
    return block * 2


def total(block: NDArray[np.float64]) -> float:
    return float(block.sum())


def square(number: int) -> int:
    return number * number


def arrays(engine: shm.Engine) -> None:
    x = np.arange(1000.0)
    y = engine.map_blocks(double, x, block_bytes="1 KiB")
    assert_type(y, NDArray[np.float64])
    engine.map_blocks(lambda block: block + 1, x, out=y, dtype="f8", axis=-1, writable="private")
    shared: np.ndarray = engine.empty(1000)
    engine.map_overlap(double, x, depth=1, boundary="nearest", out=shared)
    assert engine.reduce(total, x, combine=lambda a, b: a + b) == 499_500.0
    reference = engine.put(x)
    assert engine.submit(total, reference).result() == 499_500.0
    with engine.allocator():
        assert engine.asarray(np.zeros(8)).sum() + engine.full(8, 0.0).sum() + engine.zeros((2, 4)).sum() == 0


def tasks(engine: shm.Engine) -> None:
    future = engine.submit(square, 3)
    assert_type(future, Future[int])
    assert future.result(timeout=60) == 9
    results: Iterator[int] = engine.map(square, range(4), window=2, timeout=60)
    assert list(results) == [0, 1, 4, 9]
    assert sorted(engine.map_unordered(square, [2, 1], progress=lambda done, of: None)) == [1, 4]
    assert list(engine.starmap(pow, [(2, 3)], on_error="return")) == [8]
    stats: shm.EngineStats = engine.stats()
    assert stats.tasks_done
    assert stats.to_dict()["workers"] == engine.workers
    stalls: shm.Stalls = engine.stalls(after=60)
    assert [stall.seconds for stall in stalls if isinstance(stall, shm.Stall)] == []


async def coroutines(engine: shm.Engine) -> int:
    found = await engine.asubmit(square, 5)
    assert_type(found, int)
    async for number in engine.amap(square, [1, 2]):
        found += number
    return found


def alone() -> None:
    x = np.ones(8)
    assert_type(shm.map_blocks(double, x), NDArray[np.float64])
    assert list(shm.map(square, [1, 2])) == [1, 4]
    assert shm.reduce(np.sum, x, combine=np.add) == 8


def elsewhere(address: str) -> shm.Engine:
    shm.joblib.register()
    shm.joblib.shutdown()
    return shm.Engine(cluster=address)


def executor() -> None:
    with shm.Executor(max_workers=1) as pool:
        assert_type(pool.submit(square, 3), Future[int])
        assert_type(pool.map(square, [1]), Iterator[int])
        assert pool.submit(square, number=4).result() == 16


def messages() -> None:
    with shm.Ring(capacity=4, arena_bytes="4 MiB") as ring:
        with ring.claim((2, 2), "u1") as frame:
            frame[:] = 7
        with ring.lease(timeout=1.0) as frame:
            assert frame.sum() == 28
        stats: shm.RingStats = ring.stats()
        assert stats.to_dict()
        assert ring.try_lease() is None
    numbers: shm.Queue[int] = shm.Queue(memory="8 MiB")
    numbers.put(1)
    assert_type(numbers.get(), int)
    numbers.close()
    jobs: shm.JoinableQueue[str] = shm.JoinableQueue(memory="8 MiB")
    jobs.put("job", timeout=1)
    assert jobs.get().upper() == "JOB"
    jobs.task_done()
    jobs.join()
    jobs.close()


def channels() -> None:
    left: shm.End
    left, right = shm.channel("pipe")
    with left, right:
        left.send({"x": 1}, timeout=1.0)
        assert right.receive(timeout=1.0) == {"x": 1}
        stats: shm.ChannelStats = right.stats()
        assert stats.to_dict()


def serve(address: str, keys: shm.Keys) -> shm.Server:
    return shm.listen(address, auth=keys)


def ask(address: str) -> Any:
    keys = shm.generate_keys()
    with shm.connect(address, auth=keys, timeout=None) as end:
        return end.receive()


def refused(engine: shm.Engine) -> shm.BlockError:
    try:
        engine.map_blocks(total, np.ones(8))
    except shm.BlockError as error:
        return error
    raise AssertionError("a number is no block")


def explained(error: shm.ShmError) -> str:
    """What a program can learn of each error."""
    match error:
        case shm.WorkerDied():
            return f"{error.pid} {error.returncode} {error.task} {error.attempts} {error.cause}"
        case shm.TaskTimeout() | shm.Timeout():
            return f"{error.what} {error.seconds}"
        case shm.Corrupt():
            return error.field
        case shm.MemoryBudgetExceeded():
            return f"{error.asked} of {error.budget}, {error.used} used"
        case shm.SerializationError():
            return error.path
        case shm.RemoteError():
            return f"{error.type_name}: {error.__cause__}"
        case shm.StaleReference() | shm.LeaseError() | shm.UseAfterFork() | shm.Closed() | shm.Full():
            return "used too late, or too much of it"
        case shm.PeerLost() | shm.EndOfStream() | shm.WouldBlock():
            return "nothing to receive"
        case shm.ArrayError() | shm.BlockError() | shm.LayoutMismatch():
            return "does not fit"
    return str(error)


def main() -> None:
    with shm.Engine(backend="serial") as engine:
        arrays(engine)
        tasks(engine)
        assert asyncio.run(coroutines(engine)) == 30
        html: str = engine._repr_html_() + engine.stats()._repr_html_()
        assert "<" in html
        error = refused(engine)
        assert isinstance(error.__cause__, shm.RemoteTraceback)
        assert explained(error) == "does not fit"
    alone()
    executor()
    messages()
    channels()
    sys.stdout.write(f"shmengine {shm.__version__}\n")


if __name__ == "__main__":
    main()
