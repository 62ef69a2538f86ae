"""Futures of tasks that do nothing, many at a time: what one costs, of each executor.

    submit ──► 100 outstanding ──► 2 warm workers ──► result() of the oldest, then the next submit

Needs 2 cores. The rings wrap several times.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from typing import Any

import shmengine as shm
from shmengine.bench.work import keep_outstanding


def test_outstanding(compare: Any, targets: Any, spawn: Any) -> None:
    """`Executor.submit` against the standard library's."""
    with shm.Executor(2) as ours, ProcessPoolExecutor(2, mp_context=spawn) as standard:
        result = compare(
            {
                "Executor.submit": lambda: keep_outstanding(ours, 10_000),
                "ProcessPoolExecutor.submit": lambda: keep_outstanding(standard, 3_000),
            },
            unit="a task",
        )
    ratio = result.ratio("Executor.submit", "ProcessPoolExecutor.submit")
    targets.at_least("100 outstanding, Executor to ProcessPoolExecutor", ratio, 3)
