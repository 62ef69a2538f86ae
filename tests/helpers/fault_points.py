"""Deaths at chosen accesses of shared memory: a test build of the core, and children that die in it.

The build has ``lib.shmr_fault_arm(nth, loads)``: SIGKILL at the nth access from then on (`csrc/fault_points.h`).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shmengine._native import lib
from tests.helpers.leftovers import state_of
from tests.helpers.scripts import ROOT, poll_until

SOAK = bool(os.environ.get("SHMENGINE_SOAK_MINUTES"))
SEED = int(os.environ.get("SHMENGINE_TEST_SEED") or random.SystemRandom().randrange(1 << 32))


def build(tree: Path) -> dict[str, str]:
    """Copy the project to `tree`, build it with fault points, and return the environment that uses it."""
    skipped = shutil.ignore_patterns(".*", "build", "__pycache__", "*.so", "_core.c", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=skipped)
    environment = {**os.environ, "SHMENGINE_FAULT_POINTS": "1", "SHMENGINE_DEBUG": "1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True)
    return {**os.environ, "PYTHONPATH": str(tree)}


def points(total: int, count: int) -> list[int]:
    """Return `count` of the points from 1 to `total`, the first and the last among them; when soaking, up to 500."""
    count = 500 if SOAK else count
    if total <= count:
        return list(range(1, total + 1))
    print("seed:", SEED)
    between = random.Random(SEED).sample(range(2, total), count - 2)
    return [1, *sorted(between), total]


@contextmanager
def armed(nth: int) -> Iterator[None]:
    """Within it this process dies at its nth change of shared memory.

    When soaking, at its nth access of any kind: deaths between loads look like those before the next change, and take
    three times as long.
    """
    lib.shmr_fault_arm(nth, int(SOAK))
    yield
    lib.shmr_fault_arm(0, 0)


class Victim:
    """A forked child that calls ``act(say)``, and what it said (one byte each) before it died or was done.

    It ends without leaving anything in good order: even a survivor is a death to the others.
    """

    def __init__(self, act: Callable[[Callable[[int], object]], object]) -> None:
        self._inbox, outbox = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                _ = act(lambda what: os.write(outbox, bytes([what])))  # what it returns lives as long
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(outbox)

    def hear(self) -> int:
        """Wait for the next thing it says; -1 if it ends before."""
        return (os.read(self._inbox, 1) or b"\xff")[0] if self._inbox >= 0 else -1

    def is_asleep(self) -> bool:
        """Tell whether it waits for something in the kernel, or has ended."""
        return state_of(self.pid) in "SZ"

    def kill(self) -> None:
        """Kill it; until `end` it stays as a zombie."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def end(self) -> tuple[bool, set[int]]:
        """Wait for its end; return whether it was killed, and what it had said and nobody heard."""
        status = os.waitpid(self.pid, 0)[1]
        said = set(os.read(self._inbox, 1 << 16))
        os.close(self._inbox)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, -signal.SIGKILL), f"the victim failed with {code}"
        return code != 0, said


def until_asleep(process: Victim | Partner) -> None:
    """Return when the process sleeps, or is no more."""
    poll_until(process.is_asleep, what="it sleeps")


class Partner:
    """A forked child that lives on, and does what it is told, one thing after the other.

    Parameters
    ----------
    begin, end : callable
        Called first and last.
    **actions : callable
        What `start` and `ask` can name.
    """

    def __init__(
        self, begin: Callable[[], object], end: Callable[[], object], **actions: Callable[..., object]
    ) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()

        def serve() -> None:
            self.pipe.close()
            begin()
            theirs.send("here")
            with contextlib.suppress(EOFError):
                while True:
                    what, args = theirs.recv()
                    theirs.send(actions[what](*args))
            end()

        self.process = context.Process(target=serve)
        self.process.start()
        theirs.close()
        assert self.pipe.recv() == "here"

    def start(self, what: str, *args: object) -> None:
        """Let it do something."""
        self.pipe.send((what, args))

    def finish(self) -> Any:
        """Return what came of it."""
        return self.pipe.recv()

    def ask(self, what: str, *args: object) -> Any:
        """Let it do something, and return what came of it."""
        self.start(what, *args)
        return self.finish()

    def is_asleep(self) -> bool:
        """Tell whether it waits in shared memory."""
        with open(f"/proc/{self.process.pid}/wchan") as file:
            return "futex" in file.read()

    def end(self) -> None:
        """Let it end in good order."""
        self.pipe.close()
        self.process.join()
        assert self.process.exitcode == 0
        self.process.close()
