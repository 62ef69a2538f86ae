"""What every channel promises, whatever carries its messages.

    End ─ timeouts, threads, asyncio, iteration, what becomes of the other end
     └ Link ─ one mechanism's way to the other end (link.py)
        ├ FrameLink ─ sequence numbers, checks, compression (frames.py)
        │   ├ PipeLink  ├ MessageQueueLink  └ SocketLink
        └ RingLink ─ shared memory

An end is for one process at a time (any of its threads): the first that uses it. Messages arrive in the order in which
they were sent, each once and whole; one that was not sent in time has not been sent at all.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from io import UnsupportedOperation
from types import TracebackType
from typing import Any, Self

from shmengine._native.status import deadline_of
from shmengine.channels.link import END, LOOK_NS, NOTHING, Capabilities, Link, Options
from shmengine.channels.presence import Fate
from shmengine.channels.turns import Turn
from shmengine.channels.waiting import Pause
from shmengine.errors import Closed, EndOfStream, PeerLost, SerializationError, Timeout, WouldBlock
from shmengine.interrupts import InterruptsLater
from shmengine.region import call_at_process_end
from shmengine.stats import ChannelStats, as_table

__all__ = ["End"]

FINISH_NS = 4 * 50_000_000


class End:
    """One end of a channel, made by `channel`, `connect` or `Server.accept`.

    Pass it on (as an argument of a `multiprocessing.Process` under any start method, of a task of an `Engine`, or by
    fork) before its first use; then it belongs to the process that uses it first. Close the copy that stays behind:
    while it lives, the death of a process that had not yet used its end is not seen.
    """

    def __init__(self, link: Link, options: Options, *, sends: bool = True, receives: bool = True) -> None:
        self._link = link
        self._options = options
        self._sends = sends
        self._receives = receives
        self._closed = False
        self._pid = 0
        self._turns: list[Turn] = []
        self._begin()
        # Who ends in an orderly way closes his ends, as a file would be.
        self._finalizer = weakref.finalize(self, _finish, link, self._turns)
        call_at_process_end(self._finalizer)
        _ends.add(self)

    def _begin(self) -> None:
        # Received, and not yet handed out (at most one, after an interruption): each in a list of its own, so that it
        # can be told from an equal one.
        self._ready: deque[list[Any]] = deque()
        self._sending = Turn()
        self._receiving = Turn()
        self._turns[:] = self._sending, self._receiving
        self._closing = threading.RLock()
        self._ended = False
        self._looked = 0

    # --- sending ---------------------------------------------------------------------------------

    def send(self, obj: Any, timeout: float | None = None, *, priority: int = 0) -> None:
        """Send an object; it is on its way, and may be changed, when this returns.

        Parameters
        ----------
        obj : object
            An array (any layout and dtype but object), or anything that can be pickled.
        timeout : float, optional
            Seconds to wait while the channel is full; None: for ever, 0: not at all. When it has passed nothing was
            sent.
        priority : int, optional
            Higher ones overtake, where the mechanism has priorities; order holds within each.

        Raises
        ------
        Timeout
        WouldBlock
            With a timeout of 0.
        EndOfStream
            The other end was closed: nobody would receive this.
        PeerLost
            The process of the other end died, or cannot be reached any more; the text says what is known.
        SerializationError
            The object cannot be sent.
        Closed
            This end was closed here.
        ValueError
            There is no such priority, or the timeout is no number of seconds.
        """
        self._send_by(deadline_of(timeout), obj, timeout, priority)

    def _send_by(self, deadline: int, obj: Any, timeout: float | None, priority: int) -> None:
        link = self._use(sending=True)
        if priority:
            self._check_priority(priority)
        message = link.encode(obj)
        turn = self._sending
        try:
            if not turn.take(0):
                self._wait_for(turn, deadline, "send", timeout)
            self._push(link, message, priority, deadline, timeout)
        finally:
            self._leave(turn)

    def try_send(self, obj: Any, *, priority: int = 0) -> None:
        """Send without waiting: `WouldBlock` if the channel is full."""
        self.send(obj, 0, priority=priority)

    def send_many(self, objs: Iterable[Any], timeout: float | None = None, *, priority: int = 0) -> int:
        """Send one object after the other.

        Parameters
        ----------
        objs : iterable
        timeout : float, optional
            Seconds for all of them together; None: for ever.

        Returns
        -------
        int
            How many were sent: all, unless the timeout has passed.

        Raises
        ------
        EndOfStream, PeerLost, SerializationError, Closed, ValueError
            As for `send`; what came before has been sent.
        """
        deadline = deadline_of(timeout)
        sent = 0
        for obj in objs:
            left = None if timeout is None else max(0.0, (deadline - time.monotonic_ns()) / 1e9)
            try:
                self.send(obj, left, priority=priority)
            except (Timeout, WouldBlock):
                break
            sent += 1
        return sent

    async def asend(self, obj: Any, timeout: float | None = None, *, priority: int = 0) -> None:
        """Like `send`, for asyncio: only this coroutine waits. If it is cancelled nothing was sent."""
        deadline = deadline_of(timeout)
        link = self._use(sending=True)
        if priority:
            self._check_priority(priority)
        message = link.encode(obj)
        await self._wait_async(self._sending, deadline, "send", timeout)
        sent = False
        try:
            pause = Pause(link.write_fd, writing=True)
            if time.monotonic_ns() - self._looked > LOOK_NS:
                self._look_before_sending(link)
            while not self._closed and not (sent := link.send(message, priority, 0)):
                self._look_before_sending(link)
                await pause.wait(self._time_left(deadline, "send", timeout))
            self._check_open()
        finally:
            if not sent:
                link.give_up()
            self._leave_async(self._sending)

    def _push(self, link: Link, message: Any, priority: int, deadline: int, timeout: float | None) -> None:
        if self._closed:  # while this thread waited for its turn
            self._check_open()
        sent = False
        try:
            now = time.monotonic_ns()
            if now - self._looked > LOOK_NS:
                self._look_before_sending(link)
            while not (sent := link.send(message, priority, _earlier(deadline, now + LOOK_NS))):
                self._check_open()
                self._look_before_sending(link)
                now = time.monotonic_ns()
                self._check_time(deadline, now, "send", timeout)
        finally:
            if not sent:
                link.give_up()

    def _look_before_sending(self, link: Link) -> None:
        """Raise if nobody would receive a message; then the next call looks again."""
        fate = link.fate()
        if self._ended or fate is Fate.CLOSED:
            raise EndOfStream("send: the other end was closed, nobody would receive this")
        if fate is Fate.LOST:
            raise PeerLost(f"send: {link.loss()}; nobody would receive this")
        self._looked = time.monotonic_ns()

    # --- receiving -------------------------------------------------------------------------------

    def receive(self, timeout: float | None = None) -> Any:
        """Take the next message.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait for one; None: for ever, 0: not at all.

        Returns
        -------
        object
            Arrays are the receiver's own, and writable; over shared memory read-only views, without a copy.

        Raises
        ------
        EndOfStream
            The other end was closed, and all that it had sent was received.
        PeerLost
            The process of the other end died, or cannot be reached any more, and all that had come was received.
        Timeout
        WouldBlock
            With a timeout of 0.
        Corrupt
            A message failed a check, is missing, or came out of order; the next call goes on behind it.
        SerializationError
            A message cannot be unpickled here, or must not be (``allow_pickle=False``); it is gone.
        Closed
            This end was closed here.
        """
        return self._receive_by(deadline_of(timeout), timeout)

    def _receive_by(self, deadline: int, timeout: float | None) -> Any:
        link = self._use(sending=False)
        turn = self._receiving
        box: list[Any] = []
        try:
            try:
                if not turn.take(0):
                    self._wait_for(turn, deadline, "receive", timeout)
                self._pull(link, deadline, timeout)
                box = self._ready[0]
                self._ready.popleft()
            finally:
                self._leave(turn)
            return box[0]
        except BaseException:
            # Perhaps a signal's handler: what it keeps from being returned is for the next call.
            if box and not (self._ready and self._ready[0] is box):
                self._ready.appendleft(box)
            raise

    def try_receive(self) -> Any:
        """Receive without waiting: `WouldBlock` if nothing is there."""
        return self.receive(0)

    async def areceive(self, timeout: float | None = None) -> Any:
        """Like `receive`, for asyncio: only this coroutine waits. If it is cancelled nothing was taken."""
        deadline = deadline_of(timeout)
        link = self._use(sending=False)
        await self._wait_async(self._receiving, deadline, "receive", timeout)
        try:
            pause = Pause(link.read_fd)
            while not self._fetch(link, 0):
                await pause.wait(self._time_left(deadline, "receive", timeout))
            return self._ready.popleft()[0]
        finally:
            self._leave_async(self._receiving)

    def _pull(self, link: Link, deadline: int, timeout: float | None) -> None:
        """Wait until a message is ready."""
        now = time.monotonic_ns()
        while not self._fetch(link, _earlier(deadline, now + LOOK_NS)):
            now = time.monotonic_ns()
            self._check_time(deadline, now, "receive", timeout)

    def _fetch(self, link: Link, until: int) -> bool:
        """Tell whether a message is ready by then; raise if none will ever be."""
        if self._closed:  # while this thread waited for its turn
            self._check_open()
        if self._ready:
            link.settle()
            return True
        if self._ended:
            raise EndOfStream("receive: the other end was closed, and nothing more of it waits")
        got = link.receive(until)
        if got is NOTHING:
            self._check_open()
            fate = link.fate()
            if fate is Fate.UNUSED or fate is Fate.ALIVE:
                return False
            self._looked = 0  # nor shall anything more be sent
            got = link.receive(0)  # it may have sent until the look
            if got is NOTHING:
                if fate is Fate.LOST:
                    raise PeerLost(f"receive: {link.loss()}; nothing more of it waits")
                got = END
        if got is END:
            self._ended = True
            self._looked = 0
            return self._fetch(link, 0)
        self._ready.append([got])
        link.settle()
        return True

    def __iter__(self) -> Iterator[Any]:
        """Receive until the other end is closed."""
        while True:
            try:
                obj = self.receive()
            except EndOfStream:
                return
            yield obj
            del obj  # the next one may need its memory

    async def __aiter__(self) -> AsyncIterator[Any]:
        """Receive until the other end is closed."""
        while True:
            try:
                obj = await self.areceive()
            except EndOfStream:
                return
            yield obj
            del obj

    # --- everything else ---------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        """What the mechanism of this channel can do."""
        return self._link.capabilities

    @property
    def closed(self) -> bool:
        """Whether this end was closed here."""
        return self._closed

    def stats(self) -> ChannelStats:
        """Return what this end has done so far, in this process."""
        return ChannelStats(mechanism=self.capabilities.mechanism, **vars(self._link.counts))

    def close(self) -> None:
        """Use this end no more; the other one receives what was sent, and then `EndOfStream`. Never waits."""
        self._closed = True
        # Whoever is inside of a call, another thread or one that a signal's handler interrupted here, notices soon,
        # and lets the link go when he leaves.
        with _starting, self._closing:  # nor is anybody just beginning
            if self._pid not in (0, _pid):
                self._link.close()  # a forked child's copy
            elif self._sending.take_idle():
                try:
                    if self._receiving.take_idle():
                        try:
                            self._link.close()
                        finally:
                            self._receiving.leave()
                finally:
                    self._sending.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<shmengine channel end: {self.capabilities.mechanism}{', closed' if self._closed else ''}>"

    def _repr_html_(self) -> str:
        return as_table(repr(self).strip("<>"), self.stats())

    def __reduce__(self) -> tuple[Any, ...]:
        self._check_open()
        if self._pid == _pid:
            raise SerializationError(
                "this end of a channel is in use by this process: pass it on before its first use"
            )
        return _from_token, (type(self), self._link.token(), self._options, self._sends, self._receives)

    def _use(self, *, sending: bool) -> Link:
        """Return the link, started in this process."""
        if self._pid != _pid:
            self._check_open()
            with InterruptsLater(), _starting:  # half a start would have to be taken back
                if self._pid != _pid:  # else another thread was faster
                    self._start()
        if self._closed:
            self._check_open()
        if not (self._sends if sending else self._receives):
            verb, other = ("sends", "receives") if sending else ("receives", "sends")
            raise UnsupportedOperation(
                f"this end only {other}: make the channel with duplex=True for one that {verb}, too"
            )
        return self._link

    def _start(self) -> None:
        self._link.start()
        # Once more: this process may be another one, or not have known yet that it was a child.
        call_at_process_end(self._finalizer)
        self._pid = _pid

    def _check_open(self) -> None:
        if self._closed or not self._finalizer.alive:
            raise Closed("this end of a channel is closed")

    def _check_priority(self, priority: int) -> None:
        most = self.capabilities.priorities
        if not 0 <= priority < most:
            raise ValueError(
                f"priority must be from 0 to {most - 1}, not {priority!r}"
                if most > 1
                else f"a channel of kind {self.capabilities.mechanism!r} has no priorities; 'mqueue' has"
            )

    def _wait_for(self, turn: Turn, deadline: int, what: str, timeout: float | None) -> None:
        """Wait until no other thread is sending (or receiving)."""
        while not turn.take(_seconds_until(deadline)):
            self._check_open()
            self._check_time(deadline, time.monotonic_ns(), what, timeout)

    async def _wait_async(self, turn: Turn, deadline: int, what: str, timeout: float | None) -> None:
        pause = Pause(None)
        while not turn.take_async():
            self._check_open()
            await pause.wait(self._time_left(deadline, what, timeout))

    def _leave(self, turn: Turn) -> None:
        turn.leave()
        if self._closed:
            self.close()
        elif not self._finalizer.alive and threading.current_thread().daemon:
            threading.Event().wait()  # the process ends: a daemon thread does so with it, and not with an error

    def _leave_async(self, turn: Turn) -> None:
        turn.leave_async()
        if self._closed:
            self.close()

    def _check_time(self, deadline: int, now: int, what: str, timeout: float | None) -> None:
        """Raise if it is past the deadline."""
        if deadline == 0:
            raise WouldBlock(f"{what}: not possible without waiting")
        if 0 < deadline <= now:
            raise Timeout(f"{what}: not possible", timeout)

    def _time_left(self, deadline: int, what: str, timeout: float | None) -> float:
        """Return for how many seconds to wait now; raise if it is past the deadline."""
        self._check_time(deadline, time.monotonic_ns(), what, timeout)
        return _seconds_until(deadline)


def _finish(link: Link, turns: list[Turn]) -> None:
    """Close an end that is collected; or, at the end of the process, as soon as no thread is inside of a call."""
    until = time.monotonic_ns() + FINISH_NS
    for each in turns:
        while not each.take_idle():
            if time.monotonic_ns() > until:
                return  # the end of the process does the rest; it looks like a death
            time.sleep(FINISH_NS / 1e9 / 100)
    link.close()


_pid = os.getpid()  # asking each time costs as much as several steps of a small message
_ends: weakref.WeakSet[End] = weakref.WeakSet()
_starting = threading.RLock()  # two threads may be the first to use an end


def _after_fork() -> None:
    global _pid, _starting
    _pid = os.getpid()
    _starting = threading.RLock()
    for end in list(_ends):
        end._begin()  # its locks may be held by threads that this forked child does not have


os.register_at_fork(after_in_child=_after_fork)


def _earlier(deadline: int, other: int) -> int:
    return deadline if 0 <= deadline < other else other


def _seconds_until(deadline: int) -> float:
    """Return the seconds to the deadline, but not more than to the next look."""
    if deadline < 0:
        return LOOK_NS / 1e9
    return min(LOOK_NS, max(0, deadline - time.monotonic_ns())) / 1e9


def _from_token(
    cls: type[End], token: Callable[[], Link], options: Options, sends: bool, receives: bool
) -> End:
    return cls(token(), options, sends=sends, receives=receives)
