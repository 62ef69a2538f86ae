"""Channels between two hosts: network namespaces with a cable between them that delays, loses, and is cut."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys

import pytest

from tests.helpers import start_script
from tests.helpers.scripts import ROOT

SERVER = """
    import sys
    import numpy as np
    import shmengine as shm

    with shm.listen("tcp://10.77.0.1:0", auth=sys.argv[1], peer_timeout=float(sys.argv[2])) as server:
        print(server.address, flush=True)
        with server.accept(60) as end:
            count = 0
            try:
                for number, block in end:
                    assert number == count and (block == number).all(), (number, count)
                    count += 1
                    if count % 50 == 0:
                        print(count, flush=True)
                        end.send(count)
                print("end", flush=True)
            except shm.PeerLost:
                print("lost", flush=True)
            stats = end.stats()
            assert stats.gaps == stats.corrupt == 0, stats
"""
CLIENT = """
    import sys, time
    import numpy as np
    import shmengine as shm

    count = int(sys.argv[4])
    with shm.connect(sys.argv[3], auth=sys.argv[1], timeout=60, peer_timeout=float(sys.argv[2])) as end:
        try:
            for number in range(count):
                end.send([number, np.full(2000, number)], 120)
                if number % 50 == 49:
                    assert end.receive(120) == number + 1
                    print(number + 1, flush=True)
            print("end", flush=True)
        except shm.PeerLost:
            print("lost", flush=True)
"""


def ip(*args):
    subprocess.run(["ip", *args], check=True, capture_output=True)


def packets(namespace, device, way):
    shown = subprocess.run(
        ["ip", "-n", namespace, "-j", "-s", "link", "show", device], check=True, capture_output=True
    ).stdout
    return json.loads(shown)[0]["stats64"][way]["packets"]


def namespaces():
    return f"shmengine-{os.getpid()}-a", f"shmengine-{os.getpid()}-b"


@functools.cache
def can_make_hosts():
    try:
        ip("netns", "add", f"shmengine-{os.getpid()}-try")
        ip("netns", "del", f"shmengine-{os.getpid()}-try")
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


pytestmark = pytest.mark.skipif(
    "not can_make_hosts()",
    reason="no network namespaces here; test_channel_socket.py has the same with a proxy",
)


@pytest.fixture
def hosts():
    """The commands that run something at one host, and at the other."""
    a, b = namespaces()
    with contextlib.ExitStack() as stack:
        for name in (a, b):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
        ip("link", "add", "near", "netns", a, "type", "veth", "peer", "name", "far", "netns", b)
        for name, device, address in ((a, "near", "10.77.0.1/24"), (b, "far", "10.77.0.2/24")):
            ip("-n", name, "addr", "add", address, "dev", device)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", device, "up")
        yield ["ip", "netns", "exec", a], ["ip", "netns", "exec", b]


@pytest.fixture
def key(tmp_path):
    command = [sys.executable, "-m", "shmengine", "keys", tmp_path / "key"]
    subprocess.run(command, check=True, capture_output=True)
    return str(tmp_path / "key")


@contextlib.contextmanager
def both(hosts, key, count, peer_timeout):
    with start_script(SERVER, args=[key, peer_timeout], prefix=hosts[0]) as server:
        address = server.stdout.readline().strip()
        assert address, server.stderr.read()
        with start_script(CLIENT, args=[key, peer_timeout, address, str(count)], prefix=hosts[1]) as client:
            yield server, client


def finish(process):
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    return output.split()


def cable(state):
    ip("-n", namespaces()[0], "link", "set", "near", state)


def test_all_arrives(hosts, key):
    with both(hosts, key, 300, "10") as (server, client):
        assert finish(client)[-1] == "end"
        assert finish(server)[-2:] == ["300", "end"]


STRANGER = """
    import sys
    import shmengine as shm

    class Loud:
        def __reduce__(self):
            return print, ("unpickled",)

    theirs, own = shm.Keys.load(sys.argv[1]), shm.generate_keys()
    for knows in ((), (theirs.public,)):
        keys = shm.Keys(own.public, own.secret, knows)
        try:
            with shm.connect(sys.argv[2], auth=keys, allow_pickle=True, timeout=5) as end:
                end.send(Loud())
                print("received")
        except shm.ShmError as error:
            print(type(error).__name__)
"""


def test_a_key_of_another_host_is_refused(hosts, key):
    """Who has it gets nowhere, nothing of his is unpickled, and who has the right one is not disturbed."""
    with start_script(SERVER, args=[key, "10"], prefix=hosts[0]) as server:
        address = server.stdout.readline().strip()
        with start_script(STRANGER, args=[key, address], prefix=hosts[1]) as stranger:
            assert finish(stranger) == ["Timeout", "PeerLost"]
        with start_script(CLIENT, args=[key, "10", address, "50"], prefix=hosts[1]) as client:
            assert finish(client)[-1] == "end"
        assert finish(server) == ["50", "end"]


@pytest.fixture
def hosts_far_apart():
    """As `hosts`, with a wire between them that delays, reorders and loses packets."""
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        pytest.skip(f"no TUN devices here: {error}; test_channel_socket.py has a proxy that delays")
    a, b = namespaces()
    with contextlib.ExitStack() as stack:
        for name, device, address in ((a, "near", "10.77.0.1/24"), (b, "far", "10.77.0.2/24")):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("-n", name, "tuntap", "add", device, "mode", "tun")
            ip("-n", name, "addr", "add", address, "dev", device)
            ip("-n", name, "link", "set", device, "up")
        wire = stack.enter_context(
            start_script(ROOT / "tests/helpers/lossy_wire.py", args=[a, "near", b, "far"])
        )
        assert wire.stdout.readline() == "carrying\n", wire.stderr.read()
        yield ["ip", "netns", "exec", a], ["ip", "netns", "exec", b]


def test_over_a_slow_link_that_loses_packets(hosts_far_apart, key):
    with both(hosts_far_apart, key, 200, "30") as (server, client):
        assert finish(client)[-1] == "end"
        assert finish(server)[-2:] == ["200", "end"]
    a, b = namespaces()
    assert packets(a, "near", "tx") > packets(b, "far", "rx")
    assert packets(b, "far", "tx") > packets(a, "near", "rx")


@pytest.mark.watchdog(200)
def test_a_cable_that_is_cut_and_mended(hosts, key):
    """Longer than a connection lives without a sign, shorter than its peer is waited for."""
    with both(hosts, key, 2000, "8") as (server, client):
        for expected in ("50", "100"):
            assert server.stdout.readline().strip() == expected
        cable("down")
        with pytest.raises(subprocess.TimeoutExpired):
            server.wait(6)
        cable("up")
        assert finish(client)[-1] == "end"
        assert finish(server)[-2:] == ["2000", "end"]


def test_a_cable_that_stays_cut(hosts, key):
    with both(hosts, key, 10**6, "1") as (server, client):
        assert server.stdout.readline().strip() == "50"
        cable("down")
        assert finish(client)[-1] == "lost"
        assert finish(server)[-1] == "lost"
