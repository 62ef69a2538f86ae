"""Small frames in few steps: of a small array, of one plain value, or of a dict of few of these.

They are frames as any others (codec.py), made from what was remembered of the last one alike. Number and checksum are
filled in as they are sent, and are verified before they are read, by the core where that sends and receives them; else
by `seal_small` and `open_small`.
"""

from __future__ import annotations

import pickle
import struct
from typing import Any, Final

import numpy as np

from shmengine._native import crc32c
from shmengine.arrays import address_of, is_plain_dtype
from shmengine.codec import (
    _CHECKED_FROM,
    _CRC,
    _CRC_AT,
    _HEADER,
    FRAME_MAGIC,
    FRAME_VERSION,
    HEADER_BYTES,
    KIND_ARRAY,
    KIND_PICKLE,
    decode,
    encode,
)
from shmengine.errors import ShmError

__all__ = ["UNKNOWN", "beginning_of", "decode_small", "encode_small", "open_small", "seal_small"]

UNKNOWN: Final = object()
"""What `decode_small` returns for a frame that is none of these, or that has an error."""

MOST_REMEMBERED = 4096
MOST_ENTRIES = 16
MOST_BYTES = 3072  # of an array, or of a pickle: with header and spec no more than SHMR_SMALL_FRAME
MOST_TEXT = MOST_BYTES // 4  # a character may have 4 bytes
VALUES = frozenset((bytes, str, int, float, complex, bool, type(None)))

_NUMBER = struct.Struct("<Q")  # in a frame's header
_CHECKED_AT, _NUMBER_AT = 32, 40
_CHECKED_AND_NUMBER = struct.Struct("<QQ")

_ndarray = np.ndarray
_headers: dict[int, bytes] = {}  # of frames with a pickle of so many bytes and nothing else
_beginnings: dict[Any, bytes] = {}  # of frames with an array of this dtype and shape: all before its bytes
_arrays: dict[tuple[bytes, int], tuple[Any, ...]] = {}  # what a frame of such a table and length has


def encode_small(obj: Any, *, allow_pickle: bool, most_bytes: int = MOST_BYTES) -> bytes | None:
    """Return the frame of an object, for `seal_small` or the core to seal; None: it is none of the small ones."""
    cls = type(obj)
    if cls is _ndarray:
        if not 0 < obj.nbytes <= most_bytes or not obj.flags.c_contiguous:
            return None
        beginning = beginning_of(obj)
        return None if beginning is None else beginning + obj.tobytes()
    if allow_pickle and (cls in VALUES or (cls is dict and _has_few(obj))):
        if (cls is bytes or cls is str) and len(obj) > MOST_TEXT:
            return None
        raw = pickle.dumps(obj, 5)
        header = _headers.get(len(raw))
        return _first_value(obj, raw) if header is None else header + raw
    return None


def _has_few(obj: dict[Any, Any]) -> bool:
    """Whether a dict has few entries, and of plain values only."""
    if len(obj) > MOST_ENTRIES or not VALUES.issuperset(map(type, obj)):
        return False
    for value in obj.values():
        cls = type(value)
        if cls not in VALUES or ((cls is bytes or cls is str) and len(value) > MOST_TEXT):
            return False
    return True


def beginning_of(array: np.ndarray[Any, Any]) -> bytes | None:
    """Return what the frame of a C-contiguous array begins with, before its bytes; None: it is no simple one."""
    beginning = _beginnings.get((array.dtype, array.shape))
    if beginning is None:
        if not is_plain_dtype(array.dtype) or array.dtype.names is not None:
            return None  # with names: equal dtypes may differ in titles
        beginning = b"".join(encode(array, memmap_mode=None).pieces()[:-1])
        _remember(_beginnings, (array.dtype, array.shape), beginning)
    return beginning


def _first_value(obj: Any, raw: bytes) -> bytes | None:
    if len(raw) > MOST_BYTES:
        return None  # a large int
    frame = encode(obj, memmap_mode=None).to_bytes()
    if frame[HEADER_BYTES:] == raw:
        _remember(_headers, len(raw), frame[:HEADER_BYTES])
    return frame


def decode_small(
    raw: bytes, kind: int, parts: int, prefix: int, in_band: int, total: int, memory: Any = None
) -> Any:
    """Return the object of a frame whose header and checksum are sound; `UNKNOWN`: `decode` knows more.

    Parameters
    ----------
    raw : bytes
        The frame; with `memory`, its header and table.
    kind, parts, prefix, in_band, total : int
        What the header says; `kind` is not that of a pickle if that is not allowed.
    memory : buffer or None
        What ends with the frame: writable, of nobody else, and aligned as an array needs it, that is made in it.
    """
    if kind == KIND_PICKLE and not parts:
        start = HEADER_BYTES + prefix
        try:
            return pickle.loads(raw[start : start + in_band])
        except Exception:
            return UNKNOWN
    if kind == KIND_ARRAY and not in_band:
        known = _arrays.get((raw[HEADER_BYTES : HEADER_BYTES + prefix], total))
        if known is None:
            return _first_seen(
                raw[HEADER_BYTES : HEADER_BYTES + prefix], total, bytearray(raw) if memory is None else memory
            )
        shape, dtype, nbytes = known
        if memory is not None:
            return _ndarray(shape, dtype, memory, len(memory) - nbytes)
        return _ndarray(
            shape, dtype, bytearray(raw[-nbytes:] if nbytes < 4096 else memoryview(raw)[-nbytes:])
        )
    return UNKNOWN


def _first_seen(table: bytes, total: int, memory: Any) -> Any:
    frame = np.frombuffer(memory, np.uint8)[-total:]
    try:
        array: np.ndarray[Any, Any] = decode(frame)
    except ShmError:
        return UNKNOWN
    # Its place is in the table: what is last in this frame is so in each that begins alike and is as long. But with
    # names: these are of one array, as whoever has got that may assign others.
    is_last = address_of(array) + array.nbytes == address_of(frame) + frame.nbytes
    if array.nbytes and array.flags.c_contiguous and is_last and array.dtype.names is None:
        known = (array.shape, array.dtype, array.nbytes)
        _remember(_arrays, (table, total), known)
    return array


def _remember(memory: dict[Any, Any], key: Any, value: Any) -> None:
    if len(memory) >= MOST_REMEMBERED:
        memory.clear()
    memory[key] = value


def seal_small(frame: bytes, number: int, *, checks_all: bool) -> bytearray:
    """Return a small frame with its number and checksum, where the core does not do it."""
    sealed = bytearray(frame)
    if checks_all:
        _CHECKED_AND_NUMBER.pack_into(sealed, _CHECKED_AT, len(frame) - HEADER_BYTES, number)
        checked_end = len(frame)
    else:
        _NUMBER.pack_into(sealed, _NUMBER_AT, number)
        checked_end = HEADER_BYTES + _NUMBER.unpack_from(sealed, _CHECKED_AT)[0]
    _CRC.pack_into(sealed, _CRC_AT, crc32c(memoryview(sealed)[_CHECKED_FROM:checked_end]))
    return sealed


def open_small(raw: bytes, kinds: tuple[int, ...]) -> tuple[Any, int]:
    """Return the object of a small frame, and its number; `UNKNOWN`: `decode` knows more.

    Parameters
    ----------
    raw : bytes
        What may be one, and may be damaged.
    kinds : tuple of int
        Those that are allowed.
    """
    if len(raw) < HEADER_BYTES:
        return UNKNOWN, 0
    magic, crc, version, kind, flags, _, in_band, total, checked, number, parts, prefix = _HEADER.unpack_from(
        raw
    )
    if (magic, version, flags, total) != (FRAME_MAGIC, FRAME_VERSION, 0, len(raw)) or kind not in kinds:
        return UNKNOWN, 0
    if kind == KIND_PICKLE and parts:
        return UNKNOWN, 0
    end = HEADER_BYTES + checked
    if not prefix + in_band <= checked or end > total or crc32c(raw[_CHECKED_FROM:end]) != crc:
        return UNKNOWN, 0
    return decode_small(raw, kind, parts, prefix, in_band, total), number
