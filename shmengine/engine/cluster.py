"""The cluster backend: `shmengine.engine.backend.Backend` on the hosts of a dask cluster.

::

    caller's thread (here)         loop of dask's client (`courier`)     a host (`hosts`)
    take ─ cut ─ encode: a Batch ──► to a host that has room ───────────► cut into blocks ─ its own workers
    decode ─ yield in order ◄─────── the host's answer ◄───────────────── outcomes

A batch is what one host gets at once: consecutive calls, or one piece of the arrays that it cuts into their blocks.
Edges of blocks and numbers of tasks are those of one machine, and so are the results.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np

from shmengine.arrays import Bytes
from shmengine.codec import decode, encode
from shmengine.config import default_budget
from shmengine.engine.backend import (
    CLOSED_TEXT,
    Call,
    Outcome,
    Ref,
    Submit,
    TaskOptions,
    argument_error,
    block_calls,
)
from shmengine.engine.blocks import Cut
from shmengine.engine.courier import Batch, ClusterRef, Courier, HostLost
from shmengine.engine.frames import RowCut
from shmengine.engine.hosts import aligned, frame_of, object_here
from shmengine.engine.stalls import Stalls, summary_of
from shmengine.engine.stream import room_in_window
from shmengine.errors import ArrayError, Closed, PeerLost, SerializationError, WorkerDied
from shmengine.exceptions import decode_exception
from shmengine.stats import EngineStats
from shmengine.workers.messages import INLINE_FUNCTION_BYTES, with_errstate

__all__ = ["ClusterBackend"]

BATCH_SECONDS = 0.2  # that a batch is to keep a host busy: long against the way there
BATCH_BYTES = 32 << 20  # of a batch of more than one task, either way
FILL_SECONDS = 0.0002  # a slow iterable must not hold back what it has already given


class _Refs:
    """Pickles references as their numbers, and remembers which; see `shmengine.pickling.Reducers`."""

    def __init__(self) -> None:
        self.found: dict[str, ClusterRef] = {}

    def get(self, cls: type, /) -> Callable[[Any], Any] | None:
        """Return the reducer of references."""
        return self._reduce if cls is ClusterRef else None

    def _reduce(self, ref: ClusterRef) -> Any:
        self.found[ref.number] = ref
        return object_here, (ref.number,)


def _packed(obj: Any, label: str = "") -> tuple[Bytes, list[ClusterRef]]:
    """Return an object's frame, without references to files of this host, and the references in it."""
    refs = _Refs()
    frame = frame_of(encode(obj, memmap_mode=None, reducers=refs, label=label))
    return frame, list(refs.found.values())


class _Job:
    """What the batches of one stream have in common, and what was learned from those that are back."""

    def __init__(self, fn: Any, refs: list[ClusterRef], options: TaskOptions, retries: int) -> None:
        self.fn = fn  # or the number of the reference to it
        self.refs = refs
        self.options = options
        self.retries = retries
        self.task_seconds = 0.0
        self.task_bytes = 0.0
        self.result_bytes = 0.0

    def size(self, workers: int) -> int:
        """Return how many tasks a host of so many workers is to get at once."""
        if not self.retries:
            return 1  # a death must take none along that had ended
        size = workers
        if self.task_seconds:
            size = workers * max(1, int(BATCH_SECONDS / self.task_seconds))
        heaviest = max(self.task_bytes, self.result_bytes)
        return max(1, min(size, int(BATCH_BYTES / heaviest))) if heaviest else size


class _Source(Protocol):
    """Where the tasks of a stream come from."""

    def take(self, first: int, size: int) -> tuple[int, tuple[Any, ...]]:
        """Return how many were taken (0: there are no more), and what a host gets of them."""

    def close(self) -> None:
        """End."""


class _Calls:
    def __init__(self, calls: Iterable[Call]) -> None:
        self._calls = iter(calls)

    def take(self, first: int, size: int) -> tuple[int, tuple[Any, ...]]:  # noqa: ARG002  # pieces need it
        taken: list[Call] = []
        enough = time.perf_counter() + FILL_SECONDS
        for call in itertools.islice(self._calls, size):
            taken.append(call)
            if len(taken) < size and time.perf_counter() > enough:
                break
        return len(taken), ("calls", taken)

    def close(self) -> None:
        with contextlib.suppress(AttributeError):
            self._calls.close()  # type: ignore[attr-defined]  # a generator of calls ends with its stream


class _Pieces:
    """The first cut: pieces for hosts."""

    def __init__(self, cut: Cut, kwargs: Mapping[str, Any]) -> None:
        self._cut = cut
        self._kwargs = dict(kwargs)

    def take(self, first: int, size: int) -> tuple[int, tuple[Any, ...]]:
        last = min(first + size, self._cut.count)
        if first == last:
            return 0, ()
        arrays, spans = self._cut.piece(first, last)
        return last - first, ("blocks", arrays, self._cut.axes, spans, self._kwargs)

    def close(self) -> None:
        pass


class ClusterBackend:
    """Runs tasks on the hosts of a cluster; see `shmengine.engine.backend.Backend`.

    Parameters
    ----------
    cluster : str or distributed.Client
        Address of a scheduler, or a client, which then stays open.
    workers, **settings
        Of each host's `ProcessBackend`.
    retries : int
        For tasks whose worker process, or whose host, has died.
    """

    kind = "cluster"

    def __init__(self, cluster: Any, workers: int | None = None, retries: int = 1, **settings: Any) -> None:
        frame = encode({"workers": workers, "retries": retries, **settings}, memmap_mode=None).to_bytes()
        self._retries = retries
        self._fair = default_budget() // 4  # bytes that are on their way, and as many that wait to be yielded
        self._lock = threading.Lock()
        self._done = self._failed = self._restarted = 0
        self._streams: set[queue.SimpleQueue[Any]] = set()
        self._courier = Courier(cluster, frame)

    @property
    def workers(self) -> int:
        """Number of worker processes, on all hosts."""
        return sum(self._courier.workers)

    # --- streams ---------------------------------------------------------------------------------

    def stream(
        self, fn: Callable[..., Any], calls: Iterable[Call], options: TaskOptions, *, ordered: bool
    ) -> Iterator[Outcome]:
        """Run `fn` once for each call."""
        return self._stream(fn, _Calls(calls), options, ordered)

    def stream_blocks(
        self,
        fn: Callable[..., Any],
        cut: Cut,
        target: Callable[[], tuple[np.ndarray, int] | None],  # noqa: ARG002  # hosts cannot reach it
        options: TaskOptions,
        kwargs: Mapping[str, Any],
        *,
        ordered: bool,
    ) -> Iterator[Outcome]:
        """Run `fn` once for each block."""
        if cut.axis is None or isinstance(cut, RowCut):  # frames know best how to cut themselves
            return self.stream(fn, block_calls(cut, kwargs), options, ordered=ordered)
        return self._stream(fn, _Pieces(cut, kwargs), options, ordered)

    def _stream(
        self, fn: Callable[..., Any], source: _Source, options: TaskOptions, ordered: bool
    ) -> Iterator[Outcome]:
        job = self._job(fn, options)
        finished: queue.SimpleQueue[Any] = queue.SimpleQueue()
        out: dict[int, Batch] = {}
        early: dict[int, Outcome] = {}  # in order
        arrived: deque[Outcome] = deque()  # as they come
        taken = yielded = 0
        more = True

        def deliver(*answer: Any) -> None:
            finished.put(answer)

        self._streams.add(finished)
        try:
            while True:
                while more and (size := self._room(job, out, taken - yielded)):
                    count, body = source.take(taken, size)
                    if not count:
                        more = False
                        break
                    batch = out[taken] = self._batch(job, taken, count, body, deliver)
                    taken += count
                    del body
                    self._courier.send(batch)
                if (yielded in early) if ordered else arrived:
                    yielded += 1
                    yield early.pop(yielded - 1) if ordered else arrived.popleft()
                    if self._courier.closed:
                        raise Closed(CLOSED_TEXT)
                elif not out:
                    return
                else:
                    self._open(job, self._next(finished), out, early if ordered else arrived)
                    if options.completed is not None:
                        options.completed(yielded + len(early) + len(arrived))
        finally:
            self._streams.discard(finished)
            for batch in out.values():
                batch.drop()
            source.close()

    def _room(self, job: _Job, out: dict[int, Batch], ahead: int) -> int:
        """Return how many tasks may be sent together now, `ahead` of them being taken and not yet yielded."""
        hosts = self._courier.workers or [1]
        size = job.size(max(hosts))
        limit = max(2 * len(hosts), 2 * sum(hosts) // size) + 1
        if out and (len(out) >= limit or sum(batch.frame.nbytes for batch in out.values()) > self._fair):
            return 0
        fitting = int(self._fair / job.result_bytes) if job.result_bytes else None
        return room_in_window(job.options.window, size, limit, fitting, sum(hosts), ahead)

    def _next(self, finished: queue.SimpleQueue[Any]) -> Any:
        """Wait for the answer to a batch."""
        while True:
            try:
                answer = finished.get(timeout=1)
            except queue.Empty:
                self._courier.check()  # a client that was closed has no loop any more that could say so
                continue
            if answer is None:
                raise Closed(CLOSED_TEXT)
            return answer

    def _open(self, job: _Job, answer: Any, out: dict[int, Batch], to: Any) -> None:
        """Take the outcomes out of an answer."""
        batch, frame, error = answer
        del out[batch.first]
        outcomes = self._outcomes(job, batch, frame, error)
        if isinstance(to, dict):
            to.update((outcome.index, outcome) for outcome in outcomes)
        else:
            to.extend(outcomes)

    # --- futures ---------------------------------------------------------------------------------

    def submitter(self, fn: Callable[..., Any], options: TaskOptions) -> Submit:
        """Return what runs `fn` once."""
        return functools.partial(self._submit, self._job(fn, options))

    def _submit(self, job: _Job, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Future[Any]:
        self._courier.check()
        future: Future[Any] = Future()
        begun = False

        def begin() -> bool:
            nonlocal begun
            begun = begun or future.set_running_or_notify_cancel()
            return begun

        def deliver(batch: Batch, frame: Bytes | None, error: BaseException | None) -> None:
            value = None
            try:
                (_, value, error), *_ = self._outcomes(job, batch, frame, error)
            except BaseException as lost:
                error = lost
            if begun:
                if error is None:
                    future.set_result(value)
                else:
                    future.set_exception(error)
            elif isinstance(error, Closed):
                if future.cancel():
                    future.set_running_or_notify_cancel()
            elif begin():
                future.set_exception(error)

        batch = self._batch(job, 0, 1, ("call", args, dict(kwargs)), deliver)
        batch.begin = begin
        self._courier.send(batch)
        return future

    def withdraw(self, *futures: Future[Any], kill: bool) -> None:
        """Do nothing: a host ends what it has begun."""

    # --- batches ---------------------------------------------------------------------------------

    def _job(self, fn: Callable[..., Any], options: TaskOptions) -> _Job:
        self._courier.check()
        if options.writable == "shared":
            raise ArrayError(
                "writable='shared' needs memory that workers can reach, and those of a cluster are on other"
                " machines: take writable='private' and return the array"
            )
        retries = self._retries if options.retries is None else options.retries
        options = replace(options, completed=None)  # told here, not there
        fn = with_errstate(fn)
        frame, refs = _packed(fn, "fn")
        if frame.nbytes <= INLINE_FUNCTION_BYTES:
            return _Job(fn, [], options, retries)
        ref = ClusterRef(frame, refs)
        return _Job(ref.number, [ref], options, retries)

    def _batch(self, job: _Job, first: int, count: int, body: tuple[Any, ...], deliver: Any) -> Batch:
        try:
            frame, refs = _packed((job.fn, replace(job.options, first=first), body))
        except SerializationError as error:
            calls = {"calls": body[1], "call": [Call(*body[1:])], "blocks": [Call((), body[-1])]}[body[0]]
            raise argument_error(error, calls) from error.__cause__
        return Batch(first, count, frame, job.refs + refs, job.retries, deliver)

    def _outcomes(
        self, job: _Job, batch: Batch, frame: Bytes | None, error: BaseException | None
    ) -> list[Outcome]:
        """Return what became of the tasks of a batch; raise what ends all of them."""
        if isinstance(error, (PeerLost, Closed)):
            raise error
        numbers = range(batch.first, batch.first + batch.count)
        restarts = 0
        if frame is None:
            assert error is not None
            outcomes = [Outcome(index, None, _task_error(job, batch, index, error)) for index in numbers]
        else:
            seconds, restarts, found = decode(aligned(frame))
            if isinstance(found, tuple):  # it could not begin
                outcomes = [Outcome(index, None, decode_exception(found)) for index in numbers]
            else:
                outcomes = [
                    Outcome(index, value, None if encoded is None else decode_exception(encoded))
                    for index, value, encoded in found
                ]
            hosts = self._courier.workers
            job.task_seconds = seconds * max(hosts, default=1) / batch.count
            job.task_bytes = batch.frame.nbytes / batch.count
            job.result_bytes = frame.nbytes / batch.count
        failed = sum(outcome.error is not None for outcome in outcomes)
        with self._lock:
            self._failed += failed
            self._done += batch.count - failed
            self._restarted += restarts
        return outcomes

    # --- memory ----------------------------------------------------------------------------------

    def put(self, obj: Any) -> Ref:
        """Keep a copy of `obj`, which goes to a host when the first task there takes it."""
        self._courier.check()
        return ClusterRef(*_packed(obj, "obj"))

    def empty(self, shape: Any, dtype: Any, order: Literal["C", "F"]) -> np.ndarray:
        """Return an array in ordinary memory: there is none that other machines reach."""
        self._courier.check()
        return np.empty(shape, dtype, order=order)

    def empty_result(self, shape: Any, dtype: Any, order: Literal["C", "F"]) -> np.ndarray:
        """Return an array in ordinary memory."""
        return np.empty(shape, dtype, order=order)

    def is_shared(self, array: np.ndarray) -> bool:  # noqa: ARG002  # as the contract has it
        """Tell that tasks get no array by reference."""
        return False

    def allocator(self) -> AbstractContextManager[None]:
        """Do nothing: arrays are in ordinary memory."""
        self._courier.check()
        return nullcontext()

    def copy_into(self, target: np.ndarray, source: np.ndarray) -> None:
        """Copy."""
        np.copyto(target, source, casting="same_kind")

    # --- life ------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Return a snapshot of the counters; what was copied is what went through the network."""
        courier = self._courier
        return EngineStats(
            backend=self.kind,
            workers=self.workers,
            tasks_done=self._done,
            tasks_failed=self._failed,
            retries=self._restarted + courier.retried,
            worker_deaths=courier.deaths,
            bytes_copied=courier.bytes,
            tasks_in_flight=sum(batch.count for batch in list(courier.batches)),
        )

    def stalls(self, after: float) -> Stalls:
        """Return the tasks of all hosts that have been running for so many seconds."""
        found = sorted(self._courier.stalls(after), key=lambda stall: -stall.seconds)
        return Stalls(found, summary_of(self.stats(), len(found)))

    def close(self, *, wait: bool = True) -> None:
        """End the engines of the hosts."""
        if not self._courier.closed:
            self._courier.closed = True
            for finished in list(self._streams):
                finished.put(None)
            self._courier.close(wait=wait)


def _task_error(job: _Job, batch: Batch, index: int, error: BaseException) -> BaseException:
    if not isinstance(error, HostLost):
        return error
    label = job.options.label
    task = label if batch.begin is not None else f"task {index} of {label}"
    return WorkerDied(batch.pid, None, task, batch.attempts, str(error))
