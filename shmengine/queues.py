"""`Queue` and `JoinableQueue`: the interface of `multiprocessing.Queue`, on a ring in shared memory.

    put: pickle in the caller ─► claim ─ fill ─ commit ──►  [ ring ]  ──► lease ─ copy out ─ release: get
                                                                  JoinableQueue: release at task_done

No feeder thread: what `put` has returned from is in shared memory, whatever becomes of its process.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, NoReturn, TypeVar

from shmengine import config, errors
from shmengine._native import ffi, lib
from shmengine._native.status import CLOSED, FORKED, INTERRUPTED, OK, TIMEOUT, WOULD_BLOCK, fail
from shmengine.attached import Attached, put_back, read_config
from shmengine.codec import LONG, Encoded, decode, encode
from shmengine.config import format_bytes, parse_bytes
from shmengine.leases import new_block
from shmengine.pickling import MultiprocessingReducers
from shmengine.region import Region, RegionConfig, RegionToken, call_at_process_end

__all__ = ["JoinableQueue", "Queue"]

_forks = 0  # of this process so far


def _count_fork() -> None:
    global _forks  # the hook of the standard library takes no argument
    _forks += 1


os.register_at_fork(before=_count_fork)

T = TypeVar("T")

MAX_BLOCKS = 1 << 20  # of a region
SPARE_BLOCKS = 1024  # beyond the messages that wait: for puts under way, and for messages being read
IDLE_OWNERS = 4
MAX_MAXSIZE = MAX_BLOCKS - SPARE_BLOCKS
# Slots take memory from the start: a queue without maxsize has no more of them than make sense.
UNBOUNDED_CAPACITY = 1 << 18
BYTES_PER_SLOT = 256
FIRST_LOOK_NS = 1_000_000  # a moment's wait: what the departed have left is taken over while waiting
STRANGERS_NS = 10_000_000_000  # how long to hope for threads that have never taken a message
NEXT_LOOK_NS = 100_000_000  # how often to look whether anybody could still relieve a shortage


class Queue(Attached, Generic[T]):
    """A queue between processes, and threads: a drop-in for `multiprocessing.Queue`.

    Works with every start method, as an argument of a `multiprocessing.Process` or inherited by fork, and can
    itself be sent through a queue. What `get` returns is private: arrays are writable copies.

    Differences, all on the safe side: `put` pickles in the caller's thread, so what cannot be pickled is an
    error there; it returns when the message is in shared memory, so a process may exit (or be killed) at once
    and nothing is lost, and joining a process before its messages are read cannot deadlock.

    Functions and classes go by reference, as with `multiprocessing`, so that they are the same on both
    sides. What has no importable name (lambdas, closures, classes made in functions) goes by value; so does
    everything of ``__main__`` in a session that children cannot import (a notebook, ``python -c``), unless
    they are forked.

    Parameters
    ----------
    maxsize : int, optional
        How many messages may wait (at most about a million); beyond it `put` waits. Zero or less: as many as
        the memory holds, and never more than 262,144.
    memory : int or str, optional
        Budget for all waiting messages together: bytes, or text such as ``"256 MiB"``; by default a quarter
        of what is free. Memory is taken as it is needed, in steps of 2 MiB. When it is used up, `put` waits;
        if nobody is left who could ever take a message, it raises a `Full` that names the budget instead (after
        ten seconds, if there are threads that have never taken one).
    ctx : multiprocessing context, optional
        The one whose processes will use the queue; by default `multiprocessing`'s own.

    Raises
    ------
    TypeError
        `maxsize` is no integer.
    ValueError
        `memory` is no size, or zero.
    MemoryBudgetExceeded
        There is not even room for the control part.
    """

    def __init__(self, maxsize: int = 0, *, memory: int | str | None = None, ctx: Any = None) -> None:
        if isinstance(maxsize, bool) or not hasattr(maxsize, "__index__"):
            raise TypeError(f"maxsize must be an int, not {type(maxsize).__name__}")
        budget = config.default_budget() if memory is None else parse_bytes(memory)
        if budget < 1:
            raise ValueError(f"memory must be positive, not {memory!r}")
        maxsize = min(max(maxsize.__index__(), 0), MAX_MAXSIZE)
        capacity = maxsize or min(UNBOUNDED_CAPACITY, max(1, budget // BYTES_PER_SLOT))
        geometry = RegionConfig(
            arena_bytes=budget,
            capacities=(capacity,),
            participants=256,
            doorbells=512,
            # A process keeps the records of what it has put until it calls again: enough for several that do not.
            blocks=min(MAX_BLOCKS, max(4096, IDLE_OWNERS * capacity + SPARE_BLOCKS)),
            wait_alone=True,
        )
        self._setup(Region.create(geometry), maxsize, not _children_know_main(ctx))

    def _setup(self, region: Region, maxsize: int, by_value: bool) -> None:
        self._attach(region)
        self._takers: set[int | None] = set()  # threads here that have called `get`, by ident
        self._ready: deque[Any] = deque()  # taken, but then a signal's handler raised: for the next call
        self._passed_on = False  # by pickling
        self._forks = _forks
        self._maxsize = maxsize
        self._by_value = by_value

    # --- putting ---------------------------------------------------------------------------------

    def put(self, obj: T, block: bool = True, timeout: float | None = None) -> None:
        """Put a message into the queue; it is in shared memory when this returns.

        Parameters
        ----------
        obj : object
            Anything that can be pickled; sockets, connections and what else `multiprocessing` can send
            arrive as with its own queues, once, while this process lives.
        block : bool, optional
            Whether to wait while the queue is full.
        timeout : float, optional
            Seconds to wait; None: for ever.

        Raises
        ------
        Full
            The queue stayed full, or the message is larger than the whole memory budget, or the budget is
            used up and nobody is left who could take a message. A `queue.Full`.
        SerializationError
            The object cannot be pickled.
        ValueError
            The queue is closed.
        """
        self._check_open()
        deadline = _deadline(block, timeout)
        message = new_block()
        reducers = MultiprocessingReducers()
        try:
            frame = self._encode(obj, reducers)
            self._patiently(
                lambda until: lib.shmr_claim(self._handle(), frame.nbytes, ffi.NULL, 0, -1, until, message),
                deadline,
                frame,
                relieved_by_others=True,
            )
            if frame.nbytes >= LONG:
                lib.shmr_announce(self._region.handle, 0)
            frame.write_into(self._region.root(message.offset, frame.nbytes, writable=True))
            message.length = frame.nbytes
            self._patiently(
                lambda until: lib.shmr_commit(self._region.handle, 0, 0, -1, until, message),
                deadline,
                frame,
                relieved_by_others=not self._maxsize,
            )
        except BaseException:
            if message.state:  # claimed and not committed
                lib.shmr_abort(self._region.handle, message)
            reducers.take_back()
            raise

    def put_nowait(self, obj: T) -> None:
        """Like ``put(obj, block=False)``."""
        self.put(obj, False)

    def _encode(self, obj: object, reducers: MultiprocessingReducers) -> Encoded:
        if not self._by_value:
            try:
                return encode(obj, by_value=False, memmap_mode=None, reducers=reducers)
            except errors.SerializationError:  # no importable name, perhaps
                reducers.take_back()
        return encode(obj, memmap_mode=None, reducers=reducers)

    def _patiently(
        self, call: Callable[[int], int], deadline: int, frame: Encoded, *, relieved_by_others: bool
    ) -> None:
        """Repeat a call of the core until it succeeds, the deadline passes, or nobody can help.

        Parameters
        ----------
        call
            Takes a deadline and returns a status.
        relieved_by_others
            Whether to give up when nobody is left who could take a message.
        """
        until = 0 if relieved_by_others else deadline
        patience = time.monotonic_ns() + STRANGERS_NS
        while (status := call(until)) != OK:
            if status == FORKED:
                self._rejoin()
            elif status in (TIMEOUT, WOULD_BLOCK):
                now = time.monotonic_ns()
                if relieved_by_others and until == 0:
                    until = now + FIRST_LOOK_NS
                elif 0 <= deadline <= now:
                    self._refuse_put(frame)
                elif relieved_by_others and not self._can_be_relieved(strangers=now < patience):
                    self._refuse_put(frame, "nobody is left who could take a message")
                else:
                    until = now + NEXT_LOOK_NS if deadline < 0 else min(deadline, now + NEXT_LOOK_NS)
            elif status == lib.SHMR_TOO_LARGE:
                raise errors.Full(
                    f"a message of {format_bytes(frame.nbytes)} is larger than the whole memory budget"
                    f" of this queue, {format_bytes(self._budget())}: raise memory="
                )
            elif status == CLOSED:
                self._sleep_at_exit()
                raise self._refusal()
            elif status != INTERRUPTED:
                fail(status, "put into this queue")

    def _can_be_relieved(self, *, strangers: bool) -> bool:
        """Tell whether anybody else could take a message: a process that is here or may come, or a thread.

        A thread counts if it has taken messages before; others, and not ours, only if `strangers` do: whoever
        is about to take one for the first time will do so soon.
        """
        handle = self._handle()
        lib.shmr_check_deaths(handle)
        if lib.shmr_live_participants(handle) > 1:
            return True
        me = threading.current_thread()
        for thread in threading.enumerate():
            if thread is me:
                continue
            if thread.ident in self._takers or (strangers and thread.name not in config.SERVICE_THREADS):
                return True
        if not self._passed_on and self._forks == _forks:
            return False
        processes = sys.modules.get("multiprocessing")
        return processes is not None and bool(processes.active_children())

    def _refuse_put(self, frame: Encoded, why: str = "") -> NoReturn:
        fill = self._fill()
        if fill >= self._capacity:
            limit = "the maxsize of this queue"
            if not self._maxsize:
                budget = format_bytes(self._budget())
                limit = (
                    f"as many as it has slots for with a memory budget of {budget} (give maxsize= for more)"
                )
            what = f"{fill} messages wait, {limit}"
        else:
            what = (
                f"no room for a message of {format_bytes(frame.nbytes)}: {fill} messages wait, and the memory"
                f" budget of {format_bytes(self._budget())} is used up (raise memory=)"
            )
        raise errors.Full(f"{what}{why and ', and '}{why}")

    def _budget(self) -> int:
        return int(read_config(self._region).arena_bytes)

    # --- getting ---------------------------------------------------------------------------------

    def get(self, block: bool = True, timeout: float | None = None) -> T:
        """Take the oldest message.

        Parameters
        ----------
        block : bool, optional
            Whether to wait for a message.
        timeout : float, optional
            Seconds to wait; None: for ever.

        Returns
        -------
        object
            A private copy.

        Raises
        ------
        queue.Empty
            No message came.
        SerializationError
            The message cannot be unpickled in this process; it is discarded.
        Corrupt
            The message failed a check; it is discarded.
        ValueError
            The queue is closed.
        """
        self._check_open()
        self._takers.add(threading.get_ident())
        deadline = _deadline(block, timeout)
        if self._ready and self._region.pid == os.getpid():
            with contextlib.suppress(IndexError):  # another thread was faster
                ready: T = self._ready.popleft()
                return ready
        message = new_block()
        got: list[T] = []
        try:
            while (
                not self._take_kept(message)
                and (status := lib.shmr_lease(self._handle(), 0, 0, deadline, message)) != OK
            ):
                if status in (TIMEOUT, WOULD_BLOCK):
                    from queue import Empty

                    raise Empty
                if status == CLOSED:
                    self._sleep_at_exit()
                    raise self._refusal()
                if status not in (INTERRUPTED, FORKED):
                    fail(status, "get from this queue")
            got.append(decode(self._region.root(message.offset, message.length), copy=True))
            self._got(message)
        except BaseException as error:
            if got and self._was_got(message):
                self._ready.append(got[0])
            elif isinstance(error, (errors.ShmError, MemoryError)):
                self._discard(message)
            else:  # a signal's handler
                self._keep(message)
            raise
        return got[0]

    def get_nowait(self) -> T:
        """Like ``get(block=False)``."""
        return self.get(False)

    def _got(self, message: Any) -> None:
        """Do what is to be done with a message that has been copied out."""
        lib.shmr_release(self._region.handle, message)

    def _was_got(self, message: Any) -> bool:
        return not message.state

    def _forget(self) -> None:
        self._ready = deque()

    def _discard(self, message: Any) -> None:
        if message.state:
            lib.shmr_release(self._region.handle, message)

    # --- everything else -------------------------------------------------------------------------

    def qsize(self) -> int:
        """Messages that wait; while others put and get, a recent value."""
        self._check_open()
        return self._fill()

    def empty(self) -> bool:
        """Whether no message waits; while others put and get, a recent answer."""
        return self.qsize() == 0

    def full(self) -> bool:
        """Whether `maxsize` messages wait; while others put and get, a recent answer."""
        return self.qsize() >= self._capacity

    def _fill(self) -> int:
        return int(lib.shmr_approx_fill(self._handle(), 0))

    def close(self) -> None:
        """End this process's use of the queue: from now on `put` and `get` raise `ValueError` here.

        Messages that wait stay, as long as any other process has the queue.
        """
        if not self._closed:
            self._detach()

    def join_thread(self) -> None:
        """Do nothing: there is no thread. (`multiprocessing.Queue` waits for its own here.)

        Raises
        ------
        AssertionError
            The queue is not closed.
        """
        if not self._closed:
            raise AssertionError(f"Queue {self!r} not closed")

    def cancel_join_thread(self) -> None:
        """Do nothing: there is no thread, and exiting never waits for a queue."""

    def _check_open(self) -> None:
        if self._closed:
            raise self._refusal()

    def _refusal(self) -> errors.Closed:
        return errors.Closed(f"Queue {self!r} is closed")

    def __repr__(self) -> str:
        budget = format_bytes(self._budget())
        return f"<shmengine.{type(self).__name__} maxsize={self._maxsize} memory={budget} at {id(self):#x}>"

    def __reduce__(self) -> tuple[Any, ...]:
        self._handle()
        self._passed_on = True
        return _from_token, (type(self), self._region.token(), self._maxsize, self._by_value)


class JoinableQueue(Queue[T]):
    """A `Queue` that knows when the work is done: a drop-in for `multiprocessing.JoinableQueue`.

    A message stays on the books of the process that got it until that calls `task_done`. So when a worker is
    killed in between, or just ends, its messages go back into the queue and are delivered again: `join` never
    waits for the dead, and returns only when everything was really done. Such a message may have been worked
    on twice.

    Unlike `multiprocessing`'s, `task_done` counts per process: it must be called in the process that got the
    message. (Any of its threads may; the oldest message is settled first.)
    """

    def _setup(self, region: Region, maxsize: int, by_value: bool) -> None:
        super()._setup(region, maxsize, by_value)
        self._forget()

    def _forget(self) -> None:
        super()._forget()
        self._outstanding: deque[Any] = deque()  # messages got here and not done yet
        # After the region's own finalizer, so that it runs before that one at exit.
        finalizer = weakref.finalize(self, put_back, self._region, self._outstanding)
        call_at_process_end(finalizer, 1)

    def _got(self, message: Any) -> None:
        self._outstanding.append(message)

    def _was_got(self, message: Any) -> bool:
        return any(other is message for other in self._outstanding)

    def _discard(self, message: Any) -> None:
        if message.state:
            lib.shmr_release(self._region.handle, message)
            lib.shmr_notify_idle(self._region.handle)

    def task_done(self) -> None:
        """Say that the work on the oldest message got here, and not yet done, is done.

        Raises
        ------
        ValueError
            Called more often than `get` in this process.
        """
        if self._region.pid != os.getpid():
            self._rejoin()
        try:
            message = self._outstanding.popleft()
        except IndexError:
            raise ValueError("task_done() called too many times") from None
        self._discard(message)

    def join(self) -> None:
        """Wait until every message ever put has been got and done."""
        if self._region.pid != os.getpid():
            self._rejoin()
        while (status := lib.shmr_wait_idle(self._region.handle, 0, -1)) != OK:
            if status != INTERRUPTED:
                fail(status, "join this queue")

    def close(self) -> None:
        """End `put` and `get` in this process; `task_done` and `join` still work."""
        self._closed = True


def _deadline(block: bool, timeout: float | None) -> int:
    """Monotonic nanoseconds for the core: -1 for ever, 0 not at all (negative timeouts too)."""
    if not block:
        return 0
    if timeout is None:
        return -1
    if math.isnan(timeout):
        raise ValueError("timeout must be a number of seconds or None, not nan")
    return time.monotonic_ns() + int(min(timeout, 1e9) * 1e9) if timeout > 0 else 0


def _children_know_main(ctx: Any) -> bool:
    """Tell whether child processes of the user have the ``__main__`` of this one, or can import it."""
    main = sys.modules.get("__main__")
    if getattr(main, "__file__", None) or getattr(main, "__spec__", None):
        return True
    import multiprocessing

    source: Any = multiprocessing if ctx is None else ctx
    method = source.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    return bool(method == "fork")


def _from_token(cls: type[Queue[Any]], token: RegionToken, maxsize: int, by_value: bool) -> Queue[Any]:
    queue = cls.__new__(cls)
    queue._setup(Region.from_token(token), maxsize, by_value)
    return queue
