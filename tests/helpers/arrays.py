"""Arrays of every dtype and layout, and round trips, for tests of whatever carries arrays."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from shmengine.arrays import address_of, extent_of
from shmengine.codec import decode, encode

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


def numpy_scalars():
    """A strategy for NumPy's scalars, records among them, but for what NumPy's own pickles change."""
    dtypes = st_numpy.scalar_dtypes() | st.sampled_from([np.dtype("g"), np.dtype("G")])
    numbers = dtypes.flatmap(lambda dtype: st_numpy.arrays(dtype, 1).map(lambda array: array[0]))
    texts = (st.text().map(np.str_) | st.binary().map(np.bytes_)).filter(
        lambda text: text == np.array(text)[()]
    )
    records = st.sampled_from(STRUCTURED_DTYPES[:-1]).map(lambda dtype: filled(3, dtype)[2])
    return numbers | texts | st.binary(min_size=1).map(np.void) | records


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


def aligned(nbytes):
    """Make writable memory that begins at a multiple of 64."""
    memory = np.full(nbytes + 64, 0xAA, "u1")
    start = -address_of(memory) % 64
    return memory[start : start + nbytes]


def frame_of(obj, *, extra=0, **options):
    encoded = encode(obj, **options)
    memory = aligned(encoded.nbytes + extra)
    encoded.write_into(memory)
    memory.flags.writeable = False
    return memory


def round_trip(obj, **options):
    return decode(frame_of(obj, **options))


def same(one, other):
    """Equality that looks into arrays, and at types."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and (one.tolist() == other.tolist() or one.tobytes() == other.tobytes())  # nan
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or one != one  # nan
