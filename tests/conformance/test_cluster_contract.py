"""The contract of engines on a cluster: the tests that the other backends pass, but for what differs."""

from __future__ import annotations

import pytest

import tests.conformance.test_blocks_contract as blocks
import tests.conformance.test_engine_contract as tasks
from shmengine.engine import Engine
from tests.helpers.cluster import Cluster

DIFFERENT = {
    "test_written_in_place": "nothing is shared with another machine: ArrayError says so",
    "test_blocks_in_place": "likewise",
    "test_in_place_in_a_mapped_file": "likewise",
    "test_asarray_returns_what_is_shared_already": "likewise: asarray makes a copy",
    "test_what_comes_with_a_reference_in_a_local_engine_is_not_copied": "it is no local engine",
    "test_functions_run_where_the_backend_says": "test_cluster.py has where",
    "test_log_records_reach_the_handlers_of_the_main_process": "they stay with dask's worker",
    "test_workers_may_configure_logging_themselves": "likewise",
    "test_array_likes_say_their_shape_and_dtype_in_any_way": "a piece of several blocks is read at once",
    "test_array_likes_are_read_block_by_block": "likewise",
    "test_arrays_of_zarr": "likewise",
}
"""Tests that do not apply to a cluster, and why."""

LONG = {"test_every_dtype_in_every_layout", "test_rare_dtypes"}
"""Hundreds of cases, which go to a host as they go to a worker process."""

for module in (tasks, blocks):
    for name, function in list(vars(module).items()):
        if name.startswith("test_") and name not in {*DIFFERENT, *LONG}:
            globals()[name] = function


@pytest.fixture(scope="module")
def cluster():
    made = Cluster(2)
    made.wait(2)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """For the module alone: dask's client opens connections when it likes, and keeps them."""


@pytest.fixture
def backend():
    return "cluster"


@pytest.fixture(scope="module")
def engine(cluster):
    with Engine(1, cluster=cluster.address, memory="256 MiB") as shared:
        yield shared


@pytest.fixture
def make_engine(cluster):
    made = []

    def make(workers=1, **settings):
        made.append(Engine(workers, cluster=cluster.address, **{"memory": "64 MiB", **settings}))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
