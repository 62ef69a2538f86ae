"""Shared memory: a ring for each direction, filled and read in place.

    left ── send, claim ──► [slot][slot][slot] ──► receive, lease ── right
         ◄─ receive, lease ── [slot][slot][slot] ◄── send, claim ──

A message is a block of a ring's arena: an array as `shmengine.Ring` has it, the content of a ``bytes``, or a frame
(codec.py). Order, numbers and checks are the ring's, and its core clears up after the dead; who has closed, or died,
`Presence` knows. Who closes an end closes both rings, so that whoever sleeps at one wakes.
"""

from __future__ import annotations

import os
from functools import partial
from time import monotonic_ns
from typing import Any, ClassVar

import numpy as np

from shmengine._native import lib
from shmengine._native._handles import Inbox, Outbox
from shmengine._native.status import OK, deadline_of
from shmengine.arrays import is_plain_dtype
from shmengine.channels.directions import (
    KIND_ARRAY,
    KIND_ARRAY_FRAME,
    KIND_BYTES,
    KIND_FRAME,
    Receiver,
    Sender,
)
from shmengine.channels.end import End
from shmengine.channels.link import LOOK_NS, NOTHING, Capabilities, Counts, Link, Options
from shmengine.channels.presence import Fate, Presence, PresenceToken
from shmengine.codec import encode
from shmengine.errors import Timeout, WouldBlock
from shmengine.leases import Claim, Lease
from shmengine.region import Region, RegionConfig, RegionToken
from shmengine.stats import ChannelStats

__all__ = ["RingLink", "ShmEnd", "pair"]

# As many slots as there is room for messages of a middling size, but not so many that small ones leave a core's cache:
# those of 4 KiB take three times as long if a thousand may wait.
BYTES_PER_SLOT = 64 << 10
LEAST_SLOTS = 16
MOST_SLOTS = 256
COPIES = 64  # of an end, at once
SLEEPERS = 64  # threads that wait at once


def pair(options: Options) -> tuple[Link, Link]:
    """Return the links of both ends of a new channel.

    Raises
    ------
    ValueError
        Compression was asked for.
    MemoryBudgetExceeded
        There is no room for the control part.
    """
    if options.compression not in (None, "auto"):
        raise ValueError(
            f"compression={options.compression!r}: a channel over shared memory moves no bytes that could be"
            " compressed; give None or 'auto', or use another mechanism"
        )
    config = RegionConfig(
        arena_bytes=options.buffer_bytes,
        capacities=(min(MOST_SLOTS, max(LEAST_SLOTS, options.buffer_bytes // BYTES_PER_SLOT)),),
        participants=COPIES,
        doorbells=SLEEPERS,
        wait_alone=True,  # who is not there yet may come; whether somebody is lost, `Presence` knows
    )
    there = Region.create(config)
    back = Region.create(config) if options.duplex else None
    left, right = Presence.pair()
    return RingLink(options, left, there, back), RingLink(options, right, back, there)


class RingLink(Link):
    """Shared memory's way to the other end."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        "shm",
        between_hosts=False,
        in_place=True,
        compresses=False,
        priorities=1,
        reconnects=False,
        writable=False,
        at_once_in_asyncio=False,
        outlives_sender=True,
    )
    sender: Sender
    receiver: Receiver

    def __init__(self, options: Options, presence: Presence, out: Region | None, into: Region | None) -> None:
        self.counts = Counts()
        self._options = options
        self._presence = presence
        self._pid = os.getpid()
        self._directions: list[Sender | Receiver] = []
        self._use_regions(out, into)

    def _use_regions(self, out: Region | None, into: Region | None) -> None:
        self._out, self._into = out, into
        for region in filter(None, (out, into)):
            region.users.add(self)

    def end(self, options: Options, *, sends: bool = True, receives: bool = True) -> ShmEnd:
        """Return the end over this link."""
        return ShmEnd(self, options, sends=sends, receives=receives)

    def start(self) -> None:
        """Become this process's."""
        self._presence.use()
        if self._pid != os.getpid():  # in a forked child; its parent has not used this end
            out, into = (None if region is None else region.rejoin() for region in (self._out, self._into))
            self._use_regions(out, into)
            self._pid = os.getpid()
        directions: list[Sender | Receiver] = []
        if self._out is not None:
            self.sender = Sender(self._out, self._options, self._presence)
            directions.append(self.sender)
        if self._into is not None:
            self.receiver = Receiver(self._into, self._options, self._presence)
            directions.append(self.receiver)
        self._directions = directions

    def encode(self, obj: Any) -> tuple[int, Any]:
        """Make an object ready for `send`: what kind of message it is, and what to write."""
        kind = type(obj)
        if kind is bytes:
            return KIND_BYTES, obj
        if kind is np.ndarray and is_plain_dtype(obj.dtype):
            if obj.flags.c_contiguous:
                return KIND_ARRAY, obj
            return KIND_ARRAY_FRAME, encode(obj, memmap_mode=None)
        return KIND_FRAME, encode(obj, allow_pickle=self._options.allow_pickle, memmap_mode=None)

    def send(self, message: Any, priority: int, deadline: int) -> bool:  # noqa: ARG002  # there is one
        """Send a message that was encoded."""
        return self.sender.put(message, deadline) == OK

    def give_up(self) -> None:
        """Take back a message that was not committed."""
        self.sender.take_back()

    def receive(self, deadline: int) -> Any:
        """Return the next message, `NOTHING` or `END`; the same one again until `settle`."""
        return self.receiver.get(deadline)

    def settle(self) -> None:
        """Let go of the message that `receive` has returned."""
        self.receiver.let_go()

    def fate(self) -> Fate:
        """Say what has become of the other end."""
        fate = self._presence.fate()
        if fate is Fate.LOST:
            for direction in self._directions:  # what it had begun to commit is there from now on, or never
                lib.shmr_check_deaths(direction._h)
        return fate

    def count(self) -> None:
        """Bring `counts` up to date: what is done in place is counted by the core and the handles."""
        counts = self.counts
        for direction in self._directions:
            if direction.closed or not self._presence.in_use:
                continue
            if isinstance(direction, Receiver):
                counts.messages_received = direction.inbox.received + direction._end.leases
                counts.bytes_received = direction.inbox.bytes_received + direction._end.bytes_leased
                counts.corrupt = direction.corrupt
            else:
                done = direction._region.counters()
                counts.messages_sent, counts.bytes_sent = done.committed, done.bytes_committed

    def token(self) -> Any:
        """Return what another process needs."""
        out, into = (None if region is None else region.token() for region in (self._out, self._into))
        return partial(_from_token, self._options, self._presence.token(), out, into)

    def close(self) -> None:
        """Tell the other end, if this process uses this one, and let all go."""
        used = self._presence.in_use
        self.count()
        self._presence.close()  # first: whom the closed rings wake looks there
        for direction in self._directions:
            if used:
                lib.shmr_close_ring(direction._h, 0)
            direction.close()
        for region in filter(None, (self._out, self._into)):
            region.users.discard(self)
            if region.pid == os.getpid() and not region.users:
                region.close()
        self._out = self._into = None


class ShmEnd(End):
    """One end of a channel over shared memory: messages can also be filled, and read, where they lie.

    What `receive` returns may be views of that memory, read-only; it is free again when the last one is gone. Whoever
    keeps many keeps the other end from sending: `buffer_bytes` is all that a direction has.
    """

    _link: RingLink
    _outbox: Outbox | None = None
    _inbox: Inbox | None = None

    def send(self, obj: Any, timeout: float | None = None, *, priority: int = 0) -> None:
        """Send an object, as `End.send`: ``bytes`` and contiguous arrays in one call of C, if there is room."""
        deadline = -1 if timeout is None else deadline_of(timeout)
        outbox = self._outbox
        if (
            outbox is None
            or priority
            or monotonic_ns() - self._looked > LOOK_NS
            or not outbox.put(obj, deadline)
        ):
            self._send_by(deadline, obj, timeout, priority)

    def receive(self, timeout: float | None = None) -> Any:
        """Take the next message, as `End.receive`: ``bytes`` and contiguous arrays in one call of C."""
        deadline = -1 if timeout is None else deadline_of(timeout)
        inbox = self._inbox
        if inbox is not None:
            turn = self._receiving
            try:
                obj = inbox.take(deadline)
                if obj is not NOTHING:
                    inbox.taken = True
                    if self._closed:  # by another thread, while this one waited
                        self.close()
                    return obj
            except BaseException:  # a signal's handler: the message is for the next call
                self._leave(turn)
                raise
            if self._closed:
                self.close()
        return self._receive_by(deadline, timeout)

    def claim(self, shape: int | tuple[int, ...], dtype: Any = float, timeout: float | None = None) -> Claim:
        """Claim memory for an array, to be filled in place.

        Parameters
        ----------
        shape : int or tuple of int
        dtype : dtype-like
            Any but object and StringDType.
        timeout : float, optional
            Seconds to wait for memory now, and again for a slot at the commit; None: for ever.

        Returns
        -------
        Claim
            ``with end.claim(shape, dtype) as frame: ...``: leaving sends it, an exception aborts.

        Raises
        ------
        Timeout, WouldBlock, EndOfStream, PeerLost, Closed, ValueError
            As for `send`, here or at the commit. The death of the other end is only seen when there is no room.
        MemoryBudgetExceeded
            The array is larger than all that may be on its way (`buffer_bytes`).
        ArrayError
            No array of this dtype can be carried.
        """
        self._use(sending=True)
        return self._link.sender.claim(shape, dtype, timeout)

    def try_claim(self, shape: int | tuple[int, ...], dtype: Any = float) -> Claim | None:
        """Like `claim`, but never wait: None if there is no memory or no slot now."""
        self._use(sending=True)
        try:
            if lib.shmr_has_room(self._link.sender._h, 0):
                return self._link.sender.claim(shape, dtype, 0)
        except WouldBlock:
            pass
        self._look_before_sending(self._link)
        return None

    def lease(self, timeout: float | None = None) -> Lease:
        """Lease the oldest message, an array, to be read in place.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait for a message; None: for ever.

        Returns
        -------
        Lease
            ``with end.lease() as frame: ...``: leaving releases.

        Raises
        ------
        Timeout, WouldBlock, EndOfStream, PeerLost, Corrupt, Closed, ValueError
            As for `receive`.
        ArrayError
            The message is no array: it waits for `receive`.
        """
        self._use(sending=False)
        return self._link.receiver.lease(timeout)

    def try_lease(self) -> Lease | None:
        """Like `lease`, but never wait: None if there is no message."""
        try:
            return self.lease(0)
        except WouldBlock:
            return None

    def stats(self) -> ChannelStats:
        """Return what this end has done so far, in this process."""
        self._link.count()
        return super().stats()

    def _start(self) -> None:
        super()._start()
        # From here on without a Python frame, which costs as much as the rest of a message.
        if self._sends:
            vars(self)["claim"] = self._link.sender.claim
            self._outbox = self._link.sender.outbox
            self._outbox.open(self._sending)
        if self._receives:
            vars(self)["lease"] = self._link.receiver.lease
            self._inbox = self._link.receiver.inbox
            self._inbox.open(self._receiving, self._ready)

    def close(self) -> None:
        """Use this end no more; the other one receives what was sent, and then `EndOfStream`. Never waits."""
        vars(self).pop("claim", None)
        vars(self).pop("lease", None)
        if self._outbox is not None:
            self._outbox.shut()
        if self._inbox is not None:
            self._inbox.shut()
        super().close()

    def _check_time(self, deadline: int, now: int, what: str, timeout: float | None) -> None:
        if what == "send" and 0 < deadline <= now:
            raise Timeout(f"send: {self._link.sender.shortage()}; not possible", timeout)
        super()._check_time(deadline, now, what, timeout)


def _from_token(
    options: Options, presence: PresenceToken, out: RegionToken | None, into: RegionToken | None
) -> Link:
    regions = (None if token is None else Region.from_token(token) for token in (out, into))
    return RingLink(options, Presence.from_token(presence), *regions)
