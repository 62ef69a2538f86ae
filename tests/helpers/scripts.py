"""Running Python programs as a user would, in children that cannot hang the tests."""

from __future__ import annotations

import importlib.metadata
import os
import pty
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.helpers.leftovers import descendants, describe_process

ROOT = Path(__file__).resolve().parents[2]


def soak_seconds(default: float, tests: int = 1) -> float:
    """How long a stress test should run: `default`, or its part of the minutes that a soak gives to `tests` of them."""
    minutes = os.environ.get("SHMENGINE_SOAK_MINUTES")
    return float(minutes) * 60 / tests if minutes else default


def poll_until(condition: Callable[[], object], timeout: float = 100.0, what: str = "") -> None:
    """Wait until ``condition()`` is true; fail the test after `timeout` seconds.

    For states that no event announces (a process is gone, a counter went up). By itself it waits for nearly as long
    as the watchdog, which would not know what for.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout:g} s still not: {what or condition}"
        time.sleep(0.005)


def kill_tree(pid: int, *, stacks: bool = False) -> str:
    """Kill a process that a test started, with all its descendants; say what they were doing.

    With `stacks` they get SIGABRT first, at which faulthandler writes the stacks of all threads.
    """
    tree = [*descendants(pid), pid]
    description = "\n".join(describe_process(each) for each in tree)

    def send(signal_number: int) -> None:
        for each in tree:
            try:
                os.kill(each, signal_number)
            except ProcessLookupError:
                continue

    if stacks:
        send(signal.SIGABRT)
        time.sleep(1.0)  # for the stacks to be written: nothing tells when
    send(signal.SIGKILL)
    return description


def _environment(extra: Mapping[str, str | None] | None) -> dict[str, str]:
    environment = {**os.environ, "PYTHON_COLORS": "0"}  # tracebacks on a terminal, since Python 3.13
    try:
        importlib.metadata.version("shmengine")
    except importlib.metadata.PackageNotFoundError:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for name, value in (extra or {}).items():
        if value is None:
            environment.pop(name, None)
        else:
            environment[name] = value
    return environment


@contextmanager
def _command(
    source: str | Path, args: Sequence[str], flags: Sequence[str], prefix: Sequence[str]
) -> Iterator[list[str]]:
    """The command line that runs `source`: a file, or text that is written to one."""
    with tempfile.TemporaryDirectory(prefix="shmengine-test-") as directory:
        if isinstance(source, Path):
            path = source
        else:
            path = Path(directory, "script.py")
            path.write_text(textwrap.dedent(source))
        yield [*prefix, sys.executable, "-X", "faulthandler", *flags, str(path), *args]


@contextmanager
def start_script(
    source: str | Path,
    *,
    args: Sequence[str] = (),
    env: Mapping[str, str | None] | None = None,
    flags: Sequence[str] = (),
    prefix: Sequence[str] = (),
    cwd: str | Path | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """Run a script beside the test; leaving the block kills what is left of it and its descendants.

    It has a session of its own, pipes for standard input, output and error, and text mode.
    """
    with (
        _command(source, args, flags, prefix) as command,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(env),
            cwd=cwd,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            if process.poll() is None:
                kill_tree(process.pid)


def run_script(
    source: str | Path,
    *,
    args: Sequence[str] = (),
    timeout: float = 60.0,
    env: Mapping[str, str | None] | None = None,
    flags: Sequence[str] = (),
    prefix: Sequence[str] = (),
    cwd: str | Path | None = None,
    input: str = "",  # noqa: A002  as in subprocess.run
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a Python script in a child and wait until it and whoever holds its pipes has ended.

    Parameters
    ----------
    source : str or Path
        Text of the script (dedented), or the path of one.
    args : sequence of str
        Its command line.
    timeout : float
        Seconds. A script that takes longer is killed with all its descendants, and the test fails with the
        stacks of all its threads.
    env : mapping of str to (str or None)
        Added to the environment; None removes a variable.
    flags : sequence of str
        Flags for the interpreter.
    prefix : sequence of str
        A command that runs the interpreter, as from `memory_cgroup` or `mount_namespace_prefix`.
    cwd : path, optional
        Working directory.
    input : str
        Standard input.
    check : bool
        Fail the test, with all output, unless the script exits with 0.
    """
    with start_script(source, args=args, env=env, flags=flags, prefix=prefix, cwd=cwd) as process:
        try:
            stdout, stderr = process.communicate(input, timeout=timeout)
        except subprocess.TimeoutExpired:
            description = kill_tree(process.pid, stacks=True)
            stdout, stderr = process.communicate(timeout=30)
            raise AssertionError(
                f"the script ran longer than {timeout:g} s\n{description}\n"
                f"--- stdout\n{stdout}\n--- stderr\n{stderr}"
            ) from None
    result = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
    if check and result.returncode:
        raise AssertionError(f"exit code {result.returncode}\n--- stdout\n{stdout}\n--- stderr\n{stderr}")
    return result


class PtyResult(NamedTuple):
    """What a script in a terminal did."""

    returncode: int
    output: str


def run_in_pty(
    source: str | Path,
    *,
    answers: Sequence[tuple[str, str]] = (),
    args: Sequence[str] = (),
    timeout: float = 60.0,
    env: Mapping[str, str | None] | None = None,
    flags: Sequence[str] = (),
    prefix: Sequence[str] = (),
) -> PtyResult:
    r"""Run a script with a terminal of its own as controlling terminal, 80 columns wide.

    Parameters
    ----------
    answers : sequence of (str, str)
        One after the other: when the first text has come (after the last answer), the second is typed;
        ``"\x03"`` is Ctrl-C, which the kernel turns into SIGINT for all processes in the foreground.

    Others as in `run_script`.
    """
    with _command(source, args, flags, prefix) as command:
        pid, master = pty.fork()
        if pid == 0:
            try:
                os.execvpe(command[0], command, {**_environment(env), "COLUMNS": "80", "TERM": "xterm"})
            finally:
                os._exit(127)
        output = b""
        searched = 0
        pending = list(answers)
        deadline = time.monotonic() + timeout
        try:
            while True:
                if not select.select([master], [], [], max(deadline - time.monotonic(), 0))[0]:
                    description = kill_tree(pid, stacks=True)
                    shown = output.decode(errors="replace")
                    raise AssertionError(f"the script ran longer than {timeout:g} s\n{description}\n{shown}")
                try:
                    received = os.read(master, 65536)
                except OSError:  # EIO: nobody has the terminal open any more
                    break
                if not received:
                    break
                output += received
                while pending and (at := output.find(pending[0][0].encode(), searched)) >= 0:
                    expected, typed = pending.pop(0)
                    searched = at + len(expected.encode())
                    os.write(master, typed.encode())
        finally:
            os.close(master)
            status = os.waitpid(pid, 0)[1]
        text = output.decode(errors="replace").replace("\r\n", "\n")
        assert not pending, f"never came: {pending[0][0]!r}; the output was:\n{text}"
        return PtyResult(os.waitstatus_to_exitcode(status), text)
