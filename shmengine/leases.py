"""Claims and leases: a process's right to write, or to read, one block of a ring.

``with`` a claim, leaving commits and an exception aborts; ``with`` a lease, leaving releases. The array that is
yielded is a plain ``ndarray``. If it (or a view of it) is still in use elsewhere when a lease's block is left,
the block stays leased until the last view dies, which is counted (``late_releases``).

The handles themselves are in C (csrc/handles.c), because they are needed for every message.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shmengine._native import ffi, lib
from shmengine._native._handles import Claim, End, Layout, Lease, connect
from shmengine.errors import LeaseError

if TYPE_CHECKING:
    from shmengine.region import Region

__all__ = ["Claim", "End", "Layout", "Lease", "new_block", "release_with"]

connect(
    LeaseError,
    *(
        int(ffi.cast("uintptr_t", ffi.addressof(lib, f"shmr_{name}")))
        for name in ("claim", "announce", "commit", "abort", "lease", "release", "send", "check_payload")
    ),
)


class _Watched(weakref.ref[Any]):
    """The last view of a leased block, which is released when that is gone."""

    __slots__ = ("block", "region", "then")
    block: Any
    region: Region
    then: Callable[[], None] | None


_watched: dict[int, _Watched] = {}  # by id: arrays cannot be hashed


# A plain function: CPython 3.13.0 frees the code of an inner one that it has no memory for (python/cpython#122752).
def _release(reference: _Watched) -> None:
    del _watched[id(reference)]
    if reference.then is not None:
        reference.then()
    # A stale one was released by force, or is the parent's.
    lib.shmr_release(reference.region.handle, reference.block)


def release_with(root: Any, region: Region, block: Any, then: Callable[[], None] | None = None) -> None:
    """Release a leased block when `root`, and so every view derived from it, is gone; `then` call `then`."""
    reference = _Watched(root, _release)
    reference.region, reference.block, reference.then = region, block, then
    _watched[id(reference)] = reference


def new_block() -> Any:
    """Return a fresh ``shmr_block``."""
    return ffi.new("shmr_block *")
