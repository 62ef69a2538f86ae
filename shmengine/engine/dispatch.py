"""Dispatch: tasks through a shared ring to workers, results through another one back.

::

    stream / submit ── encode ── claim ── commit ──► task ring ──► worker: lease, call, commit, release
         ▲                                                                     │
         └── deliver ◄── decode ◄── lease ◄── whoever waits ◄── result ring ◄──┘

Whoever waits for a result drains the ring for all: one thread at a time is the *drainer*; the others sleep
until it has something for them, or hands over. When only futures wait, a thread of ours drains. What results
make due (the next future, a task to be run again) goes through an outbox, because the drainer must never wait
for room.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from shmengine import codec, config
from shmengine._native import ffi, lib
from shmengine._native.status import (
    CLOSED,
    CORRUPT,
    INTERRUPTED,
    OK,
    TIMEOUT,
    WOULD_BLOCK,
    detail,
    fail,
)
from shmengine.arena import Arena
from shmengine.arrays import has_views
from shmengine.crossings import Crossings
from shmengine.engine.backend import CLOSED_TEXT, argument_error
from shmengine.engine.collector import Collector
from shmengine.engine.deaths import Deaths
from shmengine.engine.futures import Futures
from shmengine.engine.inflight import Batch, InFlight, Job, Task
from shmengine.engine.policy import Policy
from shmengine.engine.shortage import LOOK_NS, Patience, Shortage
from shmengine.errors import ArrayError, Closed, Corrupt, RemoteError
from shmengine.exceptions import decode_exception
from shmengine.filemap import forget_files
from shmengine.interrupts import InterruptsLater
from shmengine.leases import release_with
from shmengine.pickling import goes_by_reference
from shmengine.region import EXTENT_BYTES, Region
from shmengine.workers import logs, messages
from shmengine.workers.inheritance import Inheritance
from shmengine.workers.messages import (
    BROKEN,
    EVENT,
    NUMBER,
    PART,
    PLACED,
    RESULT_RING,
    SHORT,
    TASK,
    TASK_RING,
    VALUE,
)
from shmengine.workers.pool import Pool

if TYPE_CHECKING:
    from shmengine.engine.scatter import Scatter

__all__ = ["BATCHES_PER_WORKER", "RING_CAPACITY", "Dispatcher"]

RING_CAPACITY = 4096
HELD_NS = 20_000_000  # what a task is taken to need after one of its kind has held up others
BATCHES_PER_WORKER = 3  # one running, some waiting: main may be held up for as long as they last


def _nothing() -> None:
    """In place of a weak reference."""


class Dispatcher:
    """The engine's state; its threads hold this, never the backend, so that a forgotten backend ends."""

    def __init__(
        self,
        region: Region,
        workers: int,
        retries: int,
        payload_check: int,
        inheritance: Inheritance,
        threads: int,
        policy: Policy,
    ) -> None:
        self.policy = policy
        self.region = region
        self.handle = region.handle
        self.arena = Arena(region)
        self.crossings = Crossings(self.arena, creator=True)
        self.workers = workers
        self.retries = retries
        self.payload_check = payload_check
        # Whatever main keeps, each worker finds room for an answer, if only to say that there is none.
        lib.shmr_leave_extents(self.handle, workers)
        c = region.counters()
        self.budget = int(c.budget)
        self.closed = False
        self.broken: Callable[[], BaseException] | None = None  # makes the error that everything ends with
        self.in_flight = InFlight()
        self.lock = self.in_flight.lock  # counters of jobs and futures, too
        # Entered as the lock that it is: a signal's handler can raise in Condition's own __exit__, written in Python.
        self.turn_lock = threading.RLock()
        self.turn = threading.Condition(self.turn_lock)  # who drains
        self.drainer: int | None = None
        # What was sent cannot be cancelled any more: as many as with ProcessPoolExecutor, if that is imitated.
        self.futures = Futures(self, workers + 1 if policy.pickles_late else BATCHES_PER_WORKER * workers + 1)
        self.deaths = Deaths(self)
        self.shortage = Shortage(self)
        self._latest_function: tuple[Callable[[], Any], bytes] = _nothing, b""
        self.outbox: deque[Batch] = deque()  # due, to be sent by the next thread that is not draining
        self.later: deque[Batch] = (
            deque()
        )  # due when nothing is on its way: there was no room for their results
        self.flushing = threading.local()
        self.collector = Collector(self)
        self.done = self.failed = self.retried = 0
        self.bytes_copied = self.bytes_shared = 0
        self.spare: list[Any] = []
        setup = {
            "path": [entry or os.getcwd() for entry in sys.path],
            "argv": sys.argv,
            "cwd": os.getcwd(),
            "arena_limit": self.budget * 3 // 4 // workers,
            "payload_check": payload_check,
            "log_levels": logs.levels(),
            "tasks": policy.tasks_per_worker,
            **policy.setup(),
        }
        limits = config.thread_limit_environment(threads)
        environment = {name: value for name, value in limits.items() if name not in os.environ}
        environment.update(policy.environment, SHMENGINE_WORKER="1")
        self.pool = Pool(
            region,
            workers,
            setup,
            inheritance,
            environment,
            self.deaths.announce,
            self.in_flight.limit,
            start=workers if policy.start == "now" else 0,
        )

    def has_ended(self) -> bool:
        """Tell whether `end` was called, by any thread."""
        return self.closed

    def check_open(self) -> None:
        self.region.check_fork()
        if self.closed:
            raise self.broken() if self.broken is not None and self.policy.fragile else _closed()

    # --- out -------------------------------------------------------------------------------------

    def provide_workers(self) -> None:
        """Before a future is sent: start a worker for it, if they start on demand."""
        if self.policy.start != "now" and not self.closed:
            self.pool.provide(self.futures.count() + 1, at_once=self.policy.start == "first task")

    def put(self, encoded: codec.Encoded) -> Any:
        """Write a frame into a shared block of its own; return its bytes, which hold it."""
        self.check_open()
        block, ref = ffi.new("shmr_block *"), ffi.new("shmr_ref *")
        patience = Patience()
        try:
            while (
                status := lib.shmr_claim(
                    self.handle, encoded.nbytes, ffi.NULL, 0, RESULT_RING, self.look(), block
                )
            ) != OK:
                self.shortage.relieve(status, encoded.nbytes, "put an object", patience)
            encoded.write_into(
                self.region.root(block.offset, encoded.nbytes, writable=True),
                checksum=bool(self.payload_check),
            )
            block.length = encoded.nbytes
            status = lib.shmr_publish(self.handle, block, ref)
            if status != OK:
                fail(status, "put an object")
            self.bytes_copied += encoded.bytes_inline
            return self.arena.resolve((self.region.number, ref.block, ref.generation, 0))
        finally:
            if ref.generation:
                lib.shmr_drop(self.handle, ref.block, ref.generation)
            elif block.state:  # an error, or Ctrl-C
                lib.shmr_abort(self.handle, block)

    def look(self) -> int:
        return time.monotonic_ns() + LOOK_NS

    def encode_function(self, fn: Callable[..., Any]) -> Any:
        """Serialise a function: bytes that travel with each batch, or a frame in shared memory.

        The latest one is kept, if its pickle is the same each time.
        """
        sent = messages.with_errstate(fn)
        known, raw = self._latest_function
        if sent is fn and known() is fn and goes_by_reference(fn):
            return raw
        encoded = codec.encode(sent, share=None, label="fn")
        if encoded.nbytes > messages.INLINE_FUNCTION_BYTES:
            return self.put(encoded)
        raw = encoded.to_bytes()
        if sent is fn and goes_by_reference(fn):
            self._latest_function = weakref.ref(fn), raw
        return raw

    def encode_batch(self, batch: Batch) -> codec.Encoded:
        options = batch.job.options
        calls = [(task.args, task.kwargs) for task in batch.tasks]
        payload = (batch.job.function, options.rng, [task.index for task in batch.tasks], calls)
        if options.writable == "shared":
            self.check_shared(batch.tasks)
        try:
            return codec.encode(
                payload,
                share=self.arena.share,
                memmap_mode="r+" if options.writable == "shared" or options.place is not None else "r",
                place=options.place,
            )
        except codec.SerializationError as error:
            raise argument_error(error, batch.tasks) from error.__cause__

    def check_shared(self, tasks: list[Task]) -> None:
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

    def dispatch(self, batch: Batch, encoded: codec.Encoded | None = None) -> None:
        """Send a batch; while there is no room, drain results. After an error, the batch has what was not sent."""
        if encoded is None:
            encoded = self.encode_batch(batch)
        while encoded.nbytes > self.budget // 8 and len(batch.tasks) > 1:
            half = len(batch.tasks) // 2
            self.dispatch(Batch(batch.job, batch.tasks[:half]))
            batch.tasks = batch.tasks[half:]  # what is left, should that fail
            encoded = self.encode_batch(batch)
        batch.nbytes = encoded.nbytes
        number = self.in_flight.add(batch)
        if batch.job.options.timeout is not None:
            self.pool.watch_time()
        block = self.spare.pop() if self.spare else ffi.new("shmr_block *")
        try:
            patience = Patience()
            while True:
                self.check_open()
                if self.broken is not None:
                    raise self.broken()
                status = messages.write_frame(
                    self.arena,
                    TASK_RING,
                    TASK,
                    number,
                    encoded,
                    payload_check=self.payload_check,
                    spec=messages.MODES[batch.job.options.writable]
                    + (b"" if batch.job.options.place is None else messages.OWN),
                    items=RESULT_RING,
                    deadline=self.look(),
                    block=block,
                )
                if status == OK:
                    break
                self.in_flight.take(number)  # not among those that could free memory
                try:
                    self.shortage.relieve(status, encoded.nbytes, "send a task", patience)
                finally:
                    with self.lock:
                        if not self.closed:
                            self.in_flight.add(batch, number)
        except BaseException:
            self.in_flight.take(number)
            raise
        self.spare.append(block)
        self.bytes_copied += encoded.bytes_inline
        self.bytes_shared += encoded.bytes_shared

    # --- back ------------------------------------------------------------------------------------

    def drain(self, deadline: int, scatter: Scatter | None = None) -> bool:
        """Take results off the ring, if nobody else does: the ones that are there, waiting for the first.

        Meanwhile go on sending the blocks of `scatter`.

        Returns
        -------
        bool
            Whether this thread was the drainer and took something.
        """
        me = threading.get_ident()
        nested = self.drainer == me  # a callback of a future waits for more
        with InterruptsLater():
            try:
                with self.turn_lock:
                    if self.drainer not in (None, me):
                        return False
                    self.drainer = me
                took = self._drain(deadline, scatter)
            finally:
                try:
                    self._end_turn(me, nested)
                except BaseException:  # the handler of another signal
                    self._end_turn(me, nested)
                    raise
        self.flush()
        return took

    def _end_turn(self, me: int, nested: bool) -> None:
        if self.drainer == me and not nested:
            with self.turn_lock:
                self.drainer = None
                self.turn.notify_all()

    def recall(self) -> list[Batch]:
        """Take the tasks that no worker has begun off the ring."""
        block = ffi.new("shmr_block *")
        recalled = []
        while lib.shmr_lease(self.handle, TASK_RING, 0, 0, block) == OK:
            lib.shmr_release(self.handle, block)
            batch = self.in_flight.take(block.tag)
            if batch is not None and not batch.job.abandoned:
                recalled.append(batch)
        return recalled

    def flush(self) -> None:
        """Send the batches that results have made due."""
        if getattr(self.flushing, "now", False):
            return
        self.flushing.now = True
        try:
            while True:
                self.futures.send_pending()
                if not (self.outbox or (self.later and not self.in_flight)):
                    break
                batch = (self.outbox or self.later).popleft()
                if batch.job.abandoned:
                    continue
                try:
                    self.dispatch(batch)
                except BaseException as error:
                    if isinstance(error, codec.SerializationError) and len(batch.tasks) > 1:
                        self.outbox.extend(
                            Batch(batch.job, [task]) for task in batch.tasks
                        )  # one of them it is
                        continue
                    for task in batch.tasks:
                        self.conclude(batch.job, task, None, error)
                    if not isinstance(error, Exception):
                        raise
        except IndexError:
            pass  # another thread took the last one
        finally:
            self.flushing.now = False

    def _drain(self, deadline: int, scatter: Scatter | None) -> bool:
        took = False
        while True:
            block = self.spare.pop() if self.spare else ffi.new("shmr_block *")
            if scatter is not None:
                status = scatter.exchange(deadline, block)
                took = took or scatter.is_ready()
                scatter = None
            else:
                status = lib.shmr_lease(
                    self.handle, RESULT_RING, self.payload_check, 0 if took else deadline, block
                )
            if status == OK:
                took = True
                self.receive(block)
                if self.futures.pending:
                    return True  # to be sent before the next one is read: a worker waits for them
                continue
            self.spare.append(block)
            if status in (TIMEOUT, WOULD_BLOCK, INTERRUPTED):
                return took
            if status == CLOSED:
                raise Closed(CLOSED_TEXT)
            if status == CORRUPT and block.kind and self.spoiled(block.tag):
                took = True
                continue
            fail(status, "receive a result")

    def spoiled(self, tag: int) -> bool:
        """A result was changed in shared memory: its tasks fail, and no others; False if there are none."""
        batch = self.in_flight.take(tag)
        if batch is None:
            return False
        for task in batch.tasks:
            error = Corrupt("the result was changed in shared memory, on its way here", detail())
            self.conclude(batch.job, task, None, error)
        return True

    def receive(self, block: Any) -> None:
        """Decode one message of the result ring and deliver it."""
        kind, number = block.kind, block.tag
        if kind == EVENT:
            lib.shmr_release(self.handle, block)
            self.spare.append(block)
            self.deaths.settle(number)
            return
        if kind == PLACED:
            self.deaths.failed_starts = 0
            if not self.in_flight.accept(block):
                lib.shmr_release(self.handle, block)
            self.spare.append(block)
            return
        self.pool.forward_output(block.producer, number)
        if kind == NUMBER:
            value = damage = None
            nanoseconds = 0
            try:
                nanoseconds, value = messages.number_in(block)
            except Corrupt as found:
                damage = found
            lib.shmr_release(self.handle, block)
            self.spare.append(block)
            self.deaths.failed_starts = 0
            if (batch := self.in_flight.take(number)) is not None and not batch.job.abandoned:
                batch.job.task_ns = _smoothed(batch.job.task_ns, nanoseconds)
                self.conclude(batch.job, batch.tasks[0], value, damage)
            return
        root = messages.frame_root(self.arena, block, writable=True)  # ours alone from now on
        nanoseconds, inline, shared = messages.account_of(block)
        copied = self.must_copy(inline + shared)
        if kind == PART:
            batch, given_back = self.in_flight.take_part(number, *messages.part_of(block))
            self.outbox.extend(given_back)
        else:
            batch = self.in_flight.take(number)
        payload: Any = None
        error: BaseException | None = None
        if kind == BROKEN or (batch is not None and not batch.job.abandoned):
            try:
                payload = messages.read_frame(root, self.arena.resolve, copy=copied)
            except BaseException as failure:
                error = self.policy.broken(failure)
        self.bytes_shared += shared
        self.bytes_copied += inline + (inline + shared if copied else 0)
        # Views of the frame itself keep it leased; references are held on their own.
        holder = [root]
        del root
        if has_views(holder):
            release_with(holder[0], self.region, block, self.arena.holding(block.offset, block.length))
        else:
            lib.shmr_release(self.handle, block)
            self.spare.append(block)
        del holder
        if kind == BROKEN:
            cause = decode_exception(payload) if error is None else error
            self.fail_all(lambda: self.policy.broken(_initializer_error(cause)))
            return
        self.deaths.failed_starts = 0
        if batch is None:
            return
        job = batch.job
        count = len(batch.tasks)
        if kind == PART:
            job.task_ns = max(job.task_ns, HELD_NS)
        else:
            job.task_ns = _smoothed(job.task_ns, nanoseconds / count)
            job.result_bytes = _smoothed(job.result_bytes, (inline + shared) / count)
        if job.abandoned:
            return
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            for task in batch.tasks:
                self.conclude(job, task, None, error)
            raise error
        if kind == SHORT:
            self.run_later(batch, payload, error)
        elif error is not None and self.policy.fragile:
            for task in batch.tasks:  # one of them cannot be decoded, and they have run
                self.conclude(job, task, None, error)
        elif count > 1 and (error is not None or len(payload) != count):
            # One of them cannot be decoded, here or there, and spoils the others: each alone. (Those that have
            # run are run again; without retries there is one task a batch.)
            self.outbox.extend(Batch(job, [task]) for task in batch.tasks)
        elif error is not None:
            self.conclude(job, batch.tasks[0], None, error)
        elif kind == VALUE:
            self.conclude(job, batch.tasks[0], payload, None)
        else:
            for task, (good, value) in zip(batch.tasks, payload, strict=True):
                if good:
                    self.conclude(job, task, value, None)
                    continue
                raised = decode_exception(value, self.policy.broken)
                self.conclude(job, task, None, raised if good is False else self.policy.broken(raised))

    def run_later(self, batch: Batch, payload: Any, error: BaseException | None) -> None:
        """Its results found no room: try again when nothing else is on its way, or give up."""
        job = batch.job
        if len(batch.tasks) > 1 or (job.retries and self.in_flight):
            self.later.extend(Batch(job, [task]) for task in batch.tasks)
        else:
            self.conclude(job, batch.tasks[0], None, error or decode_exception(payload))

    def must_copy(self, nbytes: int) -> bool:
        """Tell whether a result has to go to private memory, because what users keep must not stop the flow."""
        kept = self.arena.pinned_bytes + nbytes
        room = self.budget - (self.workers + 1) * EXTENT_BYTES  # for one of the same size from each worker
        return kept > room // 2 or kept + self.workers * nbytes > room

    def conclude(self, job: Job, task: Task, value: Any, error: BaseException | None) -> None:
        if error is None:
            self.done += 1
        else:
            self.failed += 1
        job.deliver(task, value, error)

    def wait(
        self, ready: Callable[[], bool], tell: Callable[[], object], scatter: Scatter | None = None
    ) -> None:
        """Return when `ready`; meanwhile drain, or sleep while another thread does, and `tell` how far it is."""
        while not ready():
            tell()
            if self.broken is not None:
                raise self.broken()
            self.check_open()
            if self.drain(self.look(), scatter):
                continue
            with self.turn_lock:
                if self.drainer is not None and not ready():
                    self._sleep_until_told()
            self.shortage.deny_if_stuck()

    def _sleep_until_told(self) -> None:
        try:
            self.turn.wait(0.25)
        except (
            BaseException
        ):  # a signal's handler has raised where Condition.wait, written in Python, has let go of it
            if not self.turn_lock._is_owned():  # type: ignore[attr-defined]  # what Condition uses, too
                self.turn_lock.acquire()
            raise

    # --- who waits ---------------------------------------------------------------------------------

    def abandon(self, job: Job) -> None:
        """Nobody wants the results of a job any more: those that are on their way must not take up memory."""
        job.abandoned = True
        if not self.closed and self.in_flight.any_abandoned():
            self.collector.wake()

    # --- observing and ending ---------------------------------------------------------------------

    def fail_all(self, make_error: Callable[[], BaseException]) -> None:
        """Nothing can run any more: everybody gets an error of his own."""
        self.broken = make_error
        for batch in self.in_flight.take_all():
            for task in batch.tasks:
                self.conclude(batch.job, task, None, make_error())
        with self.turn_lock:
            self.turn.notify_all()

    def wind_down(self) -> None:
        """While the last tasks end: take their results, and let none wait for memory that nobody will free."""
        with contextlib.suppress(Closed, Corrupt):
            self.drain(0)
        for pid, _ in self.pool.starving():
            self.pool.deny(pid)

    def end(self, *, wait: bool) -> None:
        if self.region.pid != os.getpid():
            return
        with self.lock:
            if self.closed:
                return
            self.closed = True
            waiting = [*self.outbox, *self.later]
            self.outbox.clear()
            self.later.clear()
        # Tasks that nobody has begun are dropped.
        lib.shmr_close_ring(self.handle, TASK_RING)
        waiting += self.recall()
        self.pool.close(wait=wait, meanwhile=self.wind_down)
        error = self.broken or _closed
        self.futures.fail_pending(error)
        for batch in [*self.in_flight.take_all(), *waiting]:
            for task in batch.tasks:
                batch.job.deliver(task, None, error())
        lib.shmr_close_ring(self.handle, RESULT_RING)
        with self.turn_lock:
            self.turn.notify_all()
        self.collector.join()
        block = ffi.new("shmr_block *")
        while lib.shmr_lease(self.handle, RESULT_RING, 0, 0, block) == OK:
            lib.shmr_release(self.handle, block)
        forget_files()  # that results have named
        self.crossings.close()
        self.region.close()


def _smoothed(before: float, value: float) -> float:
    return value if before == 0 else 0.75 * before + 0.25 * value


def _closed() -> Closed:
    return Closed(CLOSED_TEXT)


def _initializer_error(cause: BaseException) -> RemoteError:
    error = RemoteError(f"the initializer failed in a worker: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error
