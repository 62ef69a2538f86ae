"""`Executor`: the interface of `concurrent.futures.ProcessPoolExecutor`, on worker processes that share memory."""

from __future__ import annotations

import functools
import itertools
import logging
import multiprocessing
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures import process as standard
from traceback import format_exception
from types import TracebackType
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np

from shmengine.config import default_workers
from shmengine.engine.backend import Submit, TaskOptions, function_name
from shmengine.engine.checks import CHECKS, budget_of, check_choice, positive
from shmengine.engine.collector import Collector
from shmengine.engine.policy import Policy
from shmengine.engine.process import ProcessBackend
from shmengine.errors import (
    Closed,
    MemoryBudgetExceeded,
    RemoteError,
    RemoteTraceback,
    SerializationError,
    WorkerDied,
)
from shmengine.pickling import goes_by_reference, original_error
from shmengine.workers.messages import USUAL_ERRSTATE

__all__ = ["BrokenExecutor", "Executor", "ExecutorWorkerDied", "WorkerProcess", "broken_by"]

P = ParamSpec("P")
T = TypeVar("T")


class ExecutorWorkerDied(WorkerDied, standard.BrokenProcessPool):
    """A worker process of an `Executor` ended abruptly: all its unfinished futures get this, and `submit` raises it."""


class BrokenExecutor(RemoteError, standard.BrokenProcessPool):
    """An initializer failed, or something could not be unpickled on the other side; ``__cause__`` says why."""


def broken_by(error: BaseException, cls: type[BrokenExecutor] = BrokenExecutor) -> BrokenExecutor:
    """Return the error for something that could not be unpickled, or for an initializer's `RemoteError`."""
    if isinstance(error, RemoteError) and not error.type_name:
        broken = cls(str(error))
        broken.__cause__ = error.__cause__
    else:
        type_name = error.type_name if isinstance(error, RemoteError) else type(error).__qualname__
        broken = cls(f"it cannot be unpickled: {error}", type_name)
        broken.__cause__ = error
    return broken


class WorkerProcess:
    """A worker, as far as others use `multiprocessing.Process`."""

    def __init__(self, popen: Any) -> None:
        self._popen = popen

    @property
    def pid(self) -> int:
        """Process id."""
        return int(self._popen.pid)

    @property
    def exitcode(self) -> int | None:
        """Exit code, minus the signal number, or None while it is alive."""
        code: int | None = self._popen.poll()
        return code

    def is_alive(self) -> bool:
        """Tell whether it has not ended."""
        return self.exitcode is None

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, or for so many seconds."""
        import subprocess

        try:
            self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            return

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._popen.terminate()

    def kill(self) -> None:
        """Send SIGKILL."""
        self._popen.kill()

    def __repr__(self) -> str:
        return f"<WorkerProcess pid={self.pid} exitcode={self.exitcode}>"


class _AsStandard(Policy):
    """Deaths and errors as `concurrent.futures.process` has them."""

    workers_name = "max_workers"
    fragile = True
    pickles_late = True
    finishes = True

    def __init__(self, start: Literal["first task", "on demand"], tasks_per_worker: int | None) -> None:
        self.start = start
        self.tasks_per_worker = tasks_per_worker

    def setup(self) -> dict[str, Any]:
        """Let workers talk to managers, and say what pickle says."""
        return {"authkey": bytes(multiprocessing.current_process().authkey), "original_errors": True}

    def broken(self, error: BaseException) -> BaseException:
        """Return an error that is `BrokenProcessPool` as well."""
        if isinstance(error, WorkerDied):
            return ExecutorWorkerDied(
                error.pid, error.returncode, error.task, error.attempts, error.cause, error.stderr_tail
            )
        return broken_by(error)

    def failed(self, error: BaseException) -> BaseException:
        """Return what was raised, with the traceback of the worker as the standard's class."""
        return _as_standard(error)


class _Initializer(functools.partial[Any]):
    """An initializer that logs its failure as the standard's does."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except BaseException:
            logging.getLogger("concurrent.futures").critical("Exception in initializer:", exc_info=True)
            raise


class Executor(futures.Executor):
    """A `concurrent.futures.Executor` as strict as `ProcessPoolExecutor`, on an engine's worker processes.

    Large arrays cross by shared memory; lambdas and closures can be submitted; no ``__main__`` guard is needed.
    Otherwise it does what the standard's does, errors included.

    Parameters
    ----------
    max_workers : int, optional
        By default the cores that this process may use; 255 at most. They start when futures find none idle.
    mp_context : multiprocessing context, optional
        For compatibility: workers are always programs of their own, as with ``"spawn"``. With ``"fork"`` all
        of them start with the first future, and `max_tasks_per_child` is refused.
    initializer : callable, optional
        Called as ``initializer(*initargs)`` in each worker before its tasks. If it fails, the executor is broken.
    initargs : tuple
    max_tasks_per_child : int, optional
        Tasks after which a worker is replaced by a fresh one.
    memory : int or str, optional
        Budget of shared memory, in bytes or like ``"2 GiB"``; by default a quarter of what is available.
    threads_per_worker : int, optional
        Threads that numerical libraries may use in one worker; by default cores / workers.
    check : {"frame", "payload"}
        What is verified of each message; as in `Engine`.
    writable : {False, "private"}
        How functions get arrays: read-only, or as private copies (also True), for functions that write to them.

    Raises
    ------
    TypeError, ValueError
        As by the standard's, with its texts.
    MemoryBudgetExceeded
        The budget does not fit into memory.

    Examples
    --------
    >>> with Executor(1) as executor:
    ...     executor.submit(pow, 2, 10).result()
    1024
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: Any = None,
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] = (),
        *,
        max_tasks_per_child: int | None = None,
        memory: int | str | None = None,
        threads_per_worker: int | None = None,
        check: str = "frame",
        writable: Literal[False, True, "private"] = False,
    ) -> None:
        if writable not in (False, True, "private"):
            raise ValueError(f"writable must be False or 'private', not {writable!r}")
        if max_workers is None:
            max_workers = default_workers()
        elif max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        if mp_context is None:
            mp_context = multiprocessing.get_context("spawn" if max_tasks_per_child is not None else None)
        forks = mp_context.get_start_method(allow_none=False) == "fork"
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        if max_tasks_per_child is not None:
            if not isinstance(max_tasks_per_child, int):
                raise TypeError("max_tasks_per_child must be an integer")
            if max_tasks_per_child <= 0:
                raise ValueError("max_tasks_per_child must be >= 1")
            if forks:
                raise ValueError(
                    "max_tasks_per_child is incompatible with the 'fork' multiprocessing start method;"
                    " supply a different mp_context."
                )
        check_choice("check", check, CHECKS)
        budget = budget_of(memory)
        if threads_per_worker is not None:
            threads_per_worker = positive("threads_per_worker", threads_per_worker)
        self._max_workers = max_workers
        self._mp_context = mp_context
        self._shut_down = False
        self._writable: Literal[False, "private"] = "private" if writable else False
        self._latest: tuple[Callable[[], Any], Submit] = _nothing, _nothing
        self._backend = ProcessBackend(
            max_workers,
            budget,
            threads_per_worker,
            None if initializer is None else _Initializer(initializer),
            tuple(initargs),
            check=check,
            policy=_AsStandard("first task" if forks else "on demand", max_tasks_per_child),
        )
        _services.add(self._backend.service)

    # --- what others look at -------------------------------------------------------------------

    @property
    def _processes(self) -> dict[int, WorkerProcess]:
        return {pid: WorkerProcess(popen) for pid, popen in self._backend.processes().items()}

    @property
    def _broken(self) -> BaseException | None:
        return self._backend.broken

    # --- running -------------------------------------------------------------------------------

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> futures.Future[T]:
        """Run ``fn(*args, **kwargs)`` in a worker and return its future.

        Raises
        ------
        BrokenProcessPool
            A worker has died, or an initializer has failed.
        RuntimeError
            The executor was shut down, or the interpreter is about to exit.
        """
        return self._submitter(fn)(args, kwargs)

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Return an iterator over ``fn(*items)``, in order.

        Parameters
        ----------
        fn : callable
            Pickled once.
        *iterables : iterable
            Consumed at once, unless there is a `buffersize`.
        timeout : float, optional
            Seconds from now after which ``next()`` raises `TimeoutError`.
        chunksize : int
            How many calls make up one task.
        buffersize : int, optional
            Most tasks that are submitted and not yet yielded; iterables are then consumed lazily.

        Raises
        ------
        TimeoutError, or what `fn` raised
            By ``next()``. The tasks that are left are cancelled.
        ValueError
            `chunksize` or `buffersize` is not positive.
        BrokenProcessPool, RuntimeError
            As by `submit`.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None:
            if not isinstance(buffersize, int):
                raise TypeError("buffersize must be an integer or None")
            if buffersize < 1:
                raise ValueError("buffersize must be None or > 0")
        end = None if timeout is None else timeout + time.monotonic()
        calls: Iterator[tuple[Any, ...]] = zip(*iterables, strict=False)
        run: Callable[..., Any] = fn
        if chunksize > 1:
            run, calls = functools.partial(_run_calls, fn), _grouped(calls, chunksize)
        submit = self._submitter(run, function_name(fn))
        submitted = deque(submit(args, {}) for args in itertools.islice(calls, buffersize))
        # The iterator must not keep the executor.
        more = (
            None if buffersize is None else functools.partial(_submit_next, weakref.ref(self), submit, calls)
        )
        results = _results(submitted, end, more)
        return itertools.chain.from_iterable(map(_emptied, results)) if chunksize > 1 else results

    def _submitter(self, fn: Callable[..., Any], name: str = "") -> Submit:
        """Return what submits calls of a function; the latest one is kept, if its pickle is the same each time."""
        self._check_usable()
        known, submit = self._latest
        if known() is fn and goes_by_reference(fn) and np.geterr() == USUAL_ERRSTATE:
            return submit
        try:
            options = TaskOptions(label=f"submit({name or function_name(fn)})", writable=self._writable)
            submit = functools.partial(_submit, self._backend.submitter(fn, options))
        except SerializationError as error:
            self._backend.provide_workers()  # as the standard's: before anything is pickled
            return functools.partial(_fail, error)
        if goes_by_reference(fn) and np.geterr() == USUAL_ERRSTATE:
            self._latest = weakref.ref(fn), submit
        return submit

    def _check_usable(self) -> None:
        if (broken := self._broken) is not None:
            raise broken
        if self._shut_down:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if _exiting:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    # --- life ----------------------------------------------------------------------------------

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more futures, and end the workers when all that were submitted have ended.

        Parameters
        ----------
        wait : bool
            Until then; otherwise that happens in a thread. (The interpreter does not exit before.)
        cancel_futures : bool
            Cancel those that have not begun.
        """
        self._shut_down = True
        if cancel_futures:
            self._backend.cancel_pending()
        self._backend.service.finish()
        if wait:
            self._backend.service.join()

    def terminate_workers(self) -> None:
        """Send SIGTERM to all workers: what has not begun is cancelled, what runs gets `BrokenProcessPool`."""
        self._end_workers(WorkerProcess.terminate)

    def kill_workers(self) -> None:
        """Send SIGKILL to all workers; otherwise like `terminate_workers`."""
        self._end_workers(WorkerProcess.kill)

    def _end_workers(self, end: Callable[[WorkerProcess], None]) -> None:
        processes = self._processes
        self.shutdown(wait=False, cancel_futures=True)
        for process in processes.values():
            end(process)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Literal[False]:
        if kind is KeyboardInterrupt:  # it does not reach the workers
            self.kill_workers()
        self.shutdown()
        return False

    def __reduce__(self) -> Any:
        raise TypeError("an Executor cannot be sent to another process")

    def __repr__(self) -> str:
        state = "broken" if self._broken else "shut down" if self._shut_down else "running"
        return f"<Executor max_workers={self._max_workers} {state}>"


def _nothing(*_: Any) -> Any:
    return _nothing


# --- submitting and yielding, without a reference to the executor ----------------------------------


def _submit(submit: Submit, args: tuple[Any, ...], kwargs: Any) -> futures.Future[Any]:
    try:
        return submit(args, kwargs)
    except (SerializationError, MemoryBudgetExceeded) as error:
        return _fail(error, args, kwargs)
    except standard.BrokenProcessPool as error:  # since it was found usable
        return _fail(error, args, kwargs)
    except Closed as error:
        raise RuntimeError("cannot schedule new futures after shutdown") from error


def _fail(error: BaseException, args: tuple[Any, ...], kwargs: Any) -> futures.Future[Any]:  # noqa: ARG001
    """Return a future of a task that could not be sent."""
    future: futures.Future[Any] = futures.Future()
    future.set_running_or_notify_cancel()
    future.set_exception(_as_standard(error))
    return future


def _as_standard(error: BaseException) -> BaseException:
    """Return the error of a task as the standard's has it: what was raised, with a `_RemoteTraceback`."""
    text = error.__cause__.text if isinstance(error.__cause__, RemoteTraceback) else ""
    if isinstance(error, SerializationError) and not text:
        error = original_error(error)
        text = "".join(format_exception(error))
        error.__traceback__ = None  # its frames refer to arguments
    if text:
        error.__cause__ = standard._RemoteTraceback(f'\n"""\n{text}"""')  # type: ignore[arg-type]
    return error


def _submit_next(
    executor: weakref.ref[Executor], submit: Submit, calls: Iterator[tuple[Any, ...]]
) -> futures.Future[Any] | None:
    usable = executor()
    if usable is None or (args := next(calls, None)) is None:
        return None
    usable._check_usable()
    return submit(args, {})


def _results(
    submitted: deque[futures.Future[Any]],
    end: float | None,
    more: Callable[[], futures.Future[Any] | None] | None,
) -> Iterator[Any]:
    try:
        while submitted:
            if more is not None and (future := more()) is not None:
                submitted.append(future)
                del future
            yield _result(submitted.popleft(), None if end is None else end - time.monotonic())
    finally:
        for future in submitted:
            future.cancel()


def _result(future: futures.Future[Any], timeout: float | None) -> Any:
    try:
        return future.result(timeout)
    finally:
        future.cancel()
        del future  # no cycle with the traceback of what it raises


def _grouped(calls: Iterator[tuple[Any, ...]], size: int) -> Iterator[tuple[Any, ...]]:
    while group := tuple(itertools.islice(calls, size)):
        yield (group,)


def _run_calls(fn: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> list[Any]:
    return [fn(*args) for args in calls]


def _emptied(values: list[Any]) -> Iterator[Any]:
    values.reverse()
    while values:
        yield values.pop()


# --- the end of the interpreter ---------------------------------------------------------------------

_services: weakref.WeakSet[Collector] = weakref.WeakSet()
_exiting = False


def _finish_all() -> None:
    """Wait for what was submitted, as the standard's executors do; after Ctrl-C, do not."""
    global _exiting
    _exiting = True
    interrupted = getattr(sys, "last_type", None) is KeyboardInterrupt
    services = list(_services)
    for service in services:
        service.finish(now=interrupted)
    for service in services:
        service.join()


# Before threads are joined, and before `atexit` callbacks.
threading._register_atexit(_finish_all)  # type: ignore[attr-defined]
