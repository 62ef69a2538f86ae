"""An engine under load whose workers are killed, stopped and continued; and main processes killed from outside."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Self

import numpy as np

from shmengine._native import ffi, lib
from shmengine._native.status import PLACES
from shmengine.engine import Engine
from shmengine.region import Region
from tests.helpers.leftovers import adopt_orphans, descendants, describe_process
from tests.soak.leaks import arena_bytes_lost, counted_leaks
from tests.soak.participants import HANG_SECONDS
from tests.soak.report import Report

WORKERS = 2
STOP_SECONDS = (
    0.15  # less than a slice of a wait: who sleeps through it has been notified late, not been forgotten
)

# --- load: each returns how many outcomes were right ----------------------------------------------


def add_up(array: np.ndarray, i: int) -> float:
    return float(array.sum()) + i


def spread(i: int) -> np.ndarray:
    """Return something born shared, of a size that tells."""
    return np.full((1 + i % 3) * 50_000, i % 251, "u1")


def transform(block: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.sqrt(block) * 2 + 1
    return result


def mapped(engine: Engine, rng: random.Random) -> int:
    count = rng.randint(1, 2000)
    arrays = [np.arange(i % 700, dtype="f8") for i in range(count)]
    results = engine.map(add_up, arrays, range(count), window=rng.choice([None, 1, 7, 300]))
    return _count(
        result == array.sum() + i for i, (result, array) in enumerate(zip(results, arrays, strict=True))
    )


def submitted(engine: Engine, rng: random.Random) -> int:
    futures = [engine.submit(add_up, np.ones(i), i) for i in range(rng.randint(1, 200))]
    return _count(future.result() == 2 * i for i, future in enumerate(futures))


def results_born_shared(engine: Engine, rng: random.Random) -> int:
    results = list(engine.map(spread, range(100)))
    kept = [(i, results[i]) for i in rng.sample(range(100), 10)]
    right = _count((result == i % 251).all() for i, result in enumerate(results))
    del results
    engine.submit(abs, -1).result()
    return right + _count(
        (result == i % 251).all() for i, result in kept
    )  # outlive the process that made them


def ordinary_blocks(engine: Engine, rng: random.Random) -> int:
    x = np.random.default_rng(rng.getrandbits(32)).random((rng.randint(1, 1000), 300))
    return _count([np.array_equal(engine.map_blocks(transform, x, block_bytes="64 KiB"), transform(x))])


def shared_blocks(engine: Engine, rng: random.Random) -> int:
    x = engine.asarray(np.random.default_rng(rng.getrandbits(32)).random((rng.randint(1, 1000), 300)))
    out = engine.zeros(x.shape)
    engine.map_blocks(transform, x, out=out, block_bytes="64 KiB")
    return _count([np.array_equal(out, transform(x))])


def reduced(engine: Engine, rng: random.Random) -> int:
    x = np.ones(rng.randint(1, 300_000))
    return _count([engine.reduce(np.sum, x, combine=lambda a, b: a + b, block_bytes="64 KiB") == len(x)])


def referenced(engine: Engine, rng: random.Random) -> int:
    array = np.arange(rng.randint(1, 100_000), dtype="f8")
    ref = engine.put(array)
    expected = array.sum()
    return _count(
        result == expected + i for i, result in enumerate(engine.map(add_up, [ref] * 50, range(50)))
    )


def _count(rights: Iterator[bool] | list[bool]) -> int:
    found = list(rights)
    if not all(found):
        raise AssertionError(f"{found.count(False)} of {len(found)} results are wrong")
    return len(found)


LOADS: tuple[Callable[[Engine, random.Random], int], ...] = (
    mapped,
    submitted,
    results_born_shared,
    ordinary_blocks,
    shared_blocks,
    reduced,
    referenced,
)

# --- workers that die -----------------------------------------------------------------------------


class Tormentor:
    """Kills workers (one, or all at once), and stops and continues them, at random moments, most of them at work.

    Between two deaths there is always an outcome: workers that are only ever killed get nothing done.
    """

    def __init__(self, engine: Engine, rng: random.Random) -> None:
        self.engine = engine
        self.rng = rng
        self.kills = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        pool = self.engine._backend._core.pool  # type: ignore[attr-defined]
        while not self.ended.wait(self.rng.uniform(0, 0.1)):
            done = self.engine.stats().tasks_done
            pids = [pid for pid, *_ in pool.busy()] if self.rng.random() < 0.7 else pool.pids
            victims = self.rng.sample(pids, min(len(pids), self.rng.choice([1, 1, 1, 2])))
            if self.rng.random() < 0.25:
                self.signal(victims, signal.SIGSTOP)
                self.ended.wait(self.rng.uniform(0, STOP_SECONDS))
                self.signal(victims, signal.SIGCONT)
                continue
            self.kills += self.signal(victims, signal.SIGKILL)
            while self.engine.stats().tasks_done == done and not self.ended.wait(0.002):
                pass

    def signal(self, pids: list[int], number: signal.Signals) -> int:
        sent = 0
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                sent += 1
        return sent

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


def torment_workers(seconds: float, rng: random.Random, report: Report) -> None:
    """All kinds of load on one engine, for so long."""
    end = time.monotonic() + seconds
    with Engine(WORKERS, memory="64 MiB", retries=1000) as engine:
        with Tormentor(engine, rng) as tormentor:
            while time.monotonic() < end and report.passed:
                work(engine, rng, report)
        report.kills += tormentor.kills
        list(engine.map(abs, range(200)))  # all workers are there again
        gc.collect()
        stats = engine.stats()
        report.rescued_wakeups += stats.rescued_wakeups
        if stats.tasks_in_flight or stats.tasks_failed or not stats.worker_deaths <= tormentor.kills:
            report.failures.append(f"tasks failed, or never ended: {stats}")
        heir = Region.attach(os.dup(engine._backend._core.region.fd))  # type: ignore[attr-defined]
    for place in range(PLACES):  # workers may hold memory in reserve until they end
        lib.shmr_recover(heir.handle, place, ffi.NULL, 0, ffi.NULL)
    report.bytes_leaked += arena_bytes_lost(heir)
    heir.close()


def work(engine: Engine, rng: random.Random, report: Report) -> None:
    """Do some load, and count it."""
    load = rng.choice(LOADS)
    try:
        report.messages += load(engine, rng)
    except Exception:
        report.wrong += 1
        report.failures.append(f"{load.__name__}: {traceback.format_exc()}")


# --- main processes that die ----------------------------------------------------------------------


def kill_a_main(rng: random.Random, report: Report) -> None:
    """Fork a main process, let it start an engine and work, kill it: its workers must end too."""
    before = descendants()
    counts = mmap.mmap(-1, 16)  # outcomes, errors
    seed = rng.getrandbits(32)
    pid = os.fork()
    if pid == 0:
        try:
            be_main(seed, memoryview(counts).cast("Q"))
        finally:
            os._exit(1)
    time.sleep(rng.uniform(0, 1.5))  # the random moment is what is tested
    os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    words = memoryview(counts).cast("Q")
    report.messages += words[0]
    if code == -signal.SIGKILL:
        report.kills += 1
    if code != -signal.SIGKILL or words[1]:
        report.wrong += 1
        report.failures.append(f"a main process ended with code {code} and {words[1]} errors")
    end = time.monotonic() + HANG_SECONDS
    while left := descendants() - before:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if time.monotonic() > end:
            report.hung += 1
            report.failures.append(
                f"they outlive their main process: {[describe_process(each) for each in left]}"
            )
            for each in left:
                os.kill(each, signal.SIGKILL)
            return
        time.sleep(0.002)


def be_main(seed: int, counts: memoryview) -> None:
    """Work until killed."""
    rng, report = random.Random(seed), Report()
    while True:
        with Engine(WORKERS, memory="32 MiB") as engine:
            for _ in range(rng.randint(1, 30)):
                work(engine, rng, report)
                counts[0], counts[1] = report.messages, len(report.failures)
                if report.failures:
                    print(report, flush=True)


def run(seconds: float, seed: int) -> Report:
    """Workers die for three quarters of the time, main processes for one."""
    report, rng = Report(), random.Random(seed)
    adopt_orphans()
    end = time.monotonic() + seconds
    with counted_leaks(report):
        while (left := end - time.monotonic()) > 0 and report.passed:
            torment_workers(min(30, left * 0.75), rng, report)
            mains_until = time.monotonic() + min(10, left * 0.25)
            while time.monotonic() < mains_until and report.passed:
                kill_a_main(rng, report)
    return report
