"""What runs on the hosts of a cluster: a plugin for dask's workers, with one process backend on each host.

::

    main (`shmengine.engine.cluster`)        a dask worker of each host         worker processes of that host
      Batch: function, calls | blocks ──────► run: decode ── stream ───────────► fn(block)
      outcomes ◄───────────────────────────── encode ◄───────────────────────── value | error

Only dask's workers and its scheduler import this, and who has an `Engine` with ``cluster=``: it needs `distributed`.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from distributed import Scheduler, Worker, get_worker, secede
from distributed.diagnostics.plugin import SchedulerPlugin, WorkerPlugin

from shmengine.arrays import Bytes, address_of, readonly
from shmengine.codec import FRAME_ALIGNMENT, Encoded, decode, encode
from shmengine.engine.backend import CLOSED_TEXT, Call, TaskOptions
from shmengine.engine.blocks import along
from shmengine.engine.process import ProcessBackend
from shmengine.engine.stalls import Stall
from shmengine.errors import Closed
from shmengine.exceptions import EncodedException, encode_exception

__all__ = [
    "ClientWatch",
    "HostPlugin",
    "OutcomeOnHost",
    "aligned",
    "frame_of",
    "object_here",
    "referring",
    "run",
    "stalls",
    "start",
]

OutcomeOnHost = tuple[int | None, Any, EncodedException | None]
"""Index of a task, its value, its error."""


# --- frames ---------------------------------------------------------------------------------------


def frame_of(encoded: Encoded) -> Bytes:
    """Return a frame as an array of bytes, which distributed sends beside its pickle."""
    frame = _aligned_empty(encoded.nbytes)
    encoded.write_into(frame)
    return frame


def aligned(frame: Bytes) -> Bytes:
    """Return a frame that has arrived where its arrays are aligned and can be written to."""
    if frame.flags.writeable and address_of(frame) % FRAME_ALIGNMENT == 0:
        return frame
    copied = _aligned_empty(frame.nbytes)
    copied[:] = frame
    return copied


def _aligned_empty(nbytes: int) -> Bytes:
    memory = np.empty(nbytes + FRAME_ALIGNMENT, np.uint8)
    start = -address_of(memory) % FRAME_ALIGNMENT
    return memory[start : start + nbytes]


# --- references -----------------------------------------------------------------------------------


class _Decoding(threading.local):
    """What the references in the frame stand for that this thread decodes."""

    objects: dict[str, Any] | None = None


_decoding = _Decoding()


def object_here(number: str) -> Any:
    """Return what a reference of this number stands for in this process; frames of the cluster call it."""
    assert _decoding.objects is not None
    return _decoding.objects[number]


def referring(frame: Bytes, objects: dict[str, Any]) -> Any:
    """Decode a frame, with these objects in place of its references; arrays are views, read-only if it is."""
    before, _decoding.objects = _decoding.objects, objects
    try:
        return decode(frame)
    finally:
        _decoding.objects = before


# --- the plugins ----------------------------------------------------------------------------------


class ClientWatch(SchedulerPlugin):  # type: ignore[misc]  # which mypy does not look at
    """On the scheduler: takes the plugin from all workers when the client goes, however that happens."""

    def __init__(self, name: str, client: str) -> None:
        self.name = f"{name}-client"
        self._plugin = name
        self._client = client

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """Be told that a client has gone."""
        if client == self._client and self._plugin in scheduler.worker_plugins:
            self._removing = asyncio.ensure_future(self._remove(scheduler))

    async def _remove(self, scheduler: Scheduler) -> None:
        await scheduler.unregister_worker_plugin(None, self._plugin)
        await scheduler.unregister_scheduler_plugin(self.name)


class HostPlugin(WorkerPlugin):  # type: ignore[misc]  # likewise
    """On each of dask's workers; the engine starts in the one of its host that gets tasks.

    Parameters
    ----------
    name : str
        Of the engine in main.
    settings : bytes
        A frame: the arguments of `ProcessBackend`.
    """

    idempotent = True

    def __init__(self, name: str, settings: bytes) -> None:
        self.name = name
        self._settings = settings

    def setup(self, worker: Worker) -> None:  # noqa: ARG002  # as distributed calls it
        """Be attached to a worker."""
        self._lock = threading.Lock()
        self._closed = False
        self._backend: ProcessBackend | None = None
        self._kept: dict[str, Any] = {}  # number of a reference -> our own to the same object

    async def teardown(self, worker: Worker) -> None:  # noqa: ARG002  # likewise
        """Be detached: the engine's end. It may take a while, and others have engines in this process."""
        try:
            ending = asyncio.get_running_loop().run_in_executor(None, self._end)
        except RuntimeError:  # at the end of the process, when no thread can be had any more
            self._end()
        else:
            await ending

    def _end(self) -> None:
        with self._lock:
            self._closed = True
            backend, self._backend = self._backend, None
            self._kept.clear()
        if backend is not None:
            backend.close(wait=False)

    def backend(self) -> ProcessBackend:
        """Return the host's engine; start it if it is not there yet."""
        with self._lock:
            if self._closed:
                raise Closed(CLOSED_TEXT)
            if self._backend is None:
                self._backend = ProcessBackend(**decode(self._settings))
            return self._backend

    def stalls(self, after: float) -> list[Stall]:
        """Return the slow tasks of this host."""
        backend = self._backend
        return [] if backend is None else list(backend.stalls(after))

    def run(self, frame: Bytes, shared: dict[str, Bytes]) -> Bytes:
        """Run a batch and return its outcomes as a frame: (seconds, restarts of tasks, outcomes or one error)."""
        started = time.perf_counter()
        restarts = 0
        outcomes: list[OutcomeOnHost] | EncodedException
        try:
            backend = self.backend()
            fn, options, body = referring(readonly(aligned(frame)), self._objects(backend, shared))
            if isinstance(fn, str):  # a large one, put like other objects
                fn = self._kept[fn].get()
            before = backend.stats().retries
            outcomes = list(_outcomes(backend, fn, options, body))
            restarts = max(0, backend.stats().retries - before)
            del fn, body
            seconds = time.perf_counter() - started
            return frame_of(encode((seconds, restarts, outcomes), memmap_mode=None))
        except BaseException as error:
            outcomes = encode_exception(error)
        return frame_of(encode((time.perf_counter() - started, restarts, outcomes)))

    def _objects(self, backend: ProcessBackend, shared: dict[str, Bytes]) -> dict[str, Any]:
        """Put what has been sent into shared memory, once, for as long as dask keeps it."""
        with self._lock:
            for number, frame in shared.items():
                if number not in self._kept:
                    self._kept[number] = backend.put(referring(readonly(aligned(frame)), self._kept))
                    weakref.finalize(frame, self._kept.pop, number, None)
            return {number: self._kept[number] for number in shared}


def _outcomes(
    backend: ProcessBackend, fn: Any, options: TaskOptions, body: tuple[Any, ...]
) -> Iterator[OutcomeOnHost]:
    kind, *rest = body
    if kind == "call":  # of `submit`
        future = backend.submitter(fn, options)(*rest)
        failure = future.exception()
        yield (None, future.result(), None) if failure is None else (None, None, encode_exception(failure))
        return
    calls: Iterator[Call] = map(Call._make, rest[0]) if kind == "calls" else _block_calls(*rest)
    for index, value, error in backend.stream(fn, calls, options, ordered=False):
        yield index, value, None if error is None else encode_exception(error)


def _block_calls(
    arrays: Sequence[Any], axes: Sequence[int], spans: Sequence[tuple[int, int]], kwargs: dict[str, Any]
) -> Iterator[Call]:
    """Cut the host's piece into blocks: the second cut."""
    for low, high in spans:
        yield Call(
            tuple([array[along(axis, low, high)] for array, axis in zip(arrays, axes, strict=True)]), kwargs
        )


# --- what main calls ------------------------------------------------------------------------------


def _plugin_of(worker: Worker, name: str) -> HostPlugin:
    plugin = worker.plugins.get(name)
    if not isinstance(plugin, HostPlugin):
        raise Closed(CLOSED_TEXT)
    return plugin


async def start(name: str, dask_worker: Worker) -> tuple[str, int, int]:
    """Start the engine of this host; return identity and process id of dask's worker, and the number of workers."""
    backend = await asyncio.to_thread(_plugin_of(dask_worker, name).backend)
    return dask_worker.id, os.getpid(), backend.workers


async def stalls(name: str, after: float, dask_worker: Worker) -> list[Stall]:
    """Return the slow tasks of this host."""
    return await asyncio.to_thread(_plugin_of(dask_worker, name).stalls, after)


def run(name: str, identity: str, numbers: Sequence[str], frame: Bytes, *shared: Bytes) -> Bytes | None:
    """Run a batch, as a task of dask; None if it was sent to another worker than this."""
    worker = get_worker()
    if worker.id != identity:
        return None  # the one that it was sent to has died; who sent it decides whether it may run again
    plugin = _plugin_of(worker, name)
    secede()  # the work is done by other processes, and main bounds how much of it there is
    return plugin.run(frame, dict(zip(numbers, shared, strict=True)))
