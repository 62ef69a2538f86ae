"""Futures of tasks that do nothing, many at a time: what one costs, of each executor.

    submit ──► 100 outstanding ──► 2 warm workers ──► result() of the oldest, then the next submit

Needs 2 cores. The rings wrap several times.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

import shmengine as shm

OUTSTANDING = 100


def nothing(number: int) -> int:
    return number


def keep_outstanding(executor: Executor, count: int) -> int:
    """Submit `count` tasks, at most so many of them at a time, and check each result."""
    futures: deque[Any] = deque()
    for number in range(count):
        if len(futures) == OUTSTANDING:
            assert futures.popleft().result(60) == number - OUTSTANDING
        futures.append(executor.submit(nothing, number))
    assert [future.result(60) for future in futures] == list(range(count - OUTSTANDING, count))
    return count


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
