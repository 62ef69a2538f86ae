"""What workers print: all of it arrives, while they run, and before the result of the task that has printed it."""

from __future__ import annotations

import io
import os
import re
import select
import signal
import socket
import sys
import threading
import time

import pytest

from shmengine._native import lib
from shmengine.engine import Engine
from tests.helpers.leftovers import stands_still
from tests.helpers.scripts import poll_until, run_script


@pytest.fixture(scope="module")
def engine():
    before = os.environ.pop("PYTHONUNBUFFERED", None)
    with Engine(2, memory="64 MiB") as engine:
        yield engine
    if before is not None:
        os.environ["PYTHONUNBUFFERED"] = before


class Screen(io.StringIO):
    """A stream that may be looked at while others write to it."""

    def write(self, text):
        time.sleep(0.001)  # so that whoever does not wait for it is seen
        return super().write(text)


@pytest.fixture
def show(monkeypatch):
    """Called by a test, as pytest sets the streams anew before it."""

    def show(screen=None):
        screen = screen or Screen()
        monkeypatch.setattr(sys, "stdout", screen)
        return screen

    return show


def waits_for_room(pid):
    with open(f"/proc/{pid}/wchan") as file:
        return "pipe_write" in file.read()


def print_line():
    print("a line")


def print_begun():
    print("a line", end="", flush=True)


def print_in_c():
    import ctypes

    ctypes.CDLL(None).puts(b"a line")


def print_by_child():
    os.system("echo a line")


WAYS = [print_line, print_begun, print_in_c, print_by_child]


@pytest.mark.parametrize("way", WAYS)
def test_while_the_task_runs(engine, show, tmp_path, way):
    screen = show()

    def task():
        way()
        while not (tmp_path / "go").exists():
            time.sleep(0.005)

    future = engine.submit(task)
    try:
        poll_until(lambda: "a line" in screen.getvalue(), 30)
        assert not future.done()
    finally:
        (tmp_path / "go").touch()
        future.result()
    assert screen.getvalue().rstrip("\n") == "a line"


@pytest.mark.parametrize("way", WAYS)
def test_before_the_result(engine, show, way):
    screen = show()
    seen = []
    for _ in range(5):
        future = engine.submit(way)
        future.add_done_callback(lambda _: seen.append(screen.getvalue().count("a line")))
        future.result()
    poll_until(lambda: len(seen) == 5)
    assert seen == [1, 2, 3, 4, 5]


def test_before_each_result_of_a_stream(engine, show):
    screen = show()

    def talk(i):
        print(f"<{i}", end=">")
        return i

    for i in engine.map(talk, range(500)):
        assert f"<{i}>" in screen.getvalue()
    assert sorted(re.findall(r"\d+", screen.getvalue()), key=int) == [str(i) for i in range(500)]


def test_before_the_error_of_a_task(engine, show):
    screen = show()

    def fail():
        print("and then", end=" ")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        engine.submit(fail).result()
    assert screen.getvalue() == "and then "


def test_a_line_is_one_write(engine, show):
    """However many pieces it is made of; else the first of them could come alone, before the result of another task."""
    show()

    def talk():
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps writes apart
        before = os.dup(1)
        os.dup2(far.fileno(), 1)
        try:
            print("<", 1, "x" * 100_000, ">")
            print("that was all")
        finally:
            os.dup2(before, 1)
            os.close(before)
        with near, far:
            return [near.recv(1 << 20).decode() for _ in range(2)]

    assert engine.submit(talk).result() == [f"< 1 {'x' * 100_000} >\n", "that was all\n"]


def test_the_little_there_was_room_for_is_no_end_of_a_line(engine, show, monkeypatch):
    """A full pipe takes what fits into its last page; results of earlier tasks do not let that go on alone."""
    monkeypatch.setattr("shmengine.workers.pool.BEGUN_SECONDS", 60.0)
    screen = show()
    pool = engine._backend._core.pool
    lines = [
        *["x" * (select.PIPE_BUF - 1)] * 15,
        "y" * 99,
        "z" * (select.PIPE_BUF + 199),
    ]  # 16 pages, and 200 bytes

    def talk():
        for line in lines:
            print(line)

    with pool._output:  # nobody reads
        future = engine.submit(talk)
        poll_until(lambda: any(map(waits_for_room, pool.pids)), what="its pipe is full")
        (pid,) = filter(waits_for_room, pool.pids)
        os.kill(pid, signal.SIGSTOP)
        poll_until(lambda: stands_still(pid))
        pool.forward_output(
            lib.shmr_find(pool.region.handle, pid), tag=1 << 40
        )  # for those of another message
        shown = screen.getvalue()
        os.kill(pid, signal.SIGCONT)
    future.result()
    assert shown.splitlines() == lines[:-1]
    assert screen.getvalue().splitlines() == lines


def test_streams_of_workers_look_as_pythons_own(engine):
    def look():
        streams = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
        return [(stream.name, stream.mode, stream.newlines, stream.line_buffering) for stream in streams]

    assert engine.submit(look).result() == [("<stdout>", "w", None, True), ("<stderr>", "w", None, True)] * 2


def test_lines_stay_whole(engine, show, monkeypatch):
    """Also long ones, of many workers at once, and made of many pieces."""

    monkeypatch.setattr("shmengine.workers.pool.BEGUN_SECONDS", 60.0)  # however busy this machine is
    screen = show()

    def talk(i):
        print("<", i, "x" * 10_000, ">")

    list(engine.map(talk, range(200)))
    lines = screen.getvalue().splitlines()
    assert len(lines) == 200
    assert all(re.fullmatch(r"< \d+ x{10000} >", line) for line in lines)


def test_characters_stay_whole(engine, show):
    screen = show()

    def talk():
        os.write(1, b"caf\xc3")
        time.sleep(0.5)  # longer than a line that was begun waits
        os.write(1, b"\xa9\nnot \xff a character\n\xe2")

    engine.submit(talk).result()
    assert screen.getvalue() == "café\nnot \ufffd a character\n"


def test_a_stream_that_fails(engine, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    engine.submit(print, "x").result()
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    engine.submit(print, "x").result()


def test_a_stream_that_waits_for_whoever_waits_for_us(engine, monkeypatch):
    """It delays results, but not for ever."""
    lock = threading.Lock()

    class Locked(io.StringIO):
        def write(self, text):
            with lock:
                return super().write(text)

    monkeypatch.setattr(sys, "stdout", stream := Locked())

    def begin(i):
        print("begun", flush=True)
        time.sleep(0.3)  # until somebody is writing it
        return i

    with lock:
        assert engine.submit(begin, 7).result() == 7
    poll_until(lambda: stream.getvalue() == "begun\n")


def test_streams_of_a_tasks_own(engine, show):
    show()

    def own():
        import contextlib

        sys.stdout, before = object(), sys.stdout
        try:
            with contextlib.redirect_stderr(None):
                return 5
        finally:
            sys.stdout = before

    assert engine.submit(own).result() == 5
    assert engine.submit(setattr, sys, "stdout", None).result() is None


def test_what_nobody_ended_comes_at_the_latest_when_the_worker_ends():
    source = """
        import sys, threading
        import shmengine as shm
        def later():
            threading.Timer(0.1, lambda: (sys.stdout.write("after the task"), sys.stdout.flush())).start()
        with shm.Engine(1, memory="32 MiB") as engine:
            engine.submit(later).result()
    """
    assert run_script(source, check=True).stdout == "after the task"


def test_results_come_after_output_in_a_program():
    source = """
        import shmengine as shm
        with shm.Engine(2, memory="64 MiB") as engine:
            for i in range(20):
                print(engine.submit(lambda i: print("task", i) or i, i).result())
            for i in engine.map(lambda i: print("task", i) or i, range(20), window=1):
                print(i)
    """
    result = run_script(source, check=True, env={"PYTHONUNBUFFERED": None})
    assert result.stdout == "".join(f"task {i}\n{i}\n" for i in range(20)) * 2
