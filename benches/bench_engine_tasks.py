"""Tasks that do nothing: what one task costs.

    map(fn, range(n)) ──► [ tasks ] ──► 2 warm workers ──► [ results ] ──► in order

Needs 2 cores. No chunking by the caller, on either side; at most a window of tasks is in flight, so the rings
wrap many times.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from typing import Any

import shmengine as shm


def nothing(number: int) -> int:
    return number


def check(results: Any, count: int) -> int:
    """All answers, in order."""
    assert list(results) == list(range(count))
    return count


def test_tasks(compare: Any, targets: Any, spawn: Any) -> None:
    """`map` against the standard library's two pools."""
    with shm.Engine(2) as engine, spawn.Pool(2) as pool, ProcessPoolExecutor(2, mp_context=spawn) as executor:
        result = compare(
            {
                "engine.map": lambda: check(engine.map(nothing, range(20_000)), 20_000),
                "ProcessPoolExecutor.map": lambda: check(
                    executor.map(nothing, range(3_000), chunksize=1), 3_000
                ),
                "Pool.imap": lambda: check(pool.imap(nothing, range(20_000)), 20_000),
            },
            unit="a task",
        )
    targets.at_least(
        "tasks, map to ProcessPoolExecutor.map", result.ratio("engine.map", "ProcessPoolExecutor.map"), 10
    )
    targets.at_least("tasks, map to Pool.imap", result.ratio("engine.map", "Pool.imap"), 1.5)


def test_one_task(compare: Any, targets: Any, spawn: Any) -> None:
    """One task at a time: `submit` and wait for its result."""
    with shm.Engine(2) as engine, ProcessPoolExecutor(2, mp_context=spawn) as executor:

        def one_by_one(submit: Any, count: int) -> int:
            for number in range(count):
                assert submit(nothing, number).result(60) == number
            return count

        result = compare(
            {
                "engine.submit": lambda: one_by_one(engine.submit, 1_000),
                "ProcessPoolExecutor.submit": lambda: one_by_one(executor.submit, 500),
            },
            unit="a task",
        )
    ratio = result.ratio("engine.submit", "ProcessPoolExecutor.submit")
    targets.note("one task at a time, submit to ProcessPoolExecutor.submit", f"{ratio:.3g}x")
