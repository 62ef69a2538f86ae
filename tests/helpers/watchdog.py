"""A process beside pytest that ends a run that hangs, with all stacks and all children.

It is a process and not a thread because a hanging extension may hold the interpreter's lock. It is told
on standard input, one line a message, what runs and for how long it may; pytest's end closes the pipe.
At the deadline it writes what pytest and its descendants are doing, sends SIGABRT (at which faulthandler,
which pytest enables, writes the stacks of all threads), and then kills what is left. Where pytest runs tests in several
processes, all of that is for the end of the run's output, too: `REPORT` is the name of a file for it.
"""

from __future__ import annotations

import os
import select
import signal
import stat
import subprocess
import sys
import time
from typing import BinaryIO

DEFAULT_SECONDS = 120.0
REPORT = "SHMENGINE_TEST_REPORT"


class Watchdog:
    """The side of the watched process."""

    def __init__(self, stderr: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,  # a Ctrl-C is pytest's business
        )
        assert self.process.stdin is not None
        self.pipe = self.process.stdin.fileno()

    def start(self, seconds: float, what: str) -> None:
        """From now on `what` may take that many seconds."""
        os.write(self.pipe, f"{seconds} {what!a}\n".encode())

    def stop(self) -> None:
        """It is done."""
        os.write(self.pipe, b"0\n")

    def close(self) -> None:
        """End the watchdog."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main(watched: int) -> None:
    """The watchdog's own life."""
    deadline: float | None = None
    what = ""
    received = b""
    while True:
        wait = None if deadline is None else max(deadline - time.monotonic(), 0)
        if select.select([0], [], [], wait)[0]:
            more = os.read(0, 65536)
            if not more:
                return
            received += more
            *lines, received = received.split(b"\n")
            for line in lines:
                seconds, _, what = line.decode().partition(" ")
                deadline = time.monotonic() + float(seconds) if float(seconds) else None
        elif deadline is not None:
            # Run as a file, not as a module: it must start even when the package does not import.
            from leftovers import descendants, describe_process

            say(f"\n\nwatchdog: {what} hangs; everything is stopped")
            others = descendants(watched) - descendants(os.getpid()) - {os.getpid()}
            for pid in sorted(others):
                say(f"  {describe_process(pid)}")
            files = captured(others)
            end_all(watched, others)
            for file in files:
                say(file.read().decode(errors="replace"))
            return


def say(text: str) -> None:
    """Print it, and add it to the report."""
    print(text, file=sys.stderr, flush=True)
    if path := os.environ.get(REPORT):
        with open(path, "a", encoding="utf-8") as report:
            report.write(f"{text}\n")


def captured(pids: set[int]) -> list[BinaryIO]:
    """Return the files that these processes' stderr goes to, each once, at their ends: their stacks go there."""
    files: dict[int, BinaryIO] = {}
    for pid in pids:
        path = f"/proc/{pid}/fd/2"
        try:
            status = os.stat(path)
            if stat.S_ISREG(status.st_mode) and status.st_ino not in files:
                files[status.st_ino] = open(path, "rb")  # noqa: SIM115  until the end of this process
                files[status.st_ino].seek(0, os.SEEK_END)
        except OSError:
            continue
    return list(files.values())


def end_all(watched: int, others: set[int]) -> None:
    """Stacks first, then death: of the descendants, then of the watched process itself."""
    for group in (others, {watched}):
        for number in (signal.SIGABRT, signal.SIGKILL):
            for pid in group:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
            if number == signal.SIGABRT:
                time.sleep(2)  # for the stacks to be written


if __name__ == "__main__":
    main(int(sys.argv[1]))
