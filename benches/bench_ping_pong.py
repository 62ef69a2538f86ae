"""Round trips of 64 bytes between two processes, and what waiting costs.

    ping ── there ──► pong
         ◄── back ──

Needs 2 cores; each process is pinned to one, so that the kernel cannot put both on the same.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import shmengine as shm
from benches.measure import cpu_seconds, two_cpus
from benches.rivals import Pair, PipePingPong, RingPingPong

IDLE_SECONDS = 2.0


def test_ping_pong(compare: Any, targets: Any) -> None:
    """The default adaptive wait against a pipe."""
    with ExitStack() as stack:
        ours = stack.enter_context(Pair(RingPingPong(64), two_cpus()))
        pipe = stack.enter_context(Pair(PipePingPong(64), two_cpus()))
        result = compare(
            {"shmengine.Ring": lambda: ours.run(20_000), "multiprocessing.Pipe": lambda: pipe.run(2_000)},
            unit="a round trip",
        )
    targets.at_least("ping-pong, Ring to Pipe", result.ratio("shmengine.Ring", "multiprocessing.Pipe"), 10)


def _wait_for_one(ring: shm.Ring) -> None:
    with ring.lease(60):
        pass
    with ring.lease(60):  # idle from here on
        pass


def test_idle_waiter(benchmark: Any, spawn: Any, targets: Any) -> None:
    """A process that waits for a message; CPU time while nothing comes."""
    with shm.Ring(capacity=4, arena_bytes=1 << 20) as ring:
        waiter = spawn.Process(target=_wait_for_one, args=(ring,), daemon=True)
        waiter.start()
        with ring.claim(1, "u1", 60):
            pass
        while ring.approx_fill():
            time.sleep(0.001)
        time.sleep(0.1)  # it settles down: that is not what is measured
        before = cpu_seconds(waiter.pid)
        benchmark.pedantic(time.sleep, (IDLE_SECONDS,), rounds=1)
        used = cpu_seconds(waiter.pid) - before
        with ring.claim(1, "u1", 60):
            pass
        waiter.join(60)
        assert waiter.exitcode == 0
    targets.at_most("idle waiter on a ring, CPU", used / IDLE_SECONDS * 100, 1, " %")


def test_idle_engine(benchmark: Any, targets: Any) -> None:
    """An engine without work: the workers, and the service thread in the main process."""
    import psutil

    with shm.Engine(2) as engine:
        assert list(engine.map(abs, range(-1000, 0))) == list(range(1000, 0, -1))
        workers = [child.pid for child in psutil.Process().children() if _is_worker(child)]
        assert len(workers) == engine.workers
        time.sleep(0.1)
        main, before = time.process_time(), [cpu_seconds(pid) for pid in workers]
        benchmark.pedantic(time.sleep, (IDLE_SECONDS,), rounds=1)
        used = sum(cpu_seconds(pid) - start for pid, start in zip(workers, before, strict=True))
        main = time.process_time() - main
    targets.at_most("idle engine, CPU of two workers", used / IDLE_SECONDS * 100, 0.1, " %")
    targets.at_most("idle engine, CPU of the main process", main / IDLE_SECONDS * 100, 0.1, " %")


def _is_worker(process: Any) -> bool:
    return any("shmengine" in argument for argument in process.cmdline())
