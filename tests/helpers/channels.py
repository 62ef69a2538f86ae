"""Two ends of a channel at work: what they say to each other, and who has the other one, however he was started."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from shmengine import Engine, channel
from shmengine.channels.hub import THREAD
from shmengine.channels.open import MECHANISMS
from tests.helpers.arrays import same

__all__ = [
    "FOREVER",
    "MECHANISMS",
    "STARTS",
    "Child",
    "Job",
    "Partners",
    "drain",
    "fill",
    "is_message",
    "make_pair",
    "message",
    "nobody_serves",
    "number_of",
    "sending",
    "trip",
]

FOREVER = 30  # no test waits so long unless it has failed
STARTS = ("thread", "fork", "spawn", "worker")

SIZES = (0, 1, 63, 64, 65, 1000, 4032, 4096, 4097, 65_536, 70_001)
LARGE = (300_001, 1 << 20, 3_000_000)


def make_pair(mechanism: str, **options: Any):
    """A channel with little room, so that it is full soon."""
    return channel(mechanism, **{"buffer_bytes": "8 MiB", **options})


def message(number: int, *, large: bool = True) -> Any:
    """The message of this number: of some kind and size, nothing of it like that of another one."""
    nbytes = LARGE[number // 20 % len(LARGE)] if large and number % 20 == 19 else SIZES[number % len(SIZES)]
    data = (np.arange(nbytes) * 7 + number).astype("u1")
    match number % 4:
        case 0:
            return np.concatenate([np.array([number], "<i8").view("u1"), data])
        case 1:
            return number.to_bytes(8, "little") + data.tobytes()
        case 2:
            return {"number": number, "data": data, "words": [str(number)] * 3}
        case _:
            return [number, data[::-1], None, data[: nbytes // 2]]


def number_of(obj: Any) -> int:
    """The number of a message."""
    match obj:
        case dict():
            return int(obj["number"])
        case list():
            return int(obj[0])
        case _:
            return int.from_bytes(bytes(obj[:8]), "little")


def is_message(obj: Any, *, large: bool = True) -> bool:
    """Whether every byte of a message is that of its number."""
    return same(obj, message(number_of(obj), large=large))


def nobody_serves() -> bool:
    """Whether all socket channels of this process are done with."""
    return not any(thread.name == THREAD for thread in threading.enumerate())


def fill(end: Any, block: Any, limit: int = 1 << 16) -> int:
    """Send the same thing until the channel is full; return how often."""
    from shmengine.errors import WouldBlock

    for sent in range(limit):
        try:
            end.try_send(block)
        except WouldBlock:
            return sent
    raise AssertionError(f"{limit} times {len(block)} bytes went into a channel, and it is not full")


def drain(end: Any, count: int) -> list[Any]:
    """Receive so many."""
    return [end.receive(FOREVER) for _ in range(count)]


@contextlib.contextmanager
def sending(end: Any, objs: Iterable[Any], *, close: bool = False) -> Iterator[None]:
    """Send in a thread, as a channel may have little room; the end of the block waits until all is sent."""
    failures: list[BaseException] = []

    def send() -> None:
        try:
            for obj in objs:
                end.send(obj, FOREVER)
            if close:
                end.close()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if failures:
        raise failures[0]


def trip(left: Any, right: Any, obj: Any) -> Any:
    """Send an object from one end to the other, and return what comes."""
    with sending(left, [obj]):
        return right.receive(FOREVER)


class Job:
    """Something at work elsewhere: ``result()`` returns what came of it, or raises what it raised."""

    def __init__(self, wait: Callable[[], tuple[bool, Any]], pid: int) -> None:
        self._wait = wait
        self.pid = pid

    def result(self) -> Any:
        good, value = self._wait()
        if good:
            return value
        raise value


def _outcome(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[bool, Any]:
    try:
        return True, function(*args)
    except BaseException as error:
        return False, error


class Partners:
    """Starts functions that get an end of a channel, which is theirs from then on; many share a process."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._spawned = context.Process(target=_serve, args=(theirs,))
        self._spawned.start()
        theirs.close()
        self._engine = Engine(1, memory="64 MiB")
        self._engine.submit(os.getpid).result(FOREVER)

    def start(self, how: str, function: Callable[..., Any], end: Any, *args: Any) -> Job:
        """Call ``function(end, *args)`` in a thread, a forked child, a spawned one or a worker of an engine."""
        return getattr(self, f"_{how}")(function, end, args)

    def close(self) -> None:
        """End all of them."""
        self._engine.close()
        self._pipe.close()
        self._spawned.join()
        self._spawned.close()

    def _thread(self, function, end, args) -> Job:
        outcome: list[Any] = []
        thread = threading.Thread(target=lambda: outcome.append(_outcome(function, (end, *args))))
        thread.start()

        def wait():
            thread.join()
            return outcome[0]

        return Job(wait, os.getpid())

    def _fork(self, function, end, args) -> Job:
        child = Child(function, end, *args)
        end.close()
        return Job(child.outcome, child.pid)

    def _spawn(self, function, end, args) -> Job:
        self._pipe.send((function, end, args))
        assert self._pipe.recv() == "here"
        end.close()
        return Job(self._pipe.recv, self._spawned.pid)

    def _worker(self, function, end, args) -> Job:
        future = self._engine.submit(_outcome, function, (end, *args))

        def wait():
            try:
                return future.result(2 * FOREVER)
            finally:
                end.close()

        return Job(wait, self._engine._backend.pids[0])


def _serve(pipe: Any) -> None:
    with contextlib.suppress(EOFError):
        while True:
            function, end, args = pipe.recv()
            pipe.send("here")
            outcome = _outcome(function, (end, *args))
            end.close()
            del function, end, args
            pipe.send(outcome)
            del outcome


class Child:
    """A forked child that ends as a program does; what it was called with is its own.

    Its ends of a channel are closed by its end, and not before.
    """

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe(duplex=False)

        def run() -> None:
            self._pipe.close()
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            outcome = _outcome(function, args)
            try:
                theirs.send(outcome)
            except Exception:
                traceback.print_exc()

        self._process = context.Process(target=run)
        self._process.start()
        self.pid = self._process.pid
        theirs.close()

    def kill(self) -> None:
        """End it at once."""
        os.kill(self.pid, signal.SIGKILL)
        self._process.join()

    def outcome(self) -> tuple[bool, Any]:
        """Wait for its end, and return what became of the call."""
        try:
            outcome = self._pipe.recv()
        except EOFError:
            outcome = (False, AssertionError("the child ended without an answer"))
        self.end()
        return outcome

    def end(self) -> int:
        """Wait for its end, and return its exit code."""
        self._process.join()
        code = self._process.exitcode
        self._process.close()
        self._pipe.close()
        return code
