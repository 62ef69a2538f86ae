"""Arrays of an engine through `multiprocessing`'s own queues, pipes and arguments of processes: by reference.

::

    sender    ForkingPickler ── where the region is, which block, which part of it, a flag ──► pickle
    receiver  unpickles: joins the region, holds the block, raises the flag; leaves with the last such array, or
              when the last of those that it has passed on itself has been received

From the pickling on the sender holds the block, until it sees that the flag is up: it looks when it passes on the
next array, when memory is short, and when somebody asks for its statistics. What nobody ever receives is held until
the engine is closed. The flag says who received, so that one who is killed does not keep memory either.

Arrays of anybody else are pickled as ever.
"""

from __future__ import annotations

import os
import pickle
import select
import threading
import weakref
from collections import deque
from typing import Any

import numpy as np

from shmengine._native import ffi, lib
from shmengine.arena import Arena
from shmengine.arrays import (
    Array,
    Bytes,
    SharedReference,
    decode_spec,
    encode_spec,
    is_plain_dtype,
    spec_of,
    view,
)
from shmengine.errors import ShmError, StaleReference
from shmengine.region import Region, RegionToken
from shmengine.tokens import lend

__all__ = ["Crossings"]

LOOKS = 4  # at what waits, for each array that is passed on: more come to their end than begin
ALREADY_JOINED = 1 << 32  # a flag, where others have a process id: not to be cleared up after by us
WHAT = "the memory of the engine that this array lies in"
ADVICE = "; it must live, and its engine be open, until the array is received"

_flag_type = np.dtype("u8")


class Crossings:
    """What this process passes on of the arrays in one region.

    Parameters
    ----------
    arena : Arena
    creator : bool, optional
        Whether this process is the one that clears up after others in this region.
    """

    def __init__(self, arena: Arena, *, creator: bool = False) -> None:
        self.arena = arena
        self._creator = creator
        self._waiting: deque[tuple[Array, SharedReference]] = deque()
        self._receivers: set[int] = set()
        self._burying = threading.Lock()
        _senders[arena.region.number] = self
        _register()

    def describe(self, array: Array) -> tuple[Any, ...] | None:
        """Return what `_receive` makes the array of, and hold its block until then; None: it cannot be named."""
        self.settle(LOOKS)
        arena = self.arena
        region = arena.region
        reference = arena.share(array)
        if reference is None:
            return None
        try:
            token = RegionToken(region.number, region.name, lend(region.fd, WHAT, ADVICE))
            flag = arena.empty(1, _flag_type)
        except ShmError:  # no room for a flag; or other code has closed our descriptors
            return None
        flag[0] = 0
        named = arena.share(flag)
        if named is None or not arena.hold(reference):
            return None
        self._waiting.append((flag, reference))
        return token, reference, named, encode_spec(spec_of(array)), bool(array.flags.writeable)

    @property
    def waits(self) -> bool:
        """Whether something was passed on that nobody is known to have received."""
        return bool(self._waiting)

    def settle(self, most: int = 1 << 62) -> None:
        """Let go of what has been received, and of what receivers held who are dead."""
        for _ in range(min(most, len(self._waiting))):
            try:
                flag, reference = self._waiting.popleft()
            except IndexError:  # another thread was faster
                return
            receiver = int(flag[0])
            if not receiver:
                self._waiting.append((flag, reference))
                continue
            self.arena.drop(reference)
            if self._creator and receiver < ALREADY_JOINED and receiver != os.getpid():
                self._receivers.add(receiver)
        if most > LOOKS and self._burying.acquire(blocking=False):
            try:
                self._bury()
            finally:
                self._burying.release()

    def _bury(self) -> None:
        """Clear up after receivers who are gone. One at a time, or the second would clear up after a newcomer."""
        handle = self.arena.region.handle
        for pid in list(self._receivers):
            place = lib.shmr_find(handle, pid)
            if place < 0:  # it has left, maybe with arrays that were alive to its end
                lib.shmr_adopt(handle)
            elif _is_dead(pid):
                lib.shmr_recover(handle, place, ffi.NULL, 0, ffi.NULL)
            else:
                continue
            self._receivers.discard(pid)

    def close(self) -> None:
        """Pass on nothing more by reference, and hold nothing for those who have not received yet."""
        if _senders.get(self.arena.region.number) is self:
            del _senders[self.arena.region.number]
        while self._waiting:
            self.arena.drop(self._waiting.popleft()[1])


def _is_dead(pid: int) -> bool:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(0))
    finally:
        os.close(fd)


# --- the pickler ---------------------------------------------------------------------------------

_senders: weakref.WeakValueDictionary[int, Crossings] = weakref.WeakValueDictionary()
_reduce_before: Any = None  # what somebody else has registered


def _register() -> None:
    global _reduce_before
    from multiprocessing.reduction import ForkingPickler

    known = ForkingPickler._extra_reducers.get(np.ndarray)  # type: ignore[attr-defined]
    if known is not _reduce:
        _reduce_before = known
        ForkingPickler.register(np.ndarray, _reduce)


def _reduce(array: Array) -> Any:
    for crossings in list(_senders.values()):
        if crossings.arena.contains(array) and is_plain_dtype(array.dtype):
            described = crossings.describe(array)
            if described is not None:
                return _receive, described
    if _reduce_before is not None:
        return _reduce_before(array)
    return array.__reduce_ex__(pickle.DEFAULT_PROTOCOL)


# --- the receiver --------------------------------------------------------------------------------


class _Joined:
    """A region that this process is in for arrays that it was passed, and for how many blocks of it."""

    def __init__(self, region: Region) -> None:
        self.crossings = Crossings(Arena(region))
        self.blocks = 0


_joined: dict[int, _Joined] = {}
_joining = threading.RLock()


def _receive(
    token: RegionToken, reference: SharedReference, flag: SharedReference, spec: bytes, writable: bool
) -> Array:
    number = token.number
    with _joining:
        _leave_unused()
        sender = _senders.get(number)
        joined = _joined.get(number)
        mark = ALREADY_JOINED
        if sender is None or joined is not None:
            if joined is None:
                mark = ALREADY_JOINED if Region.is_joined(number) else os.getpid()
                joined = _Joined(Region.from_token(token))
            else:
                mark = os.getpid()
            joined.blocks += 1
            _joined[number] = joined  # a collection of garbage may have let go of it just now
            sender = joined.crossings
        try:
            root = _open(sender.arena, reference, flag, writable, mark)
            array = view(root, decode_spec(spec), reference.offset)
        except BaseException:
            if joined is not None:
                _leave(number)
            raise
        if joined is not None:
            weakref.finalize(root, _leave, number).atexit = False
    return array


def _open(
    arena: Arena, reference: SharedReference, flag: SharedReference, writable: bool, mark: int
) -> Bytes:
    """Return the bytes of the block, and tell the sender."""
    try:
        root = arena.resolve(reference, writable=writable)
    except StaleReference:
        raise StaleReference(
            "the array that was passed on does not exist any more: it was received before, and freed, or the engine"
            " in whose memory it was has been closed"
        ) from None
    try:
        with arena.borrowed(flag) as raw:
            raw[flag.offset : flag.offset + _flag_type.itemsize].view(_flag_type)[0] = mark
    except StaleReference:  # received once more, or the sender does not wait for it
        pass
    return root


def _leave(number: int) -> None:
    """One block less; with the last one this process leaves the region."""
    with _joining:
        joined = _joined.get(number)
        if joined is not None:
            joined.blocks -= 1
            _leave_unused()


def _leave_unused() -> None:
    """Leave the regions of which no block is left here, nor one that was passed on and is still on its way."""
    for number, joined in list(_joined.items()):
        if not joined.blocks:
            joined.crossings.settle()
            if not joined.crossings.waits:
                joined.crossings.close()
                del _joined[number]


def _after_fork() -> None:
    global _joining
    _joining = threading.RLock()
    _senders.clear()  # the parent's places in its regions are not ours
    _joined.clear()


os.register_at_fork(after_in_child=_after_fork)
