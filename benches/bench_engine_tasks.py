"""Tasks that do nothing: what one task costs.

    map(fn, range(n)) ──► [ tasks ] ──► 2 warm workers ──► [ results ] ──► in order

Needs 2 cores. No chunking by the caller, on either side; at most a window of tasks is in flight, so the rings
wrap many times.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from typing import Any

import shmengine as shm
from shmengine.bench.work import check_map, nothing, one_by_one


def test_tasks(compare: Any, targets: Any, spawn: Any) -> None:
    """`map` against the standard library's two pools."""
    with shm.Engine(2) as engine, spawn.Pool(2) as pool, ProcessPoolExecutor(2, mp_context=spawn) as executor:
        result = compare(
            {
                "engine.map": lambda: check_map(engine.map(nothing, range(20_000)), 20_000),
                "ProcessPoolExecutor.map": lambda: check_map(
                    executor.map(nothing, range(3_000), chunksize=1), 3_000
                ),
                "Pool.imap": lambda: check_map(pool.imap(nothing, range(20_000)), 20_000),
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
        result = compare(
            {
                "engine.submit": lambda: one_by_one(engine.submit, 1_000),
                "ProcessPoolExecutor.submit": lambda: one_by_one(executor.submit, 500),
            },
            unit="a task",
        )
    ratio = result.ratio("engine.submit", "ProcessPoolExecutor.submit")
    targets.note("one task at a time, submit to ProcessPoolExecutor.submit", f"{ratio:.3g}x")
