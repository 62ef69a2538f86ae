"""The only door to the C core: ``ffi``, ``lib`` and two helpers that take Python buffers."""

from __future__ import annotations

from typing import Any

from shmengine._native._core import ffi, lib

__all__ = ["ABI", "copy_bytes", "crc32c", "ffi", "lib"]

#: Version of the shared layout; attaching to a region of another one is refused.
ABI: int = lib.shmr_abi()


def crc32c(buffer: Any, value: int = 0) -> int:
    """CRC-32C (Castagnoli) of the bytes of a C-contiguous buffer, continued from `value`."""
    raw = ffi.from_buffer(buffer)
    return int(lib.shmr_crc32c(value, raw, len(raw)))


def copy_bytes(target: int, source: int, nbytes: int) -> None:
    """Copy between two addresses, around the cache if it is much; the caller knows that both are good."""
    lib.shmr_copy(ffi.cast("void *", target), ffi.cast("void *", source), nbytes)
