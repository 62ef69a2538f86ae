"""Dask's own tests of a `get` function, on the two roads from dask to an executor."""

from __future__ import annotations

import functools

import dask.base
import dask.multiprocessing
import pytest
from dask.utils_test import GetFunctionTestMixin

import shmengine


@pytest.fixture(scope="module")
def executor():
    with shmengine.Executor(2) as made:
        yield made


class TestScheduler(GetFunctionTestMixin):
    """``x.compute(scheduler=executor)``."""

    @pytest.fixture(autouse=True)
    def on(self, executor):
        self.get = dask.base.get_scheduler(scheduler=executor)


class TestPool(GetFunctionTestMixin):
    """``dask.multiprocessing.get(pool=executor)``."""

    @pytest.fixture(autouse=True)
    def on(self, executor):
        # Dask's fusion of a chain of 10,000 tasks into one exceeds Python's stack, on whatever pool.
        self.get = functools.partial(dask.multiprocessing.get, pool=executor, optimize_graph=False)
