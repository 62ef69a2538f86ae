"""An engine on hosts of their own: network namespaces on a bridge, one of which loses its cable."""

from __future__ import annotations

import contextlib
import os
import time

import numpy as np
import pytest

import shmengine as shm
from tests.helpers.cluster import Cluster
from tests.system.test_socket_hosts import can_make_hosts, ip  # noqa: F401  # the mark calls it

pytestmark = pytest.mark.skipif(
    "not can_make_hosts()",
    reason="no network namespaces here; test_cluster.py has the same on addresses of loopback",
)

MAIN = "10.78.0.1"
HOSTS = ["10.78.0.2", "10.78.0.3"]


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """For the module alone: dask's client opens connections when it likes, and keeps them."""


@pytest.fixture
def cluster(request):
    """The scheduler beside main, and two workers elsewhere; the parameter: settings of dask."""
    bridge = f"shmb{os.getpid() % 1_000_000}"
    with contextlib.ExitStack() as stack:
        ip("link", "add", bridge, "type", "bridge")
        stack.callback(ip, "link", "del", bridge)
        ip("addr", "add", f"{MAIN}/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        names = []
        for number, address in enumerate(HOSTS):
            name = f"shmengine-{os.getpid()}-host{number}"
            device = f"shm{os.getpid() % 1_000_000}h{number}"
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", name)
            stack.callback(ip, "link", "del", device)
            ip("link", "set", device, "master", bridge, "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "eth0", "up")
            names.append(["ip", "netns", "exec", name])
        settings = getattr(request, "param", {})
        made = Cluster(2, at=[[], *names], addresses=[MAIN, *HOSTS], settings=settings)
        stack.callback(made.close)
        made.wait(2)
        yield made


def test_two_hosts_one_of_which_is_killed_meanwhile(cluster):
    assert cluster.address.startswith(f"tcp://{MAIN}:")
    x = np.random.default_rng(2).random((40_000, 50))
    with shm.Engine(1, cluster=cluster.address, memory="64 MiB") as engine:
        assert engine.workers == 2
        hosts = set(engine.map(lambda _: time.sleep(0.01) or os.readlink("/proc/self/ns/net"), range(50)))
        assert len(hosts) == 2
        assert os.readlink("/proc/self/ns/net") not in hosts
        assert np.array_equal(engine.map_blocks(np.sqrt, x), np.sqrt(x))
        results = engine.map(lambda i: time.sleep(0.01) or i, range(200))
        head = [next(results) for _ in range(10)]
        cluster.workers[0].kill()
        assert head + list(results) == list(range(200))
        assert engine.stats().retries > 0
        assert engine.workers == 1


# A host that is silent for so long is lost; by itself dask waits for minutes.
@pytest.mark.parametrize("cluster", [{"DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "10s"}], indirect=True)
def test_the_cable_of_one_of_two_hosts_is_cut_meanwhile(cluster):
    with shm.Engine(1, cluster=cluster.address, memory="64 MiB") as engine:
        results = engine.map(lambda i: time.sleep(0.02) or i, range(400))
        head = [next(results) for _ in range(10)]
        assert engine.workers == 2
        ip("-n", f"shmengine-{os.getpid()}-host0", "link", "set", "eth0", "down")
        assert head + list(results) == list(range(400))
        assert engine.workers == 1
        assert engine.stats().retries > 0
        x = np.random.default_rng(2).random((40_000, 50))
        assert np.array_equal(engine.map_blocks(np.sqrt, x), np.sqrt(x))
