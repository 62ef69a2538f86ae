"""Takes batches to the hosts of a cluster and their results back; runs in the event loop of a `distributed.Client`.

::

    _carry, one a batch: wait for a seat at a host ─ scatter what is large, submit ─ gather ─ deliver
                           ▲ on another host, `retries` times ── host lost ──┘
    _watch: which hosts are there, and whether the scheduler is

A *host* is one of dask's workers: the first one of each address that has any. Dask is given each task for one worker
alone, so it never runs one again by itself: who may do that is decided here.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from distributed import Client
from distributed.comm import connect
from distributed.security import Security
from distributed.utils import LoopRunner

from shmengine.arrays import Bytes, readonly
from shmengine.engine import hosts as there
from shmengine.engine.backend import CLOSED_TEXT, Ref
from shmengine.engine.stalls import Stall
from shmengine.errors import Closed, PeerLost

__all__ = ["Batch", "ClusterRef", "Courier", "HostLost"]

LOOK_SECONDS = 0.25  # between two looks at who is there
HOSTLESS_SECONDS = (
    15.0  # without any host, until one comes: a nanny starts a dead worker anew in some seconds
)
BLAME_SECONDS = 2.0  # from an error of dask's until it is known which side has died
ANSWER_SECONDS = 30.0  # for what the end asks of the scheduler
EMBEDDED_BYTES = 1 << 20  # a larger frame goes around dask's graphs


class HostLost(Exception):
    """The host of a batch has gone, or there is none."""


class ClusterRef(Ref):
    """A reference to an object that crosses the network once for each host whose tasks take it."""

    __slots__ = ("at", "frame", "nested", "number")

    def __init__(self, frame: Bytes, nested: list[ClusterRef]) -> None:
        super().__init__()
        self.number = uuid.uuid4().hex
        self.frame = readonly(frame)
        self.nested = nested  # what it contains references to
        self.at: dict[str, asyncio.Task[Any]] = {}  # host and engine -> what dask keeps there

    def get(self) -> Any:
        """Return the object; its arrays are read-only."""
        return there.referring(self.frame, {ref.number: ref.get() for ref in self.nested})

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.get(),)  # for whoever is no host of this cluster


def _itself(obj: Any) -> Any:
    return obj


class Batch:
    """Consecutive tasks on their way to one host and back.

    Parameters
    ----------
    frame : ndarray of uint8
        What the host gets, beside the objects of `refs`.
    retries : int
        How often it may be sent again after its host has gone.
    deliver : callable
        Gets the batch and the host's answer, or the error in its place: `HostLost`, `PeerLost`, `Closed` or what
        dask raised. Called once, in the loop, unless the batch was dropped.
    begin : callable, optional
        Tells whether the batch is still wanted, when its turn has come.
    """

    __slots__ = (
        "attempts",
        "begin",
        "count",
        "deliver",
        "first",
        "frame",
        "pid",
        "refs",
        "retries",
        "running",
    )

    def __init__(
        self,
        first: int,
        count: int,
        frame: Bytes,
        refs: list[ClusterRef],
        retries: int,
        deliver: Callable[[Batch, Bytes | None, BaseException | None], None],
        begin: Callable[[], bool] | None = None,
    ) -> None:
        self.first = first
        self.count = count
        self.frame = frame
        self.refs = refs
        self.retries = retries
        self.deliver = deliver
        self.begin = begin
        self.running: Future[None] | None = None
        self.attempts = 0
        self.pid = 0  # of dask's worker that it was sent to last

    def drop(self) -> None:
        """Abandon it."""
        if (running := self.running) is not None:
            running.cancel()


class _Host:
    """A worker of dask's that has an engine."""

    def __init__(self, name: str, address: str, identity: str, pid: int, workers: int) -> None:
        self.name = name
        self.address = address
        self.identity = identity
        self.pid = pid
        self.workers = workers
        self.load = 0  # how many of its workers have something to do
        self.lost = asyncio.Event()


class Courier:
    """The hosts of a cluster, as a client sees them.

    Parameters
    ----------
    cluster : str or distributed.Client
        Address of a scheduler, or a client, which then stays open.
    settings : bytes
        A frame: what each host's `ProcessBackend` is made with.

    Raises
    ------
    PeerLost
        No scheduler answers, or it has no workers.
    """

    def __init__(self, cluster: Any, settings: bytes) -> None:
        self._client, self._owns_client = _client_of(cluster)
        self._loop: asyncio.AbstractEventLoop = self._client.loop.asyncio_loop
        self._name = f"shmengine-{uuid.uuid4().hex}"
        self.batches: set[Batch] = set()
        self.bytes = self.retried = self.deaths = 0
        self.closed = False
        self._hosts: dict[str, _Host] = {}  # by name
        self._starting: dict[str, asyncio.Task[None]] = {}
        self._refused: dict[str, Exception] = {}  # address of a worker whose engine could not start -> why
        self._changed = asyncio.Event()  # replaced by a new one at each change
        self._gone = asyncio.Event()  # the scheduler
        self._watching: asyncio.Task[None] | None = None
        try:
            self._client.register_plugin(there.ClientWatch(self._name, self._client.id))
            self._client.register_plugin(there.HostPlugin(self._name, settings))
            self._call(self._open()).result()
        except BaseException:
            self.close(wait=False)
            raise

    # --- for any thread ------------------------------------------------------------------------------

    @property
    def workers(self) -> list[int]:
        """How many workers each host has."""
        return [host.workers for host in list(self._hosts.values())]

    def check(self) -> None:
        """Raise what keeps batches from being sent."""
        if self.closed:
            raise Closed(CLOSED_TEXT)
        if self._gone.is_set() or self._client.status == "closed":
            raise self.scheduler_lost()

    def scheduler_lost(self) -> PeerLost:
        """Return the error."""
        scheduler = self._client.scheduler
        address = "" if scheduler is None else f" at {scheduler.address}"
        return PeerLost(
            f"the connection to the scheduler{address} was lost; when it is back, make a new engine"
        )

    def send(self, batch: Batch) -> None:
        """Have a batch run."""
        self.batches.add(batch)
        batch.running = self._call(self._carry(batch))
        batch.running.add_done_callback(lambda _: self._ended(batch))

    def _ended(self, batch: Batch) -> None:
        self.batches.discard(batch)
        batch.running = None  # which refers to the batch
        batch.refs.clear()

    def stalls(self, after: float) -> list[Stall]:
        """Return the tasks of all hosts that have been running for so many seconds."""
        names = {host.address: host.name for host in list(self._hosts.values())}
        if self.closed or not names:
            return []
        found = self._client.run(there.stalls, self._name, after, workers=list(names), on_error="ignore")
        return [
            replace(stall, worker=f"{stall.worker} on {names[address]}")
            for address, stalls in found.items()
            for stall in stalls
        ]

    def close(self, *, wait: bool) -> None:
        """End the engines of the hosts; `wait`: until what they run has ended."""
        self.closed = True
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = False
        if here:  # garbage, collected in this thread: nobody can wait
            self._ending = asyncio.ensure_future(self._close(wait=False))
            return
        if self._client.status == "running":
            with contextlib.suppress(Exception):
                self._call(self._close(wait=wait)).result()
        if self._owns_client:
            self._client.close(timeout=ANSWER_SECONDS)

    def _call(self, coroutine: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    # --- a batch -------------------------------------------------------------------------------------

    async def _carry(self, batch: Batch) -> None:
        frame: Bytes | None = None
        error: BaseException | None = None
        try:
            while frame is None:
                host = await self._seat(batch)
                try:
                    if batch.begin is not None and not batch.begin():
                        raise Closed(CLOSED_TEXT)
                    batch.attempts += 1
                    batch.pid = host.pid
                    frame = await self._run_at(host, batch)
                except HostLost:
                    if batch.attempts > batch.retries:
                        raise
                    self.retried += batch.count
                finally:
                    host.load -= min(batch.count, host.workers)
                    self._tell()
        except Exception as raised:
            error = raised
        self.batches.discard(batch)
        batch.deliver(batch, frame, error)

    async def _seat(self, batch: Batch) -> _Host:
        """Wait until a host has room: it may have twice as many tasks as workers."""
        since = time.monotonic()
        while True:
            self.check()
            free = [
                host
                for host in self._hosts.values()
                if not host.load or host.load + min(batch.count, host.workers) <= 2 * host.workers
            ]
            if free:
                host = min(free, key=lambda host: host.load / host.workers)
                host.load += min(batch.count, host.workers)
                return host
            if self._hosts:
                since = time.monotonic()
            elif time.monotonic() - since > HOSTLESS_SECONDS:
                batch.pid = 0
                raise HostLost(f"the cluster has had no host for {HOSTLESS_SECONDS:g} s{self._why()}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), LOOK_SECONDS)

    def _why(self) -> str:
        return "".join(f"; at {address}: {error}" for address, error in self._refused.items())

    async def _run_at(self, host: _Host, batch: Batch) -> Bytes:
        """Return the answer of a host; `HostLost` if it goes meanwhile, `PeerLost` if the scheduler does."""
        working = asyncio.ensure_future(self._work(host, batch))
        ends = [asyncio.ensure_future(event.wait()) for event in (host.lost, self._gone)]
        try:
            await asyncio.wait([working, *ends], return_when=asyncio.FIRST_COMPLETED)
            if working.done() and not working.cancelled():
                error = working.exception()
                if error is None and (frame := working.result()) is not None:
                    self.bytes += frame.nbytes
                    return frame
                if error is not None and not _may_be_a_death(error):
                    raise error
            # Who it was that died may not be known yet.
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED, timeout=BLAME_SECONDS)
            if self._gone.is_set():
                raise self.scheduler_lost()
            raise HostLost(f"dask's worker at {host.address} was lost")
        finally:
            for task in (working, *ends):
                task.cancel()

    async def _work(self, host: _Host, batch: Batch) -> Bytes | None:
        shared: dict[str, Any] = {}
        for ref in batch.refs:
            await self._share(ref, host, shared)
        data: Any = batch.frame
        self.bytes += data.nbytes
        if data.nbytes > EMBEDDED_BYTES:
            data = await _undisturbed(self._scatter(data, host))
        future = self._client.submit(
            there.run,
            self._name,
            host.identity,
            tuple(shared),
            data,
            *shared.values(),
            key=f"{self._name}-{uuid.uuid4().hex}",
            workers=[host.address],
            pure=False,
        )
        try:
            found: Bytes | None = await _undisturbed(_result_of(future))
            return found
        except asyncio.CancelledError:
            if future.status == "pending":
                future.release()  # so that it does not run, if it has not begun
            raise

    async def _share(self, ref: ClusterRef, host: _Host, shared: dict[str, Any]) -> None:
        """Have an object at a host, and before it what it refers to."""
        for nested in ref.nested:
            await self._share(nested, host, shared)
        place = f"{host.identity} for {self._name}"
        if place not in ref.at:
            ref.at[place] = asyncio.ensure_future(self._scatter(ref.frame, host))
            self.bytes += ref.frame.nbytes
        try:
            shared[ref.number] = await _undisturbed(ref.at[place])
        except Exception:
            ref.at.pop(place, None)
            raise

    async def _scatter(self, frame: Bytes, host: _Host) -> Any:
        return await self._client.scatter(frame, workers=[host.address], hash=False, asynchronous=True)

    # --- the hosts -----------------------------------------------------------------------------------

    async def _open(self) -> None:
        since = time.monotonic()
        while True:
            await self._meet()
            await asyncio.gather(*self._starting.values())
            for error in self._refused.values():
                raise error
            if self._hosts:
                break
            if time.monotonic() - since > HOSTLESS_SECONDS:
                raise PeerLost(
                    f"the scheduler at {self._client.scheduler.address} has no workers:"
                    " `shmengine cluster --help` shows how to start some"
                )
            await asyncio.sleep(LOOK_SECONDS)
        self._watching = asyncio.ensure_future(_watch(weakref.ref(self), self._client))

    async def _meet(self) -> None:
        """Look who is there: hosts that have gone are lost, hosts that have come are started."""
        info = await self._client.scheduler.identity()
        present = info["workers"]
        for name in [name for name, host in self._hosts.items() if host.address not in present]:
            self.deaths += 1
            self._hosts.pop(name).lost.set()
            self._tell()
        self._refused = {address: error for address, error in self._refused.items() if address in present}
        for address, worker in sorted(present.items()):
            name = worker["host"]
            if name not in self._hosts and name not in self._starting and address not in self._refused:
                self._starting[name] = asyncio.ensure_future(self._start(name, address))

    async def _start(self, name: str, address: str) -> None:
        try:
            found = await self._client.run(there.start, self._name, workers=[address], asynchronous=True)
            self._hosts[name] = _Host(name, address, *found[address])
            self._tell()
        except Exception as error:
            self._refused[address] = error
        finally:
            del self._starting[name]

    def _tell(self) -> None:
        """Wake all that wait for a seat."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _scheduler_is_gone(self) -> None:
        self._gone.set()
        self._tell()

    async def _close(self, *, wait: bool) -> None:
        self._tell()  # who waits for a seat leaves
        running = [asyncio.wrap_future(batch.running) for batch in list(self.batches) if batch.running]
        if not wait:
            for future in running:
                future.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        if self._watching is not None:
            self._watching.cancel()
        client = self._client
        for unregister, name in (
            (client.unregister_worker_plugin, self._name),
            (client.unregister_scheduler_plugin, there.ClientWatch(self._name, "").name),
        ):
            with contextlib.suppress(Exception):
                await asyncio.wait_for(unregister(name), ANSWER_SECONDS)


async def _undisturbed(coroutine: Any) -> Any:
    """Await something of dask's that must not be cancelled: it gathers for several at once."""
    task = asyncio.ensure_future(coroutine)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # or asyncio complains
    return await asyncio.shield(task)


async def _result_of(future: Any) -> Any:
    try:
        return await future
    finally:
        future.release()


async def _watch(courier_ref: weakref.ref[Courier], client: Client) -> None:
    """Look again and again who is there, until the scheduler is not."""
    while (courier := courier_ref()) is not None:
        looking = asyncio.ensure_future(courier._meet())
        while not looking.done() and client.status == "running":
            await asyncio.wait([looking], timeout=LOOK_SECONDS)
        if client.status != "running" or looking.exception() is not None:
            looking.cancel()
            courier._scheduler_is_gone()
            return
        del courier
        await asyncio.sleep(LOOK_SECONDS)


def _may_be_a_death(error: BaseException) -> bool:
    """Tell whether dask may say with this error that a worker or the scheduler has died."""
    return (
        isinstance(error, (OSError, asyncio.CancelledError))
        or type(error).__module__.partition(".")[0] == "distributed"
    )


def _client_of(cluster: Any) -> tuple[Client, bool]:
    """Return a client, and whether it is ours to close."""
    if isinstance(cluster, Client):
        if cluster.asynchronous:
            raise ValueError(
                "cluster is an asynchronous Client: give one that is not, or the scheduler's address"
            )
        if cluster.status != "running":
            raise PeerLost(f"cluster is a Client whose status is {cluster.status!r}")
        return cluster, False
    if not isinstance(cluster, str):
        raise TypeError(
            f"cluster must be the address of a scheduler or a distributed.Client, not {type(cluster).__name__}"
        )
    try:
        LoopRunner(asynchronous=False).run_sync(_reach, cluster)
        return Client(cluster, set_as_default=False), True
    except OSError as error:
        raise PeerLost(f"no scheduler answers at {cluster}: {error}") from error


async def _reach(address: str) -> None:
    """Connect and go: a client that cannot connect leaves the thread of its loop behind."""
    comm = await connect(address, **Security().get_connection_args("client"))
    await comm.close()
