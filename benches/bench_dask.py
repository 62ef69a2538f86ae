"""A standard deviation over 4 GB of random numbers that Dask makes, in 35 chunks: who runs its graph.

    da.random(20000 x 25000).std() ──► 35 chunks made and summed up where they are, then a small tree ──► 2 workers

Nothing large crosses: Dask fuses the making of a chunk with its sums. Needs 2 cores. The same seed, so all must find
the same number.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest

import shmengine as shm

SHAPE = (20_000, 25_000)
EXPECTED = 12**-0.5  # of uniform numbers between 0 and 1


def test_std_of_random_numbers(compare: Any, targets: Any) -> None:
    """Our executor against a `LocalCluster` of as many processes, both warm."""
    da = pytest.importorskip("dask.array")
    distributed = pytest.importorskip("distributed")

    def std(scheduler: Any) -> int:
        value = da.random.default_rng(1).random(SHAPE, chunks="auto").std().compute(scheduler=scheduler)
        assert abs(value - EXPECTED) < 1e-5
        return 1

    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(shm.Executor(2))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        cluster = stack.enter_context(
            distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
        )
        client = stack.enter_context(distributed.Client(cluster, set_as_default=False))
        result = compare(
            {
                "scheduler=Executor": lambda: std(ours),
                "LocalCluster": lambda: std(client),
                "threads": lambda: std("threads"),
            },
            repeats=5,
            bytes_each=8 * SHAPE[0] * SHAPE[1],
        )
    targets.at_least(
        "std of 4 GB, Executor to LocalCluster", result.ratio("scheduler=Executor", "LocalCluster"), 1
    )
    targets.note("Executor to threads", f"{result.ratio('scheduler=Executor', 'threads'):.3g}x")
