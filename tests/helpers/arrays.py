"""Arrays of every dtype and layout, for tests of whatever carries arrays."""

from __future__ import annotations

import numpy as np

from shmengine.arrays import extent_of

SIMPLE_DTYPES = [
    *("?", "i1", "u1", "<i2", ">i4", "<u8", "q", "e", "<f4", ">f8", "g", "<c8", ">c16", "G"),
    *("<M8[ns]", ">M8[25us]", "M8", "<m8[D]", "m8", "S5", "S1", "<U3", ">U2", "V7", "V0"),
]
STRUCTURED_DTYPES = [
    [("a", "<i4"), ("b", ">f8", (2, 3))],
    np.dtype([("a", "i1"), ("b", "i8")], align=True),
    np.dtype((np.record, [("x", "<f4"), ("when", "<M8[us]")])),
    {"names": ["a", "b"], "formats": ["<i4", "S3"], "offsets": [8, 0], "itemsize": 24},
    {"names": ["a", "b"], "formats": ["<i4", "<f4"], "offsets": [0, 2], "titles": ["A title", None]},
    [("näme", [("deep", [("deeper", "?")], (2,))])],
    [],
]
DTYPES = [np.dtype(dtype) for dtype in (*SIMPLE_DTYPES, *STRUCTURED_DTYPES)]
NO_DTYPES = [np.dtype("O"), np.dtype([("a", "O")]), np.dtypes.StringDType()]


def filled(shape, dtype):
    """Make an array whose bytes differ."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape)) * dtype.itemsize
    raw = (np.arange(count) % 251).astype("u1") & (1 if dtype.kind == "b" else 0x2F)
    if dtype.kind == "U":  # any bytes but these are no text
        return (np.arange(np.prod(shape, dtype=int)) % 97).astype(dtype).reshape(shape)
    return np.ndarray(shape, dtype, raw.copy()) if count else np.zeros(shape, dtype)


LAYOUTS = {
    "C": lambda dtype: filled((3, 4), dtype),
    "F": lambda dtype: np.asfortranarray(filled((3, 4), dtype)),
    "strided": lambda dtype: filled((6, 8), dtype)[1::2, ::3],
    "negative": lambda dtype: filled((4, 6), dtype)[::-2, ::-1],
    "transposed": lambda dtype: filled((2, 3, 4), dtype).transpose(1, 2, 0),
    "0-d": lambda dtype: filled((), dtype),
    "empty": lambda dtype: filled((0, 3), dtype),
    "empty strided": lambda dtype: filled((4, 6), dtype)[2:2, ::-2],
    "broadcast": lambda dtype: np.broadcast_to(filled((4,), dtype), (2, 3, 4)),
    "64-d": lambda dtype: filled((1,) * 62 + (2, 2), dtype),
}


def memory_of(array):
    """Copy an array's memory, from its lowest to its highest byte."""
    low, high = extent_of(array)
    window = type("Window", (), {})()
    window.__array_interface__ = {"version": 3, "data": (low, True), "shape": (high - low,), "typestr": "|u1"}
    return np.asarray(window).copy() if high > low else np.zeros(0, "u1")


def same_bytes(one, other):
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.dtype.names is not None:  # the bytes between fields are nobody's
        return not one.dtype.names or bool(np.all(one.reshape(-1) == other.reshape(-1)))
    return one.tobytes() == other.tobytes()
