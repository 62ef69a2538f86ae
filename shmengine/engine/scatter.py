"""Scatter and gather for the process backend: the blocks of a call as bare bytes, through the C core.

::

    arrays ── shmr_scatter_send ──► task ring ──► workers: fn(*blocks)
    target ◄── shmr_scatter_accept ── result ring ◄── its place, or its reference

What all blocks have in common (the function, keyword arguments, how to cut, where results go) is put into shared
memory once, as a `Plan`. The first results come back as values and tell what the target is. Blocks that fail, that
do not fit, or whose worker dies go on as ordinary tasks.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from shmengine import codec
from shmengine._native import ffi, lib
from shmengine._native.status import CORRUPT, OK, WOULD_BLOCK, fail
from shmengine.arrays import address_of, encode_spec, is_plain_dtype, spec_of
from shmengine.engine.backend import PLACED, Outcome, TaskOptions
from shmengine.engine.blocks import Cut
from shmengine.engine.dispatch import Dispatcher
from shmengine.engine.inflight import Batch, Job, Task
from shmengine.engine.shortage import Patience
from shmengine.filemap import reference_to
from shmengine.workers import messages
from shmengine.workers.scatter import BLOCK_SPEC, Flat, Plan, Target

__all__ = ["Scatter", "TargetOf", "scatter_blocks"]

SPARE_BLOCKS = 1  # beside those that run: few, so that all are in the cache that cores share
TURNS = 16  # blocks until Python has a look: at signals, at progress
WINDOW_MIN = 64  # results in order that wait for an earlier one

TargetOf = Callable[[], "tuple[np.ndarray[Any, Any], int] | None"]


def scatter_blocks(
    keep: object,
    core: Dispatcher,
    fn: Callable[..., Any],
    cut: Cut,
    target: TargetOf,
    options: TaskOptions,
    kwargs: Mapping[str, Any],
    ordered: bool,
) -> Iterator[Outcome] | None:
    """Run `fn` once for each block; None if these arrays have to travel as ordinary tasks.

    Parameters
    ----------
    keep
        Kept alive as long as the iterator is.
    target : callable
        Returns the array that results go to and its axis, or None as long as it is not known.
    """
    if cut.axis is None or cut.count < 2 or options.writable == "shared":
        return None
    arrays = []
    for array, axis in zip(cut.arrays, cut.axes, strict=True):
        how = _how_to_send(core, array, axis)
        if how is None:
            return None
        arrays.append((how, axis))
    if sum(type(how) is Flat for how, _ in arrays) > lib.SHMR_SCATTER_SOURCES:
        return None
    return Scatter(keep, core, fn, cut, arrays, target, options, kwargs, ordered).run()


def _how_to_send(core: Dispatcher, array: Any, axis: int) -> Any:
    """Return the array, if workers can cut it themselves, or a `Flat`, or None."""
    if type(array) not in (np.ndarray, np.memmap) or not is_plain_dtype(array.dtype) or not array.nbytes:
        return None
    if core.arena.contains(array):
        return array if core.arena.share(array) is not None else None
    if reference_to(array, "r") is not None:
        return array
    return _flat(array, axis)


def _flat(array: np.ndarray[Any, Any], axis: int) -> Flat | None:
    if axis == 0 and array.flags.c_contiguous:
        return Flat(array.dtype, array.shape, axis)
    if axis == array.ndim - 1 and array.flags.f_contiguous:
        return Flat(array.dtype, array.shape, axis)
    return None


def _nowhere(task: Task, value: Any, error: BaseException | None) -> None:
    """Take an outcome that nobody waits for any more."""


class Scatter:
    """The blocks of one call, on their way out and back."""

    def __init__(
        self,
        keep: object,
        core: Dispatcher,
        fn: Callable[..., Any],
        cut: Cut,
        arrays: list[tuple[Any, int]],
        target: TargetOf,
        options: TaskOptions,
        kwargs: Mapping[str, Any],
        ordered: bool,
    ) -> None:
        core.check_open()
        self.core = core
        self.cut = cut
        self.count = cut.count
        self.kwargs = dict(kwargs)
        self.first_tag = core.in_flight.reserve(cut.count)
        self._arrays = arrays
        self._target_of: TargetOf | None = target
        self._target: np.ndarray[Any, Any] | None = None  # kept for whoever is just writing to it
        self._ordered = ordered
        self._ready: dict[int, Outcome] = {}  # in order
        self._values: deque[Outcome] = deque()  # as they come
        self._yielded = self._placed = 0
        self._placing = threading.Lock()
        retries = core.retries if options.retries is None else options.retries
        self.job = Job(core.encode_function(fn), options, retries, self._deliver, keep)
        self._frames: list[Any] = []  # of all plans: a block that is out may need an earlier one
        self._states = ffi.new("unsigned char[]", cut.count)
        self._exchange = c = ffi.new("shmr_scatter *")
        c.states, c.count, c.first_tag = self._states, cut.count, self.first_tag
        c.task_ring, c.result_ring = messages.TASK_RING, messages.RESULT_RING
        c.task_kind, c.result_kind = messages.BLOCK, messages.PLACED
        c.payload_check = core.payload_check
        self._whole = cut.whole_blocks()
        c.next = self._whole.start
        block_bytes = self._describe_sources()
        workers = core.workers
        at_once = workers + max(SPARE_BLOCKS, workers // 2)
        self._limit = min(at_once, max(workers, core.budget // 4 // max(1, block_bytes)))

    def _describe_sources(self) -> int:
        """Tell the core where the arrays lie; return the bytes of one block of all of them."""
        c, cut, total = self._exchange, self.cut, 0
        before, after = cut.depth
        for array, (how, _) in zip(cut.arrays, self._arrays, strict=True):
            if type(how) is not Flat:
                self.core.bytes_shared += array.nbytes
                continue
            row_bytes = array.nbytes // cut.length
            source = c.source[c.sources]
            source.address = ffi.cast("char *", address_of(array))
            source.bytes, source.pitch = array.nbytes, cut.rows * row_bytes
            source.before, source.after = before * row_bytes, after * row_bytes
            total += source.pitch + source.before + source.after
            c.sources += 1
        return total

    # --- the stream ------------------------------------------------------------------------------

    def run(self) -> Iterator[Outcome]:
        """Yield outcomes; see `shmengine.engine.backend.Backend.stream`."""
        core, c = self.core, self._exchange
        try:
            self._make_plan(None)
            core.in_flight.add_scattered(self)
            if self.job.options.timeout is not None:
                core.pool.watch_time()
            for index in range(self.count):
                if index not in self._whole:  # blocks at the ends, with cells from beyond them
                    core.dispatch(Batch(self.job, [self._task(index)]))
            while True:
                self._send()
                before = self._yielded
                while (outcome := self._next()) is not None:
                    self._yielded += 1
                    yield outcome
                    del outcome
                if self._yielded == self.count:
                    core.pool.forward_output()
                    return
                if self._yielded == before:  # else more may be sent now
                    core.wait(self.is_ready, self._tell, self)
        finally:
            core.done += c.arrived
            core.bytes_copied += c.bytes_sent + c.bytes_copied
            self.job.deliver = _nowhere  # or else we would be a cycle, and keep results
            with self._placing:  # another thread that drains may be writing to the target
                self.job.abandoned = True
            core.abandon(self.job)
            core.in_flight.remove_scattered(self)

    def _next(self) -> Outcome | None:
        if self._placed < self._exchange.arrived:
            self._placed += 1
            return Outcome(-1, PLACED)
        if self._ordered:
            return self._ready.pop(self._yielded, None)
        return self._values.popleft() if self._values else None

    def is_ready(self) -> bool:
        """Tell whether there is an outcome to be yielded."""
        if self._placed < self._exchange.arrived:
            return True
        return self._yielded in self._ready if self._ordered else bool(self._values)

    def _tell(self) -> None:
        if (completed := self.job.options.completed) is not None:
            waiting = self._exchange.arrived - self._placed + len(self._ready) + len(self._values)
            completed(self._yielded + waiting)

    def _send(self) -> None:
        """Send as many blocks as may be out; while there is no room, drain results."""
        core, c = self.core, self._exchange
        if self._target_of is not None and (found := self._target_of()) is not None:
            self._target_of = None
            self._target = found[0]
            self._make_plan(self._describe_target(*found))
        self._set_bounds()
        patience = Patience()
        while (status := lib.shmr_scatter_send(core.handle, c, core.look())) != OK:
            core.check_open()
            if core.broken is not None:
                raise core.broken()
            core.shortage.relieve(
                status, sum(c.source[i].pitch for i in range(c.sources)), "send a task", patience
            )
            self._set_bounds()

    def _set_bounds(self) -> None:
        c, core = self._exchange, self.core
        c.stop = self._whole.stop
        if self._ordered:
            window = max(WINDOW_MIN, 2 * self._limit)
            if self.job.result_bytes:
                window = min(window, max(core.workers, int(core.budget // 4 / self.job.result_bytes)))
            c.stop = min(c.stop, max(c.next, self._yielded + window))
        c.limit = 0 if core.later and c.out else self._limit  # memory is short: let what is on its way end

    def _make_plan(self, target: Target | None) -> None:
        """Put what all blocks have in common where workers read it."""
        core, cut = self.core, self.cut
        options = self.job.options
        plan = Plan(
            self.job.function,
            options.rng,
            options.writable in (True, "private"),
            self.kwargs,
            self._arrays,
            cut.length,
            cut.rows,
            *cut.depth,
            target,
        )
        frame = core.put(codec.encode(tuple(plan), share=core.arena.share))
        self._frames.append(frame)
        reference = core.arena.share(frame)
        assert reference is not None
        c = self._exchange
        c.spec_bytes = BLOCK_SPEC.size
        BLOCK_SPEC.pack_into(ffi.buffer(c.spec), 0, *reference[:3], self.first_tag)

    def _describe_target(self, target: np.ndarray[Any, Any], axis: int) -> Target | None:
        """Say how results get into the target; None: only as values."""
        core, c = self.core, self._exchange
        if not is_plain_dtype(target.dtype) or not target.nbytes:
            return None
        reference = core.arena.share(target)
        order = ""
        if reference is None:
            flat = _flat(target, axis)
            if flat is None:
                return None
            order = flat.order
            c.target = ffi.cast("char *", address_of(target))
            c.target_bytes = target.nbytes
            c.target_pitch = self.cut.rows * (target.nbytes // self.cut.length)
        return Target(target.dtype, target.shape, axis, order, reference, encode_spec(spec_of(target)))

    # --- for the dispatcher ----------------------------------------------------------------------

    def exchange(self, deadline: int, block: Any) -> int:
        """Send and accept in turn (as the drainer); OK if a message is left in `block` that is somebody else's."""
        status: int = lib.shmr_scatter_run(self.core.handle, self._exchange, TURNS, deadline, block)
        return status

    @property
    def out(self) -> int:
        """How many blocks are at the workers."""
        return int(self._exchange.out)

    def settle(self, tag: int) -> Task | None:
        """One is back, or given up: return it as a task (None: it was not out)."""
        if not lib.shmr_scatter_settle(self._exchange, tag):
            return None
        return self._task(tag - self.first_tag)

    def accept(self, block: Any) -> bool:
        """Put the result in a leased message to its place and release it; False if it is no such message."""
        with self._placing:
            if self.job.abandoned:
                lib.shmr_scatter_settle(self._exchange, block.tag)
                return False
            kind, tag = block.kind, block.tag
            status = lib.shmr_scatter_accept(self.core.handle, self._exchange, block)
            if status == CORRUPT and kind and self.core.spoiled(tag):
                return True
        if status not in (OK, WOULD_BLOCK):
            fail(status, "receive a result")
        return bool(status == OK)

    def _task(self, index: int) -> Task:
        if self.job.abandoned:
            return Task(index, (), None)
        return Task(index, self.cut.blocks(index), self.kwargs or None)

    def _deliver(self, task: Task, value: Any, error: BaseException | None) -> None:
        outcome = Outcome(task.index, value, error)
        if self._ordered:
            self._ready[task.index] = outcome
        else:
            self._values.append(outcome)
