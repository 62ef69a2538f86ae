"""Child processes that answer requests, under a watchdog: one that dies or hangs is reported, never waited for.

main ── request ──► child 0, child 1, ...      each on a core of its own, if there are as many
     ◄── reply ────     │
                        └ no reply in time: Hung; dead: Died; raised: Failed    (then all of them are killed)
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Final, NoReturn, Self

__all__ = ["Crew", "CrewError", "Died", "Failed", "Hung", "Member", "cores"]

fork = multiprocessing.get_context("fork")

Handler = Callable[[Any], Any]
Member = Callable[[], "tuple[Handler, Callable[[], None]]"]
"""Runs in the child: returns what answers requests, and what lets all go at the end."""

PR_SET_PDEATHSIG: Final = 1
LEAVE_SECONDS: Final = 2.0


class CrewError(Exception):
    """A crew is of no further use; the text says why."""


class Hung(CrewError):
    """Somebody did not answer in time."""


class Died(CrewError):
    """A process ended without an answer."""


class Failed(CrewError):
    """An exception in a child."""


class Crew:
    """Forked children, one for each member; a context manager.

    Parameters
    ----------
    members : sequence of callable
    cpus : sequence of int, optional
        One for each member; empty: wherever the kernel likes.
    patience : float, optional
        Seconds to wait for an answer.

    Raises
    ------
    CrewError
        Somebody did not get ready.
    """

    def __init__(self, members: Sequence[Member], cpus: Sequence[int] = (), patience: float = 20.0) -> None:
        self._patience = patience
        self._children: list[Any] = []
        self._commands: list[Connection[Any, Any]] = []
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - for stderr: a crash may explain itself there
        try:
            for number, member in enumerate(members):
                here, there = fork.Pipe()
                cpu = cpus[number] if cpus else None
                child = fork.Process(
                    target=_serve, args=(member, there, cpu, self._errors.fileno(), os.getpid()), daemon=True
                )
                self._commands.append(here)
                with (
                    warnings.catch_warnings()
                ):  # newer Pythons warn of other threads: children need none of them
                    warnings.simplefilter("ignore", DeprecationWarning)
                    child.start()
                self._children.append(child)
                there.close()
            self._replies()
        except BaseException:
            self.kill()
            raise

    def ask(self, *requests: Any) -> list[Any]:
        """Send each member its request, and return their replies.

        Raises
        ------
        Hung, Died, Failed
            All members have been killed.
        """
        try:
            for commands, request in zip(self._commands, requests, strict=True):
                try:
                    commands.send((True, request))
                except OSError:
                    pass  # it is dead, as will be noticed
            return self._replies()
        except BaseException:
            self.kill()
            raise

    def _replies(self) -> list[Any]:
        deadline = time.monotonic() + self._patience
        replies: dict[int, Any] = {}
        while len(replies) < len(self._children):
            awaited = [n for n in range(len(self._children)) if n not in replies]
            sources = [source for n in awaited for source in (self._commands[n], self._children[n].sentinel)]
            ready = wait(sources, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise Hung(f"no answer within {self._patience:g} s")
            for n in awaited:
                if self._commands[n].poll():
                    replies[n] = self._receive(n)
                elif self._children[n].sentinel in ready:
                    self._complain(n)
        return [replies[n] for n in range(len(self._children))]

    def _receive(self, number: int) -> Any:
        try:
            error, reply = self._commands[number].recv()
        except (EOFError, OSError):
            self._complain(number)
        if error is not None:
            raise Failed(error)
        return reply

    def _complain(self, number: int) -> NoReturn:
        child = self._children[number]
        child.join(LEAVE_SECONDS)
        code = child.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"exited with {code}"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        raise Died(f"a process {how}" + (f": {last[:200]}" if last else ""))

    def kill(self) -> None:
        """End all members at once."""
        for child in self._children:
            child.kill()
        self._let_go()

    def close(self) -> None:
        """Let all members leave in an orderly way; kill those that do not."""
        for commands in self._commands:
            try:
                commands.send((False, None))
            except OSError:
                pass  # killed before
        deadline = time.monotonic() + LEAVE_SECONDS
        for child in self._children:
            child.join(max(0.0, deadline - time.monotonic()))
        self.kill()

    def _let_go(self) -> None:
        for child in self._children:
            child.join()
            child.close()
        for commands in self._commands:
            commands.close()
        self._children.clear()
        self._commands.clear()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()


def _serve(member: Member, commands: Connection[Any, Any], cpu: int | None, errors: int, main: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != main:
        return  # main has died before that
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # main gets it too, and kills
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(errors, 2)
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    try:
        answer, leave = member()
        commands.send((None, None))
        while True:
            goes_on, request = commands.recv()
            if not goes_on:
                break
            commands.send((None, answer(request)))
        leave()
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        commands.send(
            (f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}:{where.lineno})", None)
        )


def cores(count: int) -> tuple[int, ...]:
    """Return processors for `count` processes, each on a core of its own; empty if there are not as many."""
    chosen: list[int] = []
    taken: set[str] = set()
    for cpu in sorted(os.sched_getaffinity(0)):
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as file:
                core = file.read().strip()
        except OSError:
            core = str(cpu)
        if core not in taken:
            taken.add(core)
            chosen.append(cpu)
    return tuple(chosen[:count]) if len(chosen) >= count else ()
