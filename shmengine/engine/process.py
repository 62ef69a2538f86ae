"""The process backend: `shmengine.engine.backend.Backend` over a dispatcher and a pool of workers."""

from __future__ import annotations

import contextlib
import functools
import math
import subprocess
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from shmengine import codec, config
from shmengine._native import ffi, lib
from shmengine._native.status import PLACES
from shmengine.arena import Arena
from shmengine.arrays import address_of
from shmengine.engine.backend import Call, Outcome, Ref, Submit, TaskOptions, block_calls
from shmengine.engine.blocks import Cut
from shmengine.engine.collector import Collector
from shmengine.engine.dispatch import RING_CAPACITY, Dispatcher
from shmengine.engine.policy import Policy
from shmengine.engine.scatter import TargetOf, scatter_blocks
from shmengine.engine.stalls import Stall, Stalls, summary_of
from shmengine.engine.stream import run_stream
from shmengine.errors import MemoryBudgetExceeded
from shmengine.region import EXTENT_BYTES, Region, RegionConfig
from shmengine.stats import EngineStats
from shmengine.workers import messages
from shmengine.workers.inheritance import Inheritance
from shmengine.workers.messages import RESULT_RING, STARTING, TASK_RING

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = ["ProcessBackend", "ProcessRef"]

SHARED_RESULT_BYTES = 1 << 20
ATTEMPTS = 3  # to use room that was there a moment ago, but may be taken by another thread
BORN_SHARED_BYTES = 1024  # within `allocator`; smaller arrays are as cheap to copy


class ProcessRef(Ref):
    """A reference to an object in shared memory."""

    __slots__ = ("_arena", "_frame")

    def __init__(self, frame: Any, arena: Arena) -> None:
        super().__init__()
        self._frame = frame
        self._arena = arena

    def get(self) -> Any:
        """Return the object; its arrays are read-only views of shared memory."""
        return codec.decode(self._frame, resolve=self._arena.resolve)

    def __reduce__(self) -> tuple[Any, ...]:
        return messages.load_shared, (self._frame,)


class ProcessBackend:
    """Runs tasks in worker processes; see `shmengine.engine.backend.Backend`."""

    kind = "process"

    def __init__(
        self,
        workers: int,
        memory: int | None = None,
        threads_per_worker: int | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: tuple[Any, ...] = (),
        retries: int = 1,
        check: str = "frame",
        policy: Policy | None = None,
    ) -> None:
        policy = policy or Policy()
        most = PLACES - 1
        if workers > most:
            raise ValueError(
                f"{policy.workers_name} must be at most {most}, not {workers}: so many processes can share memory"
            )
        self.workers = workers
        budget = memory if memory is not None else config.default_budget()
        least = (workers + 2) * EXTENT_BYTES
        if budget < least:
            raise MemoryBudgetExceeded(
                f"a memory budget of {config.format_bytes(budget)} is too small: {workers} workers need at least"
                f" {config.format_bytes(least)}",
                least,
                budget,
            )
        with contextlib.ExitStack() as undo:
            inheritance = Inheritance(initializer, initargs)
            undo.callback(inheritance.close)
            region = Region.create(
                RegionConfig(
                    arena_bytes=budget,
                    capacities=(RING_CAPACITY, RING_CAPACITY),
                    participants=min(256, max(64, 2 * workers + 16)),
                    doorbells=min(512, max(64, 4 * workers + 32)),
                    creator_recovers=True,
                    wait_alone=True,
                )
            )
            undo.callback(region.close, force=True)
            self._core = Dispatcher(
                region,
                workers,
                retries,
                int(check == "payload"),
                inheritance,
                threads_per_worker or max(1, config.default_workers() // workers),
                policy,
            )
            undo.pop_all()
        forgotten = (
            self._core.collector.finish if policy.finishes else functools.partial(self._core.end, wait=False)
        )
        self._finalizer = weakref.finalize(self, forgotten)

    # --- running ---------------------------------------------------------------------------------

    def stream(
        self, fn: Callable[..., Any], calls: Iterable[Call], options: TaskOptions, *, ordered: bool
    ) -> Iterator[Outcome]:
        """Run `fn` once for each call."""
        return run_stream(self, self._core, fn, calls, options, ordered)

    def stream_blocks(
        self,
        fn: Callable[..., Any],
        cut: Cut,
        target: TargetOf,
        options: TaskOptions,
        kwargs: Mapping[str, Any],
        *,
        ordered: bool,
    ) -> Iterator[Outcome]:
        """Run `fn` once for each block."""
        scattered = scatter_blocks(self, self._core, fn, cut, target, options, kwargs, ordered)
        return scattered or self.stream(fn, block_calls(cut, kwargs), options, ordered=ordered)

    def submitter(self, fn: Callable[..., Any], options: TaskOptions) -> Submit:
        """Return what runs `fn` once."""
        return self._core.futures.submitter(fn, options)

    def withdraw(self, *futures: Future[Any], kill: bool) -> None:
        """Keep the tasks of these futures from running."""
        self._core.futures.withdraw({*futures}, kill=kill)

    # --- memory ----------------------------------------------------------------------------------

    def put(self, obj: Any) -> Ref:
        """Keep one copy of `obj` in shared memory."""
        return ProcessRef(self._core.put(codec.encode(obj, label="obj")), self._core.arena)

    def empty(self, shape: Any, dtype: Any, order: Literal["C", "F"]) -> np.ndarray:
        """Return an uninitialised array in shared memory."""
        core = self._core
        core.check_open()
        for _ in range(ATTEMPTS):
            with contextlib.suppress(MemoryBudgetExceeded):
                return core.arena.empty(shape, dtype, order)
            core.crossings.settle()
            # Workers give arguments back a little after the result is here, and what they keep when they are idle.
            core.shortage.make_room(
                math.prod(np.atleast_1d(shape).tolist()) * np.dtype(dtype).itemsize, "make an array"
            )
        return core.arena.empty(shape, dtype, order)

    def share_copy(self, array: np.ndarray) -> np.ndarray:
        """Return a copy in shared memory, without waiting for room.

        Raises
        ------
        MemoryBudgetExceeded
            There is none.
        """
        core = self._core
        copy = core.arena.empty(array.shape, array.dtype, "F" if array.flags.fnc else "C")
        codec.copy_array(*((copy.T, array.T) if array.flags.fnc else (copy, array)))
        core.bytes_copied += array.nbytes
        return copy

    def empty_result(self, shape: Any, dtype: Any, order: Literal["C", "F"]) -> np.ndarray:
        """Return an uninitialised array: in shared memory if it is large, and as long as half of that stays free."""
        core = self._core
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes >= SHARED_RESULT_BYTES and not dtype.hasobject:
            counters = core.region.counters()
            if nbytes + counters.used + core.arena.pinned_bytes <= core.budget // 2:
                with contextlib.suppress(MemoryBudgetExceeded):
                    return core.arena.empty(shape, dtype, order)
        return np.empty(shape, dtype, order=order)

    def is_shared(self, array: np.ndarray) -> bool:
        """Tell whether tasks get `array` by reference."""
        return self._core.arena.contains(array)

    def allocator(self) -> AbstractContextManager[None]:
        """Within it, new arrays are born shared."""
        self._core.check_open()
        return self._core.arena.allocator(BORN_SHARED_BYTES)

    def copy_into(self, target: np.ndarray, source: np.ndarray) -> None:
        """Copy, around the cache if it is much."""
        nbytes = source.nbytes
        if (
            target.dtype == source.dtype
            and not source.dtype.hasobject
            and target.flags.c_contiguous
            and source.flags.c_contiguous
            and target.shape == source.shape
            and target.flags.writeable
        ):
            lib.shmr_copy(
                ffi.cast("void *", address_of(target)), ffi.cast("void *", address_of(source)), nbytes
            )
        else:
            np.copyto(target, source, casting="same_kind")
        if self._core.arena.contains(source):
            self._core.bytes_copied += nbytes

    @property
    def service(self) -> Collector:
        """What lives until the last future has ended."""
        return self._core.collector

    @property
    def broken(self) -> BaseException | None:
        """The error that everything ends with, if it does."""
        make_error = self._core.broken
        return None if make_error is None else make_error()

    def cancel_pending(self) -> None:
        """Cancel the futures that have not begun."""
        self._core.futures.cancel_pending()

    def provide_workers(self) -> None:
        """Start a worker for a future that will be submitted, if they start on demand and none is idle."""
        self._core.provide_workers()

    def processes(self) -> dict[int, subprocess.Popen[bytes]]:
        """Return the workers by their process ids."""
        return {pid: worker.process for pid, worker in self._core.pool.processes().items()}

    def stats(self) -> EngineStats:
        """Return a snapshot of the counters."""
        core = self._core
        if core.closed:
            return EngineStats(
                "process", self.workers, core.done, core.failed, core.retried, core.pool.deaths
            )
        core.crossings.settle()
        c = core.region.counters()
        fill = sum(lib.shmr_approx_fill(core.handle, ring) for ring in (TASK_RING, RESULT_RING))
        return EngineStats(
            backend="process",
            workers=self.workers,
            tasks_done=core.done,
            tasks_failed=core.failed,
            retries=core.retried,
            worker_deaths=core.pool.deaths,
            bytes_copied=core.bytes_copied,
            bytes_shared=core.bytes_shared,
            memory_budget=core.budget,
            memory_used=int(c.reserved),
            ring_fill=int(fill),
            ring_capacity=2 * RING_CAPACITY,
            tasks_in_flight=core.in_flight.tasks(),
            rescued_wakeups=int(c.rescued_wakeups),
            late_releases=int(c.late_releases),
        )

    def stalls(self, after: float) -> Stalls:
        """Return the tasks that have been running for so many seconds."""
        core = self._core
        found = []
        for activity in core.pool.slow(after):
            function, task = "start", None
            if activity.tag != STARTING:
                function, task = core.in_flight.whose(activity.tag, activity.index)
            found.append(
                Stall(
                    activity.pid,
                    f"worker {activity.pid}",
                    function or "a task whose result is here",
                    task,
                    activity.seconds,
                    activity.stack,
                    activity.starves,
                )
            )
        stats = self.stats()
        more = ""
        if not core.closed:
            rings = [
                f"{name} ring {lib.shmr_approx_fill(core.handle, ring)} of {RING_CAPACITY}"
                for name, ring in (("task", TASK_RING), ("result", RESULT_RING))
            ]
            memory = f"memory {config.format_bytes(stats.memory_used)} of {config.format_bytes(stats.memory_budget)}"
            more = ", ".join(["", *rings, memory])
        return Stalls(found, summary_of(stats, len(found)) + more)

    def close(self, *, wait: bool = True) -> None:
        """End the workers."""
        self._core.end(wait=wait)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return self._core.pool.pids
