"""What the engine does, against the same work without it: arrays in blocks, small tasks, and the start.

    x in ordinary memory ── blocks ──► 2 workers: sqrt(b) * 2 + 1 ──► result      beside one process with NumPy
    map, submit ── tasks that do nothing ──► 2 warm workers ──► results           beside the standard library's pools
    Engine(2) ... first result                                                    beside two bare imports of NumPy

Contestants check their own answers, and take turns. All memory is warm: each runs once before the rounds. The
serial rival is a loop over blocks that fit into the cache, with ``out=`` everywhere, in the best of some block sizes
and of two ways to write it; plain NumPy is slower.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from shmengine.bench.compare import Comparison, Contestant
from shmengine.bench.plan import KIB, MIB, show_size
from shmengine.bench.results import Work, spread
from shmengine.engine import Engine
from shmengine.futures import Executor

__all__ = ["FULL_WORK", "QUICK_WORK", "WorkPlan", "fitting", "measure_work"]

Array = NDArray[np.float64]
Loop = Callable[[Array, Array], None]

WORKERS: Final = 2
BLOCK_SIZES: Final = (64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, 1 * MIB)
OUTSTANDING: Final = 100
PATIENCE: Final = 120.0
MEMORY: Final = 8  # arrays: the input, what it should be, two results, and temporaries
SERIAL: Final = "serial blocks"


@dataclass(frozen=True)
class WorkPlan:
    """One run.

    Attributes
    ----------
    nbytes : int
        Of the array that is worked on; `MEMORY` times as much memory is needed.
    repeats : int
        Rounds of each; all contestants of a comparison take turns within a repeat.
    tasks : int
        In a round of the quickest contestant; others have fewer.
    """

    nbytes: int
    repeats: int
    tasks: int


def fitting(plan: WorkPlan, available: int) -> WorkPlan:
    """Return the plan with an array that fits into so many bytes of memory, in halves of what it says."""
    nbytes = plan.nbytes
    while nbytes > MIB and MEMORY * nbytes > available:
        nbytes //= 2
    return replace(plan, nbytes=nbytes)


FULL_WORK: Final = WorkPlan(nbytes=1 << 30, repeats=9, tasks=20_000)
QUICK_WORK: Final = WorkPlan(nbytes=1 << 28, repeats=3, tasks=4_000)


# --- arrays in blocks -----------------------------------------------------------------------------


def curve(block: Array) -> Array:
    """What the workers run: plain NumPy, as anybody would write it."""
    result: Array = np.sqrt(block) * 2 + 1
    return result


def sum_of_sines(block: Array) -> Any:
    """As `curve`, and needs more time for each byte."""
    return np.sin(block).sum()


def through_buffer(elements: int) -> Loop:
    """The steps in a block buffer, the last one into the result."""
    buffer = np.zeros(elements)

    def loop(x: Array, result: Array) -> None:
        for start in range(0, len(x), elements):
            block = x[start : start + elements]
            work = buffer[: len(block)]
            np.sqrt(block, out=work)
            np.multiply(work, 2, out=work)
            np.add(work, 1, out=result[start : start + elements])

    return loop


def in_result(elements: int) -> Loop:
    """All steps in the block of the result, which stays in the cache between them."""

    def loop(x: Array, result: Array) -> None:
        for start in range(0, len(x), elements):
            work = result[start : start + elements]
            np.sqrt(x[start : start + elements], out=work)
            np.multiply(work, 2, out=work)
            np.add(work, 1, out=work)

    return loop


def blocked_sum_of_sines(x: Array, elements: int) -> float:
    """The serial rival of the reduction."""
    buffer, partials = np.zeros(elements), []
    for start in range(0, len(x), elements):
        block = x[start : start + elements]
        work = buffer[: len(block)]
        np.sin(block, out=work)
        partials.append(work.sum())
    return math.fsum(partials)


def seconds_of(call: Callable[[], Any], repeats: int = 3) -> float:
    """Seconds of the fastest of some runs."""
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def best_loop(x: Array, result: Array) -> tuple[str, Loop]:
    """Return the fastest way to write the rival of `map_blocks` on this machine, and its name."""
    loops = {
        f"{name}, {size // KIB} KiB": make(size // 8)
        for name, make in (("block buffer", through_buffer), ("in the result", in_result))
        for size in BLOCK_SIZES
    }
    seconds = {name: seconds_of(lambda loop=loop: loop(x, result)) for name, loop in loops.items()}  # type: ignore[misc]
    name = min(seconds, key=seconds.__getitem__)
    return name, loops[name]


def best_sum(x: Array) -> int:
    """Return the elements of a block with which the rival of `reduce` is fastest."""
    return min(
        (size // 8 for size in BLOCK_SIZES),
        key=lambda elements: seconds_of(lambda: blocked_sum_of_sines(x, elements), 2),
    )


def same(found: Array, expected: Array) -> bool:
    """Bit for bit, 16 MiB at a time."""
    step = 2 * MIB
    return found.shape == expected.shape and all(
        np.array_equal(found[start : start + step], expected[start : start + step])
        for start in range(0, len(expected), step)
    )


def _arrays(plan: WorkPlan) -> Iterator[Work]:
    size = show_size(plan.nbytes)
    x = np.random.default_rng(8).random(plan.nbytes // 8)
    right = np.sqrt(x) * 2 + 1
    out, out_serial = np.zeros_like(x), np.zeros_like(x)
    blocked = best_loop(x[: len(x) // 4], out[: len(x) // 4])[1]
    ends = slice(None, None, len(x) - 1)

    def check(found: Array) -> None:
        if not np.array_equal(found[ends], right[ends]):
            raise ValueError("map_blocks: a wrong answer")

    def serial() -> None:
        result = np.empty_like(x)
        blocked(x, result)
        check(result)

    with Engine(WORKERS) as engine:
        if not same(engine.map_blocks(curve, x), right):
            raise ValueError("map_blocks: a wrong answer")
        result = compare(
            {
                "ours": lambda: check(engine.map_blocks(curve, x)),
                SERIAL: serial,
                "plain NumPy": lambda: check(np.sqrt(x) * 2 + 1),
            },
            plan.repeats,
        )
        yield from rows(f"map_blocks, {size}, fresh", result)
        result = compare(
            {
                "ours": lambda: check(engine.map_blocks(curve, x, out=out)),
                SERIAL: lambda: blocked(x, out_serial),
            },
            plan.repeats,
        )
        if not same(out, right) or not same(out_serial, right):
            raise ValueError("map_blocks with out=: a wrong answer")
        yield from rows(f"map_blocks, {size}, out=", result)
        elements = best_sum(x[: len(x) // 8])
        total = blocked_sum_of_sines(x, elements)

        def is_total(value: Any) -> None:
            if not math.isclose(value, total, rel_tol=1e-12):
                raise ValueError(f"reduce: {value} for {total}")

        result = compare(
            {
                "ours": lambda: is_total(engine.reduce(sum_of_sines, x, combine=np.add)),
                SERIAL: lambda: is_total(blocked_sum_of_sines(x, elements)),
                "plain NumPy": lambda: is_total(np.sin(x).sum()),
            },
            plan.repeats,
        )
        yield from rows(f"reduce, {size}", result)


# --- tasks ----------------------------------------------------------------------------------------


def nothing(number: int) -> int:
    """A task that does nothing."""
    return number


def check_map(results: Any, count: int) -> int:
    """All answers, in order; return how many."""
    if list(results) != list(range(count)):
        raise ValueError("a map lost, doubled or changed results")
    return count


def one_by_one(submit: Callable[..., Any], count: int) -> int:
    """Submit a task when the one before has ended; return how many."""
    return check_map((submit(nothing, number).result(PATIENCE) for number in range(count)), count)


def keep_outstanding(executor: futures.Executor, count: int) -> int:
    """Submit `count` tasks, at most `OUTSTANDING` of them at a time, and check each result."""
    waiting: deque[futures.Future[int]] = deque()
    results = []
    for number in range(count):
        if len(waiting) == OUTSTANDING:
            results.append(waiting.popleft().result(PATIENCE))
        waiting.append(executor.submit(nothing, number))
    results += [future.result(PATIENCE) for future in waiting]
    return check_map(results, count)


def _tasks(plan: WorkPlan) -> Iterator[Work]:
    spawn = multiprocessing.get_context("spawn")
    many, few = plan.tasks, plan.tasks // 10
    with (
        Engine(WORKERS) as engine,
        Executor(WORKERS) as ours,
        spawn.Pool(WORKERS) as pool,
        ProcessPoolExecutor(WORKERS, mp_context=spawn) as standard,
    ):
        result = compare(
            {
                "ours": lambda: check_map(engine.map(nothing, range(many)), many),
                "ProcessPoolExecutor.map": lambda: check_map(standard.map(nothing, range(few)), few),
                "Pool.imap": lambda: check_map(pool.imap(nothing, range(many)), many),
            },
            plan.repeats,
        )
        yield from rows("map, no-op tasks", result)
        result = compare(
            {
                "ours": lambda: keep_outstanding(ours, many // 2),
                "ProcessPoolExecutor.submit": lambda: keep_outstanding(standard, few),
            },
            plan.repeats,
        )
        yield from rows(f"Executor, {OUTSTANDING} outstanding", result)
        result = compare(
            {
                "ours": lambda: one_by_one(engine.submit, few),
                "ProcessPoolExecutor.submit": lambda: one_by_one(standard.submit, few),
            },
            plan.repeats,
        )
        yield from rows("submit, one at a time", result)
    pool.join()


# --- the start ------------------------------------------------------------------------------------

STARTER: Final = """
import sys
import shmengine as shm

shm.Engine
print("ready", flush=True)
while sys.stdin.readline():
    engine = shm.Engine(2)
    assert engine.submit(abs, -3).result(60) == 3
    print("done", flush=True)
    sys.stdin.readline()
    engine.close()
    print("closed", flush=True)
"""


class Starter:
    """A process that starts an engine on command, again and again; a context manager.

    Bytecode is cached, as it is for users, whatever this shell says.
    """

    def __init__(self) -> None:
        self._bytecode = tempfile.TemporaryDirectory()
        self._environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
            "PYTHONPYCACHEPREFIX": self._bytecode.name,
        }
        # In a session of its own: Ctrl-C is ours, and the end of its input is its end.
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = self.python(STARTER, start_new_session=True, **pipes)
        self._running = False
        self._read("ready")

    def python(self, source: str, **options: Any) -> subprocess.Popen[str]:
        """Start ``python -c source``."""
        return subprocess.Popen([sys.executable, "-c", source], env=self._environment, text=True, **options)

    def engine(self) -> None:
        """Start an engine of two workers, until it has answered; it is closed by `bare`, or at the end."""
        self._tell("done")
        self._running = True

    def bare(self) -> None:
        """Start two interpreters that import NumPy, at once, until they have ended."""
        self.stop()
        processes = [self.python("import numpy") for _ in range(WORKERS)]
        if any(process.wait() for process in processes):  # with a limit it looks every 50 ms
            raise OSError("python -c 'import numpy' failed")

    def stop(self) -> None:
        """Close the engine, if one runs."""
        if self._running:
            self._tell("closed")
            self._running = False

    def _tell(self, answer: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go on\n")
        self._process.stdin.flush()
        self._read(answer)

    def _read(self, expected: str) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.readline() != f"{expected}\n":
            raise OSError("an engine did not start in a process of its own")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with self._process:  # the end of its input ends it, and its engine
                pass
        finally:
            self._bytecode.cleanup()


def _start(plan: WorkPlan) -> Iterator[Work]:
    with Starter() as starter:
        contestants = {"ours": starter.engine, "two bare imports of NumPy": starter.bare}
        result = compare(contestants, plan.repeats)
    yield from rows("Engine(2), first result", result)


# --- all of it ------------------------------------------------------------------------------------


def compare(contestants: Mapping[str, Contestant], repeats: int) -> Comparison:
    """Let all of them run once, and then `repeats` times in turns."""
    comparison = Comparison("each")
    with quiet_collector():
        for _ in range(repeats + 1):
            for name, contestant in contestants.items():
                comparison.run(name, contestant)
            gc.collect()
    comparison.seconds = {name: seconds[1:] for name, seconds in comparison.seconds.items()}
    comparison.work = {name: work[1:] for name, work in comparison.work.items()}
    return comparison


@contextmanager
def quiet_collector() -> Iterator[None]:
    """Keep what is there from being walked again and again while something is measured."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def rows(what: str, comparison: Comparison) -> Iterator[Work]:
    """Yield a row for each rival of the first one."""
    ours, *rivals = comparison.seconds
    mine = comparison.costs(ours)
    for rival in rivals:
        theirs = comparison.costs(rival)
        ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
        yield Work(what, rival, statistics.median(mine), statistics.median(theirs), spread(ratios), len(mine))


def measure_work(plan: WorkPlan, progress: Callable[[int, int, str], None]) -> list[Work]:
    """Measure all of it.

    Raises
    ------
    ValueError
        An answer was wrong.
    OSError
        There is not enough memory, or a process did not start.
    """
    found: list[Work] = []
    parts = (("arrays in blocks", _arrays), ("tasks", _tasks), ("the start", _start))
    for number, (name, part) in enumerate(parts):
        progress(number, len(parts), name)
        found += part(plan)
    return found
