"""Who has the other end of a channel, however he was started, and what he is asked to do with it.

A `Remote` is an end that is a partner's, with the interface of an end: each call is made over there. What a start
forces to be different is said in `STARTS`; docs/channels.md has it as a table.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import signal
import threading
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import cloudpickle

from shmengine import EndOfStream, Engine, PeerLost, WorkerDied
from shmengine.channels.end import End

__all__ = ["FOREVER", "STARTS", "Child", "Job", "Partners", "Remote", "Start", "in_thread"]

FOREVER = 30  # no test waits so long unless it has failed


class Start(NamedTuple):
    """What is different between the ways to start who has the other end."""

    passed: str
    """How his end gets to him."""
    own_process: bool
    """Whether signals, and a death, are his alone."""
    lost: type[Exception]
    """What the other end gets when he is killed, or, as a thread, has lost his end."""


STARTS = {
    "thread": Start("as it is", own_process=False, lost=EndOfStream),
    "fork": Start("inherited", own_process=True, lost=PeerLost),
    "spawn": Start("pickled", own_process=True, lost=PeerLost),
    "worker": Start("as an argument of its task", own_process=True, lost=PeerLost),
}


# --- there ---------------------------------------------------------------------------------------


def _outcome(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[bool, Any]:
    try:
        return True, function(*args)
    except BaseException as error:
        error.add_note(f"There:\n{traceback.format_exc()}")
        return False, error


def _serve(line: Any, held: dict[int, Any]) -> None:
    """Do what is asked with the ends that are held, one thing after the other, until there is nothing more to do."""
    with contextlib.suppress(EOFError):
        while (asked := line.receive()) is not None:
            function, args = asked
            outcome = _outcome(function, (held, *args))
            del asked, function, args  # over shared memory, what is kept takes room
            try:
                line.send(outcome)
            except Exception as error:
                line.send((False, AssertionError(f"{outcome[1]!r} cannot be said: {error!r}")))
            del outcome
    for end in held.values():
        end.close()
    held.clear()


def _serve_alone(ours: Any, theirs: Any, end: Any = None) -> None:
    ours.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _serve(_Line(theirs), {} if end is None else {0: end})


def _serve_as_task(address: str, end: Any) -> None:
    with multiprocessing.connection.Client(address) as connection:
        line = _Line(connection)
        line.send(os.getpid())
        _serve(line, {} if end is None else {0: end})


def _take(held: dict[int, Any], number: int, end: Any) -> None:
    held[number] = end


def _with_end(held: dict[int, Any], number: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return function(held[number], *args)


def _with_ends(held: dict[int, Any], numbers: list[int], function: Callable[..., Any]) -> Any:
    return function([held[number] for number in numbers])


def _close(held: dict[int, Any], number: int) -> None:
    if (end := held.pop(number, None)) is not None:
        end.close()


def _drop(held: dict[int, Any], number: int) -> None:
    del held[number]
    gc.collect()


def _call(end: Any, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return getattr(end, name)(*args, **options)


class _Line:
    """What is asked and answered, between processes."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def send(self, obj: Any) -> None:
        self._connection.send_bytes(cloudpickle.dumps(obj))

    def receive(self) -> Any:
        return pickle.loads(self._connection.recv_bytes())

    def close(self) -> None:
        self._connection.close()


class _Queues:
    """What is asked and answered, between threads."""

    def __init__(self, ours: Any, theirs: Any) -> None:
        self._ours, self._theirs = ours, theirs

    @classmethod
    def pair(cls) -> tuple[_Queues, _Queues]:
        one, other = queue.SimpleQueue[Any](), queue.SimpleQueue[Any]()
        return cls(one, other), cls(other, one)

    def send(self, obj: Any) -> None:
        self._theirs.put(obj)

    def receive(self) -> Any:
        return self._ours.get()

    def close(self) -> None:
        pass


# --- here ----------------------------------------------------------------------------------------


class Job:
    """Something at work elsewhere: ``result()`` returns once what came of it, or raises what it raised."""

    def __init__(self, wait: Callable[[], tuple[bool, Any]], pid: int) -> None:
        self._wait = wait
        self.pid = pid
        self._outcome: tuple[bool, Any] | None = None
        self.done = False

    def wait(self) -> None:
        """Wait for its end."""
        if not self.done:
            self._outcome = self._wait()
            self.done = True

    def result(self) -> Any:
        self.wait()
        assert self._outcome is not None, "a result is given away once: nothing keeps it"
        (good, value), self._outcome = self._outcome, None
        if good:
            return value
        raise value


def in_thread(function: Callable[..., Any], *args: Any) -> Job:
    """Call a function in a thread of this process."""
    outcome: list[tuple[bool, Any]] = []
    thread = threading.Thread(target=lambda: outcome.append(_outcome(function, args)))
    thread.start()

    def wait() -> tuple[bool, Any]:
        thread.join()
        return outcome.pop()

    return Job(wait, os.getpid())


class _Host:
    """A thread or a process that has ends.

    Attributes
    ----------
    pid, tid : int
        His process, and the thread in it that does what is asked.
    """

    def __init__(self, line: Any, pid: int, tid: int, stop: Callable[[], None]) -> None:
        self.pid, self.tid = pid, tid
        self._line = line
        self._stop = stop
        self.ends = 0
        self._numbers = itertools.count(1)
        self._pending: Job | None = None
        self.gone = False

    def ask(self, function: Callable[..., Any], *args: Any) -> Job:
        """Let him call ``function(held, *args)`` when he has done what he was asked before."""
        assert not self.gone
        if self._pending is not None:
            self._pending.wait()
        self._line.send((function, args))
        self._pending = Job(self._answer, self.pid)
        return self._pending

    def _answer(self) -> tuple[bool, Any]:
        self._pending = None
        try:
            return self._line.receive()
        except (EOFError, OSError):
            return False, AssertionError("he has ended without an answer")

    def take(self, end: Any) -> int:
        """Give him an end by a pickle, and return the number that he has for it."""
        number = next(self._numbers)
        self.ask(_take, number, end).result()
        end.close()
        return number

    def end(self) -> None:
        """Let him end as soon as he has done what he was asked."""
        if not self.gone:
            self.gone = True
            if self._pending is not None:
                self._pending.wait()
            with contextlib.suppress(OSError):  # he may have been killed
                self._line.send(None)
            self._line.close()
            self._stop()

    def kill(self) -> None:
        """End his process at once."""
        self.gone = True
        os.kill(self.pid, signal.SIGKILL)
        self._stop()
        self._line.close()


class Remote:
    """An end that a partner has: the interface of an end, each call of which is made there.

    Attributes
    ----------
    pid, tid : int
        His process, and the thread in it.
    """

    def __init__(self, host: _Host, number: int, *, shared: bool) -> None:
        self._host, self._number, self._shared = host, number, shared
        self._left = False
        host.ends += 1
        self.pid, self.tid = host.pid, host.tid

    def start(self, function: Callable[..., Any], *args: Any) -> Job:
        """Let ``function(end, *args)`` be called there."""
        return self._host.ask(_with_end, self._number, function, args)

    def start_with(self, others: Iterable[Remote], function: Callable[..., Any]) -> Job:
        """Let ``function(ends)`` be called there with this end and others that he has, too."""
        return self._host.ask(_with_ends, [self._number, *(each._number for each in others)], function)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return what ``function(end, *args)`` returns there, or raise what it raises."""
        return self.start(function, *args).result()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_") or not callable(getattr(End, name, None)):
            raise AttributeError(f"an end has no method {name!r}")
        return lambda *args, **options: self.run(_call, name, args, options)

    @property
    def closed(self) -> bool:
        return self.run(getattr, "closed")

    @property
    def capabilities(self) -> Any:
        return self.run(getattr, "capabilities")

    def __repr__(self) -> str:
        return self.run(repr)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.run(list))

    def drop(self) -> None:
        """Let him lose his end, without closing it, and go on."""
        self._host.ask(_drop, self._number).result()

    def kill(self) -> None:
        """End his process at once; a thread, which cannot be killed, loses its end."""
        self._host.kill()

    def leave(self) -> None:
        """Let him close the end, and what was started for it alone end."""
        if not (self._host.gone or self._left):
            self._left = True
            self._host.ask(_close, self._number).result()
            self._host.ends -= 1
            if not self._host.ends and not self._shared:
                self._host.end()


class _Thread(_Host):
    def __init__(self, end: Any) -> None:
        ours, theirs = _Queues.pair()
        self._end = weakref.ref(end)
        thread = threading.Thread(target=_serve, args=(theirs, {0: end}))
        thread.start()
        super().__init__(ours, os.getpid(), thread.native_id or 0, thread.join)

    def kill(self) -> None:
        """A thread cannot be killed: if it is at work its end is closed under it, else it loses it."""
        if self._pending is None:
            self.ask(_drop, 0).result()
        elif (end := self._end()) is not None:
            end.close()
        self.end()


class Partners:
    """Starts those who have an end of a channel.

    Threads and forked children are there for one end; a spawned process, a forked one that inherits none, and an engine
    are started with the first end, or at once with ``ready=True``, and last as long as this, or until they are killed.
    """

    def __init__(self, *, ready: bool = False) -> None:
        self._processes: dict[str, _Host] = {}
        self._engine: Engine | None = None
        self._task: _Host | None = None
        if ready:
            self._process("fork")
            self._process("spawn")
            self._workers()

    def take(self, how: str, end: Any, *, pickled: bool = False) -> Remote:
        """Give an end to a thread, a forked child, a spawned one or a worker of an engine: it is theirs from then on.

        With ``pickled=True`` each process gets it as a spawned one does, and nothing there but the pickle has had it.
        """
        if how == "thread":
            return Remote(_Thread(end), 0, shared=False)
        if how == "fork" and not pickled:
            return Remote(self._child(end), 0, shared=False)
        if how != "worker":
            host = self._process(how)
            return Remote(host, host.take(end), shared=True)
        if self._task is not None and not self._task.gone:  # the only worker is at work
            return Remote(self._task, self._task.take(end), shared=False)
        if pickled:
            host = self._begin_task()
            return Remote(host, host.take(end), shared=False)
        return Remote(self._begin_task(end), 0, shared=False)

    def close(self) -> None:
        """End all of them."""
        for host in self._processes.values():
            host.end()
        if self._engine is not None:
            self._engine.close()

    def _child(self, end: Any) -> _Host:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        host = _started(context.Process(target=_serve_alone, args=(ours, theirs, end)), ours)
        theirs.close()
        end.close()
        return host

    def _begin_task(self, end: Any = None) -> _Host:
        with multiprocessing.connection.Listener(family="AF_UNIX") as listener:
            future = self._workers().submit(_serve_as_task, listener.address, end)
            line = _Line(listener.accept())
        pid = line.receive()
        if end is not None:
            end.close()

        def stop() -> None:
            error = future.exception(FOREVER)
            assert error is None or isinstance(error, WorkerDied), error

        self._task = _Host(line, pid, pid, stop)
        return self._task

    def _workers(self) -> Engine:
        if self._engine is None:
            self._engine = Engine(1, memory="64 MiB", retries=0)
            self._engine.submit(os.getpid).result(FOREVER)
        return self._engine

    def _process(self, how: str) -> _Host:
        host = self._processes.get(how)
        if host is None or host.gone:
            context = multiprocessing.get_context(how)
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve_alone, args=(ours, theirs))
            host = self._processes[how] = _started(process, ours)
            theirs.close()
        return host


def _started(process: Any, connection: Any) -> _Host:
    process.start()

    def stop() -> None:
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        process.close()

    return _Host(_Line(connection), process.pid, process.pid, stop)


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
