"""Channels over sockets: order, resuming, back-pressure, who is let in, and what is left."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
from functools import partial
from io import UnsupportedOperation

import numpy as np
import pytest

import shmengine as shm
from shmengine.channels import dialing, hub, listening, local
from shmengine.channels.greetings import Greeting, Proof, identity_of_this_process, is_gone
from shmengine.channels.link import Counts
from shmengine.channels.sessions import PREFIX, Kind, Session, most_part_bytes
from shmengine.codec import encode
from shmengine.tokens import start_time
from tests.helpers import open_fds, poll_until, run_script, start_script
from tests.helpers.channels import nobody_serves
from tests.helpers.proxy import Proxy

STARTS = ["fork", "spawn"]
ROUNDS = 100


class Interrupted(BaseException):
    """What handlers of signals raise here."""


@pytest.fixture
def ends():
    left, right = shm.channel("socket")
    yield left, right
    left.close()
    right.close()


@pytest.fixture
def server():
    with shm.listen("tcp://127.0.0.1:0", peer_timeout=5) as server:
        yield server


def dial(server, **options):
    """Both ends of a channel through a server."""
    mine = shm.connect(server.address, timeout=20, **options)
    return mine, server.accept(20)


# --- messages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None,
        "text",
        {"a": [1, 2.5, b"x"], "b": (True, None)},
        np.arange(10),
        np.zeros(0),
        np.arange(1 << 20, dtype="f4").reshape(1024, 1024)[::2, ::3],
        np.array(["2020-01-01"], "M8[D]"),
        np.ones(3, dtype=[("a", "i4"), ("b", "f8")]),
        b"x" * 100_000,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_sent_arrives(ends, value):
    left, right = ends
    left.send(value)
    got = right.receive(20)
    assert type(got) is type(value)
    np.testing.assert_equal(got, value)


@pytest.mark.parametrize("nbytes", [1, 1 << 12, 1 << 15, 1 << 16, 1 << 20, 5 << 20])
def test_arrays_arrive_writable_and_aligned(ends, nbytes):
    left, right = ends
    left.send(np.full(nbytes, 7, "u1"))
    got = right.receive(20)
    assert got.flags.writeable
    assert got.ctypes.data % 16 == 0
    got += 1
    assert (got == 8).all()


def test_an_array_may_be_changed_when_send_has_returned(ends):
    left, right = ends
    array = np.empty(1 << 18, "i4")
    for i in range(20):
        array.fill(i)
        left.send(array)
    for i in range(20):
        assert (right.receive(20) == i).all()


def test_both_directions_at_once(ends):
    left, right = ends
    block = np.arange(50_000)

    def echo():
        for message in right:
            right.send(message)

    thread = threading.Thread(target=echo)
    thread.start()

    def send():
        for i in range(200):
            left.send((i, block))

    sender = threading.Thread(target=send)
    sender.start()
    for i in range(200):
        number, got = left.receive(60)
        assert number == i
        assert np.array_equal(got, block)
    sender.join()
    left.close()
    thread.join()


def test_stats_count_messages_and_bytes(ends):
    left, right = ends
    for _ in range(3):
        left.send(np.zeros(1000))
    for _ in range(3):
        right.receive(20)
    sent, received = left.stats(), right.stats()
    assert sent.mechanism == "socket"
    assert sent.messages_sent == received.messages_received == 3
    assert sent.bytes_sent == received.bytes_received > 24_000
    assert (received.gaps, received.duplicates, received.corrupt, received.resent) == (0, 0, 0, 0)


def test_a_one_way_channel_has_one_way():
    left, right = shm.channel("socket", duplex=False)
    with left, right:
        left.send(1)
        assert right.receive(20) == 1
        with pytest.raises(UnsupportedOperation):
            right.send(2)


def test_asyncio_twins_wait_without_a_thread(ends):
    left, right = ends

    async def both():
        got = asyncio.ensure_future(right.areceive(60))
        await asyncio.sleep(0)
        await left.asend(np.arange(5))
        assert (await got).tolist() == [0, 1, 2, 3, 4]
        for i in range(100):
            await left.asend(i)
        assert [await right.areceive(60) for _ in range(100)] == list(range(100))
        with pytest.raises(shm.Timeout):
            await right.areceive(0.01)

    before = threading.active_count()
    asyncio.run(both())
    assert threading.active_count() <= before + 1  # the service, which is there once


# --- timeouts and back-pressure -----------------------------------------------------------------------


def test_receive_times_out(ends):
    _, right = ends
    with pytest.raises(shm.Timeout):
        right.receive(0.02)
    with pytest.raises(shm.WouldBlock):
        right.try_receive()


@pytest.mark.parametrize("transport", ["pair", "tcp"])
def test_a_slow_receiver_holds_its_sender_back(transport, server):
    options = {"buffer_bytes": 1 << 20}
    left, right = shm.channel("socket", **options) if transport == "pair" else dial(server, **options)
    with left, right:
        block = np.zeros(100_000, "u1")
        sent = 0
        with pytest.raises(shm.WouldBlock):
            while sent < 1000:
                left.try_send((sent, block))
                sent += 1
        assert 5 <= sent <= 11
        with pytest.raises(shm.Timeout):
            left.send((sent, block), 0.05)
        for i in range(sent):
            assert right.receive(20)[0] == i
        with pytest.raises(shm.WouldBlock):
            right.try_receive()  # says what was taken, and finds that what was not sent has not been
        left.send((sent, block), 20)
        assert right.receive(20)[0] == sent


@pytest.mark.parametrize("much", [sys.maxsize, 1 << 70])
def test_a_buffer_without_a_limit(much):
    left, right = shm.channel("socket", buffer_bytes=much)
    with left, right:
        left.send(1)
        assert right.receive(20) == 1


def test_a_message_larger_than_the_buffer_goes_alone():
    left, right = shm.channel("socket", buffer_bytes=1000)
    with left, right:
        left.send(np.zeros(100_000))
        with pytest.raises(shm.WouldBlock):
            left.try_send(1)
        assert right.receive(20).size == 100_000
        with pytest.raises(shm.WouldBlock):
            right.try_receive()
        left.send(1, 20)
        assert right.receive(20) == 1


# --- the end of it ------------------------------------------------------------------------------------


def test_an_orderly_close_comes_after_all_messages(ends):
    left, right = ends
    for i in range(1000):
        left.send(i)
    left.close()
    assert list(right) == list(range(1000))
    with pytest.raises(shm.EndOfStream):
        right.receive(1)
    with pytest.raises(shm.Closed):
        left.send(1)


def test_who_sends_to_a_closed_end_learns_it(ends):
    left, right = ends
    left.send(1)
    assert right.receive(20) == 1
    right.close()
    with pytest.raises(shm.EndOfStream):
        while True:
            left.send(np.zeros(10_000), 20)


def test_an_end_that_was_closed_unused_is_an_orderly_end(ends):
    left, right = ends
    right.close()
    with pytest.raises(shm.EndOfStream):
        left.receive(20)


def test_what_was_sent_waits_for_an_end_that_starts_later(ends):
    left, right = ends
    for i in range(100):
        left.send(np.full(1000, i))
    left.close()
    del left
    gc.collect()
    assert [int(block[0]) for block in right] == list(range(100))


def test_both_close_with_messages_on_their_way():
    left, right = shm.channel("socket")
    left.send(np.zeros(1 << 20))
    right.send(np.zeros(1 << 20))
    left.close()
    right.close()  # and nothing is left: a fixture looks


def test_a_collected_end_is_closed():
    left, right = shm.channel("socket")
    left.send(1)
    del left
    gc.collect()
    assert list(right) == [1]
    right.close()


def consume(end, report):
    total = 0
    for block in end:
        total += int(block[0])
    report.send(total)
    report.close()


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("side", [0, 1])
def test_an_end_goes_to_a_child(start, side):
    context = multiprocessing.get_context(start)
    ends = shm.channel("socket")
    mine, other = ends[1 - side], ends[side]
    here, there = context.Pipe()
    child = context.Process(target=consume, args=(other, there))
    child.start()
    other.close()
    there.close()
    for i in range(200):
        mine.send(np.full(1000, i))
    mine.close()
    assert here.recv() == sum(range(200))
    child.join()
    assert child.exitcode == 0
    here.close()


def send_and_exit(end, count):
    for i in range(count):
        end.send(np.full(10_000, i))


@pytest.mark.parametrize("start", STARTS)
def test_a_process_that_ends_has_closed_its_ends(start):
    context = multiprocessing.get_context(start)
    left, right = shm.channel("socket")
    child = context.Process(target=send_and_exit, args=(right, 50))
    child.start()
    right.close()
    assert [int(block[0]) for block in left] == list(range(50))
    child.join()
    assert child.exitcode == 0
    left.close()


def test_a_script_that_ends_has_closed_its_ends(server):
    with server:
        script = """
            import sys, numpy as np, shmengine as shm
            end = shm.connect(sys.argv[1], timeout=30)
            for i in range(50):
                end.send(np.full(10_000, i))
        """
        thread = threading.Thread(
            target=run_script, args=(script,), kwargs={"args": [server.address], "check": True}
        )
        thread.start()
        with server.accept(60) as end:
            assert [int(block[0]) for block in end] == list(range(50))
        thread.join()


def send_until_killed(end):
    i = 0
    while True:
        end.send(np.full(20_000, i))
        i += 1


@pytest.mark.parametrize("start", STARTS)
def test_a_killed_sender_is_lost_after_what_it_had_sent(start):
    context = multiprocessing.get_context(start)
    left, right = shm.channel("socket", buffer_bytes="2 MiB")
    child = context.Process(target=send_until_killed, args=(right,))
    child.start()
    right.close()
    for i in range(100):
        assert (left.receive(60) == i).all()
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    expected = 100
    with pytest.raises(shm.PeerLost):
        while True:
            assert (left.receive(60) == expected).all()
            expected += 1
    with pytest.raises(shm.PeerLost):
        left.send(1)
    left.close()


def sleep_for_ever(end, ready):
    end.receive()
    ready.send(None)
    time.sleep(1000)


def test_a_killed_receiver_is_lost():
    context = multiprocessing.get_context("spawn")
    left, right = shm.channel("socket", buffer_bytes="1 MiB")
    here, there = context.Pipe()
    child = context.Process(target=sleep_for_ever, args=(right, there))
    child.start()
    right.close()
    left.send(0)
    here.recv()
    killer = threading.Timer(0.2, os.kill, (child.pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(shm.PeerLost):
        while True:
            left.send(np.zeros(100_000), 60)
    child.join()
    killer.join()
    left.close()
    here.close()
    there.close()


def test_a_forked_child_does_not_harm_its_parents_end(ends):
    left, right = ends
    left.send(1)
    assert right.receive(20) == 1
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            try:
                left.send(2)
            except shm.UseAfterFork:
                code = 0
            left.close()
            right.close()
            gc.collect()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    left.send(3)
    assert right.receive(20) == 3
    right.send(4)
    assert left.receive(20) == 4


def test_nothing_stays_when_all_are_closed(server):
    server.close()
    poll_until(nobody_serves, what="the thread ends")
    before = open_fds()
    for _ in range(3):
        with shm.listen("tcp://127.0.0.1:0") as another:
            left, right = dial(another)
            left.send(np.zeros(1 << 20))
            right.receive(20)
            left.close()
            right.close()
    poll_until(nobody_serves, what="the thread ends")
    poll_until(lambda: open_fds() == before, what="all descriptors are closed")


def test_nothing_stays_when_signals_come_to_the_thread_that_ends():
    """As they do in a process whose main thread has them pending, or blocked."""
    poll_until(nobody_serves, what="the thread ends")
    before = open_fds()
    tgkill = ctypes.CDLL(None).tgkill
    handler = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        for _ in range(20):
            left, right = shm.channel("socket")
            left.send(1)
            assert right.receive(20) == 1
            (service,) = (thread for thread in threading.enumerate() if thread.name == hub.THREAD)
            left.close()
            right.close()
            while service.is_alive():
                tgkill(os.getpid(), service.native_id, signal.SIGUSR1)  # by its number: it may have ended
                time.sleep(0.0001)
            service.join()
    finally:
        signal.signal(signal.SIGUSR1, handler)
    poll_until(lambda: open_fds() == before, what="all descriptors are closed")


# --- servers ------------------------------------------------------------------------------------------


def test_a_server_accepts_many(server):
    mine = [shm.connect(server.address, timeout=20) for _ in range(20)]
    theirs = [server.accept(20) for _ in range(20)]
    for i, end in enumerate(mine):
        end.send(i)
    assert sorted(end.receive(20) for end in theirs) == list(range(20))
    for end in theirs:
        end.send("back")
    assert {end.receive(20) for end in mine} == {"back"}
    for end in mine + theirs:
        end.close()


@pytest.mark.parametrize("place", ["path", "abstract"])
def test_ipc_addresses(place, tmp_path):
    address = (
        f"ipc://{tmp_path}/channel" if place == "path" else f"ipc://@test-{os.getpid()}-{time.time_ns()}"
    )
    with shm.listen(address) as server:
        left, right = dial(server)
        left.send({1, 2})  # of one user and one machine: pickles pass
        assert right.receive(20) == {1, 2}
        left.close()
        assert list(right) == []
        right.close()


def test_over_tcp_no_pickle_passes(server):
    left, right = dial(server)
    with pytest.raises(shm.SerializationError):
        left.send({1, 2})
    with shm.connect(server.address, allow_pickle=True) as unsafe, server.accept(20) as careful:
        unsafe.send({1, 2})
        with pytest.raises(shm.SerializationError):
            careful.receive(20)
        unsafe.send(np.arange(3))
        assert careful.receive(20).tolist() == [0, 1, 2]
    left.close()
    right.close()


def test_accept_times_out(server):
    with pytest.raises(shm.WouldBlock):
        server.accept(0)
    with pytest.raises(shm.Timeout):
        server.accept(0.02)
    server.close()
    with pytest.raises(shm.Closed):
        server.accept()
    assert list(server) == []


def test_accepted_ends_outlive_the_server(server):
    left, right = dial(server)
    server.close()
    left.send(1)
    assert right.receive(20) == 1
    left.close()
    assert list(right) == []
    right.close()


def test_who_was_not_accepted_sees_an_orderly_end(server):
    end = shm.connect(server.address, timeout=20)
    server.close()
    with pytest.raises(shm.EndOfStream):
        end.receive(20)
    end.close()


def test_connect_times_out_where_nobody_listens():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(shm.Timeout, match="no server answers"):
            shm.connect(f"tcp://127.0.0.1:{port}", timeout=0.1)


@pytest.mark.parametrize(
    ("address", "options", "text"),
    [
        ("udp://127.0.0.1:1", {}, "an address is"),
        ("tcp://127.0.0.1", {}, "an address is"),
        ("tcp://127.0.0.1:99999", {}, "an address is"),
        ("ipc://", {}, "an address is"),
        ("tcp://0.0.0.0:0", {}, "auth="),
        ("tcp://*:0", {}, "auth="),
        ("tcp://no.such.host.invalid:1", {"auth": "none"}, "no host"),
        ("tcp://127.0.0.1:0", {"peer_timeout": 0}, "peer_timeout"),
        ("tcp://127.0.0.1:0", {"compression": "gzip"}, "compression"),
    ],
)
def test_bad_addresses_and_options_are_refused(address, options, text):
    with pytest.raises(ValueError, match=text):
        shm.listen(address, **options)
    with pytest.raises(ValueError, match=text):
        shm.connect(address, **options)


@pytest.mark.parametrize("address", [None, 123, b"tcp://127.0.0.1:0", ("127.0.0.1", 0)])
def test_what_is_no_text_is_no_address(address):
    for use in (shm.listen, shm.connect):
        with pytest.raises(
            TypeError, match=f"{use.__name__}: an address is a text .* not {type(address).__name__}"
        ):
            use(address)


def test_an_address_in_use_is_an_error(server):
    with pytest.raises(OSError, match="cannot listen"):
        shm.listen(server.address)


def test_everybody_may_be_let_in_if_that_is_said():
    with shm.listen("tcp://0.0.0.0:0", auth="none") as server:
        port = server.address.rpartition(":")[2]
        end = shm.connect(f"tcp://127.0.0.1:{port}", timeout=20)
        with server.accept(20) as other:
            end.send(1)
            assert other.receive(20) == 1
            end.close()
            assert list(other) == []


def test_an_end_from_connect_cannot_be_passed_on(server):
    left, right = dial(server)
    with pytest.raises(shm.SerializationError, match="address"):
        pickle.dumps(left)
    left.close()
    right.close()


# --- broken connections ---------------------------------------------------------------------------------


def wait_until_finished(end):
    """Its goodbye has been heard: who has sent one, and cannot reach anybody, waits for the peer's timeout."""
    poll_until(lambda: end._link._port.closed)


def test_a_connection_that_breaks_again_and_again_loses_and_doubles_nothing(server):
    with Proxy(server.address) as proxy:
        left = shm.connect(proxy.address, timeout=20, buffer_bytes="4 MiB", peer_timeout=60)
        right = server.accept(20)
        done = threading.Event()

        def break_it():
            while not done.is_set():
                seen = proxy.bytes_passed
                poll_until(lambda: done.is_set() or proxy.bytes_passed > seen + 500_000, 60)
                proxy.drop()

        def send(end, count):
            for i in range(count):
                end.send([i, np.full(3000, i)])

        count = 1500
        threads = [
            threading.Thread(target=break_it),
            threading.Thread(target=send, args=(left, count)),
            threading.Thread(target=send, args=(right, count)),
        ]
        for thread in threads:
            thread.start()
        for i in range(count):
            for end in (left, right):
                number, block = end.receive(60)
                assert number == i
                assert (block == i).all()
        done.set()
        for thread in threads:
            thread.join()
        assert proxy.connections > 1
        assert left.stats().reconnects >= 1
        assert left.stats().gaps == right.stats().gaps == 0
        left.close()
        assert list(right) == []
        right.close()
        wait_until_finished(left)


def test_a_slow_path_changes_nothing_but_the_time(server):
    with Proxy(server.address, delay=0.005) as proxy:
        left = shm.connect(proxy.address, timeout=20)
        right = server.accept(20)
        for i in range(100):
            left.send([i, np.full(2000, i)], 60)
        for i in range(100):
            number, block = right.receive(60)
            assert number == i
            assert (block == i).all()
        left.close()
        assert list(right) == []
        right.close()
        wait_until_finished(left)


def test_a_path_that_is_gone_for_a_while_comes_back(server):
    with Proxy(server.address) as proxy:
        left = shm.connect(proxy.address, timeout=20, peer_timeout=60)
        right = server.accept(20)
        left.send("before")
        assert right.receive(20) == "before"
        proxy.shut()
        proxy.drop()
        for i in range(100):
            left.send(i)
            right.send(-i)
        proxy.open()
        assert [right.receive(60) for _ in range(100)] == list(range(100))
        assert [left.receive(60) for _ in range(100)] == [-i for i in range(100)]
        left.close()
        assert list(right) == []  # it has come through: with the proxy the path ends
        right.close()
        wait_until_finished(left)


def test_who_does_not_come_back_is_lost():
    with shm.listen("tcp://127.0.0.1:0", peer_timeout=0.5) as server, Proxy(server.address) as proxy:
        left = shm.connect(proxy.address, timeout=20, peer_timeout=0.5)
        right = server.accept(20)
        left.send(1)
        proxy.shut()
        poll_until(lambda: proxy.bytes_passed > 200)
        assert right.receive(20) == 1
        proxy.drop()
        with pytest.raises(shm.PeerLost):
            left.receive(60)
        with pytest.raises(shm.PeerLost):
            right.receive(60)
        left.close()
        right.close()


def test_a_cut_cable_is_found():
    with shm.listen("tcp://127.0.0.1:0", peer_timeout=1) as server, Proxy(server.address) as proxy:
        left = shm.connect(proxy.address, timeout=20, peer_timeout=1)
        right = server.accept(20)
        proxy.cut()
        with pytest.raises(shm.PeerLost):
            left.receive(60)
        with pytest.raises(shm.PeerLost):
            right.receive(60)
        left.close()
        right.close()


def test_a_killed_client_on_this_machine_is_lost_at_once(server):
    script = """
        import os, signal, sys, shmengine as shm
        end = shm.connect(sys.argv[1], timeout=30)
        for i in range(10):
            end.send(i)
        end.receive()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    with shm.listen("tcp://127.0.0.1:0", peer_timeout=3600) as patient:
        thread = threading.Thread(target=run_script, args=(script,), kwargs={"args": [patient.address]})
        thread.start()
        with patient.accept(60) as end:
            assert [end.receive(60) for _ in range(10)] == list(range(10))
            end.send("now")
            with pytest.raises(shm.PeerLost):
                end.receive(60)
        thread.join()


# --- strangers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_scanner_gets_nowhere_and_disturbs_nobody(server, seed):
    left, right = dial(server)
    host, _, port = server.address.removeprefix("tcp://").rpartition(":")
    random = np.random.default_rng(seed)
    greeting = b"\xff\0\0\0\0\0\0\0\1\x7f\3\0NULL" + bytes(48)
    for _ in range(20):
        with socket.create_connection((host, int(port))) as stranger:
            stranger.settimeout(5)
            try:
                stranger.sendall(greeting if random.integers(2) else b"")
                stranger.sendall(random.bytes(int(random.integers(1, 5000))))
            except OSError:
                continue
    left.send(1)
    assert right.receive(20) == 1
    with pytest.raises(shm.WouldBlock):
        server.accept(0)
    left.close()
    right.close()


def test_parts_without_a_greeting_are_not_even_looked_into():
    import zmq

    class Bomb:
        def __reduce__(self):
            return os._exit, (1,)

    frame = encode(Bomb()).to_bytes()
    server = shm.listen("tcp://127.0.0.1:0", peer_timeout=0.5)
    left, right = dial(server)
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        stranger.connect(server.address)
        for kind in (Kind.DATA, Kind.GOODBYE, Kind.ACKNOWLEDGE, Kind.WELCOME, Kind.REFUSAL, Kind.HELLO, 77):
            stranger.send(PREFIX.pack(kind, 0, 1 << 60) + frame)
            stranger.send_multipart([b"a", PREFIX.pack(kind, 0, 0), b"c", b"d"])
            stranger.send(b"")
        greeting = Proof(b"").greeting(Kind.HELLO, b"k" * 16, b"n" * 16)
        stranger.send(PREFIX.pack(Kind.HELLO, 0, 0) + greeting)
        assert stranger.poll(20_000)
        assert stranger.recv()[0] == Kind.WELCOME
        stranger.send(PREFIX.pack(Kind.DATA, 0, 0) + b"no frame")
        with server.accept(20) as accepted:
            with pytest.raises(shm.Corrupt):
                accepted.receive(20)
            stranger.send(PREFIX.pack(Kind.DATA, 5, 0) + b"no frame, and others are missing")
            with pytest.raises(shm.Timeout):
                accepted.receive(0.1)
            while True:  # it is asked for what is missing
                assert stranger.poll(20_000)
                kind, number, _ = PREFIX.unpack_from(stranger.recv())
                if kind == Kind.REPEAT:
                    break
            assert number == 1
    left.send(1)
    assert right.receive(20) == 1
    left.close()
    right.close()
    server.close()


def test_a_session_that_the_server_does_not_know_is_refused(server):
    import zmq

    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        stranger.connect(server.address)
        stranger.send(PREFIX.pack(Kind.HELLO, 5, 0) + Proof(b"").greeting(Kind.HELLO, b"k" * 16, b"n" * 16))
        assert stranger.poll(20_000)
        part = stranger.recv()
        assert part[0] == Kind.REFUSAL
        assert "does not know" in Greeting.unpack(part).text


def test_without_the_secret_nobody_is_the_other_end(ends):
    import zmq

    left, right = ends
    with pytest.raises(shm.WouldBlock):
        left.try_receive()  # it listens now
    with zmq.Context() as context, context.socket(zmq.PAIR) as stranger:
        stranger.linger = 0
        stranger.connect(f"ipc://@{left._link._name}")
        greeting = Proof(b"guessed").greeting(Kind.HELLO, left._link._session.key, b"n" * 16)
        stranger.send(PREFIX.pack(Kind.HELLO, 0, 0) + greeting)
        stranger.send(PREFIX.pack(Kind.DATA, 0, 0) + pickle.dumps(1))
        assert not stranger.poll(200)
        with pytest.raises(shm.WouldBlock):
            left.try_receive()
    left.send("still works")
    assert right.receive(20) == "still works"


def test_asking_what_is_behind_a_connection_keeps_no_descriptor_whatever_interrupts():
    def interrupt(*_):
        if asking:
            asking.clear()
            raise Interrupted

    asking: list[bool] = []
    here, there = socket.socketpair()
    with here, there:
        before = open_fds()
        handler = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 2e-4, 2e-4)
        try:
            interrupted = 0
            while interrupted < 2000:
                try:
                    asking.append(True)
                    for _ in range(1000):
                        assert local.process_behind(here.fileno()) == os.getpid()
                        assert local.unread_bytes(here.fileno()) == 0
                    asking.clear()
                except Interrupted:
                    interrupted += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
        assert open_fds() == before


def test_whoever_is_turned_away_dials_again(ends):
    """While somebody else is there, or what is left of him, nobody hears the other end."""
    import zmq

    left, right = ends
    with pytest.raises(shm.WouldBlock):
        left.try_receive()  # it listens now
    hung_up = threading.Event()
    with zmq.Context() as context, context.socket(zmq.PAIR) as stranger:
        stranger.linger = 0
        with stranger.get_monitor_socket(zmq.Event.HANDSHAKE_SUCCEEDED) as monitor:
            stranger.connect(f"ipc://@{left._link._name}")
            assert monitor.poll(60_000)
            stranger.disable_monitor()
        right.send("there")
        port = right._link._port
        hang_up = port._hang_up
        port._hang_up = lambda: (hang_up(), hung_up.set())
        assert hung_up.wait(60)
    left.send("and back")
    assert right.receive(60) == "and back"
    assert left.receive(60) == "there"
    assert left.stats().gaps == right.stats().gaps == 0


def test_news_of_a_connection_that_was_hung_up(ends):
    """It had come back by itself, and nobody had looked."""
    import zmq

    left, right = ends
    right.send("begins")
    assert left.receive(60) == "begins"
    port = right._link._port
    with port.lock:
        port._wait_and_dial()
        port.on_event(zmq.Event.HANDSHAKE_SUCCEEDED, 0)
        port.cut_off(right._link._session)
    port.hub.wake()
    left.send("there")
    right.send("and back")
    assert left.receive(60) == "and back"
    assert right.receive(60) == "there"


def test_whoever_has_gone_when_his_greeting_is_read_is_not_there(tmp_path):
    """What has become of his connection is known before his greeting is."""
    import zmq

    with shm.listen(f"ipc://{tmp_path}/here") as server:
        port = server._port
        with port.lock:  # the service sees nothing of it
            before = open_fds()
            with zmq.Context() as context, context.socket(zmq.DEALER) as guest:
                guest.linger = 1000
                guest.connect(server.address)
                greeting = Proof(b"").greeting(Kind.HELLO, b"k" * 16, b"n" * 16)
                guest.send(PREFIX.pack(Kind.HELLO, 0, 0) + greeting)
                poll_until(lambda: port._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN)
            poll_until(lambda: open_fds().keys() <= before.keys())  # ZeroMQ's thread has seen it leave
            port.pump(-1)
        with pytest.raises(shm.WouldBlock):
            server.accept(0)
        end = shm.connect(server.address, timeout=20)
        with end, server.accept(20) as other:
            end.send(1)
            assert other.receive(20) == 1


@pytest.mark.parametrize("same", [True, False])
def test_whoever_comes_with_the_descriptor_of_one_who_has_gone_is_heard(tmp_path, same):
    """News of both wait to be read; `same`: it is the same client, who has come back."""
    import zmq

    def come(key):
        guest = context.socket(zmq.DEALER)
        guest.linger = 1000
        guest.connect(server.address)
        guest.send(PREFIX.pack(Kind.HELLO, 0, 0) + Proof(b"").greeting(Kind.HELLO, key, b"n" * 16))
        return guest

    with shm.listen(f"ipc://{tmp_path}/here") as server, zmq.Context() as context:
        port = server._port
        with come(b"a" * 16) as first:
            assert first.poll(60_000)
            before = open_fds()
            port.lock.acquire()  # the service sees nothing of what follows
        try:
            poll_until(lambda: len(open_fds()) < len(before) - 1)  # both sides have closed
            second = come(b"a" * 16 if same else b"b" * 16)
            poll_until(lambda: port._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN)
            port.read_events()
            there = [session for session in port.sessions.values() if session.peer is not None]
            assert there == [*port._by_fd.values()]
            assert [session.key[:1] for session in there] == [b"a" if same else b"b"]
        finally:
            port.lock.release()
        with second:
            assert second.poll(60_000)
            assert second.recv()[0] == Kind.WELCOME


def act_as_guests(address, orders):
    """Be clients of ZeroMQ's that greet by themselves; the other process has only what it accepts."""
    import zmq

    here = {}
    with zmq.Context() as context:
        for what, key, parts in iter(orders.recv, None):
            if what == "come":
                here[key] = context.socket(zmq.DEALER)
                here[key].linger = 1000
                here[key].connect(address)
            for part in parts:
                here[key].send(part)
            if what == "leave":
                here.pop(key).close()
            orders.send(here[key].recv() if what == "hear" else None)
        context.destroy(0)


class Guests:
    """Who comes to a server, one after the other with the same descriptor."""

    def __init__(self, server):
        context = multiprocessing.get_context("spawn")
        self.port = server._port
        self.orders, orders = context.Pipe()
        self.process = context.Process(target=act_as_guests, args=(server.address, orders))
        self.process.start()
        orders.close()
        self.none = self.connections()

    def _order(self, what, key, *parts):
        self.orders.send((what, key, parts))
        return self.orders.recv()

    def come(self, key, greetings=1):
        greeting = PREFIX.pack(Kind.HELLO, 0, 0) + Proof(b"").greeting(Kind.HELLO, key, b"n" * 16)
        self._order("come", key, *[greeting] * greetings)

    def send(self, key, *parts):
        self._order("send", key, *parts)

    def hear(self, key):
        return self._order("hear", key)

    def leave(self, key):
        """Let one go; ZeroMQ sees that, and nobody else if the caller has the port's lock."""
        self._order("leave", key)
        poll_until(lambda: self.connections() == self.none)

    @staticmethod
    def connections():
        return {fd for fd, what in open_fds().items() if what.startswith("socket:")}

    def wait(self, *, news, parts=1):
        """Wait until so much is known of connections, and until so many parts should have come."""
        poll_until(lambda: len(self.port.hear_news()) >= news)
        time.sleep(0.02 * parts)  # too little would only make the test easier

    def close(self):
        self.orders.send(None)
        self.process.join()
        self.process.close()
        self.orders.close()


@pytest.fixture
def guests(tmp_path):
    with (
        shm.listen(f"ipc://{tmp_path}/here", peer_timeout=0.5) as server,
        contextlib.closing(Guests(server)) as guests,
    ):
        yield server, guests


def test_what_one_has_brought_is_read_when_his_descriptor_is_anothers(guests):
    """Also if that one's greeting comes in between: ZeroMQ takes one part of each in turn."""
    server, guests = guests
    port = server._port
    guests.come(b"a" * 16)
    assert guests.hear(b"a" * 16)[0] == Kind.WELCOME
    with port.lock:
        (fd,) = port._by_fd
        parts = PREFIX.pack(Kind.DATA, 0, 0) + b"there", PREFIX.pack(Kind.GOODBYE, 1, 0)
        guests.send(b"a" * 16, *parts)
        guests.leave(b"a" * 16)
        guests.come(b"b" * 16)
        guests.wait(news=3, parts=3)
        poll_until(lambda: (port.read_events(), port.pump(-1), b"b" * 16 in port.sessions)[2])
        port.read_events()
        gone, there = port.sessions[b"a" * 16], port.sessions[b"b" * 16]
        assert (gone.received, gone.goodbye, gone.peer) == (2, True, None)
        assert port._by_fd == {fd: there}
        assert [*port._peers] == [there.peer]


@pytest.mark.parametrize("key", [b"b" * 16, b"a" * 16])
def test_a_late_greeting_of_one_who_has_gone_is_not_taken_for_anothers(guests, key):
    """Whose descriptor is the same: he greeted twice, and the second time is read after the other one's.

    Or it is he himself, who has come back.
    """
    server, guests = guests
    port = server._port
    with port.lock:
        guests.come(b"a" * 16, greetings=2)
        guests.wait(news=2, parts=2)
        guests.leave(b"a" * 16)
        guests.come(key)
        guests.wait(news=5, parts=3)
        poll_until(lambda: (port.read_events(), port.pump(-1), key in port.sessions)[2])
        port.read_events()
        there = [session for session in port.sessions.values() if session.peer is not None]
        assert [session.key for session in there] == [key]
        assert [*port._by_fd.values()] == there
        assert port._peers == {there[0].peer: there[0]}


def test_nothing_is_kept_of_one_who_was_missed_by_who_sent(guests):
    import zmq

    server, guests = guests
    port = server._port
    guests.come(b"a" * 16)
    assert guests.hear(b"a" * 16)[0] == Kind.WELCOME
    with port.lock:
        session = port.sessions[b"a" * 16]
        guests.leave(b"a" * 16)
        port._socket.getsockopt(zmq.EVENTS)  # ZeroMQ's socket knows what its thread has seen
        session.keep([session.prefix(Kind.DATA, 0) + b"there"])
        port._hand_over(session)
        assert session.peer is None
        port.read_events()
        port.arrived.remove(session)
        port.remove(session)
        assert not port._peers
        assert not port._by_fd


def test_no_news_of_connections_are_lost_to_a_handler_that_raises(guests):
    """Whatever it interrupts."""

    def interrupt(_, frame):
        if frame.f_code.co_filename.startswith(os.path.dirname(shm.__file__)):
            raise Interrupted

    def visit():
        for number in range(ROUNDS):
            guests.come(b"%016d" % number)
            guests.leave(b"%016d" % number)

    server, guests = guests
    port, heard, interrupted = server._port, 0, 0
    visitor = threading.Thread(target=visit)
    with port.lock:
        handler = signal.signal(signal.SIGALRM, interrupt)
        visitor.start()
        signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-4)
        try:
            while heard < 3 * ROUNDS:  # accepted, greeted, gone. If one is missing the watchdog ends this.
                try:
                    heard = len(port.hear_news())
                except Interrupted:
                    interrupted += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            visitor.join()
        assert interrupted > 0
        port._news.clear()


class Once:
    """Calls something, and the first time raises before or after it."""

    def __init__(self, function, *, after=False):
        self.function, self.after, self.left = function, after, 1

    def __call__(self, *args, **kwargs):
        first, self.left = self.left, 0
        if first and not self.after:
            raise Interrupted
        result = self.function(*args, **kwargs)
        if first:
            raise Interrupted
        return result


@pytest.mark.parametrize("after", [False, True])
def test_who_was_interrupted_while_reading_an_answer_is_connected(server, after):
    end, other = dial(server)
    with end, other:
        end.send(1)
        assert other.receive(20) == 1
        port, session = end._link._port, end._link._session
        with port.lock:  # what the service would do, done here
            session.connected = once = Once(session.connected, after=after)
            port.cut_off(session)
            port._wait_and_dial()

            def answered():
                with contextlib.suppress(Interrupted):
                    port.read_events()
                    port.serve()
                with server._port.lock:
                    server._port.read_events()
                    server._port.serve()
                return not once.left

            poll_until(answered)
            session.connected = once.function
        end.send(2)
        assert other.receive(20) == 2
        other.send(3)
        assert end.receive(20) == 3


def test_who_was_interrupted_while_a_guest_came_has_him_to_accept(guests):
    server, guests = guests
    port = server._port
    with port.lock:
        guests.come(b"a" * 16)
        guests.wait(news=2)
        with interrupting(port, "add"):
            while True:
                port.pump(-1)
        port.pump(-1)
        assert [session.key for session in port.arrived] == [b"a" * 16]
    with server.accept(20) as end:
        assert guests.hear(b"a" * 16)[0] == Kind.WELCOME
        end.send("there")


@contextlib.contextmanager
def interrupting(target, name):
    """Have a signal come with each call of a function, whose handler raises."""

    def interrupt(*_):
        raise Interrupted

    def call(*args, **kwargs):
        signal.raise_signal(signal.SIGUSR1)
        return function(*args, **kwargs)

    function = getattr(target, name)
    handler = signal.signal(signal.SIGUSR1, interrupt)
    setattr(target, name, call)
    try:
        with pytest.raises(Interrupted):
            yield
    finally:
        setattr(target, name, function)
        signal.signal(signal.SIGUSR1, handler)


def test_a_guest_is_not_lost_to_who_was_interrupted_in_accept(server):
    with shm.connect(server.address, timeout=20) as end:
        end.send(1)
        with interrupting(server._port, "accept"):
            server.accept(20)
        gc.collect()
        with server.accept(20) as other:
            assert other.receive(20) == 1
            other.send(2)
            assert end.receive(20) == 2
        with pytest.raises(shm.WouldBlock):
            server.accept(0)


def test_who_was_interrupted_in_connect_or_listen_has_left_nothing(server, tmp_path):
    address = f"ipc://{tmp_path}/here"
    members = set(server._port.hub.members)
    with interrupting(dialing.DialPort, "_dial"):
        shm.connect(server.address, timeout=20)
    with interrupting(listening, "SocketFile"):
        shm.listen(address)
    gc.collect()
    with shm.listen(address):
        pass
    poll_until(lambda: server._port.hub.members == members)


def test_between_attempts_there_are_pauses():
    """Whoever accepts and hangs up, as forwarders with nobody behind them do, is not called without end."""
    with socket.create_server(("127.0.0.1", 0)) as forwarder:
        calls = threading.Thread(target=pytest.raises, args=(shm.Timeout, call_in_vain, forwarder))
        calls.start()
        begin = time.monotonic()
        for _ in range(20):
            forwarder.accept()[0].close()
        # 5 ms, twice as long each time, and then 200. (In between ZeroMQ may come by itself, before we know.)
        assert time.monotonic() - begin >= 0.5
        calls.join()


def call_in_vain(forwarder):
    shm.connect("tcp://{}:{}".format(*forwarder.getsockname()), timeout=6)


def test_the_end_of_a_process_waits_for_what_its_sockets_still_send():
    """Also when nobody needs them any more."""
    script = """
        import time, shmengine as shm
        from shmengine.channels import hub

        def end_context(context):
            time.sleep(0.5)  # as when the machine is busy
            at_once(context)
            print("sent")

        at_once, hub.end_context = hub.end_context, end_context
        left, right = shm.channel("socket")
        left.send(1)
        assert right.receive(20) == 1
        left.close()
        right.close()
        while hub._hub is not None:
            time.sleep(0.01)
    """
    assert run_script(script, check=True).stdout == "sent\n"


def test_a_dead_client_whose_child_lives_on_is_lost(tmp_path):
    """The child has inherited the connection, which so does not end."""
    script = """
        import os, signal, sys, time, shmengine as shm
        end = shm.connect(sys.argv[1], timeout=30)
        end.send("there")
        assert end.receive(60) == "go"
        child = os.fork()
        if child == 0:
            os.closerange(0, 3)
            time.sleep(1000)
        end.send(child)
        end.receive()
    """
    with (
        shm.listen(f"ipc://{tmp_path}/here") as server,
        start_script(script, args=[server.address]) as process,
        server.accept(60) as end,
    ):
        assert end.receive(60) == "there"
        end.send("go")
        child = end.receive(60)
        try:
            process.kill()
            process.wait()
            with pytest.raises(shm.PeerLost):
                end.receive(60)
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_stranger_who_is_turned_away_and_leaves_ends_nobody():
    """ZeroMQ reads nothing of his any more; a beat that was due then ended the process."""
    script = """
        import time, zmq, shmengine as shm, shmengine.channels.socket as module
        module.PEER_SECONDS = 0.5
        left, right = shm.channel("socket")
        with left, right:
            left.send(1)
            assert right.receive(20) == 1
            with zmq.Context() as context, context.socket(zmq.PAIR) as stranger:
                stranger.linger = 0
                stranger.connect(f"ipc://@{left._link._name}")
                for _ in range(10):
                    stranger.send(b"anything")
                    time.sleep(0.02)
            time.sleep(1)
            left.send(2)
            assert right.receive(20) == 2
    """
    run_script(script, check=True)


# --- interruptions ----------------------------------------------------------------------------------------


def test_a_storm_of_signals_loses_and_doubles_nothing():
    run_script(
        """
        import multiprocessing, os, signal, threading, time
        import numpy as np, shmengine as shm

        class Storm(BaseException):
            pass

        def storm(_, frame):
            if frame.f_code.co_filename != __file__:  # not between a call and where its result is kept
                raise Storm

        def echo(end):
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            for message in end:
                end.send(message)

        if __name__ == "__main__":
            left, right = shm.channel("socket", buffer_bytes="1 MiB")
            child = multiprocessing.get_context("fork").Process(target=echo, args=(right,))
            child.start()
            right.close()
            left.send("warm")
            assert left.receive(30) == "warm"
            signal.signal(signal.SIGUSR1, storm)
            stop = threading.Event()
            main = threading.main_thread().ident

            def thunder():
                while not stop.wait(0.002):
                    signal.pthread_kill(main, signal.SIGUSR1)

            thread = threading.Thread(target=thunder)
            thread.start()
            got, interrupted, sent = [], 0, 0
            end_time = time.monotonic() + 4
            while time.monotonic() < end_time:
                try:
                    number = sent
                    sent += 1  # whether or not it went: a number is never used twice
                    left.send([number, np.full(3000, number)], 30)
                except Storm:
                    interrupted += 1
                try:
                    while True:
                        got.append(left.try_receive())
                except shm.WouldBlock:
                    pass
                except Storm:
                    interrupted += 1
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            stop.set()
            thread.join()
            left.send("last")
            while not got or not isinstance(got[-1], str):
                got.append(left.receive(30))
            numbers = [message[0] for message in got[:-1]]
            assert all((message[1] == message[0]).all() for message in got[:-1])
            assert numbers == sorted(set(numbers)), "doubled, or in another order"
            assert interrupted > 10, interrupted
            stats = left.stats()
            assert stats.gaps == stats.corrupt == 0, stats
            # What was taken from the channel and interrupted on its way to `got` is the test's own loss.
            assert len(numbers) >= sent - 2 * interrupted - 1
            left.close()
            child.join()
            assert child.exitcode == 0
        """,
        check=True,
        timeout=90,
    )


STORM = """
    import multiprocessing, os, random, signal, threading
    import shmengine as shm

    COUNT, ENOUGH = 30_000, 20  # messages at least, and interruptions: how many there are depends on the machine
    PACKAGE = os.path.dirname(shm.__file__)

    class Storm(BaseException):
        pass

    def storm(_, frame):
        if frame.f_code.co_filename.startswith(PACKAGE):  # not between a call and where its result is kept
            raise Storm

    def thunder(function):
        stop, main = threading.Event(), threading.main_thread().ident
        signal.signal(signal.SIGUSR1, storm)

        def run():
            while not stop.wait(random.uniform(0, 0.0003)):
                signal.pthread_kill(main, signal.SIGUSR1)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            return function()
        finally:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            stop.set()
            thread.join()

    def send(end):
        sure, number = [], 0
        while number < COUNT or not is_enough():
            try:
                while number < COUNT or not is_enough():
                    number += 1
                    end.send(number - 1)
                    sure.append(number - 1)
            except Storm:
                interruptions.release()
        return sure

    def receive(end):
        got = []
        while not got or got[-1] != "last":
            try:
                while not got or got[-1] != "last":
                    got.append(end.receive(30))
            except Storm:
                interruptions.release()
        return got

    def is_enough():
        return interruptions.get_value() >= ENOUGH

    def sender(end):
        end.send(len(send(end)))
        end.send("last")
        end.receive(30)

    def receiver(end, pipe):
        pipe.send(receive(end))

    if __name__ == "__main__":
        context = multiprocessing.get_context("fork")
        interruptions = context.Semaphore(0)
        left, right = shm.channel("socket", buffer_bytes="1 MiB")
"""


def test_a_storm_over_short_ways_loses_and_doubles_nothing_that_is_received():
    run_script(
        STORM
        + """
        child = context.Process(target=sender, args=(right,))
        child.start()
        right.close()
        got = thunder(lambda: receive(left))
        *numbers, count, last = got
        assert numbers == [*range(count)] and count >= COUNT, (len(numbers), count)
        assert left._link._session.quick_received > 0
        left.send("all")
        left.close()
        child.join()
        assert child.exitcode == 0
        """,
        check=True,
        timeout=90,
    )


def test_a_storm_over_short_ways_loses_and_doubles_nothing_that_is_sent():
    run_script(
        STORM
        + """
        here, there = context.Pipe()
        child = context.Process(target=receiver, args=(right, there))
        child.start()
        right.close()
        sure = thunder(lambda: send(left))
        left.send("last")
        got = here.recv()
        assert got == sorted(set(got[:-1])) + ["last"]
        assert set(sure) <= set(got), "lost"
        assert left._link._session.quick_sent > 0
        left.close()
        child.join()
        assert child.exitcode == 0
        """,
        check=True,
        timeout=90,
    )


# --- short ways ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", ["frame", "payload"])
def test_small_messages_go_the_short_ways(check):
    left, right = shm.channel("socket", check=check)
    with left, right:
        left.send("warm")
        assert right.receive(20) == "warm"
        for number in range(3000):
            left.send(number)
        assert [right.receive(20) for _ in range(3000)] == list(range(3000))
        # How many of them: that depends on what the service does meanwhile, which has its own thread.
        assert left._link._session.quick_sent > 0
        assert right._link._session.quick_received > 0
        sent, received = left.stats(), right.stats()
        assert sent.messages_sent == received.messages_received == 3001
        assert sent.bytes_sent == received.bytes_received == sent.wire_bytes_sent
        assert received.wire_bytes_received == sent.wire_bytes_sent


def test_whoever_looks_now_and_then_goes_the_short_ways_too(ends):
    """To look in vain is to ask to be woken: once."""
    left, right = ends
    left.send("warm")
    assert right.receive(20) == "warm"
    session, port = right._link._session, right._link._port

    def received():
        with port.lock:
            port.pump(-1)
        return session.received

    for number in range(1, 1001, 10):
        with pytest.raises(shm.WouldBlock):
            right.try_receive()
        for more in range(10):
            left.send(number + more)
        poll_until(lambda all_of_them=number + 10: received() == all_of_them, 20)
        assert [right.try_receive() for _ in range(10)] == list(range(number, number + 10))
    assert session.quick_received > 0


def test_threads_that_go_short_and_long_ways_keep_their_order(ends):
    """Small messages do not overtake large ones of the same thread, nor does one come twice."""
    left, right = ends
    block = np.zeros(100_000, "u1")

    def send(who):
        for number in range(400):
            left.send((who, number, block) if number % 7 == 0 else f"{who} {number}")

    senders = [threading.Thread(target=send, args=(who,)) for who in range(3)]
    received = []
    receivers = [
        threading.Thread(target=lambda: received.append([right.receive(20) for _ in range(600)]))
        for _ in range(2)
    ]
    for thread in (*senders, *receivers):
        thread.start()
    for thread in (*senders, *receivers):
        thread.join()
    names = []
    for some in received:
        mine = [tuple(map(int, x.split())) if isinstance(x, str) else x[:2] for x in some]
        for who in range(3):
            numbers = [number for other, number in mine if other == who]
            assert numbers == sorted(numbers)
        names += mine
    assert sorted(names) == [(who, number) for who in range(3) for number in range(400)]


@pytest.mark.parametrize("timeout", ["soon", -1, float("nan")])
def test_short_ways_check_the_timeout(ends, timeout):
    left, right = ends
    left.send(1)
    assert right.receive(20) == 1
    for call in (partial(left.send, 2), right.receive):
        with pytest.raises((TypeError, ValueError)):
            call(timeout)
    left.send(3)
    assert right.receive(20) == 3


def test_a_closed_end_goes_no_short_way(ends):
    left, right = ends
    left.send(1)
    assert right.receive(20) == 1
    left.send(2)
    right.close()
    left.close()
    for call in (partial(left.send, 3), right.receive):
        with pytest.raises(shm.Closed):
            call()


# --- sessions alone ---------------------------------------------------------------------------------------


GREETING = Greeting(b"k", b"n", b"", 1 << 20, "")


def part(kind, number, taken=0, body=b""):
    return PREFIX.pack(kind, number, taken) + body


def test_a_session_resends_what_the_other_end_has_not_received():
    session = Session(b"k", Counts(), 1 << 20)
    for i in range(5):
        session.keep([part(Kind.DATA, i)])
    session.connected(b"", part(Kind.WELCOME, 0), GREETING)
    for number, _ in session.to_hand_over():
        session.handed_over(number)
    assert list(session.to_hand_over()) == []
    session.feed(part(Kind.ACKNOWLEDGE, 0, 2))
    session.disconnected()
    session.connected(b"", part(Kind.WELCOME, 3, 2), GREETING)
    again = [number for number, _ in session.to_hand_over()]
    assert again == [3, 4]
    for number in again:
        session.handed_over(number)
    assert session.counts.resent == 2
    assert session.counts.reconnects == 1
    session.feed(part(Kind.ACKNOWLEDGE, 0, 5))
    assert not session.outstanding
    assert session.next_number == 5


def test_a_session_drops_what_comes_twice():
    session = Session(b"k", Counts(), 1 << 20)
    for number in (0, 1, 1, 0, 2):
        session.feed(part(Kind.DATA, number, body=b"%d" % number))
    got = []
    while (found := session.next_message()) is not None:
        assert session.next_message() == found
        got.append(found[1][0][-1:])
        session.take()
        session.take()
    assert got == [b"0", b"1", b"2"]
    assert session.counts.duplicates == 2
    session.feed(part(Kind.DATA, 2))
    assert session.next_message() is None


def test_acknowledgements_of_what_was_never_sent_do_no_harm():
    session = Session(b"k", Counts(), 1 << 20)
    session.keep([part(Kind.DATA, 0)])
    session.feed(part(Kind.ACKNOWLEDGE, 0, 1 << 60))
    assert not session.outstanding
    assert session.next_number == 1
    session.connected(b"", part(Kind.WELCOME, 1 << 60, 1 << 60), GREETING)
    session.keep([part(Kind.DATA, 1)])
    assert [number for number, _ in session.to_hand_over()] == [1]


def test_parts_are_larger_within_a_machine():
    assert most_part_bytes("tcp://127.0.0.1:1") == 1 << 19
    assert most_part_bytes("ipc://@x") > 16 << 20


def test_a_session_is_never_missed_since_nothing(monkeypatch):
    """Whoever looks in the middle of it, or after a signal's handler, would take the other end for lost long ago."""
    session = Session(b"k" * 16, Counts(), 1 << 20)
    session.connected(b"peer", part(Kind.WELCOME, 0), GREETING)
    peers = []
    monkeypatch.setattr(time, "monotonic_ns", lambda: peers.append(session.peer) or 5)
    session.disconnected()
    assert peers == [b"peer"]
    assert (session.peer, session.missed_since) == (None, 5)


def test_a_process_of_this_machine_is_known_to_be_gone():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0,))
    here = identity_of_this_process()
    assert not is_gone(here)
    assert not is_gone("another-boot 4026531836 1 1")
    assert not is_gone("")
    child.start()
    gone = f"{here.rsplit(' ', 2)[0]} {child.pid} {start_time(child.pid)}"
    child.join()
    assert is_gone(gone)
    assert is_gone(f"{here.rsplit(' ', 1)[0]} 1")


# --- who listens, and who only says so ----------------------------------------------------------------


def test_a_server_removes_no_file_and_takes_no_address(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("of somebody")
    with pytest.raises(FileExistsError):
        shm.listen(f"ipc://{kept}")
    assert kept.read_text() == "of somebody"
    with shm.listen(f"ipc://{tmp_path}/used") as server:
        with pytest.raises(OSError, match="somebody listens there"):
            shm.listen(f"ipc://{tmp_path}/used")
        mine, theirs = dial(server)
        mine.send("still here")
        assert theirs.receive(20) == "still here"
        mine.close()
        theirs.close()


def test_a_listener_of_another_user_is_refused(tmp_path, monkeypatch):
    with shm.listen(f"ipc://{tmp_path}/theirs") as server:
        monkeypatch.setattr(dialing, "user_behind", lambda fd: os.geteuid() + 1)
        with pytest.raises(shm.PeerLost, match="a process of another user"):
            shm.connect(server.address, timeout=20)


def test_whoever_announces_too_much_is_cut_off(server):
    """Before he has said who he is: nobody makes room for gigabytes of a stranger."""
    host, port = server.address.removeprefix("tcp://").rsplit(":", 1)
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16 + 1 + 31))
        stranger.sendall(b"\x06" + (3 << 30).to_bytes(8, "big") + bytes(1 << 16))
        with contextlib.suppress(ConnectionError):
            while stranger.recv(1 << 16):
                pass
    mine, theirs = dial(server)
    mine.send("others come in")
    assert theirs.receive(20) == "others come in"
    mine.close()
    theirs.close()


def answer_and_end(end):
    hub.EXIT_SECONDS = 3600.0  # to wait for somebody who does not ask
    end.send(end.receive() + 1)


@pytest.mark.parametrize("start", STARTS)
def test_a_process_that_has_answered_ends(ends, start):
    """Although nobody receives any more: what it sent was taken."""
    left, right = ends
    child = multiprocessing.get_context(start).Process(target=answer_and_end, args=(right,))
    child.start()
    right.close()
    left.send(1)
    assert left.receive(60) == 2
    child.join()
    assert child.exitcode == 0
