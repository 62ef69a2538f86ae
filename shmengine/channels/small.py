"""Small frames in few steps: of a small array, or of one plain value.

They are frames as any others (codec.py), made from what was remembered of the last one alike. The core fills in number
and checksum as it sends them, and has verified them before they are read here.
"""

from __future__ import annotations

import pickle
from typing import Any, Final

import numpy as np

from shmengine.arrays import address_of, is_plain_dtype
from shmengine.codec import HEADER_BYTES, KIND_ARRAY, KIND_PICKLE, decode, encode
from shmengine.errors import ShmError

__all__ = ["UNKNOWN", "decode_small", "encode_small"]

UNKNOWN: Final = object()
"""What `decode_small` returns for a frame that is none of these, or that has an error."""

MOST_REMEMBERED = 4096
MOST_BYTES = 3072  # of an array, or of a pickle: with header and spec no more than SHMR_SMALL_FRAME
VALUES = frozenset((bytes, str, int, float, complex, bool, type(None)))

_ndarray = np.ndarray
_headers: dict[int, bytes] = {}  # of frames with a pickle of so many bytes and nothing else
_beginnings: dict[Any, bytes] = {}  # of frames with an array of this dtype and shape: all before its bytes
_arrays: dict[tuple[bytes, int], tuple[Any, ...]] = {}  # what a frame of such a table and length has


def encode_small(obj: Any, *, allow_pickle: bool) -> bytes | None:
    """Return the frame of an object, for `shmr_stream_send_frame`; None: it is none of the small ones."""
    cls = type(obj)
    if cls is _ndarray:
        if not 0 < obj.nbytes <= MOST_BYTES or not obj.flags.c_contiguous:
            return None
        beginning = _beginnings.get((obj.dtype, obj.shape))
        return _first_array(obj) if beginning is None else beginning + obj.tobytes()
    if cls in VALUES and allow_pickle:
        if (cls is bytes or cls is str) and len(obj) > MOST_BYTES // 4:  # a character may have 4 bytes
            return None
        raw = pickle.dumps(obj, 5)
        header = _headers.get(len(raw))
        return _first_value(obj, raw) if header is None else header + raw
    return None


def _first_array(array: np.ndarray[Any, Any]) -> bytes | None:
    if not is_plain_dtype(array.dtype) or array.dtype.names is not None:
        return None  # with names: equal dtypes may differ in titles
    frame = encode(array, memmap_mode=None).to_bytes()
    _remember(_beginnings, (array.dtype, array.shape), frame[: -array.nbytes])
    return frame


def _first_value(obj: Any, raw: bytes) -> bytes | None:
    if len(raw) > MOST_BYTES:
        return None  # a large int
    frame = encode(obj, memmap_mode=None).to_bytes()
    if frame[HEADER_BYTES:] == raw:
        _remember(_headers, len(raw), frame[:HEADER_BYTES])
    return frame


def decode_small(raw: bytes, kind: int, parts: int, prefix: int, in_band: int) -> Any:
    """Return the object of a frame whose header and checksum are sound; `UNKNOWN`: `decode` knows more.

    Parameters
    ----------
    raw : bytes
    kind, parts, prefix, in_band : int
        What the header says; `kind` is not that of a pickle if that is not allowed.
    """
    if kind == KIND_PICKLE and not parts:
        start = HEADER_BYTES + prefix
        try:
            return pickle.loads(raw[start : start + in_band])
        except Exception:
            return UNKNOWN
    if kind == KIND_ARRAY and not in_band:
        known = _arrays.get((raw[HEADER_BYTES : HEADER_BYTES + prefix], len(raw)))
        if known is None:
            return _first_seen(raw, prefix)
        shape, dtype, nbytes = known
        return _ndarray(shape, dtype, bytearray(raw[-nbytes:]))
    return UNKNOWN


def _first_seen(raw: bytes, prefix: int) -> Any:
    frame = np.frombuffer(bytearray(raw), np.uint8)
    try:
        array: np.ndarray[Any, Any] = decode(frame)
    except ShmError:
        return UNKNOWN
    # Its place is in the table: what is last in this frame is so in each that begins alike and is as long.
    is_last = address_of(array) + array.nbytes == address_of(frame) + frame.nbytes
    if array.nbytes and array.flags.c_contiguous and is_last:
        known = (array.shape, array.dtype, array.nbytes)
        _remember(_arrays, (raw[HEADER_BYTES : HEADER_BYTES + prefix], len(raw)), known)
    return array


def _remember(memory: dict[Any, Any], key: Any, value: Any) -> None:
    if len(memory) >= MOST_REMEMBERED:
        memory.clear()
    memory[key] = value
