"""The only place where a status code of the C core becomes an exception."""

from __future__ import annotations

import os
import time
from typing import NoReturn

from shmengine import errors
from shmengine._native import ffi, lib

OK: int = lib.SHMR_OK
WOULD_BLOCK: int = lib.SHMR_WOULD_BLOCK
TIMEOUT: int = lib.SHMR_TIMEOUT
INTERRUPTED: int = lib.SHMR_INTERRUPTED
CLOSED: int = lib.SHMR_CLOSED
NO_MEMORY: int = lib.SHMR_NO_MEMORY
STALE: int = lib.SHMR_STALE
FORKED: int = lib.SHMR_FORKED
ITEM_WAITS: int = lib.SHMR_ITEM_WAITS
NOT_SHARED: int = lib.SHMR_NOT_SHARED
PEER_LOST: int = lib.SHMR_PEER_LOST
DENIED: int = lib.SHMR_DENIED
CORRUPT: int = lib.SHMR_CORRUPT

PLACES = 256
"""Most participants of a region."""


def detail() -> str:
    """What the last failing call of this thread said about itself."""
    return str(ffi.string(lib.shmr_last_detail()).decode())


def fail(status: int, what: str, *, seconds: float | None = None) -> NoReturn:
    """Raise the exception that `status` stands for.

    Parameters
    ----------
    status
        A code other than OK.
    what
        What was being done, in the words of the caller: ``"lease from this ring"``.
    seconds
        The timeout that was given, for `Timeout`.
    """
    reason = str(ffi.string(lib.shmr_status_text(status)).decode())
    if status in (WOULD_BLOCK, ITEM_WAITS):
        raise errors.WouldBlock(f"{what}: {reason}")
    if status == TIMEOUT:
        raise errors.Timeout(f"{what}: not possible", seconds)
    if status == CLOSED:
        raise errors.Closed(f"{what}: it is closed")
    if status in (NO_MEMORY, DENIED, lib.SHMR_TOO_LARGE):
        raise errors.MemoryBudgetExceeded(f"{what}: {detail() or reason}; raise memory= (or arena_bytes=)")
    if status == STALE:
        raise errors.LeaseError(f"{what}: {reason}")
    if status == FORKED:
        raise errors.UseAfterFork(
            f"{what}: it belongs to the parent of this forked process; make (or attach to) one here"
        )
    if status == CORRUPT:
        raise errors.Corrupt(f"{what}: {reason}: {detail()}", detail())
    if status == lib.SHMR_MISMATCH:
        raise errors.LayoutMismatch(f"{what}: {reason}: {detail()}")
    if status == PEER_LOST:
        raise errors.PeerLost(f"{what}: the last other participant died, so nobody can answer")
    if status == lib.SHMR_CROWDED:
        raise errors.ShmError(
            f"{what}: {reason}: at most {PLACES} processes can use it at once; close it where it is not needed"
        )
    if status == lib.SHMR_SYSTEM:
        code = lib.shmr_last_errno()
        raise OSError(code, f"{what}: {detail()}: {os.strerror(code)}")
    raise ValueError(f"{what}: {reason}: {detail()}")


def deadline_of(timeout: float | None) -> int:
    """Monotonic nanoseconds for the core: -1 for ever, 0 not at all.

    Raises
    ------
    ValueError
        The timeout is negative or not a number.
    """
    if timeout is None:
        return -1
    if not timeout >= 0:
        raise ValueError(
            f"timeout must be None (for ever), 0 (do not wait) or positive seconds, not {timeout!r}"
        )
    if timeout == 0:
        return 0
    return time.monotonic_ns() + int(min(timeout, 1e9) * 1e9)
