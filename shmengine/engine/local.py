"""Backends without processes: `SerialBackend`, the oracle of the others, and `ThreadBackend`.

Both keep the contract that processes impose: a function sees read-only arrays (unless told otherwise),
and what it returns belongs to the caller alone, never to an input or to another result.
"""

from __future__ import annotations

import functools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from operator import itemgetter
from typing import Any, Literal

import numpy as np

from shmengine.arrays import detach, readonly
from shmengine.engine.backend import (
    CLOSED_TEXT,
    Call,
    Outcome,
    Ref,
    Submit,
    TaskOptions,
    annotate,
    block_calls,
    task_rng,
    timed_out,
)
from shmengine.engine.blocks import Cut
from shmengine.engine.stalls import Stall, Stalls, summary_of
from shmengine.errors import Closed
from shmengine.pickling import substitute
from shmengine.stats import EngineStats
from shmengine.threads import Service
from shmengine.workers.messages import with_errstate
from shmengine.workers.stacks import thread_stack

__all__ = ["LocalRef", "SerialBackend", "ThreadBackend"]


class LocalRef(Ref):
    """A reference to a snapshot in this process."""

    __slots__ = ("_snapshot",)

    def __init__(self, snapshot: Any) -> None:
        super().__init__()
        self._snapshot = snapshot

    def get(self) -> Any:
        """Return the object."""
        return self._snapshot

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._snapshot,)


def _itself(obj: Any) -> Any:
    return obj


class _LocalBackend:
    """What both local backends have in common: one task at a time, counted."""

    kind: str
    workers: int

    def __init__(
        self, workers: int, initializer: Callable[..., Any] | None = None, initargs: tuple[Any, ...] = ()
    ) -> None:
        self.workers = workers
        self._initializer = initializer
        self._initargs = initargs
        self._closed = False
        self._lock = threading.Lock()
        self._done = self._failed = self._in_flight = 0

    def withdraw(self, *futures: Future[Any], kill: bool) -> None:
        """Do nothing: a thread cannot be ended."""

    def put(self, obj: Any) -> Ref:
        self._check_open()
        return LocalRef(_snapshot(obj))

    def empty(self, shape: Any, dtype: Any, order: Literal["C", "F"]) -> np.ndarray:
        self._check_open()
        return np.empty(shape, dtype, order=order)

    def empty_result(self, shape: Any, dtype: Any, order: Literal["C", "F"]) -> np.ndarray:
        return np.empty(shape, dtype, order=order)

    def stream_blocks(
        self,
        fn: Callable[..., Any],
        cut: Cut,
        target: Callable[[], tuple[np.ndarray, int] | None],  # noqa: ARG002  # no copy to be saved within a process
        options: TaskOptions,
        kwargs: Mapping[str, Any],
        *,
        ordered: bool,
    ) -> Iterator[Outcome]:
        return self.stream(fn, block_calls(cut, kwargs), options, ordered=ordered)

    def stream(
        self, fn: Callable[..., Any], calls: Iterable[Call], options: TaskOptions, *, ordered: bool
    ) -> Iterator[Outcome]:
        raise NotImplementedError

    def is_shared(self, array: np.ndarray) -> bool:  # noqa: ARG002  # as the contract has it
        return True

    def allocator(self) -> AbstractContextManager[None]:
        self._check_open()
        return nullcontext()

    def copy_into(self, target: np.ndarray, source: np.ndarray) -> None:
        np.copyto(target, source, casting="same_kind")

    def stats(self) -> EngineStats:
        return EngineStats(
            backend=self.kind,
            workers=self.workers,
            tasks_done=self._done,
            tasks_failed=self._failed,
            tasks_in_flight=self._in_flight,
        )

    def stalls(self, after: float) -> Stalls:  # noqa: ARG002  # who could ask runs nothing
        return Stalls((), summary_of(self.stats(), 0))

    def _check_open(self) -> None:
        if self._closed:
            raise Closed(CLOSED_TEXT)

    def _count(self, failed: bool) -> None:
        with self._lock:
            if failed:
                self._failed += 1
            else:
                self._done += 1

    def _run(self, fn: Callable[..., Any], call: Call, options: TaskOptions, index: int | None) -> Any:
        """Run one task and return its value, or raise what it raised."""
        args, kwargs = call
        if Ref.alive:
            args, kwargs = _resolved((args, kwargs))
        args = tuple([_presented(a, options.writable) if isinstance(a, np.ndarray) else a for a in args])
        kwargs = {
            name: _presented(a, options.writable) if isinstance(a, np.ndarray) else a
            for name, a in kwargs.items()
        }
        if options.rng is not None:
            kwargs["rng"] = task_rng(options.rng, index or 0)
        returned = [fn(*args, **kwargs)]
        del args, kwargs  # so that a private copy which the function returned is ours alone
        detach(returned)
        return returned.pop()


class SerialBackend(_LocalBackend):
    """Runs each task in the calling thread, one after another, when its outcome is asked for."""

    kind = "serial"

    def __init__(
        self, initializer: Callable[..., Any] | None = None, initargs: tuple[Any, ...] = (), **_: Any
    ) -> None:
        super().__init__(1, initializer, initargs)
        self._initialised = initializer is None

    def stream(
        self,
        fn: Callable[..., Any],
        calls: Iterable[Call],
        options: TaskOptions,
        *,
        ordered: bool,  # noqa: ARG002  # either is the same here
    ) -> Iterator[Outcome]:
        self._check_open()
        fn = _resolved(fn)
        for index, call in enumerate(calls):
            yield self._attempt(fn, call, options, index)  # no local: a large value must not live on here
            self._check_open()

    def submitter(self, fn: Callable[..., Any], options: TaskOptions) -> Submit:
        return functools.partial(self._submit, _resolved(fn), options)

    def _submit(
        self, fn: Callable[..., Any], options: TaskOptions, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Future[Any]:
        self._check_open()
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        _, value, error = self._attempt(fn, Call(args, kwargs), options, None)
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(annotate(error, options))
        return future

    def close(self, *, wait: bool = True) -> None:  # noqa: ARG002  # nothing runs
        self._closed = True

    def _attempt(
        self, fn: Callable[..., Any], call: Call, options: TaskOptions, index: int | None
    ) -> Outcome:
        started = time.monotonic()
        value: Any = None
        error: BaseException | None = None
        try:
            if not self._initialised:
                assert self._initializer is not None
                self._initializer(*self._initargs)
                self._initialised = True
            value = self._run(fn, call, options, index)
            if options.timeout is not None and time.monotonic() - started > options.timeout:
                error, value = timed_out(options, index), None
        except KeyboardInterrupt:
            raise  # it was meant for the main program
        except BaseException as raised:
            error = raised
        try:
            self._count(error is not None)
            return Outcome(-1 if index is None else index, value, error)
        finally:
            del error  # no cycle of traceback and frame


class _Task:
    """One call on its way through the threads; ends exactly once: run, dropped or timed out."""

    __slots__ = ("abandoned", "call", "ended", "finish", "fn", "index", "options", "started", "thread")

    def __init__(
        self,
        fn: Callable[..., Any],
        call: Call,
        options: TaskOptions,
        index: int | None,
        finish: Callable[[_Task, Any, BaseException | None], None],
    ) -> None:
        self.fn = fn
        self.call: Call | None = call
        self.options = options
        self.index = index
        self.finish = finish
        self.started: float | None = None
        self.thread: threading.Thread | None = None  # that runs it; None again when it was replaced
        self.ended = False  # guarded by the backend's lock, like `abandoned`
        self.abandoned = False  # nobody waits for it any more


class ThreadBackend(_LocalBackend):
    """Runs tasks in threads of this process: no copies, and parallel where functions drop the GIL.

    The threads are daemons: a call that outlives its timeout, or the engine, keeps no program alive.
    """

    kind = "thread"

    def __init__(
        self,
        workers: int,
        initializer: Callable[..., Any] | None = None,
        initargs: tuple[Any, ...] = (),
        **_: Any,
    ) -> None:
        super().__init__(workers, initializer, initargs)
        self._queue: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._threads: set[threading.Thread] = set()
        self._running: dict[threading.Thread, _Task] = {}  # those nobody waits for any more, too
        self._inline = threading.local()  # has `serial` in our own threads
        while len(self._threads) < workers:
            self._add_thread()

    def stream(
        self, fn: Callable[..., Any], calls: Iterable[Call], options: TaskOptions, *, ordered: bool
    ) -> Iterator[Outcome]:
        self._check_open()
        if hasattr(self._inline, "serial"):
            # A task that maps on its own engine: waiting for a thread from within one could be for ever.
            yield from self._inline.serial.stream(fn, calls, options, ordered=ordered)
            return
        fn = with_errstate(_resolved(fn))
        window = options.window or 4 * self.workers
        finished: queue.SimpleQueue[tuple[_Task, Any, BaseException | None]] = queue.SimpleQueue()
        running: dict[int, _Task] = {}
        early: dict[int, Outcome] = {}  # completed before its turn
        numbered = enumerate(calls)
        turn = 0
        more = True

        def finish(task: _Task, value: Any, error: BaseException | None) -> None:
            finished.put((task, value, error))

        try:
            while True:
                while more and len(running) + len(early) < window:
                    index, call = next(numbered, (-1, None))
                    if call is None:
                        more = False
                        break
                    task = _Task(fn, call, options, index, finish)
                    del call
                    running[index] = task
                    self._start(task)
                if turn in early:
                    yield early.pop(turn)
                    turn += 1
                    continue
                if not running:
                    return
                if ordered:
                    outcome = self._next_outcome(finished, running, options)
                    early[outcome.index] = outcome
                    del outcome
                    if options.completed is not None:
                        options.completed(turn + len(early) + finished.qsize())
                else:
                    yield self._next_outcome(finished, running, options)
                self._check_open()
        finally:
            for task in running.values():
                self._abandon(task)

    def submitter(self, fn: Callable[..., Any], options: TaskOptions) -> Submit:
        self._check_open()
        if hasattr(self._inline, "serial"):
            return self._inline.serial.submitter(fn, options)  # type: ignore[no-any-return]
        return functools.partial(self._submit, with_errstate(_resolved(fn)), options)

    def _submit(
        self, fn: Callable[..., Any], options: TaskOptions, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Future[Any]:
        future: Future[Any] = Future()

        def run(*args: Any, **kwargs: Any) -> Any:
            return fn(*args, **kwargs) if future.set_running_or_notify_cancel() else None

        def finish(task: _Task, value: Any, error: BaseException | None) -> None:
            if task.started is None:  # dropped by close()
                future.cancel()
                future.set_running_or_notify_cancel()
            elif future.cancelled():
                return
            elif error is None:
                future.set_result(value)
            else:
                future.set_exception(annotate(error, options))

        self._start(_Task(run, Call(args, kwargs), options, None, finish))
        return future

    def stalls(self, after: float) -> Stalls:
        now = time.monotonic()
        with self._lock:
            running = [(now - (task.started or now), thread, task) for thread, task in self._running.items()]
        found = [
            Stall(
                os.getpid(),
                f"thread {thread.name} ({thread.native_id})",
                task.options.label,
                task.index,
                seconds,
                thread_stack(thread.ident),
            )
            for seconds, thread, task in sorted(running, key=itemgetter(0), reverse=True)
            if seconds >= after and not task.ended
        ]
        return Stalls(found, summary_of(self.stats(), len(found)))

    def close(self, *, wait: bool = True) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                for _ in self._threads:
                    self._queue.put(None)
            threads = list(self._threads)
        if wait:
            for thread in threads:
                if thread is not threading.current_thread():
                    thread.join()

    def _start(self, task: _Task) -> None:
        with self._lock:
            self._check_open()
            self._in_flight += 1
            self._queue.put(task)

    def _add_thread(self) -> None:
        thread = Service(self._work, "shmengine-worker")
        self._threads.add(thread)
        thread.start()

    def _work(self) -> None:
        self._inline.serial = SerialBackend()
        failure: BaseException | None = None
        if self._initializer is not None:
            try:
                self._initializer(*self._initargs)
            except BaseException as raised:
                failure = raised
        while (task := self._queue.get()) is not None:
            leave = self._work_on(task, failure)
            del task
            if leave:
                return

    def _work_on(self, task: _Task, failure: BaseException | None) -> bool:
        """Run one task; tell whether this thread has been replaced meanwhile."""
        value: Any = None
        error: BaseException | None = None
        with self._lock:
            assert task.call is not None
            call, task.call = task.call, None
            dropped = task.abandoned or self._closed
            if not dropped:
                task.thread, task.started = threading.current_thread(), time.monotonic()
                self._running[task.thread] = task
        if dropped:
            error = Closed(CLOSED_TEXT)
        else:
            try:
                if failure is not None:
                    raise failure
                value = self._run(task.fn, call, task.options, task.index)
            except BaseException as raised:
                error = raised
        del call
        with self._lock:
            abandoned, task.ended = task.abandoned, True
            replaced = not dropped and task.thread is None
            self._in_flight -= 1
            self._running.pop(threading.current_thread(), None)
        if not abandoned:
            if not dropped:
                self._count(error is not None)
            task.finish(task, value, error)
        del value, error
        return replaced

    def _abandon(self, task: _Task, *, replace: bool = False) -> bool:
        """Stop waiting for `task`; tell False if it has ended already.

        `replace`: the thread that is busy with it counts no longer, and a new one takes its place.
        """
        with self._lock:
            if task.ended:
                return False
            task.abandoned = True
            if replace and task.thread is not None and not self._closed:
                self._threads.discard(task.thread)
                task.thread = None
                self._add_thread()
            return True

    def _next_outcome(
        self,
        finished: queue.SimpleQueue[tuple[_Task, Any, BaseException | None]],
        running: dict[int, _Task],
        options: TaskOptions,
    ) -> Outcome:
        """Wait until one of `running` completes or exceeds its timeout; it is removed from there."""
        while True:
            patience = None
            if options.timeout is not None:
                now = time.monotonic()
                starts = {index: task.started for index, task in running.items() if task.started is not None}
                for index, started in starts.items():
                    if now - started <= options.timeout:
                        continue
                    thread = running[index].thread
                    stack = thread_stack(thread.ident) if thread is not None else ""
                    if self._abandon(running[index], replace=True):
                        del running[index]
                        self._count(failed=True)
                        return Outcome(index, None, timed_out(options, index, stack))
                # A task that has not started cannot exceed its time before a whole timeout from now.
                patience = max(min(starts.values(), default=now) + options.timeout - now, 0.001)
            try:
                task, value, error = finished.get(timeout=patience)
            except queue.Empty:
                continue
            if isinstance(error, Closed) and task.started is None:
                raise error
            assert task.index is not None
            del running[task.index]
            return Outcome(task.index, value, error)


def _presented(array: np.ndarray, writable: Any) -> np.ndarray:
    """Return `array` as the function is to see it."""
    if writable is False:
        return readonly(array)
    return array if writable == "shared" else array.copy(order="K")


def _resolved(value: Any) -> Any:
    """Return `value` with the object in place of each reference, wherever pickling would find one."""
    return substitute(_in_containers(value), Ref, lambda ref: ref.get()) if Ref.alive else value


def _in_containers(value: Any) -> Any:
    """Return `value` with the object in place of each reference that lies in exact containers alone.

    So these need not be pickled, and what lies beside them need not be something that can be.
    """
    if isinstance(value, Ref):
        return value.get()
    kind = type(value)
    if kind is tuple or kind is list:
        return kind(_in_containers(part) for part in value)
    if kind is dict:
        return {key: _in_containers(part) for key, part in value.items()}
    return value


def _snapshot(obj: Any) -> Any:
    """Return a copy of `obj` as processes would see it: independent of the original, arrays read-only."""
    from shmengine.codec import decode, encode

    return decode(np.frombuffer(encode(obj).to_bytes(), np.uint8))
