"""What the other end of a socket channel, or whoever says that he is one, cannot do to this one."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zmq

import shmengine as shm
from shmengine import config
from shmengine.channels import hub, servers
from shmengine.channels.greetings import Greeting, Proof
from shmengine.channels.sessions import PREFIX, UNKNOWN_BYTES, Kind
from tests.helpers import open_fds, poll_until, run_script
from tests.helpers.proxy import Proxy


def dial(server, **options):
    """Both ends of a channel through a server."""
    mine = shm.connect(server.address, timeout=20, **options)
    return mine, server.accept(20)


# --- what is said of an end that is lost ----------------------------------------------------------


def test_of_an_end_that_cannot_be_reached_nobody_says_that_it_died():
    with shm.listen("tcp://127.0.0.1:0", peer_timeout=0.5) as server, Proxy(server.address) as proxy:
        left = shm.connect(proxy.address, timeout=20, peer_timeout=0.5)
        right = server.accept(20)
        proxy.cut()
        for end in (left, right):
            with pytest.raises(shm.PeerLost, match=r"could not be reached for 0\.5 seconds"):
                end.receive(60)
            with pytest.raises(shm.PeerLost, match=r"could not be reached for 0\.5 seconds"):
                end.send(1)
            end.close()


# --- who does not wait ----------------------------------------------------------------------------


@pytest.fixture
def stranger():
    """A socket of ZeroMQ, without all that keeps to any rule."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        yield socket


def greet(stranger, address, window=0):
    """Connect as an end of a channel does."""
    stranger.connect(address)
    greeting = Proof(b"").greeting(Kind.HELLO, b"k" * 16, b"n" * 16, window=window)
    stranger.send(PREFIX.pack(Kind.HELLO, 0, 0) + greeting)
    assert stranger.poll(20_000)
    answer = stranger.recv()
    assert answer[0] == Kind.WELCOME
    return Greeting.unpack(answer)


def bytes_waiting(session):
    return sum(len(part) for _, _, part in list(session._inbox))


@pytest.mark.parametrize("kind", [Kind.DATA, Kind.BEGINNING])
def test_who_sends_more_than_may_wait_is_lost(kind, stranger, monkeypatch):
    """Also one message without an end, when there is no more memory for it."""
    monkeypatch.setattr(config, "memory_available", lambda: 8 << 20)
    with shm.listen("tcp://127.0.0.1:0", buffer_bytes="1 MiB") as server:
        assert greet(stranger, server.address).window == 1 << 20
        with server.accept(20) as end:
            for number in range(200):
                stranger.send(PREFIX.pack(kind, number, 0) + bytes(100_000))
            session = end._link._session
            poll_until(lambda: session.refusal)  # although nobody receives
            assert bytes_waiting(session) < 16 << 20
            if kind == Kind.DATA:
                assert bytes_waiting(session) < 3 << 20
            with pytest.raises(shm.PeerLost, match=r"may send 1(\.0)? MiB"):
                while True:
                    with contextlib.suppress(shm.Corrupt):
                        end.receive(20)
            stranger.send(
                PREFIX.pack(Kind.HELLO, 0, 0) + Proof(b"").greeting(Kind.HELLO, b"k" * 16, b"m" * 16)
            )
            while True:
                assert stranger.poll(20_000)
                if stranger.recv()[0] == Kind.REFUSAL:
                    break


def test_a_server_that_sends_more_than_may_wait_is_lost():
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.linger = 0
        port = socket.bind_to_random_port("tcp://127.0.0.1")

        def serve():
            who, hello = socket.recv_multipart()
            greeting = Greeting.unpack(hello)
            answer = Proof(b"").greeting(Kind.WELCOME, greeting.key, greeting.nonce)
            socket.send_multipart([who, PREFIX.pack(Kind.WELCOME, 0, 0) + answer])
            connected.wait()
            for number in range(100):
                socket.send_multipart([who, PREFIX.pack(Kind.DATA, number, 0) + bytes(100_000)])

        connected = threading.Event()
        thread = threading.Thread(target=serve)
        thread.start()
        with shm.connect(f"tcp://127.0.0.1:{port}", timeout=20, buffer_bytes="1 MiB") as end:
            connected.set()
            thread.join()
            session = end._link._session
            poll_until(lambda: session.refusal)
            assert bytes_waiting(session) < 3 << 20
            with pytest.raises(shm.PeerLost, match="buffer_bytes"):
                end.send(1)


def test_who_asks_for_all_again_and_goes_harms_no_other(stranger):
    with (
        shm.listen("tcp://127.0.0.1:0") as server,
        shm.connect(server.address, timeout=20) as left,
        server.accept(20) as right,
    ):
        greet(stranger, server.address)
        with server.accept(20) as end:
            end.send(1)
            assert stranger.poll(20_000)
            port = end._link._port
            with port.lock:
                port.read_events()
                stranger.send(PREFIX.pack(Kind.REPEAT, 0, 0))
                stranger.close(1000)
                assert port.monitor.poll(20_000)  # it has gone, and what it has sent was not looked at
            poll_until(lambda: end._link._session.peer is None)
            end._link._patience_ns = 0  # nobody will come back
        left.send(2)
        assert right.receive(20) == 2


def test_a_server_that_went_right_after_its_answer_is_no_other_users(tmp_path):
    """Nobody can say any more whose process it was; the next connection shows."""
    address = f"ipc://{tmp_path}/server"

    def sockets():
        return {fd for fd, what in open_fds().items() if what.startswith("socket:")}

    others = sockets()
    with zmq.Context() as context, ThreadPoolExecutor(1) as pool:

        def serve():
            socket = context.socket(zmq.ROUTER)
            socket.bind(address)
            assert socket.poll(20_000)
            return socket, *socket.recv_multipart()

        def answer(socket, who, hello):
            greeting = Greeting.unpack(hello)
            welcome = Proof(b"").greeting(Kind.WELCOME, greeting.key, greeting.nonce, window=1 << 20)
            socket.send_multipart([who, PREFIX.pack(Kind.WELCOME, 0, 0) + welcome])

        connecting = pool.submit(shm.connect, address, timeout=60)
        socket, who, hello = serve()
        (port,) = hub._hub.members
        with port.lock:
            answer(socket, who, hello)
            socket.close(1000)
            poll_until(lambda: sockets() == others)  # it has gone, and its answer was not looked at
        socket, who, hello = serve()
        answer(socket, who, hello)
        with connecting.result() as end:
            end.send(1)
            assert socket.poll(20_000)
            end._link._patience_ns = 0  # when that has gone nobody will come back
        socket.close(0)


def test_what_comes_before_accept_takes_little_memory_and_is_not_lost():
    with shm.listen("tcp://127.0.0.1:0") as server, shm.connect(server.address, timeout=20) as left:
        for i in range(100):
            left.send(np.full(20_000, i))
        session = server._port.arrived[0]
        poll_until(lambda: session._asked >= 0)  # something had no space
        assert bytes_waiting(session) <= UNKNOWN_BYTES
        with server.accept(20) as right:
            for i in range(100):
                assert (right.receive(60) == i).all()
            assert right.stats().gaps == 0


@pytest.mark.parametrize("large", [False, True])
def test_a_sender_keeps_to_what_the_other_end_has_room_for(large):
    """Though it may keep more itself, and has done so before it was connected."""
    with (
        shm.listen("tcp://127.0.0.1:0", buffer_bytes="1 MiB", peer_timeout=60) as server,
        Proxy(server.address) as proxy,
    ):
        left = shm.connect(proxy.address, timeout=20, buffer_bytes="64 MiB", peer_timeout=60)
        right = server.accept(20)
        proxy.shut()
        proxy.drop()
        poll_until(lambda: left._link._session.peer is None)
        nbytes = 3_000_000 if large else 100_000
        left._link._session.window_there = 64 << 20  # of an earlier connection
        for i in range(15):
            left.send(np.full(nbytes, i, "u1"), 20)
        proxy.open()
        poll_until(lambda: left._link._session.peer is not None)
        for i in range(15):
            poll_until(lambda: right._link._session._inbox)
            assert bytes_waiting(right._link._session) < (1 << 20) + (nbytes if large else 0) + 10_000
            got = right.receive(60)
            assert len(got) == nbytes
            assert (got == i).all()
        assert right.stats().gaps == 0
        left.close()
        assert list(right) == []
        right.close()
        poll_until(lambda: left._link._port.closed)


# --- who does not wait to be accepted -------------------------------------------------------------


@pytest.mark.parametrize("closes", [True, False])
def test_who_has_gone_before_he_was_accepted_leaves_nothing(closes):
    script = """
        import os, signal, sys, shmengine as shm
        end = shm.connect(sys.argv[1], timeout=30)
        end.send(1)
        if sys.argv[2] == "False":
            os.kill(os.getpid(), signal.SIGKILL)
    """
    with shm.listen("tcp://127.0.0.1:0", peer_timeout=1) as server, shm.connect(server.address) as stays:
        poll_until(lambda: len(server._port.arrived) == 1)
        run_script(script, args=[server.address, str(closes)])
        poll_until(lambda: len(server._port.sessions) == 1, what="the session is dropped")
        assert len(server._port.waiters) == 1
        stays.send(2)
        with server.accept(20) as end:
            assert end.receive(20) == 2
        with pytest.raises(shm.WouldBlock):
            server.accept(0)


# --- slow paths -----------------------------------------------------------------------------------


def test_what_a_broken_connection_had_not_sent_is_not_in_the_way_of_the_next_one():
    """It would take longer than the other end is waited for."""
    with shm.listen("tcp://127.0.0.1:0", peer_timeout=4) as server, Proxy(server.address) as proxy:
        left = shm.connect(proxy.address, timeout=20, peer_timeout=4)
        right = server.accept(20)
        proxy.cut()
        for i in range(160):
            left.send(np.full(100_000, i, "u1"), 20)
        proxy.delay = 0.05  # for each 64 KiB
        proxy.drop()
        proxy.mend()
        for i in range(160):
            assert (right.receive(60) == i).all()
        assert left.stats().reconnects >= 1
        left.close()
        right.close()
        poll_until(lambda: left._link._port.closed)


# --- forked children ------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_a_forked_child_does_not_keep_the_address_of_a_server(transport, tmp_path):
    address = "tcp://127.0.0.1:0" if transport == "tcp" else f"ipc://{tmp_path}/server"
    with contextlib.ExitStack() as stack:
        with shm.listen(address) as server:
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,))
            child.start()
            stack.callback(child.join)
            stack.callback(child.kill)
            mine, theirs = dial(server)  # it is not harmed, either
            mine.send(1)
            assert theirs.receive(20) == 1
            mine.close()
            theirs.close()
        poll_until(lambda: server._port.closed)
        with pytest.raises(shm.Timeout):
            shm.connect(server.address, timeout=0.5)
        with shm.listen(server.address) as again:
            mine, theirs = dial(again)
            mine.close()
            theirs.close()


# --- addresses that are none ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("ipc:///tmp/" + "x" * 200, "205 bytes is too long .* 'ipc://@name'"),
        ("ipc://@" + "x" * 200, "201 bytes is too long"),
        ("ipc://" + "é" * 60, "120 bytes is too long"),
        ("ipc:///tmp/a\0b", "an address is"),
        ("ipc:///tmp/a\udcff", "no Unicode"),
        ("ipc://@", "an address is"),
        ("ipc://*", "an address is"),
        ("tcp://127.0.0.1\0:5", "no host"),
        ("tcp://b\u00fccher..example:5", "no host"),
        ("tcp://" + "a" * 80 + ":5", "no host"),
        ("tcp://127.0.0.1:\u00b2", "an address is"),
        ("tcp://127.0.0.1: 5", "an address is"),
        ("tcp://[fe80::1]:5", "through which interface"),
        ("tcp://[fe80::1%nowhere]:5", "no host"),
    ],
)
@pytest.mark.parametrize("what", ["listen", "connect"])
def test_what_is_no_address_is_said_to_be_none_and_leaves_nothing(what, address, text):
    before = open_fds()
    with pytest.raises(ValueError, match=text) as caught:
        getattr(shm, what)(address, None if address.startswith("ipc") else "none")
    assert not isinstance(caught.value, UnicodeError)
    assert open_fds() == before


@pytest.mark.parametrize("address", ["tcp://*:55", "tcp://127.0.0.1:0"])
def test_where_nobody_can_be_is_no_address_to_connect_to(address):
    with pytest.raises(ValueError, match=r"Server\.address"):
        shm.connect(address, "none")


def test_an_address_that_cannot_be_used_leaves_nothing(monkeypatch):
    """Whatever ZeroMQ has against it."""
    monkeypatch.setattr(servers, "PATH_BYTES", 1000)
    before = open_fds()
    for call in (shm.listen, shm.connect):
        with pytest.raises(OSError, match=r"^\[Errno 36\] cannot (listen at|connect to)"):
            call("ipc:///tmp/" + "x" * 200)
    poll_until(lambda: open_fds() == before)


def test_an_interface_is_part_of_a_link_local_address():
    with open("/proc/net/if_inet6") as file:
        local = [line.split() for line in file if line.split()[3] == "20"]
    if not local:
        pytest.skip("no interface with a link-local address")
    number, device = local[0][0], local[0][5]
    host = ":".join(number[at : at + 4] for at in range(0, 32, 4))
    with shm.listen(f"tcp://[{host}%{device}]:0", "none") as server:
        port = server.address.rpartition(":")[2]
        with (
            shm.connect(f"tcp://[{host}%{device}]:{port}", "none", timeout=20) as mine,
            server.accept(20) as theirs,
        ):
            mine.send(1)
            assert theirs.receive(20) == 1


# --- no descriptors -------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_without_descriptors_there_is_an_error_and_nothing_is_left(first):
    """Whether it is the first socket of the process, or not."""
    script = """
        import contextlib, os, resource, sys, time
        import shmengine as shm

        def open_fds():
            return sorted(map(int, os.listdir("/proc/self/fd")))

        shm.connect, shm.listen  # their modules are imported
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.ExitStack() as stack:
            if sys.argv[1] == "False":
                stack.enter_context(shm.listen("tcp://127.0.0.1:0"))
            before = open_fds()
            refused = 0
            for more in range(30):
                for what in ("listen", "connect"):
                    resource.setrlimit(resource.RLIMIT_NOFILE, (before[-1] + more, limits[1]))
                    try:
                        if what == "listen":
                            shm.listen("tcp://127.0.0.1:0").close()
                        else:
                            shm.connect("tcp://127.0.0.1:1", timeout=0.01)
                    except shm.Timeout:
                        pass
                    except OSError as error:
                        assert "open files" in str(error), error
                        refused += 1
                    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                    while open_fds() != before:
                        time.sleep(0.001)
        assert refused > 4
    """
    run_script(script, args=[str(first)], check=True)
