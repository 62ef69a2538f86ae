"""Shared memory: a ring for each direction, filled and read in place.

    left ── send, claim ──► [slot][slot][slot] ──► receive, lease ── right
         ◄─ receive, lease ── [slot][slot][slot] ◄── send, claim ──

A message is a block of a ring's arena: an array as `shmengine.Ring` has it, the content of a ``bytes``, or a frame
(codec.py). Order, numbers and checks are the ring's, and its core clears up after the dead; who has closed, or died,
`Presence` knows. Who closes an end closes both rings, so that whoever sleeps at one wakes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NoReturn

import numpy as np

from shmengine._native import ffi, lib
from shmengine._native.status import (
    CLOSED,
    CORRUPT,
    FORKED,
    INTERRUPTED,
    OK,
    TIMEOUT,
    WOULD_BLOCK,
    deadline_of,
    fail,
)
from shmengine.arrays import address_of, is_plain_dtype
from shmengine.channels.base import END, LOOK_NS, NOTHING, Capabilities, Counts, End, Link, Options
from shmengine.channels.presence import Fate, Presence, PresenceToken
from shmengine.codec import decode, encode
from shmengine.config import format_bytes
from shmengine.errors import (
    ArrayError,
    Closed,
    EndOfStream,
    MemoryBudgetExceeded,
    PeerLost,
    ShmError,
    Timeout,
    UseAfterFork,
    WouldBlock,
)
from shmengine.leases import Claim, Lease, new_block, release_with
from shmengine.region import Region, RegionConfig, RegionToken
from shmengine.ring import KIND_ARRAY, KIND_ARRAY_PREFIX, NO_REFS, Array, Ring
from shmengine.stats import ChannelStats

__all__ = ["RingLink", "ShmEnd", "pair"]

# Beside those of a ring:
KIND_BYTES = 3
KIND_FRAME = 4
KIND_ARRAY_FRAME = 5  # of an array alone, one that is not C-contiguous

MOST_SLOTS = 1024  # so many small messages stay in a core's cache, with their records
LEAST_SLOTS = 16
BYTES_PER_SLOT = 256
COPIES = 64  # of an end, at once
SLEEPERS = 64  # threads that wait at once
SMALL_BYTES = 1 << 16  # up to here ``bytes`` are checked as those in a frame are

NOT_NOW = frozenset((WOULD_BLOCK, TIMEOUT, INTERRUPTED))


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


class _Direction(Ring):
    """One direction of a channel as one of its ends has it, in the process that uses that."""

    def __init__(self, region: Region, options: Options, presence: Presence) -> None:
        self._presence = presence
        self._options = options
        self._block = new_block()  # what the current call has claimed, or leased
        self._setup(region, options.check)

    def _check_open(self) -> None:
        if self._closed or self._region.closed or self._region.exiting:
            self._sleep_at_exit()
            raise self._refusal()

    def _check_time(self, deadline: int, what: str, timeout: float | None) -> None:
        if deadline == 0:
            raise WouldBlock(f"{what}: not possible without waiting")
        if 0 < deadline <= time.monotonic_ns():
            raise Timeout(f"{what}: {self._why_not()}not possible", timeout)

    def _why_not(self) -> str:
        return ""

    def _give_up_on(self, status: int, what: str, need: int = 0) -> NoReturn:
        """Raise what a status stands for against which waiting does not help."""
        if status == FORKED:
            raise UseAfterFork(f"{what}: this end of a channel is used by the parent of this forked process")
        if status == lib.SHMR_TOO_LARGE:
            most = self._options.buffer_bytes
            raise MemoryBudgetExceeded(
                f"{what}: a message of {format_bytes(need)} is larger than all that may be on its way,"
                f" {format_bytes(most)}: raise buffer_bytes=",
                need,
                most,
            )
        fail(status, what)

    def _refusal(self) -> Closed:
        return Closed("this end of a channel is closed")

    def _detach(self) -> None:
        while self._kept:  # nobody else reads these
            lib.shmr_release(self._region.handle, self._kept[0])
            self._kept.popleft()
        super()._detach()


class _Sender(_Direction):
    """Claims, copies and commits; waits for room until there is nobody to send to."""

    _pending: Any = None  # the message that the block is claimed for, and filled with

    def put(self, message: tuple[int, Any], deadline: int) -> int:
        """Send a message, or go on with it; return a status of the core."""
        kind, obj = message
        block = self._block
        if (
            block.state and self._pending is not message
        ):  # a signal's handler kept its sender from taking it back
            self.take_back()
        self._pending = message
        if block.state:
            status = self._commit(block, deadline)
        elif kind == KIND_BYTES:
            block.kind, block.length, block.spec_bytes = KIND_BYTES, len(obj), 0
            check = self._payload_check or len(obj) <= SMALL_BYTES
            status = lib.shmr_send(self._h, 0, check, deadline, obj, block)
        elif kind == KIND_ARRAY:
            status = self._put_array(obj, deadline, block)
        else:
            block.kind, block.length, block.spec_bytes = kind, obj.nbytes, 0
            status = lib.shmr_claim(self._h, obj.nbytes, NO_REFS, 0, -1, deadline, block)
            if status == OK:
                obj.write_into(self._region.root(block.offset, obj.nbytes, writable=True))
                status = self._commit(block, deadline)
        if status == OK:
            self._pending = None
        elif status == CLOSED:
            self._check_open()
        elif status not in NOT_NOW:
            self._give_up_on(status, "send", block.length)
        return int(status)

    def _put_array(self, array: Array, deadline: int, block: Any) -> int:
        layout = self._end.layouts.get((array.shape, array.dtype)) or self._layout(array.shape, array.dtype)
        block.length = layout.prefix + layout.nbytes
        if layout.prefix:
            block.kind, block.spec_bytes = KIND_ARRAY_PREFIX, 0
            status: int = lib.shmr_claim(self._h, block.length, NO_REFS, 0, -1, deadline, block)
            if status != OK:
                return status
            self._target(layout, block.offset)[...] = array
            return self._commit(block, deadline)
        block.kind, block.spec_bytes = KIND_ARRAY, len(layout.spec)
        ffi.memmove(block.spec, layout.spec, len(layout.spec))
        source = ffi.cast("void *", address_of(array))
        return int(lib.shmr_send(self._h, 0, self._payload_check, deadline, source, block))

    def _commit(self, block: Any, deadline: int) -> int:
        return int(lib.shmr_commit(self._h, 0, self._payload_check, -1, deadline, block))

    def take_back(self) -> None:
        """Forget the message that was not committed."""
        self._pending = None
        if self._block.state:
            lib.shmr_abort(self._h, self._block)

    def _why_not(self) -> str:
        return f"{self.shortage()}; "

    def shortage(self) -> str:
        """Say what fills this direction."""
        text = (
            f"{self.approx_fill()} messages wait to be received (at most {self._capacity}, and"
            f" {format_bytes(self._options.buffer_bytes)}: buffer_bytes=)"
        )
        for pid, count in self._region.leases().items():
            text += f"; process {pid} has not yet let go of {count} more: views of them are alive there"
        return text

    def _detach(self) -> None:
        self.take_back()
        super()._detach()

    # What the handles (csrc/handles.c) leave to us.

    def _claim_slowly(self, address: int, need: int, timeout: float | None) -> None:
        block = ffi.cast("shmr_block *", address)
        block.state = 0
        try:
            self._patiently(
                lambda until: lib.shmr_claim(self._h, need, NO_REFS, 0, -1, until, block),
                "claim",
                timeout,
                need,
            )
        except BaseException:
            if block.state:  # a signal's handler, at the end of the wait
                lib.shmr_abort(self._h, block)
            raise

    def _commit_slowly(self, address: int, timeout: float | None) -> None:
        block = ffi.cast("shmr_block *", address)
        try:
            self._patiently(
                lambda until: self._commit(block, until), "commit (the claim was aborted)", timeout
            )
        except BaseException:
            lib.shmr_abort(self._h, block)
            raise

    def _patiently(self, call: Callable[[int], int], what: str, timeout: float | None, need: int = 0) -> None:
        """Repeat a call of the core until it succeeds, the time is over, or there is nobody to send to."""
        deadline = deadline_of(timeout)
        while (status := call(_to_next_look(deadline))) != OK:
            if status == CLOSED:
                self._check_open()
            elif status not in NOT_NOW:
                self._give_up_on(status, what, need)
            fate = self._presence.fate()
            if status == CLOSED or fate is Fate.CLOSED:
                raise EndOfStream(f"{what}: the other end was closed, nobody would receive this")
            if fate is Fate.LOST:
                raise PeerLost(f"{what}: the process of the other end died, nobody would receive this")
            if status != INTERRUPTED:
                self._check_time(deadline, what, timeout)


class _Receiver(_Direction):
    """Leases and decodes; waits for a message until none can come."""

    received = 0
    bytes_received = 0
    corrupt = 0
    _root: Any = None  # the bytes of the leased block, if something in it may be kept

    def __init__(self, region: Region, options: Options, presence: Presence) -> None:
        super().__init__(region, options, presence)
        self._current: list[Any] = []  # what was received, and is not settled
        self._base = ffi.cast("char *", lib.shmr_base(self._h))

    def get(self, deadline: int) -> Any:
        """Return the next message, `NOTHING` or `END`; the same one again until `let_go`."""
        if self._current:
            return self._current[0]
        block = self._block
        if not block.state and not (self._kept and self._take_kept(block)):
            # The sender decides what has a checksum: here it is always looked at.
            status = lib.shmr_lease(self._h, 0, 1, deadline, block)
            if status in NOT_NOW:
                return NOTHING
            if status == CLOSED:
                self._check_open()
                return END
            if status != OK:
                self.corrupt += status == CORRUPT
                self._give_up_on(status, "receive")
        try:
            obj = self._decode(block)
        except (ShmError, MemoryError):
            if self._root is not None:  # what failed may have left views of it somewhere
                release_with(self._root, self._region, block)
            self._end_lease()
            raise
        self._current.append(obj)
        return obj

    def _decode(self, block: Any) -> Any:
        """Return what lies in the leased block; again, after a signal's handler has raised in here."""
        kind = block.kind
        if kind == KIND_BYTES:
            return ffi.buffer(self._base + block.offset, block.length)[:]
        root = self._root
        if root is None:
            root = self._root = self._region.root(block.offset, block.length)
        if kind in (KIND_FRAME, KIND_ARRAY_FRAME):
            obj = decode(root, allow_pickle=self._options.allow_pickle)
        else:
            obj = self._array(root, block)
        release_with(root, self._region, block)
        return obj

    def let_go(self) -> None:
        """Forget the message that `get` has returned."""
        if self._current:
            nbytes = self._block.length
            self._end_lease()
            self.received += 1
            self.bytes_received += nbytes
            self._current.clear()

    def _end_lease(self) -> None:
        """Release the block, or leave that to the last view of it."""
        if self._root is None:
            lib.shmr_release(self._h, self._block)
        else:
            self._block = new_block()
            self._root = None

    def _detach(self) -> None:
        self._current.clear()
        self._end_lease()
        super()._detach()

    # What the handles (csrc/handles.c) leave to us.

    def _lease_slowly(self, address: int, timeout: float | None, status: int) -> None:
        if status in (CORRUPT, FORKED):
            self._give_up_on(status, "lease")
        block = ffi.cast("shmr_block *", address)
        block.state = 0
        deadline = deadline_of(timeout)
        try:
            while not self._lease_until(_to_next_look(deadline), block):
                fate = self._presence.fate()
                if fate is Fate.CLOSED or fate is Fate.LOST:
                    if self._lease_until(0, block):  # it may have sent until the look
                        return
                    if fate is Fate.LOST:
                        raise PeerLost(
                            "lease: the process of the other end died, and nothing more of it waits"
                        )
                    raise EndOfStream("lease: the other end was closed, and nothing more of it waits")
                self._check_time(deadline, "lease", timeout)
        except BaseException:  # a signal's handler
            self._keep(block)
            raise

    def _lease_until(self, deadline: int, block: Any) -> bool:
        if self._take_kept(block):
            return True
        status = lib.shmr_lease(self._h, 0, 1, deadline, block)
        if status == CLOSED:
            self._check_open()
        elif status != OK and status not in NOT_NOW:
            self.corrupt += status == CORRUPT
            self._give_up_on(status, "lease")
        return bool(status == OK)

    def _array(self, root: Any, block: Any) -> Array:
        if block.kind == KIND_ARRAY_FRAME:
            array: Array = decode(root, allow_pickle=False)
            return array
        return super()._array(root, block)

    def _read(self, address: int) -> tuple[Any, Array]:
        """Return the root and the array of a leased message; one that is no array waits for `receive`."""
        block = ffi.cast("shmr_block *", address)
        if block.kind == KIND_BYTES or block.kind == KIND_FRAME:
            self._keep(block)
            raise ArrayError("lease: the oldest message is no array; receive() takes it")
        return super()._read(address)


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
    )
    sender: _Sender
    receiver: _Receiver

    def __init__(self, options: Options, presence: Presence, out: Region | None, into: Region | None) -> None:
        self.counts = Counts()
        self._options = options
        self._presence = presence
        self._pid = os.getpid()
        self._directions: list[_Direction] = []
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
            self._use_regions(self._out and self._out.rejoin(), self._into and self._into.rejoin())
            self._pid = os.getpid()
        directions: list[_Direction] = []
        if self._out is not None:
            self.sender = _Sender(self._out, self._options, self._presence)
            directions.append(self.sender)
        if self._into is not None:
            self.receiver = _Receiver(self._into, self._options, self._presence)
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
            if isinstance(direction, _Receiver):
                counts.messages_received = direction.received + direction._end.leases
                counts.bytes_received = direction.bytes_received + direction._end.bytes_leased
                counts.corrupt = direction.corrupt
            else:
                done = direction._region.counters()
                counts.messages_sent, counts.bytes_sent = done.committed, done.bytes_committed

    def token(self) -> Any:
        """Return what another process needs."""
        out, into = (region and region.token() for region in (self._out, self._into))
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
        # From now on without a Python frame, which costs as much as the rest of a message.
        vars(self)["claim"] = self._link.sender.claim
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
        vars(self)["lease"] = self._link.receiver.lease
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

    def close(self) -> None:
        """Use this end no more; the other one receives what was sent, and then `EndOfStream`. Never waits."""
        vars(self).pop("claim", None)
        vars(self).pop("lease", None)
        super().close()

    def _check_time(self, deadline: int, now: int, what: str, timeout: float | None) -> None:
        if what == "send" and 0 < deadline <= now:
            raise Timeout(f"send: {self._link.sender.shortage()}; not possible", timeout)
        super()._check_time(deadline, now, what, timeout)


def _to_next_look(deadline: int) -> int:
    """Return when to look what has become of the other end: by the deadline at the latest."""
    look = time.monotonic_ns() + LOOK_NS
    return min(deadline, look) if deadline >= 0 else look


def _from_token(
    options: Options, presence: PresenceToken, out: RegionToken | None, into: RegionToken | None
) -> Link:
    regions = [token and Region.from_token(token) for token in (out, into)]
    return RingLink(options, Presence.from_token(presence), *regions)
