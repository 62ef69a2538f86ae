"""Dask on one machine: `Executor` as its scheduler. (`make peers` runs dask's own tests of arrays.)"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

import dask
import dask.array as da
import dask.multiprocessing
import numpy as np
import pytest
from dask.utils_test import GetFunctionTestMixin

from shmengine import Executor


@pytest.fixture(scope="module")
def executor():
    with Executor(2, mp_context=multiprocessing.get_context("fork"), memory="256 MiB") as made:
        made.submit(int).result()  # all workers start: none that a test starts may outlive it
        yield made


class TestAsScheduler(GetFunctionTestMixin):
    """Dask's own tests of a `get` function, on ``scheduler=executor``."""

    @pytest.fixture(autouse=True)
    def on_executor(self, executor):
        self.get = dask.base.get_scheduler(scheduler=executor)


class TestAsPool(GetFunctionTestMixin):
    """The same on ``dask.multiprocessing.get(pool=executor)``, which pickles by itself and sends six tasks at once."""

    @pytest.fixture(autouse=True)
    def on_executor(self, executor):
        # Dask's fusion of a chain of 10,000 tasks into one exceeds Python's stack, on whatever pool.
        self.get = functools.partial(dask.multiprocessing.get, pool=executor, optimize_graph=False)


@pytest.fixture
def x():
    return np.random.default_rng(3).random((600, 500))


def test_arrays_on_the_executor(executor, x):
    d = da.from_array(x, chunks=(100, 250))
    for graph, expected in (
        ((d + d.T.rechunk(d.chunks[0]).sum()).sum(axis=0), (x + x.sum()).sum(axis=0)),
        (d.std(), x.std()),
        (d.argmax(axis=1), x.argmax(axis=1)),
        (da.map_overlap(lambda b: b * 2, d, depth=2, boundary="reflect"), x * 2),
        (d[::2, ::-3], x[::2, ::-3]),
    ):
        assert np.allclose(graph.compute(scheduler=executor), expected)
    with dask.config.set(scheduler=executor):
        assert np.allclose(da.dot(d.T, d), x.T @ x)
    assert np.allclose(d.cumsum(axis=0).compute(scheduler="processes", pool=executor), x.cumsum(axis=0))


def test_tasks_run_in_the_workers(executor):
    pids = da.map_blocks(lambda b: b + os.getpid(), da.zeros(8, chunks=1, dtype=int)).compute(
        scheduler=executor
    )
    assert set(pids) <= set(executor._processes)


def test_an_error_of_a_chunk_is_raised_as_it_is(executor):
    def fail(block):
        raise LookupError("no such block")

    graph = da.ones(4, chunks=2).map_blocks(fail, dtype=float, meta=np.empty(0))
    with pytest.raises(LookupError, match="no such block"):
        graph.compute(scheduler=executor)
    with pytest.raises(LookupError, match="no such block"):
        graph.compute(scheduler="processes", pool=executor)
    assert da.ones(4, chunks=2).sum().compute(scheduler=executor) == 4


def test_what_cannot_be_sent_says_where_it_lies(executor):
    import threading

    lock = threading.Lock()
    graph = da.ones(4, chunks=2).map_blocks(lambda b, _: b, lock, dtype=float, meta=np.empty(0))
    with pytest.raises(TypeError, match="lock"):
        graph.compute(scheduler=executor)
    assert da.ones(4, chunks=2).sum().compute(scheduler=executor) == 4


def test_a_worker_that_dies_is_a_broken_pool_to_dask():
    def die(block):
        os.kill(os.getpid(), signal.SIGKILL)

    graph = da.ones(4, chunks=2).map_blocks(die, dtype=float, meta=np.empty(0))
    with Executor(1, memory="64 MiB") as own, pytest.raises(BrokenProcessPool, match="SIGKILL"):
        graph.compute(scheduler=own)


def test_chunk_functions_may_write_to_private_copies(executor):
    def write(block):
        block += 1
        return block

    graph = da.from_array(np.zeros(4), chunks=2).map_blocks(write, dtype=float, meta=np.empty(0))
    with pytest.raises(ValueError, match="read-only"):
        graph.compute(scheduler=executor)
    with Executor(1, memory="64 MiB", writable="private") as own:
        assert graph.compute(scheduler=own).tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="writable must be False or 'private', not 'shared'"):
        Executor(1, writable="shared")


def test_the_package_never_imports_dask():
    text = (
        "import sys, shmengine, shmengine.futures, shmengine.engine.api, shmengine.cli;"
        "assert not {'dask', 'distributed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", text], check=True)
