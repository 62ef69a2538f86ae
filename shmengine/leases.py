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
        for name in ("claim", "commit", "abort", "lease", "release", "send", "check_payload")
    ),
)

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


def new_block() -> Any:
    """Return a fresh ``shmr_block``."""
    return ffi.new("shmr_block *")
