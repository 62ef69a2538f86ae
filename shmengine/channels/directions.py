"""The two halves of an end over shared memory: one ring to send by, one to receive from.

Both are rings as users have them, with two differences: they wait for one certain process, whose end ends the wait, and
they also carry what is no array.

    kind 1, 2    arrays, as a ring has them
    kind 3       the content of a ``bytes``
    kind 4       a frame (codec.py)
    kind 5       a frame of an array alone: of one that is not C-contiguous

What a call has reached is in its `shmr_block`, in C: whatever a signal's handler raises, at whatever moment, the next
call sees whether something is claimed, or leased, and goes on there. Messages of kinds 1 and 3 mostly do not come
here at all: `Outbox` and `Inbox` (csrc/directions.c) send and receive them, in one call of C, if nothing is out of the
ordinary.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from shmengine._native import ffi, lib
from shmengine._native._handles import Inbox, Message, Outbox
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
from shmengine.arrays import address_of
from shmengine.channels.link import END, LOOK_NS, NOTHING, Blame, Options
from shmengine.channels.presence import Fate, Presence
from shmengine.codec import LONG, decode
from shmengine.config import format_bytes
from shmengine.errors import (
    ArrayError,
    Closed,
    Corrupt,
    EndOfStream,
    MemoryBudgetExceeded,
    PeerLost,
    Timeout,
    UseAfterFork,
    WouldBlock,
)
from shmengine.region import Region
from shmengine.ring import KIND_ARRAY, KIND_ARRAY_PREFIX, NO_REFS, Array, Ring

__all__ = ["KIND_ARRAY", "KIND_ARRAY_FRAME", "KIND_BYTES", "KIND_FRAME", "Receiver", "Sender"]

KIND_BYTES = 3
KIND_FRAME = 4
KIND_ARRAY_FRAME = 5

SMALL_BYTES = 1 << 16  # up to here ``bytes`` are checked as those in a frame are

NOT_NOW = frozenset((WOULD_BLOCK, TIMEOUT, INTERRUPTED))


class _Direction(Ring):
    """One direction of a channel as one of its ends has it, in the process that uses that."""

    def __init__(self, region: Region, options: Options, presence: Presence) -> None:
        self._presence = presence
        self._options = options
        self._setup(region, options.check)

    def _handle(self) -> Any:
        self._check_open()
        if self._region.pid != os.getpid():
            self._give_up_on(FORKED, "claim or lease")
        return self._h

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

    def _refuse_size(self, need: int) -> None:
        self._give_up_on(lib.SHMR_TOO_LARGE, "claim", need)

    def _refusal(self) -> Closed:
        return Closed("this end of a channel is closed")

    def _detach(self) -> None:
        while self._kept:  # nobody else reads these
            lib.shmr_release(self._region.handle, self._kept[0])
            self._kept.popleft()
        super()._detach()


class Sender(_Direction):
    """Claims, copies and commits; waits for room until there is nobody to send to."""

    def __init__(self, region: Region, options: Options, presence: Presence) -> None:
        super().__init__(region, options, presence)
        self.outbox = Outbox(region, int(ffi.cast("uintptr_t", self._h)), bool(self._payload_check))
        self._block = ffi.cast("shmr_block *", self.outbox.address)  # what is claimed, and not committed
        self._pending: Any = None  # the message that it is filled with

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
                if obj.nbytes >= LONG:
                    lib.shmr_announce(self._h, 0)
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
            if block.length >= LONG:
                lib.shmr_announce(self._h, 0)
            self._target(layout, block.offset)[...] = array
            return self._commit(block, deadline)
        block.kind, block.spec_bytes = KIND_ARRAY, len(layout.spec)
        ffi.memmove(block.spec, layout.spec, len(layout.spec))
        source = ffi.cast("void *", address_of(array))
        self.outbox.remember(array)
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


class Receiver(_Direction):
    """Leases and decodes; waits for a message until none can come."""

    corrupt = 0

    def __init__(self, region: Region, options: Options, presence: Presence) -> None:
        super().__init__(region, options, presence)
        address = [int(ffi.cast("uintptr_t", pointer)) for pointer in (self._h, lib.shmr_base(self._h))]
        self._blame = Blame()
        self.inbox = Inbox(Message(region, *address), self._kept, NOTHING)

    def get(self, deadline: int) -> Any:
        """Return the next message, `NOTHING` or `END`; the same one again until `let_go`."""
        inbox = self.inbox
        obj = inbox.current
        if obj is not NOTHING:
            return obj
        message = inbox.message
        block = ffi.cast(
            "shmr_block *", message.address
        )  # the next call finds there what a lease has reached
        if not block.state and not (self._kept and self._take_kept(block)):
            status = inbox.failed
            inbox.failed = OK
            if status == OK:
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
            obj = self._decode(message, block)
        except BaseException as error:
            self.corrupt += isinstance(error, Corrupt)
            if self._blame.is_the_messages(error):
                self._blame.clear()
                inbox.drop()
            raise
        self._blame.clear()
        inbox.current = obj
        return obj

    def _decode(self, message: Any, block: Any) -> Any:
        kind = block.kind
        if kind == KIND_BYTES:
            return bytes(message)
        root = np.frombuffer(message, np.uint8)
        if kind in (KIND_FRAME, KIND_ARRAY_FRAME):
            return decode(root, allow_pickle=self._options.allow_pickle)
        return self._array(root, block)

    def let_go(self) -> None:
        """Forget the message that `get` has returned: it is released with the last view of it."""
        self.inbox.settle()

    def _detach(self) -> None:
        self.inbox.drop()
        super()._detach()

    # What the handles (csrc/handles.c) leave to us.

    def _lease_slowly(self, address: int, timeout: float | None, status: int, deadline: int) -> None:
        if status in (CORRUPT, FORKED):
            self.corrupt += status == CORRUPT
            self._give_up_on(status, "lease")
        block = ffi.cast("shmr_block *", address)
        block.state = 0
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
        try:
            return super()._read(address)
        except Corrupt:
            self.corrupt += 1
            raise


def _to_next_look(deadline: int) -> int:
    """Return when to look what has become of the other end: by the deadline at the latest."""
    look = time.monotonic_ns() + LOOK_NS
    return min(deadline, look) if deadline >= 0 else look
