"""Claims and leases: a process's right to write, or to read, one block of a ring.

``with`` a claim, leaving commits and an exception aborts; ``with`` a lease, leaving releases. The array that is
yielded is a plain ``ndarray``. If it (or a view of it) is still in use elsewhere when a lease's block is left,
the block stays leased until the last view dies, which is counted (``late_releases``).
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from shmengine._native import ffi, lib
from shmengine._native.status import OK, STALE, WOULD_BLOCK, deadline_of, fail
from shmengine.errors import LeaseError, WouldBlock

if TYPE_CHECKING:
    from shmengine.region import Region
    from shmengine.ring import Layout, Ring

__all__ = ["Claim", "Lease", "release_with"]

Array = np.ndarray[Any, np.dtype[Any]]


def _count_own() -> int:
    thing = object()
    return sys.getrefcount(thing)


# A name in the frame that asks, and the argument of getrefcount (which some interpreters only lend).
OWN_REFERENCES = _count_own()
# Those behind a view that has not escaped: the cache's, and the asking frame's. A name after ``as`` is one more.
_VIEW_REFERENCES = 1 + OWN_REFERENCES
# The same for its root: the cache's, the view's, the asking frame's.
_ROOT_REFERENCES = 2 + OWN_REFERENCES

_watched: dict[int, weakref.ref[Any]] = {}  # by id: arrays cannot be hashed


def release_with(root: Any, region: Region, block: Any, then: Callable[[], None] | None = None) -> None:
    """Release a leased block when `root`, and so every view derived from it, is gone; `then` call `then`."""

    def release(reference: weakref.ref[Any]) -> None:
        del _watched[id(reference)]
        if then is not None:
            then()
        lib.shmr_release(region.handle, block)  # a stale one was released by force, or is the parent's

    reference = weakref.ref(root, release)
    _watched[id(reference)] = reference


class _Probe:
    """Finds out how many references a handle has in ``__exit__`` if nothing but the ``with`` statement has it."""

    references = 0

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, *_: object) -> None:
        _Probe.references = sys.getrefcount(self)


with _Probe():
    pass
# A handle with no more references than these can be used again: nobody has it who could confuse two uses.
_UNNAMED = _Probe.references


class Claim:
    """A block to be filled; made by `Ring.claim`."""

    __slots__ = ("_array", "_block", "_flags", "_layout", "_ring", "_timeout")

    def __init__(self, ring: Ring, layout: Layout) -> None:
        self._ring = ring
        self._layout = layout
        self._block = layout.new_block()
        self._timeout: float | None = None
        self._array: Array | None = None
        self._flags: Any = None

    @property
    def array(self) -> Array:
        """The memory to fill: writable, over the block's memory, uninitialised."""
        if self._array is None:
            raise LeaseError("this claim has ended: it was committed or aborted")
        return self._array

    def commit(self) -> None:
        """Hand the block over; waits while the ring is full, up to the timeout given to `Ring.claim`.

        Raises
        ------
        Timeout, WouldBlock
            The ring stayed full; the claim is aborted.
        LeaseError
            The claim has ended already.
        """
        if self._array is None:
            raise LeaseError("this claim has ended: it was committed or aborted")
        self._array = None
        self._flags.writeable = False  # what is committed belongs to the reader
        ring = self._ring
        if lib.shmr_commit(ring._h, 0, ring._payload_check, -1, 0, self._block):
            self._commit_slowly()

    def _commit_slowly(self) -> None:
        ring, timeout = self._ring, self._timeout
        try:
            status = ring._commit(self._block, deadline_of(timeout))
        except BaseException:  # a signal's handler, while we waited
            with contextlib.suppress(LeaseError):
                self._abort()
            raise
        if status == OK:
            return
        with contextlib.suppress(LeaseError):
            self._abort()
        if status == WOULD_BLOCK:
            raise WouldBlock("commit to this ring: it is full; the claim was aborted")
        fail(status, "commit to this ring (the claim was aborted)", seconds=timeout)

    def abort(self) -> None:
        """Give the block back; nobody will see it.

        Raises
        ------
        LeaseError
            The claim has ended already.
        """
        if self._array is None:
            raise LeaseError("this claim has ended: it was committed or aborted")
        self._array = None
        self._flags.writeable = False
        self._abort()

    def _abort(self) -> None:
        status = lib.shmr_abort(self._ring._h, self._block)
        if status == STALE or status == lib.SHMR_FORKED:
            raise LeaseError("abort of a claim: it is not, or no longer, held by this process")

    def __enter__(self) -> Array:
        return self.array

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if kind is None:
            self.commit()
        elif self._array is not None:
            self.abort()
        if sys.getrefcount(self) <= _UNNAMED:
            self._layout.spare.append(self)

    def __del__(self) -> None:
        if self._array is not None:  # forgotten: nobody can commit it any more
            with contextlib.suppress(Exception):
                self.abort()


class Lease:
    """A committed block to be read; made by `Ring.lease`."""

    __slots__ = ("_array", "_asked", "_block", "_key", "_ring", "_spec")

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._block = new_block()
        self._spec = ffi.buffer(self._block.spec)
        self._array: Array | None = None
        self._key: Any = None
        self._asked = False

    @property
    def array(self) -> Array:
        """The memory to read: read-only for good, over the block's memory."""
        if self._array is None:
            raise LeaseError("this lease has ended: it was released")
        self._asked = True
        return self._array

    @property
    def attempts(self) -> int:
        """How often the message had been delivered to somebody who died before releasing it."""
        return int(self._block.attempts)

    def release(self) -> None:
        """Give the block back, at once if no view of it is in use elsewhere, else with the last view.

        Raises
        ------
        LeaseError
            The lease has ended already, or belongs to the parent of this forked process.
        """
        self._release(_VIEW_REFERENCES)

    def _release(self, expected: int) -> None:
        array = self._array
        if array is None:
            raise LeaseError("this lease has ended: it was released")
        self._array = None
        ring = self._ring
        base: Any = array.base
        entry = ring._views.get(self._key)
        if (
            entry is not None
            and entry[1] is array  # no longer in the cache: then the counts say nothing
            and sys.getrefcount(array) <= expected
            and sys.getrefcount(base) <= _ROOT_REFERENCES
        ):
            if lib.shmr_release(ring._h, self._block):
                raise LeaseError("release of a lease: it is not, or no longer, held by this process")
            return
        if entry is not None and entry[1] is array:
            del ring._views[self._key]
        del entry
        lib.shmr_count_late_release(ring._h)
        release_with(base, ring._region, self._block)
        self._block = None  # it belongs to the views now

    def __enter__(self) -> Array:
        if self._array is None:
            raise LeaseError("this lease has ended: it was released")
        return self._array

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if self._array is not None:
            # One more for the name after ``as``; but whoever asked for `array` may have no such name, only others.
            self._release(_VIEW_REFERENCES + (not self._asked))
        if sys.getrefcount(self) <= _UNNAMED and self._block is not None:
            self._ring._leases.append(self)

    def __del__(self) -> None:
        if self._array is not None:
            with contextlib.suppress(Exception):
                self.release()


def new_block() -> Any:
    """Return a fresh ``shmr_block``."""
    return ffi.new("shmr_block *")
