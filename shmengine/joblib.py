"""The joblib backend ``"shmengine"``: `joblib.Parallel`, and with it scikit-learn, on workers that share memory.

::

    Parallel ── submit(BatchedCalls) ──► the calls alone ──────────► a worker: BatchedCalls again, with these calls
                                         a large array: one copy in
                                         shared memory for each
                                         call of Parallel, by        ──► a view of it
                                         reference from then on

Imports joblib; ``import shmengine`` does not import this.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import multiprocessing
import os
import pickle
import queue
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import process as standard
from typing import TYPE_CHECKING, Any

import numpy as np
from joblib import cpu_count, register_parallel_backend
from joblib.externals.loky import process_executor as loky
from joblib.parallel import (
    AutoBatchingMixin,
    BatchedCalls,
    FallbackToBackend,
    ParallelBackendBase,
    SequentialBackend,
)

from shmengine.arrays import address_of, owner_of
from shmengine.config import default_budget
from shmengine.engine.backend import Submit, TaskOptions, Writable, function_name
from shmengine.engine.callback_future import CallbackFuture
from shmengine.engine.checks import (
    CHECKS,
    at_least,
    budget_of,
    check_callable,
    check_choice,
    idle_seconds,
    positive,
)
from shmengine.engine.policy import Policy
from shmengine.engine.process import ProcessBackend
from shmengine.errors import Closed, MemoryBudgetExceeded, SerializationError, WorkerDied
from shmengine.futures import BrokenExecutor, broken_by
from shmengine.pickling import goes_by_reference
from shmengine.workers.joblib_calls import Runner, own_copy

if TYPE_CHECKING:
    from shmengine.stats import EngineStats

__all__ = ["JoblibBroken", "JoblibWorkerDied", "ShmengineBackend", "register", "shutdown", "stats"]

IDLE_SECONDS = 300.0
SHARED_BYTES = 1 << 20  # where joblib has no limit of its own


class JoblibWorkerDied(WorkerDied, loky.TerminatedWorkerError):  # type: ignore[misc]
    """A worker process died, and with it the call of `joblib.Parallel`; the next call finds a new worker."""


class JoblibBroken(BrokenExecutor, loky.BrokenProcessPool):  # type: ignore[misc]
    """An initializer failed, or something could not be unpickled on the other side; ``__cause__`` says why."""


def register() -> None:
    """Make the backend known to joblib as ``"shmengine"``; importing this module has done so already.

    Examples
    --------
    >>> from math import sqrt
    >>> import joblib
    >>> register()
    >>> with joblib.parallel_config("shmengine", n_jobs=2):
    ...     joblib.Parallel()(joblib.delayed(sqrt)(n**2) for n in range(3))
    [0.0, 1.0, 2.0]
    """
    register_parallel_backend("shmengine", ShmengineBackend)


# --- arrays ---------------------------------------------------------------------------------------


class _Arrays:
    """The large arrays of one call of Parallel: each has one copy in shared memory for as long as the array lives.

    Known by where it lies, so that it is found again whatever object is made of it each time it is pickled.
    """

    def __init__(self, backend: ProcessBackend, least: int, *, own: bool) -> None:
        self._backend = backend
        self._least = least
        self._arrive = own_copy if own else None
        self._lock = threading.Lock()
        self._copies: dict[Any, tuple[weakref.ref[np.ndarray], np.ndarray]] = {}

    def __call__(self, array: np.ndarray) -> tuple[Callable[..., Any] | None, np.ndarray]:
        """Return what goes in place of an array, and what is done with that on its arrival (`TaskOptions.place`)."""
        if array.nbytes < self._least:
            return None, array
        if self._backend.is_shared(array):
            return self._arrive, array
        key = (address_of(array), array.shape, array.strides, array.dtype)
        with self._lock:
            known = self._copies.get(key)
            if known is not None and known[0]() is not None:
                return self._arrive, known[1]
            try:
                shared = self._backend.share_copy(array)
            except MemoryBudgetExceeded:  # it may still go with each task, one after the other
                return None, array
            self._copies[key] = weakref.ref(owner_of(array), functools.partial(self._forget, key)), shared
        return self._arrive, shared

    def _forget(self, key: Any, gone: weakref.ref[np.ndarray]) -> None:
        """The array is no more: let its copy go, too. (In any thread, at any moment: without the lock.)"""
        known = self._copies.get(key)
        if known is not None and known[0] is gone:
            self._copies.pop(key, None)

    def clear(self) -> None:
        """Let all copies go: those on their way to a worker stay for as long as it needs them."""
        self._copies.clear()


# --- workers --------------------------------------------------------------------------------------


class _AsJoblib(Policy):
    """Workers that serve one call of Parallel after the other; a death fails a call, and nobody else's."""

    workers_name = "n_jobs"
    pickles_late = True

    make_future = CallbackFuture  # joblib waits by itself

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.users: weakref.WeakSet[_Call] = weakref.WeakSet()

    def make_room(self) -> None:
        """Let go of copies; who wants one again makes it again."""
        for user in list(self.users):
            user.forget_copies()

    def setup(self) -> dict[str, Any]:
        """Let workers talk to managers, and say what pickle says."""
        return {"authkey": bytes(multiprocessing.current_process().authkey), "original_errors": True}

    def broken(self, error: BaseException) -> BaseException:
        """Return an error that is `BrokenProcessPool` as well."""
        if isinstance(error, WorkerDied):
            return self.failed(error)
        return broken_by(error, JoblibBroken)

    @staticmethod
    def failed(error: BaseException) -> BaseException:
        """Return what joblib's users expect of a worker's death, and of what cannot be pickled."""
        if type(error) is WorkerDied:
            return JoblibWorkerDied(*error.__reduce__()[1])
        if isinstance(error, SerializationError):
            refused = pickle.PicklingError(f"Could not pickle the task to send it to the workers: {error}")
            refused.__cause__ = error.__cause__
            return refused
        return error


class _Pool:
    """Workers of some settings, kept from one call of Parallel to the next."""

    idle_seconds = IDLE_SECONDS  # as the latest call wants it

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        policy = _AsJoblib(settings["environment"])
        self.users = policy.users
        self.backend = ProcessBackend(
            settings["workers"],
            settings["memory"] or 2 * default_budget(),  # it is for the copies of arrays, too
            initializer=settings["initializer"],
            initargs=settings["initargs"],
            retries=settings["retries"],
            check=settings["check"],
            policy=policy,
        )
        self.idle_since = time.monotonic()

    def ends_at(self) -> float:
        """Return when it is to end if nobody uses it; infinity while somebody does."""
        return math.inf if self.users else self.idle_since + self.idle_seconds

    def serves(self, settings: Mapping[str, Any]) -> bool:
        """Tell whether these are its settings, and it works."""
        try:
            return self.backend.broken is None and bool(self.settings == settings)
        except Exception:  # arguments of an initializer that cannot be compared
            return False


_pools: list[_Pool] = []  # the latest last
_lock = threading.Lock()
_idle_thread: threading.Thread | None = None  # while there are pools
_left: queue.SimpleQueue[None] = (
    queue.SimpleQueue()
)  # one for each call that has left its pool; wakes the thread


def _pool_for(settings: Mapping[str, Any], idle_seconds: float, user: _Call) -> _Pool:
    """Return a pool with these settings; idle ones with others are ended: the cores are for one of them."""
    global _idle_thread
    with _lock:
        _end([pool for pool in _pools if not pool.users and not pool.serves(settings)])
        pool = next((pool for pool in _pools if pool.serves(settings)), None)
        if pool is None:
            pool = _Pool(settings)
            _pools.append(pool)
        if _idle_thread is None or not _idle_thread.is_alive():
            _idle_thread = threading.Thread(target=_end_idle, name="shmengine-idle", daemon=True)
            _idle_thread.start()
        pool.idle_seconds = idle_seconds
        pool.users.add(user)
        return pool


def _end(pools: list[_Pool]) -> None:
    for pool in pools:
        _pools.remove(pool)
        pool.backend.close()


def _end_idle() -> None:
    """End each pool when it has been idle for as long as it may; return when there is none (in a thread)."""
    global _idle_thread
    while True:
        with _lock:
            now = time.monotonic()
            _end([pool for pool in _pools if pool.ends_at() <= now])
            if not _pools:
                _idle_thread = None
                return
            next_end = min(pool.ends_at() for pool in _pools)
        with contextlib.suppress(queue.Empty):
            _left.get(timeout=None if next_end == math.inf else max(next_end - time.monotonic(), 0))


def shutdown() -> None:
    """End the workers that no call of Parallel uses now; the next call starts new ones."""
    with _lock:
        _end([pool for pool in _pools if not pool.users])
    _left.put(None)


def stats() -> EngineStats | None:
    """Return the counters of the workers that were started last; None if there are none.

    ``bytes_copied`` and ``bytes_shared`` tell what crossed to workers and back, and how.
    """
    with _lock:
        return _pools[-1].backend.stats() if _pools else None


def _after_fork_in_child() -> None:
    # The parent's workers are of no use here, and another thread may have held the lock.
    global _lock, _idle_thread, _left
    _lock, _idle_thread, _left = threading.Lock(), None, queue.SimpleQueue()
    _pools.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


# --- one call of Parallel -------------------------------------------------------------------------


class _Call:
    """What one call of Parallel, or several in one ``with`` block, has at the workers."""

    def __init__(
        self, settings: Mapping[str, Any], idle_seconds: float, writable: Writable, *, least: int, own: bool
    ) -> None:
        self._pool: _Pool | None = None
        pool = self._pool = _pool_for(settings, idle_seconds, self)
        # Also when it is forgotten, and by whatever thread finds that out: it takes no lock.
        self._leave = weakref.finalize(self, _left.put, None)
        self._backend = pool.backend
        self._writable = writable
        self._arrays = _Arrays(pool.backend, least, own=own)
        self._submits: dict[int, tuple[Any, Submit]] = {}
        self._outcomes: set[Future[Any]] = set()

    def submit(self, batch: BatchedCalls, callback: Callable[[Any], None] | None) -> Future[Any]:
        """Send a batch; the callback gets its outcome, and whether it has one call only."""
        outcome: Future[Any]
        try:
            outcome = self._send(batch)
        except Exception as error:
            outcome = CallbackFuture()
            outcome.set_exception(_AsJoblib.failed(error))
        self._outcomes.add(outcome)
        outcome.add_done_callback(functools.partial(self._done, callback, len(batch.items) == 1))
        return outcome

    def _send(self, batch: BatchedCalls) -> Future[Any]:
        calls = batch.items
        fn = calls[0][0]
        known = self._submits.get(id(fn))
        if len(calls) == 1 and known is not None:
            _, args, kwargs = calls[0]
            return known[1](((args, kwargs or None),), {})
        if (known is not None or goes_by_reference(fn)) and all(call[0] is fn for call in calls):
            calls = [(args, kwargs or None) for _, args, kwargs in calls]
        else:
            known, fn = self._submits.get(0), None
        if known is None:
            options = TaskOptions(
                writable=self._writable,
                place=self._arrays,
                label="Parallel" if fn is None else f"Parallel({function_name(fn)})",
            )
            known = fn, self._backend.submitter(Runner(batch, fn, {"shmengine": __name__}), options)
            self._submits[0 if fn is None else id(fn)] = known
        return known[1](tuple(calls), {})

    def _done(self, callback: Callable[[Any], None] | None, alone: bool, outcome: Future[Any]) -> None:
        self._outcomes.discard(outcome)
        if callback is not None:
            callback((outcome, alone))

    def forget_copies(self) -> None:
        """Let copies of arrays go that no task has now."""
        self._arrays.clear()

    def forget(self) -> None:
        """The call is over: what another one sends is as it is then."""
        self._arrays.clear()
        self._submits.clear()

    def abort(self) -> None:
        """Let nothing of it run any longer: workers that are at it are ended, and replaced."""
        running = [outcome for outcome in list(self._outcomes) if not outcome.cancel()]
        if running:
            with contextlib.suppress(Closed, standard.BrokenProcessPool):
                self._backend.withdraw(*running, kill=True)

    def close(self) -> None:
        """Leave the workers to others."""
        self.forget()
        if self._pool is not None:
            self._pool.idle_since = time.monotonic()
            self._pool.users.discard(self)
            self._pool = None
            self._leave()


class ShmengineBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """Runs calls of `joblib.Parallel` in worker processes that share memory.

    Not made by users, but by ``Parallel(backend="shmengine", ...)`` and ``parallel_config("shmengine", ...)``, which
    take these parameters as well.

    Parameters
    ----------
    nesting_level, inner_max_num_threads
        As for all backends of joblib.
    memory : int or str, optional
        Budget of shared memory, in bytes or like ``"2 GiB"``; by default half of what is available.
    retries : int
        How often a task is started again after its worker process died; 0 by default, as with joblib's others.
    check : {"frame", "payload"}
        What is verified of each message; as in `shmengine.Engine`.
    initializer : callable, optional
        Called as ``initializer(*initargs)`` in each worker before its tasks.
    initargs : tuple
    idle_worker_timeout : float
        Seconds after which workers that no call uses are ended, 300 by default; 0: as soon as the call is over;
        infinity: never.
    """

    default_n_jobs = 1
    supports_retrieve_callback = True
    supports_inner_max_num_threads = True
    supports_sharedmem = False
    uses_threads = False

    _workers: _Call | None = None

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Return how many workers there will be."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None or n_jobs == 1:
            return 1
        if "SHMENGINE_WORKER" in os.environ:
            where = "below its own workers"
        elif multiprocessing.current_process().daemon:
            where = "in daemonic processes"
        elif not (self.in_main_thread() or self.nesting_level == 0):
            where = "below threads"
        else:
            return max(cpu_count() + 1 + n_jobs, 1) if n_jobs < 0 else n_jobs
        warnings.warn(
            f"shmengine-backed parallel loops cannot be nested {where}, setting n_jobs=1", stacklevel=3
        )
        return 1

    def configure(
        self,
        n_jobs: int = 1,
        parallel: Any = None,
        prefer: Any = None,  # noqa: ARG002  # joblib's
        require: Any = None,  # noqa: ARG002  # joblib's
        **options: Any,
    ) -> int:
        """Find or start the workers, and return their number."""
        if self._workers is not None:  # an instance that several calls share, at the same time
            another = copy.copy(self)
            another._workers = None
            raise FallbackToBackend(another)
        n_jobs = self.effective_n_jobs(n_jobs)
        if n_jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        options = {**self.backend_kwargs, **options}
        settings, idle_seconds = self._settings(n_jobs, options)
        writable, least, own = _array_options(options)
        self._start = functools.partial(_Call, settings, idle_seconds, writable, least=least, own=own)
        self._workers = self._start()
        self.parallel = parallel
        return n_jobs

    def _settings(self, n_jobs: int, options: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """Check what is given, and return what makes a pool of workers another one."""
        unknown = options.keys() - _OPTIONS
        if unknown:
            raise TypeError(f"the shmengine backend has no parameter {', '.join(sorted(unknown))}")
        check = options.get("check", "frame")
        check_choice("check", check, CHECKS)
        if self.inner_max_num_threads is not None:
            positive("inner_max_num_threads", self.inner_max_num_threads)
        initializer = options.get("initializer")
        if initializer is not None:
            check_callable("initializer", initializer)
        timeout = options.get("idle_worker_timeout")
        settings = {
            "workers": n_jobs,
            "memory": budget_of(options.get("memory")),
            "retries": at_least(0, "retries", options.get("retries", 0)),
            "check": check,
            "initializer": initializer,
            "initargs": tuple(options.get("initargs", ())),
            "environment": self._prepare_worker_env(n_jobs),
        }
        return settings, IDLE_SECONDS if timeout is None else idle_seconds("idle_worker_timeout", timeout)

    def submit(self, func: BatchedCalls, callback: Callable[[Any], None] | None = None) -> Future[Any]:
        """Send a batch of calls to the workers."""
        workers = self._workers
        if workers is None:  # it has just been aborted
            future: Future[Any] = Future()
            future.cancel()
            return future
        return workers.submit(func, callback)

    def retrieve_result_callback(self, out: tuple[Future[Any], bool]) -> Sequence[Any]:
        """Return the results of a batch, or raise its error."""
        future, alone = out
        return [future.result()] if alone else future.result()

    def stop_call(self) -> None:
        """A call is over, others may follow in the same ``with`` block."""
        if self._workers is not None:
            self._workers.forget()

    def terminate(self) -> None:
        """Leave the workers to other calls."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None
        self.reset_batch_stats()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Let nothing of this call run any longer."""
        workers, self._workers = self._workers, None
        if workers is not None:
            workers.abort()
            workers.close()
        if ensure_ready:
            self._workers = self._start()


_OPTIONS = {
    "memory",
    "retries",
    "check",
    "initializer",
    "initargs",
    "idle_worker_timeout",
    # joblib's own, for all backends
    "max_nbytes",
    "mmap_mode",
    "temp_folder",
    "verbose",
    "context",
}


def _array_options(options: Mapping[str, Any]) -> tuple[Writable, int, bool]:
    """Return how arrays appear to tasks, from what size on they go by reference, and whether tasks copy them then.

    Smaller ones travel with the task, which may write to them. So may tasks with ``max_nbytes=None``, to all arrays.
    """
    mode, least = options.get("mmap_mode", "r"), options.get("max_nbytes", SHARED_BYTES)
    if mode not in ("r", "r+", "w+", "c", None):
        raise ValueError(f"mmap_mode must be one of 'r', 'r+', 'w+', 'c' or None, not {mode!r}")
    if least is None or mode is None:
        return "private", SHARED_BYTES, True
    return "shared" if mode in ("r+", "w+") else "private", max(int(least), 1), mode == "c"


register()
