"""How fast a socket's connection is, and that "auto" compresses where it is slow, and only there."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
import time

import numpy as np
import pytest

import shmengine as shm
from shmengine.channels import meter
from shmengine.channels.meter import ENOUGH_BYTES, ENOUGH_SECONDS, Meter
from tests.helpers import poll_until
from tests.helpers.channels import nobody_serves
from tests.helpers.proxy import Proxy

# --- a meter alone ------------------------------------------------------------------------------------


class Connection:
    """A meter, and what the kernel tells it."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.progress = (1, 0)
        self.meter = Meter(lambda: self.now)
        monkeypatch.setattr(meter, "_progress_of", lambda fd: self.progress)
        self.meter.look(3)

    def look(self, seconds, nbytes, waiting):
        """Look after some time, in which so many bytes have passed."""
        self.now += seconds
        self.progress = self.progress[0] + nbytes, waiting
        self.meter.look(3)


@pytest.fixture
def connection(monkeypatch):
    return Connection(monkeypatch)


def test_what_passes_while_something_waits_is_the_speed(connection):
    for _ in range(10):
        connection.look(0.5, 1_000_000, 1)
    assert connection.meter.seconds_per_byte() == 0.5 / 1_000_000


@pytest.mark.parametrize("waiting", [False, True])
def test_a_sender_that_pauses_is_no_slow_link(connection, waiting):
    for _ in range(1000):
        connection.look(8.0, 1 << 20, 0)
        if waiting:
            connection.look(0.125, 1 << 20, 1)
    assert connection.meter.seconds_per_byte() == (0.125 / (1 << 20) if waiting else None)


def test_a_little_tells_nothing(connection):
    for _ in range(50):
        connection.look(10.0, 1, 1)
    assert connection.meter.seconds_per_byte() is None
    connection.look(ENOUGH_SECONDS, ENOUGH_BYTES, 1)
    assert connection.meter.seconds_per_byte() is not None


def test_each_answer_is_of_the_time_since_the_last_one(connection):
    connection.look(1.0, 1_000_000, 1)
    assert connection.meter.seconds_per_byte() == 1.0 / 1_000_000
    assert connection.meter.seconds_per_byte() is None
    connection.look(1.0, 50_000_000, 1)
    assert connection.meter.seconds_per_byte() == 1.0 / 50_000_000


@pytest.mark.parametrize("tells", [True, False])
def test_between_two_connections_nothing_is_measured(connection, tells):
    connection.look(1.0, 1_000_000, 1)
    if tells:
        connection.meter.begin()
    else:
        connection.progress = None
        connection.meter.look(3)
    connection.progress = (0, 1)
    connection.look(1000.0, 5_000_000, 1)
    connection.look(1.0, 1_000_000, 1)
    assert connection.meter.seconds_per_byte() == 1.0 / 1_000_000


def test_what_the_kernel_tells_of_a_connection():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    with near, far:
        near.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += near.send(bytes(1 << 20))
        acknowledged, waiting = meter._progress_of(near.fileno())
        assert acknowledged < sent
        assert 0 < waiting < sent
        left = sent
        while left:
            left -= len(far.recv(1 << 20))
        poll_until(lambda: meter._progress_of(near.fileno())[0] >= sent, what="all is acknowledged")
        acknowledged, waiting = meter._progress_of(near.fileno())
        assert acknowledged <= sent + 1  # the beginning may count, too
        assert waiting == 0


def test_of_what_is_no_tcp_the_kernel_tells_nothing():
    one, other = socket.socketpair()
    reading, writing = os.pipe()
    with one, other, os.fdopen(reading), os.fdopen(writing, "w"):
        for fd in (one.fileno(), writing, -1):
            assert meter._progress_of(fd) is None


# --- "auto" over real connections -----------------------------------------------------------------------


def hard_to_compress(nbytes):
    """Elements of which 3 bytes of 14 are zeros: only where a byte takes long it pays to leave them out."""
    elements = np.zeros(nbytes // 14, "V14")
    elements.view("u1").reshape(-1, 14)[:, :11] = np.random.default_rng(0).integers(
        0, 256, (len(elements), 11)
    )
    return elements


@contextlib.contextmanager
def receiving(end, pause=0.0):
    """Have another thread receive all that comes, with pauses."""

    def receive():
        for _ in end:
            time.sleep(pause)

    thread = threading.Thread(target=receive)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def is_compressed(end, array, pause=0.0):
    """Send an array; whether it was compressed."""
    before = end.stats()
    end.send(array)
    time.sleep(pause)
    after = end.stats()
    return after.wire_bytes_sent - before.wire_bytes_sent < after.bytes_sent - before.bytes_sent


def goes_as_it_is(end, array, count, most):
    """Whether so many arrays in a row are not compressed: a hiccup may look like a slow link for a while."""
    row = 0
    for _ in range(most):
        row = 0 if is_compressed(end, array) else row + 1
        if row == count:
            return True
    return False


@pytest.fixture
def path():
    """A proxy that lets little pass, who has connected through it, and who was accepted."""
    with (
        shm.listen("tcp://127.0.0.1:0", compression="auto", peer_timeout=60) as server,
        Proxy(server.address, bytes_per_second=5e5) as proxy,
    ):
        connected = shm.connect(proxy.address, timeout=20, compression="auto", peer_timeout=60)
        with connected, server.accept(20) as accepted:
            yield proxy, connected, accepted
        server.close()
        poll_until(nobody_serves, what="both have said goodbye through the proxy")


@pytest.mark.parametrize("who", ["who has connected", "who was accepted"])
def test_auto_begins_on_a_slow_path_and_ends_when_it_is_fast(who, path):
    proxy, connected, accepted = path
    sender, receiver = (connected, accepted) if who == "who has connected" else (accepted, connected)
    array = hard_to_compress(1 << 18)
    with receiving(receiver), sender:
        assert not is_compressed(sender, array)  # nothing is known so far
        # The buffer takes all of these at once: no call waits for the path.
        assert any(is_compressed(sender, array, pause=0.02) for _ in range(200))
        proxy.bytes_per_second = math.inf
        while is_compressed(sender, array):
            pass


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "ipc://@{}"])
def test_auto_stays_off_on_a_fast_path(address):
    with (
        shm.listen(address.format(os.urandom(8).hex())) as server,
        shm.connect(server.address, timeout=20, compression="auto") as left,
        server.accept(20) as right,
        receiving(right),
        left,
    ):
        assert goes_as_it_is(left, hard_to_compress(1 << 20), 100, 1000)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "ipc://@{}"])
def test_a_slow_receiver_is_no_slow_path(address):
    with (
        shm.listen(address.format(os.urandom(8).hex()), buffer_bytes="4 MiB") as server,
        shm.connect(server.address, timeout=20, compression="auto") as left,
        server.accept(20) as right,
        receiving(right, pause=0.15),
        left,
    ):
        assert goes_as_it_is(left, hard_to_compress(1 << 20), 20, 60)
