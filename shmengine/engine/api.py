"""`Engine`: what users call. Checks arguments, splits, hands tasks to a backend, gathers.

::

     caller                      backend                                 workers
     map / map_blocks / reduce   serial | thread | process | cluster
       split ── Call ──────────► window of tasks ──────────────────────► fn(block)
       gather ◄── Outcome ────── in order of calls, or of completion ◄── value | error
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from shmengine.config import default_workers
from shmengine.engine.aio import Asynchronous
from shmengine.engine.backend import (
    CLOSED_TEXT,
    PLACED,
    Backend,
    Call,
    Entropy,
    TaskOptions,
    Writable,
    function_name,
    make_backend,
    ship_keywords,
)
from shmengine.engine.blocks import Cut, Gather, GhostCut, overlaps, returned_by
from shmengine.engine.checks import (
    CHECKS,
    at_least,
    budget_of,
    check_callable,
    check_choice,
    check_iterables,
    check_out,
    positive,
    task_options,
    total_of,
)
from shmengine.engine.frames import Labels, RowCut, check_is_no_frame, cut_of
from shmengine.engine.memory import SharedMemory
from shmengine.engine.progress import Reporter, reporter
from shmengine.engine.results import Results
from shmengine.engine.stalls import Observed
from shmengine.errors import BlockError, Closed, UseAfterFork

if TYPE_CHECKING:
    from concurrent.futures import Future

    from shmengine.stats import EngineStats

__all__ = ["Engine"]

BACKENDS = ("process", "thread", "serial")

T = TypeVar("T")

_MISSING: Any = object()


class Engine(Observed, Asynchronous, SharedMemory):
    """Runs functions over large arrays and streams of tasks, in parallel, on this machine or the hosts of a cluster.

    Workers start with the engine and are reused by all its calls. Results do not depend on the backend
    or the number of workers.

    Parameters
    ----------
    workers : int, optional
        Number of workers; by default the cores that this process may use (affinity and cgroup quota).
        With a cluster: of each host.
    backend : {"process", "thread", "serial"}
        Worker processes; threads (no copies, parallel where functions release the GIL); or the calling
        thread itself, for debugging. Inside a worker process, ``"process"`` becomes ``"serial"``.
    memory : int or str, optional
        Budget of shared memory, in bytes or like ``"2 GiB"``; by default a quarter of what is available.
    threads_per_worker : int, optional
        Threads that numerical libraries may use in one worker process; by default cores / workers.
    initializer : callable, optional
        Called as ``initializer(*initargs)`` in each worker before its tasks.
    retries : int
        How often a task is started again after its worker process died.
    check : {"frame", "payload"}
        What is verified of each message: its header, or every byte. With ``"payload"`` a task or a result that
        was changed in shared memory fails with `Corrupt`, and so does a task that takes an object which was
        changed after `put`. Arrays born shared that tasks take, and memory that they write to in place (`out`,
        ``writable="shared"``), are nobody's message but the caller's own to change, and are not verified.
    cluster : str or distributed.Client, optional
        Address of a dask scheduler, like ``"tcp://scheduler:8786"``, or a client: tasks then run in worker
        processes on the hosts of dask's workers. See docs/dask.md.

    Raises
    ------
    ValueError
        A value out of range or unknown.
    MemoryBudgetExceeded
        The budget does not fit into memory.
    PeerLost
        No scheduler answers, or no worker of its.

    Examples
    --------
    >>> import numpy as np
    >>> with Engine(backend="serial") as engine:
    ...     engine.map_blocks(np.sqrt, np.array([1.0, 4.0, 9.0]))
    array([1., 2., 3.])
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        backend: str = "process",
        memory: int | str | None = None,
        threads_per_worker: int | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] = (),
        retries: int = 1,
        check: str = "frame",
        cluster: Any = None,
    ) -> None:
        check_choice("backend", backend, BACKENDS)
        check_choice("check", check, CHECKS)
        count = None if workers is None else positive("workers", workers)
        if threads_per_worker is not None:
            threads_per_worker = positive("threads_per_worker", threads_per_worker)
        budget = budget_of(memory)
        if initializer is not None:
            check_callable("initializer", initializer)
        retries = at_least(0, "retries", retries)
        settings: dict[str, Any] = {}
        if cluster is not None:
            if backend != "process":
                raise ValueError(f"cluster= runs tasks in worker processes, and backend={backend!r} does not")
            backend, settings = "cluster", {"cluster": cluster}
        elif count is None:
            count = default_workers()
        if backend == "process" and "SHMENGINE_WORKER" in os.environ:
            warnings.warn(
                "an Engine was made inside a worker process: it runs its tasks serially"
                " (pass backend='serial' or 'thread' to say so yourself)",
                RuntimeWarning,
                stacklevel=2,
            )
            backend = "serial"
        self._backend = make_backend(
            backend,
            workers=count,
            memory=budget,
            threads_per_worker=threads_per_worker,
            initializer=initializer,
            initargs=tuple(initargs),
            retries=retries,
            check=check,
            **settings,
        )
        self._pid = os.getpid()
        self._last_stats: EngineStats | None = None
        # For engines that nobody closes: at the latest when the interpreter exits.
        self._finalizer = weakref.finalize(self, _close_backend, self._backend, self._pid)

    # -- streams of tasks ----------------------------------------------------------------------

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        on_error: str = "raise",
        window: int | None = None,
        rng: Entropy | None = None,
        progress: Any = False,
        writable: Writable = False,
    ) -> Iterator[Any]:
        """Return a lazy iterator over ``fn(*items)`` in input order, like the builtin.

        Iterables may be endless: at most `window` tasks are taken from them ahead of what you have
        consumed. Arguments are checked now, tasks start with the first ``next()``; ``close()`` (or
        dropping the iterator) abandons the rest.

        Parameters
        ----------
        fn : callable
            Lambdas and closures too.
        *iterables : iterable
            Ends with the shortest.
        timeout : float, optional
            Seconds that one task may run. A worker process that exceeds it is killed and replaced; a
            thread runs on, unobserved; serially it is noticed afterwards.
        on_error : {"raise", "return", "skip"}
            Raise the error of a task and drop the rest; yield the exception object in its place; or
            leave the task out.
        window : int, optional
            Most tasks in flight. With processes memory bounds them as well.
        rng : int or sequence of int, optional
            Seed: task *i* is called with ``rng=`` a `numpy.random.Generator` of its own, which depends on
            the seed and *i* alone.
        progress : bool, object or callable
            True: a progress bar; or an object with ``update(n)``, or a ``callable(done, total)``.
        writable : {False, "private", "shared"}
            How ndarray arguments appear to `fn`: read-only, as a private copy (also True), or in place,
            which with processes takes arrays born shared (`empty`, `allocator`) or writable memmaps.

        Raises
        ------
        TaskTimeout, WorkerDied, or what `fn` raised
            By ``next()``; the traceback of a worker process is the exception's ``__cause__``.
        SerializationError
            By ``next()``: `fn` or an argument cannot be sent.
        Closed
            The engine was closed.
        """
        check_iterables("map", iterables)
        calls = (Call(items) for items in zip(*iterables, strict=False))
        options = task_options("map", fn, timeout, window, rng, writable)
        return self._stream(fn, calls, options, True, on_error, progress, total_of(iterables))

    def map_unordered(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        on_error: str = "raise",
        window: int | None = None,
        rng: Entropy | None = None,
        progress: Any = False,
        writable: Writable = False,
    ) -> Iterator[Any]:
        """Return a lazy iterator over ``fn(*items)`` in order of completion; otherwise like `map`."""
        check_iterables("map_unordered", iterables)
        calls = (Call(items) for items in zip(*iterables, strict=False))
        options = task_options("map_unordered", fn, timeout, window, rng, writable)
        return self._stream(fn, calls, options, False, on_error, progress, total_of(iterables))

    def starmap(
        self,
        fn: Callable[..., Any],
        iterable: Iterable[Iterable[Any]],
        *,
        timeout: float | None = None,
        on_error: str = "raise",
        window: int | None = None,
        rng: Entropy | None = None,
        progress: Any = False,
        writable: Writable = False,
    ) -> Iterator[Any]:
        """Return a lazy iterator over ``fn(*arguments)``, tuple by tuple; otherwise like `map`."""
        check_iterables("starmap", (iterable,))
        calls = (Call(tuple(arguments)) for arguments in iterable)
        options = task_options("starmap", fn, timeout, window, rng, writable)
        return self._stream(fn, calls, options, True, on_error, progress, total_of((iterable,)))

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run ``fn(*args, **kwargs)`` once and return a `concurrent.futures.Future`.

        Raises
        ------
        SerializationError
            `fn` or an argument cannot be sent.
        """
        self._check_usable()
        check_callable("fn", fn)
        options = TaskOptions(label=f"submit({function_name(fn)})")
        return self._backend.submitter(fn, options)(args, kwargs)

    # -- arrays in blocks ----------------------------------------------------------------------

    def map_blocks(
        self,
        fn: Callable[..., T],
        *arrays: Any,
        axis: int = 0,
        block_bytes: int | str = "auto",
        out: np.ndarray | None = None,
        dtype: Any = None,
        writable: Writable = False,
        rng: Entropy | None = None,
        timeout: float | None = None,
        progress: Any = False,
        **kwargs: Any,
    ) -> T:
        """Apply `fn` to blocks of arrays, or of rows of frames, and return the result as one.

        Parameters
        ----------
        fn : callable
            Called as ``fn(*blocks, **kwargs)`` with one ndarray per array; returns an ndarray of the same
            length on `axis`. Its dtype and other dimensions may differ, but all blocks must agree. For rows of
            frames it returns frames, columns or arrays with any number of rows, which are joined in order.
        *arrays : array_like
            With the same length on `axis`. Anything with ``shape``, ``dtype`` and slicing is read block by
            block; a `numpy.memmap` is read by the workers themselves. A 0-d array is one block. DataFrames and
            Series of pandas and polars, and Arrow tables, are cut by rows and stay what they are. The result
            of an `xarray.DataArray`, whose blocks are ndarrays, has its coordinates.
        axis : int
            Along which blocks are cut; negative values count from the end of each array's dimensions.
        block_bytes : int or str
            Upper bound for a block of the widest array (but one row at least), like ``"4 MiB"``. Edges
            depend on shape, dtype and axis alone (``"auto"``: a little less than 2 MiB).
        out : ndarray, optional
            Where to write the result, cast with ``same_kind``; may share memory with an input. After an
            error its content is undefined, and if it was born shared, workers may still write the blocks
            that they are at.
        dtype : dtype, optional
            Of the result; blocks are cast with ``same_kind``.
        writable : {False, "private", "shared"}
            How blocks appear to `fn`: read-only, as a private copy (also True), or in place, which with
            processes takes arrays born shared (`empty`, `allocator`) or writable memmaps.
        rng, timeout, progress
            As in `map`, for each block.
        **kwargs
            For `fn`.

        Returns
        -------
        ndarray, frame, column or DataArray
            `out` if given, or else a new one.

        Raises
        ------
        BlockError
            Lengths differ, the axis is out of bounds, or what `fn` returned does not fit.
        ArrayError
            Something that cannot be cut.
        """
        self._check_usable()
        labels = Labels(arrays)
        cut = cut_of(labels.arrays, axis, block_bytes)
        options = task_options("map_blocks", fn, timeout, None, rng, writable)
        if isinstance(cut, RowCut):
            cut.check(out, dtype, options.writable)
            result = self._map_rows(fn, cut, options, progress, kwargs)
        else:
            result = self._map_cut(fn, cut, out, dtype, options, progress, kwargs)
        return labels.attach(result, options.label)  # type: ignore[no-any-return]

    def map_overlap(
        self,
        fn: Callable[..., Any],
        array: Any,
        depth: int | tuple[int, int],
        boundary: Any = "reflect",
        axis: int = 0,
        *,
        block_bytes: int | str = "auto",
        out: np.ndarray | None = None,
        dtype: Any = None,
        writable: Writable = False,
        rng: Entropy | None = None,
        timeout: float | None = None,
        progress: Any = False,
        **kwargs: Any,
    ) -> np.ndarray:
        """Apply `fn` to blocks with ghost cells and return the result, trimmed, as one array.

        Parameters
        ----------
        fn : callable
            Called as ``fn(block, **kwargs)``; returns an ndarray of the same length on `axis`, from which
            the ghost cells are cut off.
        array : array_like
            As in `map_blocks`; no frame.
        depth : int or (int, int)
            Number of ghost cells before and after each block, on `axis` only.
        boundary : {"reflect", "periodic", "nearest", "none"} or number
            What lies beyond the ends of the array, as in ``dask.array.overlap``: its mirror image with the
            edge element repeated, the other end, the edge element, a constant; ``"none"``: nothing, so
            that the outermost blocks have no ghost cells there.
        axis, block_bytes, out, dtype, writable, rng, timeout, progress, **kwargs
            As in `map_blocks`. Ghost cells written in place would be seen by other blocks, so `writable`
            cannot be ``"shared"``.

        Returns
        -------
        ndarray
            With the length of `array` on `axis`.
        """
        self._check_usable()
        if writable == "shared":
            raise ValueError("map_overlap cannot write in place: blocks share their ghost cells")
        check_is_no_frame("map_overlap", array)
        labels = Labels((array,))
        cut = GhostCut(labels.arrays[0], depth, boundary, axis, block_bytes)
        options = task_options("map_overlap", fn, timeout, None, rng, writable)
        result = self._map_cut(fn, cut, out, dtype, options, progress, kwargs)
        return labels.attach(result, options.label)  # type: ignore[no-any-return]

    def reduce(
        self,
        fn: Callable[..., Any],
        *arrays: Any,
        combine: Callable[[Any, Any], Any],
        axis: int = 0,
        block_bytes: int | str = "auto",
        initial: Any = _MISSING,
        rng: Entropy | None = None,
        timeout: float | None = None,
        progress: Any = False,
        writable: Writable = False,
        **kwargs: Any,
    ) -> Any:
        """Apply `fn` to blocks in the workers and fold the partial results with `combine` here.

        Parameters
        ----------
        fn : callable
            Called as ``fn(*blocks, **kwargs)``; returns anything that can be sent.
        *arrays, axis, block_bytes, rng, timeout, progress, writable, **kwargs
            As in `map_blocks`.
        combine : callable
            Called as ``combine(so_far, partial)`` in the order of blocks, so the result is reproducible.
        initial : object, optional
            Starts the fold, as in `functools.reduce`. It is the result for empty arrays, which otherwise
            are one empty block.

        Returns
        -------
        object
            What the last `combine` returned.
        """
        self._check_usable()
        check_callable("combine", combine)
        cut = cut_of(arrays, axis, block_bytes)
        options = task_options("reduce", fn, timeout, None, rng, writable)
        if cut.length == 0 and initial is not _MISSING:
            return initial
        so_far = initial
        kwargs, _refs = ship_keywords(self._backend, kwargs)
        with self._partials(fn, cut, options, progress, kwargs) as partials:
            for partial in partials:
                so_far = partial if so_far is _MISSING else combine(so_far, partial)
                del partial  # so that its memory can be used for the next one
        return so_far

    def _partials(
        self,
        fn: Callable[..., Any],
        cut: Cut,
        options: TaskOptions,
        progress: Any,
        kwargs: Mapping[str, Any],
    ) -> Results:
        report, options = _watched(progress, options, cut.count)
        stream = self._backend.stream_blocks(fn, cut, _nowhere, options, kwargs, ordered=True)
        return Results(stream, options, self._check_process, report=report)

    def _map_rows(
        self,
        fn: Callable[..., Any],
        cut: RowCut,
        options: TaskOptions,
        progress: Any,
        kwargs: Mapping[str, Any],
    ) -> Any:
        kwargs, _refs = ship_keywords(self._backend, kwargs)
        with self._partials(fn, cut, options, progress, kwargs) as results:
            parts = list(results)
        try:
            return cut.join(parts, options.label)
        except BlockError as error:
            raise error from returned_by(fn)

    def _map_cut(
        self,
        fn: Callable[..., Any],
        cut: Cut,
        out: np.ndarray | None,
        dtype: Any,
        options: TaskOptions,
        progress: Any,
        kwargs: Mapping[str, Any],
    ) -> np.ndarray:
        report, options = _watched(progress, options, cut.count)
        dtype = None if dtype is None else np.dtype(dtype)
        target = out
        if out is not None:
            check_out(out, dtype)
            overlap = overlaps(out, cut.arrays)
            if overlap == "same" and isinstance(cut, GhostCut):
                overlap = "yes"  # a block's ghost cells are other blocks' results
            if overlap == "yes" or overlaps(out, list(kwargs.values())) != "no":
                target = np.empty_like(out, subok=False)
            elif overlap == "same":
                options = replace(options, retries=0)
        backend = self._backend
        gather = Gather(
            cut,
            options.label,
            out=target,
            dtype=dtype,
            copy_into=backend.copy_into,
            allocate=backend.empty_result,
        )
        kwargs, _refs = ship_keywords(backend, kwargs)
        stream = backend.stream_blocks(fn, cut, gather.target, options, kwargs, ordered=False)
        with closing(Results(stream, options, self._check_process, report=report)) as results:
            while (outcome := results.step()) is not None:
                if outcome.value is not PLACED:
                    try:
                        gather.place(outcome.index, outcome.value)
                    except BlockError as error:
                        raise error from returned_by(fn)
                del outcome
        result = gather.result()
        if out is None:
            return result
        if target is not out:
            np.copyto(out, result)
        return out

    # -- life ----------------------------------------------------------------------------------

    @property
    def backend(self) -> str:
        """Name of the backend."""
        return self._backend.kind

    @property
    def workers(self) -> int:
        """Number of workers."""
        return self._backend.workers

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._finalizer.alive

    def close(self, *, wait: bool = True) -> None:
        """End the engine: drop what is pending, and wait (if `wait`) for what runs.

        Arrays that came from it stay valid. Closing twice, or in a forked child, does nothing.
        """
        if os.getpid() == self._pid and self._finalizer.detach() is not None:
            self._last_stats = self._backend.stats()
            self._backend.close(wait=wait)

    def __enter__(self) -> Self:
        self._check_usable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Ctrl-C and sys.exit mean now.
        self.close(wait=kind is None or issubclass(kind, Exception))

    def __reduce__(self) -> Any:
        raise TypeError("an Engine cannot be sent to another process; pass what the function needs instead")

    def __repr__(self) -> str:
        state = " closed" if self.closed else ""
        return f"<Engine backend={self.backend!r} workers={self.workers}{state}>"

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise UseAfterFork(f"this engine belongs to process {self._pid}: make a new one in the child")

    def _check_usable(self) -> None:
        self._check_process()
        if self.closed:
            raise Closed(CLOSED_TEXT)

    def _stream(
        self,
        fn: Callable[..., Any],
        calls: Iterable[Call],
        options: TaskOptions,
        ordered: bool,
        on_error: str,
        progress: Any,
        total: int | None,
    ) -> Results:
        self._check_usable()
        check_choice("on_error", on_error, ("raise", "return", "skip"))
        report, options = _watched(progress, options, total)
        stream = self._backend.stream(fn, calls, options, ordered=ordered)
        return Results(stream, options, self._check_process, on_error, report)


def _watched(progress: Any, options: TaskOptions, total: int | None) -> tuple[Reporter | None, TaskOptions]:
    """Return who is told of progress, and the options of a stream that tells him."""
    report = reporter(progress, options.label, total)
    return report, options if report is None else replace(options, completed=report.reach)


def _nowhere() -> None:
    """Say that results have no place: `reduce` folds them."""


def _close_backend(backend: Backend, pid: int) -> None:
    if os.getpid() == pid:
        backend.close(wait=False)
