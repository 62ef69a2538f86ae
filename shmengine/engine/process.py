"""The process backend: tasks through a shared ring to workers, results through another one back.

::

    stream / submit ── encode ── claim ── commit ──► task ring ──► worker: lease, call, commit, release
         ▲                                                                     │
         └── deliver ◄── decode ◄── lease ◄── whoever waits ◄── result ring ◄──┘

Whoever waits for a result drains the ring for all: one thread at a time is the *drainer*; the others sleep
until it has something for them, or hands over. When only futures wait, a thread of ours drains.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from shmengine import codec, config
from shmengine._native import ffi, lib
from shmengine._native.status import CLOSED, INTERRUPTED, ITEM_WAITS, OK, TIMEOUT, WOULD_BLOCK, fail
from shmengine.arena import Arena
from shmengine.arrays import address_of
from shmengine.engine.backend import Call, Outcome, Ref, TaskOptions, annotate, timed_out
from shmengine.errors import ArrayError, Closed, MemoryBudgetExceeded, RemoteError, WorkerDied
from shmengine.leases import release_with
from shmengine.region import EXTENT_BYTES, Region, RegionConfig
from shmengine.stats import EngineStats
from shmengine.workers import messages
from shmengine.workers.messages import BATCH, BROKEN, EVENT, RESULT_RING, TASK, TASK_RING, VALUE
from shmengine.workers.pool import Death, Pool

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = ["ProcessBackend", "ProcessRef"]

CLOSED_TEXT = "this engine is closed; make a new one"
RING_CAPACITY = 4096
BATCHES_PER_WORKER = 2  # one running, one waiting: the next task is there when a worker asks
BATCH_MAX = 128
BATCH_NS = 500_000  # aim: half a millisecond of work a batch, so that messages cost little beside it
FILL_NS = 200_000  # a slow iterable must not hold back what it has already given
WINDOW_MIN = 64
BORN_SHARED_BYTES = 1024
LOOK_NS = 250_000_000


class ProcessRef(Ref):
    """A reference to an object in shared memory."""

    __slots__ = ("_arena", "_frame")

    def __init__(self, frame: Any, arena: Arena) -> None:
        self._frame = frame
        self._arena = arena

    def get(self) -> Any:
        """Return the object; its arrays are read-only views of shared memory."""
        return codec.decode(self._frame, resolve=self._arena.resolve)

    def __reduce__(self) -> tuple[Any, ...]:
        return messages.load_shared, (self._frame,)


class _Task:
    __slots__ = ("args", "attempts", "index", "kwargs")

    def __init__(self, index: int, args: tuple[Any, ...], kwargs: Any) -> None:
        self.index = index
        self.args = args
        self.kwargs = kwargs
        self.attempts = 0


class _Batch:
    """Tasks that travel together, until their results are back."""

    __slots__ = ("job", "nbytes", "tasks")

    def __init__(self, job: _Job, tasks: list[_Task]) -> None:
        self.job = job
        self.tasks = tasks
        self.nbytes = 0


def _always() -> bool:
    return True


class _Job:
    """One stream or one future: a function, and where outcomes go."""

    __slots__ = ("abandoned", "begin", "deliver", "function", "in_flight", "keep", "options", "retries", "task_ns")

    def __init__(self, function: Any, options: TaskOptions, retries: int, deliver: Callable[..., None]) -> None:
        self.function = function  # bytes, or the frame of a put function
        self.options = options
        self.retries = retries
        self.deliver = deliver  # deliver(task, value, error), by the drainer
        self.abandoned = False
        self.begin: Callable[[], bool] = _always  # False: cancelled meanwhile
        self.in_flight = 0  # batches
        self.task_ns = 0.0  # what a task takes, smoothed; 0: not known
        self.keep: Any = None


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
    ) -> None:
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
        encoded_initializer = None
        if initializer is not None:
            encoded_initializer = codec.encode((initializer, initargs), label="(initializer, initargs)").to_bytes()
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
        try:
            self._core = _Core(
                region,
                workers,
                retries,
                int(check == "payload"),
                encoded_initializer,
                threads_per_worker or max(1, config.default_workers() // workers),
            )
        except BaseException:
            region.close(force=True)
            raise
        self._finalizer = weakref.finalize(self, _Core.end, self._core, wait=False)

    # --- running ---------------------------------------------------------------------------------

    def stream(
        self, fn: Callable[..., Any], calls: Iterable[Call], options: TaskOptions, *, ordered: bool
    ) -> Iterator[Outcome]:
        """Run `fn` once for each call."""
        return _stream(self, self._core, fn, calls, options, ordered)

    def submit(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], options: TaskOptions
    ) -> Future[Any]:
        """Run one task."""
        return self._core.submit(fn, args, kwargs, options)

    # --- memory ----------------------------------------------------------------------------------

    def put(self, obj: Any) -> Ref:
        """Keep one copy of `obj` in shared memory."""
        return ProcessRef(self._core.put(codec.encode(obj, label="obj")), self._core.arena)

    def empty(self, shape: Any, dtype: Any, order: Literal["C", "F"]) -> np.ndarray:
        """Return an uninitialised array in shared memory."""
        self._core.check_open()
        return self._core.arena.empty(shape, dtype, order)

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
        if self._core.arena.contains(source) and not self._core.arena.contains(target):
            self._core.bytes_copied += nbytes

    def stats(self) -> EngineStats:
        """Return a snapshot of the counters."""
        return self._core.stats()

    def close(self, *, wait: bool = True) -> None:
        """End the workers."""
        self._core.end(wait=wait)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return self._core.pool.pids


class _Core:
    """The engine's state; its threads hold this, never the backend, so that a forgotten backend ends."""

    def __init__(
        self,
        region: Region,
        workers: int,
        retries: int,
        payload_check: int,
        initializer: bytes | None,
        threads: int,
    ) -> None:
        self.region = region
        self.handle = region.handle
        self.arena = Arena(region)
        self.workers = workers
        self.retries = retries
        self.payload_check = payload_check
        c = region.counters()
        self.budget = int(c.budget)
        self.closed = False
        self.broken: BaseException | None = None
        self.ids = itertools.count(1)
        self.batches: dict[int, _Batch] = {}
        self.lock = threading.RLock()  # batches, counters of jobs, dispatch
        self.turn = threading.Condition()  # who drains
        self.draining = False
        self.running_futures = 0
        self.future_limit = BATCHES_PER_WORKER * workers + 1
        self.pending: deque[_Batch] = deque()  # futures that nobody has begun
        self.outbox: deque[_Batch] = deque()  # due, to be sent by the next thread that is not draining
        self.flushing = threading.local()
        self.collector: threading.Thread | None = None
        self.deaths: dict[int, Death] = {}
        self.done = self.failed = self.retried = 0
        self.bytes_copied = self.bytes_shared = 0
        self.spare: list[Any] = []
        setup = {
            "path": [entry or os.getcwd() for entry in sys.path],
            "argv": sys.argv,
            "cwd": os.getcwd(),
            "arena_limit": self.budget * 3 // 4 // workers,
            "payload_check": payload_check,
            "initializer": initializer,
        }
        limits = config.thread_limit_environment(threads)
        environment = {name: value for name, value in limits.items() if name not in os.environ}
        environment["SHMENGINE_WORKER"] = "1"
        self.pool = Pool(region, workers, setup, environment, self.on_death, self.time_limit)

    def check_open(self) -> None:
        self.region.check_fork()
        if self.closed:
            raise Closed(CLOSED_TEXT)

    # --- out -------------------------------------------------------------------------------------

    def put(self, encoded: codec.Encoded) -> Any:
        """Write a frame into a shared block of its own; return its bytes, which hold it."""
        self.check_open()
        block = ffi.new("shmr_block *")
        while True:
            status = lib.shmr_claim(
                self.handle, encoded.nbytes, ffi.NULL, 0, RESULT_RING, self.look(), block
            )
            if status == OK:
                break
            self.relieve(status, encoded.nbytes, "put an object")
        encoded.write_into(self.region.root(block.offset, encoded.nbytes, writable=True))
        block.length = encoded.nbytes
        ref = ffi.new("shmr_ref *")
        status = lib.shmr_publish(self.handle, block, ref)
        if status != OK:
            fail(status, "put an object")
        self.bytes_copied += encoded.bytes_inline
        try:
            return self.arena.resolve((self.region.number, ref.block, ref.generation, 0))
        finally:
            lib.shmr_drop(self.handle, ref.block, ref.generation)

    def look(self) -> int:
        return time.monotonic_ns() + LOOK_NS

    def relieve(self, status: int, nbytes: int, what: str) -> None:
        """A claim or commit of main's did not succeed at once: make room, or say that there is none."""
        if status == INTERRUPTED:
            return
        if status == ITEM_WAITS:
            if not self.drain(0):
                time.sleep(0.0005)  # another thread is draining
            return
        if status == TIMEOUT:
            if self.broken is not None:
                raise self.broken
            self.check_open()
            lib.shmr_trim(self.handle)
            if not self.batches:
                c = self.region.counters()
                raise MemoryBudgetExceeded(
                    f"{what}: no room for {config.format_bytes(nbytes)}; the memory budget of"
                    f" {config.format_bytes(self.budget)} is taken by arrays that are alive"
                    f" ({config.format_bytes(c.used)} of this process), and no task is running that could free"
                    " any; give the engine a larger memory=, or let arrays go",
                    nbytes,
                    self.budget,
                    int(c.used),
                )
            self.deny_if_stuck()
            return
        if status == CLOSED:
            raise Closed(CLOSED_TEXT)
        if status == lib.SHMR_TOO_LARGE:
            raise MemoryBudgetExceeded(
                f"{what}: {config.format_bytes(nbytes)} are more than the whole memory budget of"
                f" {config.format_bytes(self.budget)}; give the engine a larger memory=, or smaller blocks",
                nbytes,
                self.budget,
            )
        fail(status, what)

    def encode_function(self, fn: Callable[..., Any]) -> Any:
        """Serialise a function: bytes that travel with each batch, or a frame in shared memory."""
        encoded = codec.encode(fn, share=None, label="fn")
        if encoded.nbytes <= messages.INLINE_FUNCTION_BYTES:
            return encoded.to_bytes()
        return self.put(encoded)

    def encode_batch(self, batch: _Batch) -> codec.Encoded:
        options = batch.job.options
        calls = [(task.args, task.kwargs) for task in batch.tasks]
        payload = (batch.job.function, options.rng, [task.index for task in batch.tasks], calls)
        if options.writable == "shared":
            self.check_shared(batch.tasks)
        try:
            return codec.encode(
                payload,
                share=self.arena.share,
                memmap_mode="r+" if options.writable == "shared" else "r",
            )
        except codec.SerializationError as error:
            raise _argument_error(error, batch.tasks) from error.__cause__

    def check_shared(self, tasks: list[_Task]) -> None:
        for task in tasks:
            for value in (*task.args, *(task.kwargs or {}).values()):
                if not isinstance(value, np.ndarray) or value.nbytes == 0:
                    continue
                if not self.arena.contains(value) and codec.mapping_behind(value) is None:
                    raise ArrayError(
                        "writable='shared' needs arrays that workers can reach: make them with engine.empty,"
                        " zeros, full or asarray, within engine.allocator(), or as np.memmap"
                    )
                if not value.flags.writeable:
                    raise ArrayError("writable='shared' needs writable arrays; this one is read-only")

    def dispatch(self, batch: _Batch, encoded: codec.Encoded | None = None) -> None:
        """Send a batch; while there is no room, drain results."""
        if encoded is None:
            encoded = self.encode_batch(batch)
        with self.lock:
            number = next(self.ids)
            self.batches[number] = batch
            batch.job.begin = _always
            batch.job.in_flight += 1
            batch.nbytes = encoded.nbytes
        if batch.job.options.timeout is not None:
            self.pool.watch_time()
        block = self.spare.pop() if self.spare else ffi.new("shmr_block *")
        try:
            while True:
                self.check_open()
                if self.broken is not None:
                    raise self.broken
                status = messages.write_frame(
                    self.arena,
                    TASK_RING,
                    TASK,
                    number,
                    encoded,
                    payload_check=self.payload_check,
                    spec=messages.MODES[batch.job.options.writable],
                    items=RESULT_RING,
                    deadline=self.look(),
                    block=block,
                )
                if status == OK:
                    break
                with self.lock:  # not among those that could free memory
                    del self.batches[number]
                try:
                    self.relieve(status, encoded.nbytes, "send a task")
                finally:
                    with self.lock:
                        self.batches[number] = batch
        except BaseException:
            with self.lock:
                if self.batches.pop(number, None) is not None:
                    batch.job.in_flight -= 1
            raise
        self.spare.append(block)
        self.bytes_copied += encoded.bytes_inline
        self.bytes_shared += encoded.bytes_shared

    # --- back ------------------------------------------------------------------------------------

    def drain(self, deadline: int) -> bool:
        """Take results off the ring, if nobody else does: the ones that are there, waiting for the first.

        Returns
        -------
        bool
            Whether this thread was the drainer and took something.
        """
        with self.turn:
            if self.draining:
                return False
            self.draining = True
        try:
            took = self._drain(deadline)
        finally:
            with self.turn:
                self.draining = False
                self.turn.notify_all()
        self.flush()
        return took

    def flush(self) -> None:
        """Send the batches that results have made due; never by the drainer itself, which must not wait for room."""
        if getattr(self.flushing, "now", False):
            return
        self.flushing.now = True
        try:
            while self.outbox:
                batch = self.outbox.popleft()
                if batch.job.abandoned or not batch.job.begin():
                    self.next_future(batch)
                    continue
                try:
                    self.dispatch(batch)
                except Exception as error:
                    for task in batch.tasks:
                        self.conclude(batch.job, task, None, error)
        except IndexError:
            pass  # another thread took the last one
        finally:
            self.flushing.now = False

    def _drain(self, deadline: int) -> bool:
        took = False
        while True:
            block = self.spare.pop() if self.spare else ffi.new("shmr_block *")
            status = lib.shmr_lease(self.handle, RESULT_RING, self.payload_check, 0 if took else deadline, block)
            if status == OK:
                took = True
                self.receive(block)
                continue
            self.spare.append(block)
            if status in (TIMEOUT, WOULD_BLOCK, INTERRUPTED):
                return took
            if status == CLOSED:
                raise Closed(CLOSED_TEXT)
            fail(status, "receive a result")

    def receive(self, block: Any) -> None:
        """Decode one message of the result ring and deliver it."""
        kind, number = block.kind, block.tag
        if kind == EVENT:
            lib.shmr_release(self.handle, block)
            self.spare.append(block)
            self.after_death(number)
            return
        root = messages.frame_root(self.arena, block)
        copied = (
            self.arena.held_bytes > self.budget // 2
        )  # what users keep must not stop the flow: from here on private memory
        with self.lock:
            batch = self.batches.pop(number, None)
            if batch is not None:
                batch.job.in_flight -= 1
        payload: Any = None
        error: BaseException | None = None
        if kind == BROKEN or (batch is not None and not batch.job.abandoned):
            try:
                payload = messages.read_frame(root, self.arena.resolve, copy=copied)
            except Exception as failure:
                error = failure
        nanoseconds, inline, shared = messages.account_of(block)
        self.bytes_shared += shared
        self.bytes_copied += inline + (inline + shared if copied else 0)
        # Views of the frame itself keep it leased; references are held on their own.
        if sys.getrefcount(root) <= 2:
            lib.shmr_release(self.handle, block)
            self.spare.append(block)
        else:
            release_with(root, self.region, block, self.arena.holding(block.length))
        del root
        if kind == BROKEN:
            self.fail_all(codec.decode_exception(payload) if error is None else error)
            return
        if batch is None:
            return
        job = batch.job
        per_task = nanoseconds / len(batch.tasks)
        job.task_ns = per_task if job.task_ns == 0 else 0.75 * job.task_ns + 0.25 * per_task
        if job.abandoned:
            return
        if error is not None:
            for task in batch.tasks:
                self.conclude(job, task, None, error)
        elif kind == VALUE:
            self.conclude(job, batch.tasks[0], payload, None)
        else:
            if len(payload) != len(batch.tasks):  # the task itself could not be decoded
                payload = payload[:1] * len(batch.tasks)
            for task, (good, value) in zip(batch.tasks, payload, strict=True):
                if good:
                    self.conclude(job, task, value, None)
                else:
                    self.conclude(job, task, None, codec.decode_exception(value))

    def conclude(self, job: _Job, task: _Task, value: Any, error: BaseException | None) -> None:
        if error is None:
            self.done += 1
        else:
            self.failed += 1
        job.deliver(task, value, error)

    def wait(self, ready: Callable[[], bool]) -> None:
        """Return when `ready`; meanwhile drain, or sleep while another thread does."""
        while not ready():
            if self.broken is not None:
                raise self.broken
            self.check_open()
            if self.drain(self.look()):
                continue
            with self.turn:
                if self.draining and not ready():
                    self.turn.wait(0.25)
            self.deny_if_stuck()

    def deny_if_stuck(self) -> None:
        """If every worker that has work waits for memory, and no result is there to be taken, one must give up."""
        starving = self.pool.starving()
        if starving and lib.shmr_approx_fill(self.handle, RESULT_RING) == 0:
            lib.shmr_trim(self.handle)
            if lib.shmr_approx_fill(self.handle, RESULT_RING) == 0 and self.pool.starving() == starving:
                self.pool.deny(starving[0])

    # --- futures ---------------------------------------------------------------------------------

    def submit(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], options: TaskOptions
    ) -> Future[Any]:
        from concurrent.futures import Future

        self.check_open()
        future: Future[Any] = Future()

        def deliver(_: _Task, value: Any, error: BaseException | None) -> None:
            self.next_future(None)
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(annotate(error, options))

        retries = self.retries if options.retries is None else options.retries
        job = _Job(self.encode_function(fn), options, retries, deliver)
        job.begin = future.set_running_or_notify_cancel
        batch = _Batch(job, [_Task(0, tuple(args), dict(kwargs) or None)])
        encoded = self.encode_batch(batch)  # here, so that what cannot be pickled is raised here
        with self.lock:
            start = self.running_futures < self.future_limit
            if start:
                self.running_futures += 1
            else:
                self.pending.append(batch)
        if start:
            future.set_running_or_notify_cancel()
            try:
                self.dispatch(batch, encoded)
            except BaseException:
                self.next_future(None)
                raise
        self.collect()
        return future

    def next_future(self, _: _Batch | None) -> None:
        """A future has ended: the next one that waits may be sent."""
        with self.lock:
            if self.pending:
                self.outbox.append(self.pending.popleft())
            else:
                self.running_futures -= 1

    def collect(self) -> None:
        """Make sure that somebody drains for the futures."""
        with self.turn:
            if self.collector is None:
                self.collector = threading.Thread(target=self._collect, name="shmengine-results", daemon=True)
                self.collector.start()
            else:
                self.turn.notify_all()

    def _collect(self) -> None:
        while not self.closed:
            with self.turn:
                while not self.closed and (self.draining or self.running_futures == 0):
                    self.turn.wait()
            try:
                if not self.drain(self.look()):
                    self.deny_if_stuck()
            except Closed:
                return

    # --- death -----------------------------------------------------------------------------------

    def time_limit(self, number: int) -> float | None:
        batch = self.batches.get(number)
        return batch.job.options.timeout if batch is not None else None

    def on_death(self, death: Death) -> bool:
        """Queue a message to ourselves behind the dead worker's last results (in the pool's thread)."""
        if self.closed:
            return False
        with self.lock:
            number = next(self.ids)
            self.deaths[number] = death
        block = ffi.new("shmr_block *")
        while not self.closed:
            status = lib.shmr_claim(self.handle, 64, ffi.NULL, 0, -1, self.look(), block)
            if status == OK:
                break
        else:
            return False
        block.kind, block.tag, block.length = EVENT, number, 0
        while not self.closed:
            status = lib.shmr_commit(self.handle, RESULT_RING, 0, -1, self.look(), block)
            if status == OK:
                break
        self.pump()
        return not self.closed and self.broken is None

    def pump(self) -> None:
        """Take what is there if nobody else is about to."""
        with contextlib.suppress(Closed):
            self.drain(0)

    def after_death(self, number: int) -> None:
        """All results of the dead worker have been received: what it still had is run again, or fails."""
        death = self.deaths.pop(number)
        again: list[_Batch] = []
        for tag in death.leased:
            with self.lock:
                batch = self.batches.pop(tag, None)
                if batch is not None:
                    batch.job.in_flight -= 1
            if batch is None or batch.job.abandoned:
                continue
            again.extend(self.sort_out(batch, death, running=tag == death.tag))
        self.outbox.extend(again)

    def sort_out(self, batch: _Batch, death: Death, *, running: bool) -> list[_Batch]:
        """Blame the task that was running; return batches of those that run again."""
        job = batch.job
        again = []
        for task in batch.tasks:
            guilty = running and task.index == death.index
            if guilty:
                task.attempts += 1
                if death.timed_out:
                    error: BaseException = timed_out(job.options, task.index if job.options.label else None)
                    self.conclude(job, task, None, error)
                    continue
                if task.attempts > job.retries:
                    self.conclude(job, task, None, self.death_error(death, job, task))
                    continue
                self.retried += 1
            again.append(_Batch(job, [task]))  # alone: if it kills again, it harms no other
        return again

    def death_error(self, death: Death, job: _Job, task: _Task) -> WorkerDied:
        return WorkerDied(
            death.pid,
            death.returncode,
            f"task {task.index} of {job.options.label}" if job.options.label else f"task {task.index}",
            task.attempts,
            death.cause,
            death.stderr_tail,
        )

    def fail_all(self, error: BaseException) -> None:
        """Nothing can run any more: the initializer failed."""
        broken = RemoteError(f"the initializer failed in a worker: {type(error).__name__}: {error}")
        broken.__cause__ = error
        self.broken = broken
        with self.lock:
            batches = list(self.batches.values())
            self.batches.clear()
        for batch in batches:
            for task in batch.tasks:
                self.conclude(batch.job, task, None, broken)
        with self.turn:
            self.turn.notify_all()

    # --- observing and ending ---------------------------------------------------------------------

    def stats(self) -> EngineStats:
        if self.closed:
            return EngineStats("process", self.workers, self.done, self.failed, self.retried, self.pool.deaths)
        c = self.region.counters()
        fill = lib.shmr_approx_fill(self.handle, TASK_RING) + lib.shmr_approx_fill(self.handle, RESULT_RING)
        with self.lock:
            in_flight = sum(len(batch.tasks) for batch in self.batches.values())
        return EngineStats(
            backend="process",
            workers=self.workers,
            tasks_done=self.done,
            tasks_failed=self.failed,
            retries=self.retried,
            worker_deaths=self.pool.deaths,
            bytes_copied=self.bytes_copied,
            bytes_shared=self.bytes_shared,
            memory_budget=self.budget,
            memory_used=int(c.reserved),
            ring_fill=int(fill),
            ring_capacity=2 * RING_CAPACITY,
            tasks_in_flight=in_flight,
            rescued_wakeups=int(c.rescued_wakeups),
            late_releases=int(c.late_releases),
        )

    def end(self, *, wait: bool) -> None:
        if self.region.pid != os.getpid():
            return
        with self.lock:
            if self.closed:
                return
            self.closed = True
            batches = list(self.batches.values())
            self.batches.clear()
            waiting = [*self.outbox, *self.pending]
            self.outbox.clear()
            self.pending.clear()
        # Tasks that nobody has begun are dropped.
        block = ffi.new("shmr_block *")
        lib.shmr_close_ring(self.handle, TASK_RING)
        while lib.shmr_lease(self.handle, TASK_RING, 0, 0, block) == OK:
            lib.shmr_release(self.handle, block)
        self.pool.close(wait=wait)
        closed = Closed(CLOSED_TEXT)
        for batch in batches:
            for task in batch.tasks:
                batch.job.deliver(task, None, closed)
        for batch in waiting:
            if batch.job.begin():
                batch.job.deliver(batch.tasks[0], None, closed)
        lib.shmr_close_ring(self.handle, RESULT_RING)
        with self.turn:
            self.turn.notify_all()
        if self.collector is not None and threading.current_thread() is not self.collector:
            self.collector.join()
        while lib.shmr_lease(self.handle, RESULT_RING, 0, 0, block) == OK:
            lib.shmr_release(self.handle, block)
        self.region.close()


def _argument_error(error: codec.SerializationError, tasks: list[_Task]) -> codec.SerializationError:
    """Point into the arguments of the task instead of into our envelope."""
    for task in tasks:
        for label, value in (("args", task.args), ("kwargs", task.kwargs)):
            try:
                codec.encode(value, label=label)
            except codec.SerializationError as better:
                return better
    return error


# --- streams -----------------------------------------------------------------------------------------------------


def _stream(
    backend: ProcessBackend,
    core: _Core,
    fn: Callable[..., Any],
    calls: Iterable[Call],
    options: TaskOptions,
    ordered: bool,
) -> Iterator[Outcome]:
    core.check_open()
    ready: dict[int, Outcome] = {}
    arrived: deque[Outcome] = deque()

    def deliver(task: _Task, value: Any, error: BaseException | None) -> None:
        outcome = Outcome(task.index, value, error)
        if ordered:
            ready[task.index] = outcome
        else:
            arrived.append(outcome)

    retries = core.retries if options.retries is None else options.retries
    job = _Job(core.encode_function(fn), options, retries, deliver)
    job.keep = backend  # an iterator that is in use keeps its engine
    source = iter(calls)
    taken = yielded = 0
    exhausted = False
    window = options.window
    limit = BATCHES_PER_WORKER * core.workers + 1
    fair = core.budget // 4

    def next_ready() -> bool:
        return yielded in ready if ordered else bool(arrived)

    try:
        while True:
            # Keep the workers supplied.
            while not exhausted and job.in_flight < limit:
                size = _batch_size(job, core.workers, window)
                room = (window if window is not None else max(WINDOW_MIN, limit * size * 2)) - (taken - yielded)
                if room <= 0:
                    break
                tasks: list[_Task] = []
                start = time.perf_counter_ns()
                for call in itertools.islice(source, min(size, room)):
                    args, kwargs = call
                    tasks.append(_Task(taken, args, kwargs or None))
                    taken += 1
                    if len(tasks) > 1 and time.perf_counter_ns() - start > FILL_NS:
                        break
                    if next_ready():
                        break
                if not tasks:
                    exhausted = True
                    break
                core.dispatch(_Batch(job, tasks))
                if next_ready() and job.in_flight >= core.workers:
                    break
            if ordered:
                if yielded in ready:
                    yielded += 1
                    yield ready.pop(yielded - 1)
                    continue
            elif arrived:
                yielded += 1
                yield arrived.popleft()
                continue
            if exhausted and yielded == taken:
                return
            core.wait(next_ready)
    finally:
        job.abandoned = True
        with contextlib.suppress(AttributeError, TypeError):
            source.close()  # type: ignore[attr-defined]


def _batch_size(job: _Job, workers: int, window: int | None) -> int:
    """Tasks to send together: as many as fill the aimed time, so that small tasks cost little each."""
    if job.options.timeout is not None or job.task_ns == 0:
        return 1
    size = int(BATCH_NS / job.task_ns)
    if window is not None:
        size = min(size, window // (2 * workers + 1))
    return max(1, min(BATCH_MAX, size))
