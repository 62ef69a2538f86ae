"""How long it takes until everything is over, or whole again, after somebody died, left or gave up.

    main ──┬── worker 0: spins        SIGKILL | Ctrl-C | end of the script | SIGKILL of a worker
           └── worker 1: spins

Needs 2 cores. The clock starts at the signal (or when the script says that it ends) and stops when the kernel
says of the last process that it is gone. The slowest of some rounds counts. That nothing else is left behind is
shown by the tests, not here.
"""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest

import shmengine as shm

ROUNDS = 5
PATIENCE = 30.0
BOUND = 2.0

PROGRAM = """
import ctypes, os, sys, time
import shmengine as shm

directory, ending = sys.argv[1:]

def spin(directory):
    os.close(os.open(f"{directory}/{os.getpid()}", os.O_CREAT))
    while True:
        pass

engine = shm.Engine(2)
futures = [engine.submit(spin, directory) for _ in range(2)]
if ending == "exit":
    while len(os.listdir(directory)) < 2:
        time.sleep(0.005)
elif ending == "with the GIL":
    while len(os.listdir(directory)) < 2:
        time.sleep(0.005)
    print("busy", flush=True)
    ctypes.PyDLL(None).sleep(600)
else:
    futures[0].result()
"""


@dataclass
class Scene:
    """A main process with two busy workers; `pidfds` are all three."""

    main: subprocess.Popen[bytes]
    pids: list[int]
    pidfds: list[int] = field(default_factory=list)
    terminal: int = -1

    def seconds_until_gone(self, start: float) -> float:
        """Wait for the end of all three."""
        try:
            for pidfd in self.pidfds:
                ready, _, _ = select.select([pidfd], [], [], PATIENCE)
                assert ready, f"still alive after {PATIENCE:g} s"
            return time.perf_counter() - start
        finally:
            for pidfd in self.pidfds:
                os.close(pidfd)
            self.pidfds.clear()

    def cleanup(self) -> None:
        for pidfd in self.pidfds:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
        self.main.kill()
        self.main.wait()
        if self.main.stdout is not None:
            self.main.stdout.close()
        if self.terminal >= 0:
            os.close(self.terminal)


def _sit_at_terminal() -> None:
    """In the child: have a terminal, and a Ctrl-C there, also if this runs where that is ignored (behind a `&`)."""
    ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(directory: Path, ending: str, *, terminal: bool = False) -> Scene:
    """Start main, and wait until both workers are busy."""
    directory.mkdir()
    command = [sys.executable, "-c", PROGRAM, str(directory), ending]
    master = slave = -1
    if terminal:
        master, slave = pty.openpty()
        main = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_sit_at_terminal,  # noqa: PLW1509  # no threads here
        )
        os.close(slave)
    else:
        main = subprocess.Popen(command, stdout=subprocess.PIPE)
    scene = Scene(main, [], terminal=master)
    deadline = time.monotonic() + PATIENCE
    while len(names := os.listdir(directory)) < 2 and main.poll() is None:
        assert time.monotonic() < deadline, "the workers do not start"
        time.sleep(0.005)
    scene.pids = [main.pid, *map(int, names)]
    try:
        scene.pidfds = [os.pidfd_open(pid) for pid in scene.pids]
    except ProcessLookupError:
        assert ending == "exit"  # it was faster than we
    return scene


def rounds(
    benchmark: Any,
    targets: Any,
    what: str,
    set_up: Callable[[], Scene],
    act: Callable[[Scene], float],
) -> None:
    """Measure `act`, which returns seconds, on fresh scenes; the slowest one counts."""
    seconds: list[float] = []
    scenes: list[Scene] = []

    def fresh() -> tuple[tuple[Scene], dict[str, Any]]:
        while scenes:
            scenes.pop().cleanup()
        scenes.append(set_up())
        return (scenes[-1],), {}

    try:
        benchmark.pedantic(lambda scene: seconds.append(act(scene)), setup=fresh, rounds=ROUNDS)
    finally:
        while scenes:
            scenes.pop().cleanup()
    benchmark.extra_info["seconds"] = seconds
    targets.at_most(f"{what}, slowest of {ROUNDS}", max(seconds), BOUND)


def directories(tmp_path: Path) -> Callable[[], Path]:
    """Return a function that names a new directory each time."""
    return lambda: tmp_path / str(len(os.listdir(tmp_path)))


@pytest.mark.parametrize("state", ["in result()", "with the GIL"])
def test_kill_main(state: str, tmp_path: Path, benchmark: Any, targets: Any) -> None:
    """SIGKILL of main: the workers notice by themselves, also when main held the GIL."""
    fresh = directories(tmp_path)

    def set_up() -> Scene:
        scene = start(fresh(), state)
        if state == "with the GIL":
            assert scene.main.stdout is not None
            assert scene.main.stdout.readline() == b"busy\n"
        return scene

    def act(scene: Scene) -> float:
        began = time.perf_counter()
        scene.main.kill()
        return scene.seconds_until_gone(began)

    rounds(benchmark, targets, f"SIGKILL of main {state}: workers gone", set_up, act)


def everything_said(terminal: int) -> str:
    """What a terminal has shown; its other side is closed."""
    said = b""
    while True:
        try:
            said += os.read(terminal, 4096)
        except OSError:  # Linux says the end so
            return said.decode(errors="replace")


def test_control_c(tmp_path: Path, benchmark: Any, targets: Any) -> None:
    """Ctrl-C in a terminal: one KeyboardInterrupt, then main and workers are gone."""
    fresh = directories(tmp_path)

    def act(scene: Scene) -> float:
        began = time.perf_counter()
        os.write(scene.terminal, b"\x03")
        seconds = scene.seconds_until_gone(began)
        assert scene.main.wait(PATIENCE) == -signal.SIGINT
        text = everything_said(scene.terminal)
        assert text.count("KeyboardInterrupt") == 1, text
        return seconds

    rounds(benchmark, targets, "Ctrl-C: all gone", lambda: start(fresh(), "in result()", terminal=True), act)


EXIT = PROGRAM + "\nprint(time.perf_counter(), flush=True)\n"


def test_exit_with_busy_workers(tmp_path: Path, benchmark: Any, targets: Any) -> None:
    """A script that ends, with an engine that nobody closed and tasks that never end."""
    fresh = directories(tmp_path)

    def run() -> None:
        directory = fresh()
        directory.mkdir()
        main = subprocess.Popen(
            [sys.executable, "-c", EXIT, str(directory), "exit"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert main.stdout is not None
        with main, main.stdout:
            deadline = time.monotonic() + PATIENCE
            while len(names := os.listdir(directory)) < 2 and main.poll() is None:
                assert time.monotonic() < deadline, "the workers do not start"
                time.sleep(0.0002)
            pids = [int(name) for name in names]
            assert len(pids) == 2
            fds = []
            for pid in pids:
                try:
                    fds.append(os.pidfd_open(pid))
                except ProcessLookupError:
                    continue  # gone already
            began = float(main.stdout.readline())  # the clock is the machine's, the same in all processes
            main.wait(PATIENCE)
            for fd in fds:
                ready, _, _ = select.select([fd], [], [], PATIENCE)
                os.close(fd)
                assert ready, f"a worker is alive {PATIENCE:g} s after the end of main"
            seconds.append(time.perf_counter() - began)

    seconds: list[float] = []
    benchmark.pedantic(run, rounds=ROUNDS)
    benchmark.extra_info["seconds"] = seconds
    targets.at_most(f"exit with busy workers: all gone, slowest of {ROUNDS}", max(seconds), BOUND)


def first_time_for_ever(directory: str) -> int:
    """Spin until killed; the second time return at once."""
    try:
        file = os.open(f"{directory}/first", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return os.getpid()
    os.write(file, f"{os.getpid()}\n".encode())
    os.close(file)
    while True:
        pass


def test_kill_worker(tmp_path: Path, benchmark: Any, targets: Any) -> None:
    """SIGKILL of a worker: it is replaced and its task is done again."""
    fresh = directories(tmp_path)
    seconds: list[float] = []

    with shm.Engine(1) as engine:  # with one worker, only the replacement can do it

        def set_up() -> tuple[tuple[Any, int], dict[str, Any]]:
            directory = fresh()
            directory.mkdir()
            future = engine.submit(first_time_for_ever, str(directory))
            deadline = time.monotonic() + PATIENCE
            note = directory / "first"
            while not (note.exists() and note.read_text().endswith("\n")):
                assert time.monotonic() < deadline, "the task does not start"
                time.sleep(0.005)
            return (future, int(note.read_text())), {}

        def act(future: Any, pid: int) -> None:
            began = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            assert future.result(PATIENCE) != pid
            seconds.append(time.perf_counter() - began)

        benchmark.pedantic(act, setup=set_up, rounds=ROUNDS)
        stats = engine.stats()
    assert (stats.worker_deaths, stats.retries) == (ROUNDS, ROUNDS)
    benchmark.extra_info["seconds"] = seconds
    targets.at_most(f"SIGKILL of a worker: its task done, slowest of {ROUNDS}", max(seconds), BOUND)
