"""Sockets of one machine: the file of a server at ``ipc://path``, there while somebody may need it; signals."""

from __future__ import annotations

import errno
import multiprocessing
import signal

import pytest
import zmq

import shmengine as shm
from tests.helpers import poll_until, run_script
from tests.helpers.channels import nobody_serves


@pytest.fixture
def path(tmp_path):
    return tmp_path / "socket"


def dial(server):
    """Both ends of a channel through a server."""
    mine = shm.connect(server.address, timeout=20)
    return mine, server.accept(20)


def assert_it_works(server):
    mine, theirs = dial(server)
    with mine, theirs:
        mine.send(1)
        assert theirs.receive(20) == 1


@pytest.mark.parametrize("how", ["close", "with", "collection"])
def test_a_closed_server_leaves_no_file(path, how):
    server = shm.listen(f"ipc://{path}")
    assert path.is_socket()
    if how == "close":
        server.close()
    elif how == "with":
        with server:
            pass
    del server
    assert not path.exists()


def test_the_next_server_may_follow_at_once(path):
    for _ in range(10):
        with shm.listen(f"ipc://{path}") as server:
            assert_it_works(server)
        poll_until(lambda: not path.exists(), what="the file is gone with the last end")
    for _ in range(10):
        shm.listen(f"ipc://{path}").close()


def test_the_file_stays_for_ends_that_may_come_back(path):
    with shm.listen(f"ipc://{path}") as server:
        mine, theirs = dial(server)
    with mine, theirs:
        assert path.is_socket()
        mine.send(1)
        assert theirs.receive(20) == 1
    poll_until(lambda: not path.exists(), what="the file is gone with the last end")


def test_a_relative_path_is_that_of_the_beginning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with shm.listen("ipc://socket") as server:
        assert_it_works(server)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
    poll_until(lambda: not (tmp_path / "socket").exists(), what="the file is gone")


def test_what_others_have_put_there_stays(path):
    first = shm.listen(f"ipc://{path}")
    path.unlink()
    with shm.listen(f"ipc://{path}") as second:
        first.close()
        assert path.is_socket()
        assert_it_works(second)
        path.unlink()
        path.write_text("of somebody")
    poll_until(nobody_serves, what="the thread ends")
    assert path.read_text() == "of somebody"


def test_a_forked_child_leaves_the_file_alone(path):
    with shm.listen(f"ipc://{path}") as server:
        child = multiprocessing.get_context("fork").Process(target=server.close)
        child.start()
        child.join()
        assert child.exitcode == 0
        assert path.is_socket()
        assert_it_works(server)


@pytest.mark.parametrize("accepts", [False, True])
def test_a_process_that_ends_leaves_no_file(path, accepts):
    script = """
        import os, sys, shmengine as shm
        path, accepts = sys.argv[1:]
        server = shm.listen(f"ipc://{path}")
        if accepts == "True":
            mine = shm.connect(server.address, timeout=30)
            theirs = server.accept(30)
            mine.send(1)
        assert os.path.exists(path)
    """
    run_script(script, args=[str(path), str(accepts)], check=True)
    assert not path.exists()


def serve(address, pipe):
    server = shm.listen(address)
    pipe.send(server.address)
    pipe.recv()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_child_that_ends_leaves_no_file(path, start):
    context = multiprocessing.get_context(start)
    pipe, other = context.Pipe()
    with pipe, other:
        child = context.Process(target=serve, args=(f"ipc://{path}", other))
        child.start()
        pipe.recv()
        assert path.is_socket()
        pipe.send(None)
        child.join()
    assert child.exitcode == 0
    assert not path.exists()


def test_after_a_kill_the_file_is_in_nobodys_way(path):
    script = """
        import os, signal, sys, shmengine as shm
        server = shm.listen(sys.argv[1])
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run_script(script, args=[f"ipc://{path}"]).returncode == -signal.SIGKILL
    assert path.is_socket()
    with shm.listen(f"ipc://{path}") as server:
        assert_it_works(server)
    poll_until(lambda: not path.exists(), what="the file is gone")


@pytest.mark.parametrize("name", ["bind", "connect", "monitor"])
def test_a_signal_while_an_end_begins(monkeypatch, name):
    """ZeroMQ's call is made again, which pyzmq leaves to us; a signal interrupts it before it has done anything."""
    plain, signals = getattr(zmq.Socket, name), [zmq.error.InterruptedSystemCall] * 60

    def interrupted(socket, *args):
        if args[0] is not None and signals:
            raise signals.pop()(errno.EINTR)
        return plain(socket, *args)

    monkeypatch.setattr(zmq.Socket, name, interrupted)
    left, right = shm.channel("socket")
    with left, right:
        left.send(1)
        assert right.receive(60) == 1
    assert not signals
