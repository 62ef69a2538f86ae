"""Blocks of arrays that go to workers as bare bytes: nobody can tell, by results, errors or counters."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import struct
import threading
import time

import numpy as np
import pytest

from shmengine.engine import Engine
from shmengine.errors import BlockError, MemoryBudgetExceeded, TaskTimeout
from tests.conformance.conftest import BACKENDS
from tests.helpers import poll_until

MIB = 1 << 20


@pytest.fixture(scope="module")
def processes():
    """An engine for what only processes do."""
    with Engine(2, memory="128 MiB") as shared:
        yield shared


@pytest.fixture(scope="module")
def serial():
    with Engine(backend="serial") as shared:
        yield shared


def assert_same(result, expected):
    assert type(result) is np.ndarray
    assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
    if expected.dtype.names is None:
        assert result.tobytes() == expected.tobytes()
    else:
        assert repr(result.tolist()) == repr(expected.tolist())


def error_of(call, *args, **kwargs):
    with pytest.raises(Exception) as caught:  # of any kind; it is compared
        call(*args, **kwargs)
    return type(caught.value), str(caught.value), getattr(caught.value, "__notes__", [])


# --- arrays in -------------------------------------------------------------------------------------

SHAPES = [(101,), (53, 7), (7, 53), (5, 11, 6), (2, 1), (1, 2), (17, 1, 1)]


def as_memmap(mode):
    def make(engine, a, path):
        name = path / f"{len(list(path.iterdir()))}.bin"
        a.tofile(name)
        return np.memmap(name, a.dtype, mode, 0, a.shape)

    return make


def born_shared(engine, a, path, order="C"):
    made = engine.empty(a.shape, a.dtype, order)
    made[...] = a
    return made


def strided_shared(engine, a, path):
    made = engine.empty(tuple(2 * n for n in a.shape), a.dtype)
    view = made[tuple(slice(None, None, 2) for _ in a.shape)]
    view[...] = a
    return view


def unaligned(engine, a, path):
    raw = bytearray(a.nbytes + 1)
    made = np.frombuffer(raw, a.dtype, a.size, 1).reshape(a.shape)
    made[...] = a
    return made


def frozen(engine, a, path):
    a = a.copy()
    a.flags.writeable = False
    return a


KINDS = {
    "C": lambda engine, a, path: a.copy("C"),
    "F": lambda engine, a, path: a.copy("F"),
    "strided": lambda engine, a, path: np.repeat(a, 2, 0)[::2],
    "frozen": frozen,
    "unaligned": unaligned,
    "memmap r": as_memmap("r"),
    "memmap r+": as_memmap("r+"),
    "memmap c": as_memmap("c"),
    "memmap, sliced": lambda engine, a, path: as_memmap("r")(engine, np.concatenate([a, a]), path)[: len(a)],
    "shared": born_shared,
    "shared F": lambda engine, a, path: born_shared(engine, a, path, "F"),
    "shared strided": strided_shared,
}


def axes_of(shape):
    return sorted({0, -1, len(shape) // 2, -len(shape)})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_on_every_axis(engine, serial, kind, tmp_path):
    for shape in SHAPES:
        a = np.random.default_rng(0).random(shape)
        x = KINDS[kind](engine, a, tmp_path)
        plain = (
            engine.backend == "process" and kind == "memmap c"
        )  # private pages: the data travels, not the mapping
        for axis, rows in itertools.product(axes_of(shape), (1, 2, 10)):
            settings = {"axis": axis, "block_bytes": max(1, rows * a.nbytes // shape[axis])}
            assert_same(engine.map_blocks(lambda b: b * 2 + 1, x, **settings), a * 2 + 1)
            seen = engine.reduce(look, x, combine=lambda p, q: p + q, **settings)
            expected = serial.reduce(
                look, np.asarray(x) if plain else x, combine=lambda p, q: p + q, **settings
            )
            assert seen == expected


def look(block):
    """Return what a function can see of its block."""
    return [(type(block).__name__, block.shape, block.dtype.str, block.flags.writeable, block.tolist())]


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 40])
def test_so_many_arrays(engine, count):
    arrays = [np.full(100, float(i)) + np.arange(100) for i in range(count)]
    expected = np.zeros(100)
    for a in arrays:
        expected = expected * 1.5 + a

    def fold(*blocks):
        total = np.zeros(len(blocks[0]))
        for b in blocks:
            total = total * 1.5 + b
        return total

    assert_same(engine.map_blocks(fold, *arrays, block_bytes=8 * 7), expected)
    arrays[0] = born_shared(engine, arrays[0], None)
    assert_same(engine.map_blocks(fold, *arrays, block_bytes=8 * 7), expected)
    out = np.empty(100)
    engine.map_blocks(fold, *arrays, block_bytes=8 * 7, out=out)
    assert_same(out, expected)


def test_mixed_arrays(engine, tmp_path):
    a = np.random.default_rng(1).random((61, 3))
    made = [KINDS[kind](engine, a + i, tmp_path) for i, kind in enumerate(KINDS) if kind != "strided"]
    narrow, wide = np.arange(61, dtype="i1"), np.arange(61 * 8, dtype=">i4").reshape(61, 2, 4)
    total = sum(a + i for i in range(len(KINDS)) if list(KINDS)[i] != "strided")

    def fold(small, large, *blocks):
        return np.stack(blocks).sum(0) + small[:, None] * large.sum((1, 2))[:, None]

    fold_whole = np.stack([np.asarray(m) for m in made]).sum(0) + narrow[:, None] * wide.sum((1, 2))[:, None]
    for block_bytes in (1, 96, 200, "auto"):
        result = engine.map_blocks(fold, narrow, wide, *made, block_bytes=block_bytes)
        assert_same(result, fold_whole)
    np.testing.assert_allclose(fold_whole - narrow[:, None] * wide.sum((1, 2))[:, None], total)


DTYPES = [
    *("?", "i1", ">i2", "<u4", "e", ">f4", "g", "<c8", ">c16", "G", "S5", "U3", ">U2", "V3"),
    *("<M8[ns]", ">M8[s]", "m8[D]"),
    [("a", "i2"), ("b", ">f8", (2,))],
    np.dtype([("a", "i1"), ("b", "i8")], align=True),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_in_and_out(engine, serial, dtype):
    dtype = np.dtype(dtype)
    raw = np.arange(60 * dtype.itemsize, dtype="u1") % 23 + 1
    if dtype.kind == "U":
        a = np.array([f"{i:03}" for i in range(60)]).astype(dtype)
    else:
        a = (raw % 2 if dtype.kind == "b" else raw).view(dtype).copy()
    for shape, order in (((60,), "C"), ((20, 3), "C"), ((3, 20), "F")):
        x = np.asarray(a.reshape(shape), order=order)
        axis = -1 if order == "F" else 0
        settings = {"axis": axis, "block_bytes": 7 * dtype.itemsize}
        for fn in (lambda b: b, lambda b: b[::-1], lambda b: b.copy("A"), lambda b: np.stack([b, b], 1)):
            if fn(x).ndim > x.ndim and axis:
                continue
            assert_same(engine.map_blocks(fn, x, **settings), serial.map_blocks(fn, x, **settings))
        for out in (np.empty_like(x), engine.empty(x.shape, dtype, order)):
            assert engine.map_blocks(lambda b: b.copy(), x, out=out, **settings) is out
            assert_same(out, x)


def test_lengths_and_blocks(engine):
    for length, rows in itertools.product([2, 3, 99, 100, 101], [1, 2, 50, 99, 100]):
        x = np.arange(length * 3.0).reshape(length, 3)
        assert_same(engine.map_blocks(lambda b: b + 1, x, block_bytes=rows * 24), x + 1)
        total = engine.reduce(
            lambda b: (len(b), b.sum()), x, block_bytes=rows * 24, combine=lambda p, q: p + q
        )
        assert total[::2] == tuple(min(rows, length - i) for i in range(0, length, min(rows, length)))


# --- results ---------------------------------------------------------------------------------------

RESULTS = {
    "its input": lambda b: b,
    "a view": lambda b: b[:, ::-1],
    "transposed twice": lambda b: np.ascontiguousarray(b.T).T,
    "Fortran": np.asfortranarray,
    "another dtype": lambda b: (b * 3).astype("f4"),
    "other byte order": lambda b: b.astype(">f8"),
    "narrower": lambda b: b.sum(1),
    "one column": lambda b: b[:, :1],
    "wider": lambda b: np.repeat(b, 3, 1),
    "no columns": lambda b: b[:, :0],
    "more dimensions": lambda b: b[:, None, :, None] * np.ones((1, 2, 1, 2)),
    "part of something": lambda b: np.zeros((len(b) + 5, b.shape[1] + 2))[2:-3, 1:-1] + b,
    "slice of a larger one": lambda b: np.concatenate([b, b * 2, b])[len(b) : 2 * len(b)],
    "broadcast": lambda b: np.broadcast_to(b[:, :1], b.shape),
    "large and small by turns": lambda b: b if b[0, 0] % 2 else np.concatenate([b, b])[: len(b)],
    "Fortran by turns": lambda b: np.asfortranarray(b) if int(b[0, 0]) // 60 % 2 else b.copy(),
}


@pytest.mark.parametrize("fn", RESULTS)
def test_whatever_a_function_makes(engine, serial, fn):
    fn = RESULTS[fn]
    for width in (6, 3000):
        x = np.arange(45.0 * width).reshape(45, width)
        settings = {"block_bytes": 10 * width * 8}
        expected = serial.map_blocks(fn, x, **settings)
        assert_same(engine.map_blocks(fn, x, **settings), expected)
        assert_same(
            expected, np.concatenate([fn(x[i : i + 10]) for i in range(0, 45, 10)]).astype(expected.dtype)
        )
        shape, dtype = expected.shape, expected.dtype
        outs = [
            np.empty(shape, dtype),
            np.empty(shape, dtype, "F"),
            np.empty((2 * shape[0], *shape[1:]), dtype)[::2],
            np.empty(shape, dtype)[::-1],
            engine.empty(shape, dtype),
            engine.empty(shape, dtype, "F"),
            engine.empty((3 * shape[0], *shape[1:]), dtype)[1::3],
            engine.empty(shape, dtype)[::-1],
            np.empty(shape, "c16"),
            engine.empty(shape, ">f8" if dtype != np.dtype(">f8") else "<f8"),
        ]
        for out in outs:
            assert engine.map_blocks(fn, x, out=out, **settings) is out
            assert_same(np.ascontiguousarray(out), np.ascontiguousarray(expected.astype(out.dtype)))
        assert_same(engine.map_blocks(fn, x, dtype="c16", **settings), expected.astype("c16"))


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("order", ["C", "F"])
def test_fortran_and_c_on_any_axis(engine, serial, order, axis):
    x = np.asarray(np.random.default_rng(0).random((9, 8, 7)), order=order)
    for fn in (
        np.sqrt,
        np.asfortranarray,
        lambda b: b.copy("C"),
        lambda b: b.sum(axis - 1 if axis > 0 else 0),
    ):
        try:
            expected = serial.map_blocks(fn, x, axis=axis, block_bytes=900)
        except BlockError:
            continue
        result = engine.map_blocks(fn, x, axis=axis, block_bytes=900)
        assert_same(result, expected)
        assert result.strides == expected.strides
        for out in (
            np.empty(expected.shape),
            np.empty(expected.shape, order="F"),
            engine.empty(expected.shape),
        ):
            assert_same(engine.map_blocks(fn, x, axis=axis, block_bytes=900, out=out), expected)


@pytest.mark.parametrize("shared", [False, True])
def test_out_over_the_inputs(engine, shared):
    base = (engine.zeros if shared else np.zeros)(50_000)
    base[:] = np.arange(50_000)
    settings = {"block_bytes": 8 * 4000}
    for x, y, out in (
        (base[:40_000], base[:40_000], base[:40_000]),
        (base[:40_000], base[1:40_001], base[:40_000]),
        (base[:40_000], base[5000:45_000], base[2500:42_500]),
        (base[:40_000], base[39_999::-1], base[:40_000]),
    ):
        expected = x * 2 + y
        assert engine.map_blocks(lambda a, b: a * 2 + b, x, y, out=out, **settings) is out
        assert np.array_equal(out, expected)
        expected = out[::-1].copy()
        whole = out[::-1]
        engine.map_blocks(lambda b: b, whole, out=out, **settings)
        assert np.array_equal(out, expected)


def test_out_in_the_mapped_file_that_is_read(engine, tmp_path):
    np.arange(30_000.0).tofile(tmp_path / "x")
    x = np.memmap(tmp_path / "x", "f8", "r+")
    engine.map_blocks(lambda b: b[::-1] + 1, x, out=x, block_bytes=8 * 30_000)
    assert np.array_equal(x, np.arange(30_000.0)[::-1] + 1)
    engine.map_blocks(lambda b: b - 1, x, out=x, block_bytes=8 * 1000)
    assert np.array_equal(np.fromfile(tmp_path / "x"), np.arange(30_000.0)[::-1])


def test_a_block_is_read_only_or_private(engine):
    def write(b):
        b += 1
        return b

    for x in (np.zeros(100), engine.zeros(100)):
        with pytest.raises(ValueError, match="read-only"):
            engine.map_blocks(write, x, block_bytes=80)
        assert (engine.map_blocks(write, x, block_bytes=80, writable="private") == 1).all()
        out = np.empty(100)
        engine.map_blocks(write, x, block_bytes=80, writable="private", out=out)
        assert (out == 1).all()
        assert not x.any()
        engine.map_blocks(write, x, block_bytes=80, writable="private", out=x)
        assert (x == 1).all()


def test_private_keywords_are_fresh_for_each_block(engine):
    def write(b, *, small, large, ref):
        small += 1
        large += 1
        return np.array([small[0], large[0], large[-1], ref[1][0]] * len(b)).reshape(len(b), 4)

    settings = {"small": np.zeros(3), "large": np.zeros(30_000), "ref": engine.put(("x", np.full(9, 5.0)))}
    result = engine.map_blocks(write, np.zeros(20), block_bytes=8, writable="private", **settings)
    assert np.array_equal(result, [[1, 1, 1, 5]] * 20)
    shared = engine.zeros(30_000)
    result = engine.map_blocks(
        write, np.zeros(20), block_bytes=8, writable="private", **{**settings, "large": shared}
    )
    assert np.array_equal(result, [[1, 1, 1, 5]] * 20)
    assert not shared.any()


def test_keywords_of_every_size(engine, tmp_path):
    def fn(b, *, small, large, shared, ref, mapped, word, nested):
        return b + small[0] + large[-1] + shared[-1] + ref[-1] + mapped[-1] + len(word) + nested["a"][0][-1]

    shared = engine.full(50_000, 3.0)
    np.full(100, 5.0).tofile(tmp_path / "k")
    settings = {
        "small": np.full(2, 1.0),
        "large": np.full(50_000, 2.0),
        "shared": shared[::7],
        "ref": engine.put(np.full(70_000, 4.0)),
        "mapped": np.memmap(tmp_path / "k", "f8", "r"),
        "word": "four",
        "nested": {"a": [engine.put(np.full(3, 6.0))]},
    }
    x = np.arange(1000.0)
    assert_same(engine.map_blocks(fn, x, block_bytes=800, **settings), x + 25)
    assert (
        engine.reduce(lambda b, **k: fn(b, **k).sum(), x, block_bytes=800, combine=np.add, **settings)
        == (x + 25).sum()
    )


def test_random_numbers_are_those_of_the_block(engine, serial):
    x = np.zeros(1000)
    draw = lambda b, rng: b + rng.random(len(b))
    settings = {"block_bytes": 8 * 7, "rng": [3, 4]}
    expected = serial.map_blocks(draw, x, **settings)
    assert len(np.unique(expected)) == 1000
    assert_same(engine.map_blocks(draw, x, **settings), expected)
    assert_same(engine.map_blocks(draw, x, out=engine.empty(1000), **settings), expected)


def test_progress_counts_every_block_once(engine):
    for settings in ({}, {"out": np.empty(5000)}, {"out": engine.empty(5000)}):
        seen = []
        engine.map_blocks(
            np.sqrt,
            np.ones(5000),
            block_bytes=80,
            progress=lambda *counts, seen=seen: seen.append(counts),
            **settings,
        )
        assert seen == [(i, 500) for i in range(1, 501)]


# --- ghost cells -----------------------------------------------------------------------------------

PAD = {"reflect": "symmetric", "periodic": "wrap", "nearest": "edge"}


@pytest.mark.parametrize("depth", [0, 1, 33, (0, 3), (7, 2)], ids=str)
def test_every_depth_and_boundary(engine, serial, depth):
    for boundary in ("reflect", "periodic", "nearest", "none", 0, -2.5):
        for x, axis in (
            (np.random.default_rng(0).random(101), 0),
            (np.random.default_rng(1).random((67, 3)), 0),
            (np.asfortranarray(np.random.default_rng(2).random((3, 67))), 1),
            (np.random.default_rng(3).random((3, 67)), -1),
        ):
            before, after = depth if isinstance(depth, tuple) else (depth, depth)

            def fn(b, axis=axis):
                return np.cumsum(b, axis) - np.flip(b, axis)

            for block_bytes in (1, 8 * 20 * (x.size // x.shape[axis])):
                arguments = (fn, x, depth, boundary, axis)
                expected = serial.map_overlap(*arguments, block_bytes=block_bytes)
                assert_same(engine.map_overlap(*arguments, block_bytes=block_bytes), expected)
                for out in (np.empty_like(x), engine.empty(x.shape)):
                    engine.map_overlap(*arguments, block_bytes=block_bytes, out=out)
                    assert np.array_equal(out, expected)
            if boundary in PAD:
                pad = [(0, 0)] * x.ndim
                pad[axis] = (before, after)
                padded = np.pad(x, pad, mode=PAD[boundary])
                count = x.shape[axis]
                expected = sum(np.take(padded, range(k, k + count), axis) for k in range(before + after + 1))

                def spread(b, axis=axis, before=before, after=after):
                    wide = np.pad(
                        b, [(before, after) if k == axis % b.ndim else (0, 0) for k in range(b.ndim)]
                    )
                    return sum(
                        np.take(wide, range(k, k + b.shape[axis]), axis) for k in range(before + after + 1)
                    )

                for source in (x, born_shared(engine, x, None)):
                    np.testing.assert_allclose(
                        engine.map_overlap(spread, source, depth, boundary, axis, block_bytes=200), expected
                    )


# --- errors ----------------------------------------------------------------------------------------


def raising(at, kind=KeyError):
    def fn(b):
        if at in b:
            raise kind(f"at {at}")
        return b * 2

    return fn


FAILING = {
    "raises at first": raising(0),
    "raises in the middle": raising(333),
    "raises at last": raising(999),
    "too short": lambda b: b[1:] if 333 in b else b,
    "too long": lambda b: np.concatenate([b, b]) if 333 in b else b,
    "another dtype": lambda b: b.astype("f4") if 500 in b else b,
    "another byte order": lambda b: b.astype(">f8") if 500 in b else b,
    "more dimensions": lambda b: b[:, None] if 500 in b else b,
    "0-d": lambda b: b.sum(keepdims=False) if 500 in b else b,
    "a number": lambda b: 1.5 if 500 in b else b,
    "nothing": lambda b: None if 500 in b else b,
    "a list": lambda b: list(b) if 500 in b else b,
    "masked": lambda b: np.ma.array(b) if 500 in b else b,
    "objects": lambda b: b.astype(object) if 500 in b else b,
}


@pytest.mark.parametrize("fn", FAILING)
def test_an_error_is_the_same_everywhere(engine, serial, fn):
    fn = FAILING[fn]
    for settings in ({}, {"out": True}, {"out": "shared"}, {"dtype": "f8"}):
        x = np.arange(1000.0)
        settings = dict(settings)
        if settings.get("out"):
            settings["out"] = engine.empty(1000) if settings["out"] == "shared" else np.empty(1000)
        try:
            expected = serial.map_blocks(fn, x, block_bytes=800, **settings)
        except Exception:
            expected = error_of(serial.map_blocks, fn, x, block_bytes=800, **settings)
            assert error_of(engine.map_blocks, fn, x, block_bytes=800, **settings) == expected
        else:
            assert_same(engine.map_blocks(fn, x, block_bytes=800, **settings), expected)
        assert_same(engine.map_blocks(lambda b: b + 1, x, block_bytes=800), x + 1)  # usable at once


@pytest.mark.parametrize(
    "odd",
    [lambda b: b.astype("f4"), lambda b: b[:, None], lambda b: b.astype(">f8")],
    ids=["dtype", "shape", "byte order"],
)
def test_a_first_block_that_differs_from_the_others(engine, serial, odd):
    """It is slow, so that others arrive first where they can; the text names the same block all the same."""
    fn = lambda b: time.sleep(0.1) or odd(b) if 0 in b else b
    x = np.arange(1000.0)
    expected = error_of(serial.map_blocks, fn, x, block_bytes=800)
    assert error_of(engine.map_blocks, fn, x, block_bytes=800) == expected


def test_errors_of_an_out(engine, serial):
    x = np.arange(100.0)
    for out in (np.empty((100, 1)), np.empty(100, int), np.empty(99)):
        arguments = {"out": out, "block_bytes": 80}
        kind, text, _ = error_of(engine.map_blocks, np.sqrt, x, **arguments)
        text = re.sub(r"^block \d ", "block 0 ", text)  # every block offends
        assert (kind, text) == error_of(serial.map_blocks, np.sqrt, x, **arguments)[:2]


def test_a_function_that_cannot_be_loaded_by_the_workers(processes):
    class Refused:
        def __reduce__(self):
            return struct.unpack, ("<I", b"")

    poison = Refused()
    with pytest.raises(Exception, match="unpack requires a buffer of 4 bytes"):
        processes.map_blocks(lambda b: (poison, b)[1], np.zeros(1000), block_bytes=80)
    assert processes.map_blocks(np.cos, np.zeros(1000), block_bytes=80).sum() == 1000


# --- reduce ----------------------------------------------------------------------------------------


def numbers():
    return [
        *(0, 1, -1, 2**62, 2**63 - 1, -(2**63), 2**63, -(2**63) - 1, 2**64, 10**40, True, False, None),
        *(0.0, -0.0, 1.5, float("inf"), -float("inf"), 5e-324, 1j, -0.0 - 0.0j, "text", "", b"\0", ()),
        struct.unpack("<d", struct.pack("<Q", 0x7FF8_0000_0000_BEEF))[0],
        struct.unpack("<d", struct.pack("<Q", 0xFFF8_0000_0000_0001))[0],
        *(
            np.bool_(True),
            np.bool_(False),
            np.int8(-128),
            np.uint8(255),
            np.int16(-1),
            np.uint16(7),
            np.intc(-3),
        ),
        *(np.uintc(9), np.int_(-(2**63)), np.uint(2**64 - 1), np.longlong(-5), np.ulonglong(2**64 - 2)),
        *(np.float16(-0.0), np.float32(1e-45), np.float64(-0.0), np.longdouble(1) / 3, np.complex64(1 - 0j)),
        *(
            np.complex128(-0.0 + 2j),
            np.clongdouble(1j) / 3,
            np.str_("ab"),
            np.bytes_(b"ab"),
            np.datetime64("2020-01-01", "D"),
        ),
        *(np.timedelta64(-3, "us"), np.datetime64("NaT", "s"), np.void(b"abc")),
        np.array(0x7E01, "u2").view("f2")[()],
        np.array(0x7FC0_BEEF, "u4").view("f4")[()],
        np.array(0xFFF8_0000_0000_0BAD, "u8").view("f8")[()],
        np.array((1, 2.5), "i4,f8")[()],
        np.array(7.5),
        np.array([-0.0, 1]),
    ]


def exactly(value):
    """Return type and bits of a value."""
    if type(value) is float:
        return float, struct.pack("<d", value)
    if type(value) is complex:
        return complex, struct.pack("<dd", value.real, value.imag)
    if isinstance(value, (np.longdouble, np.clongdouble)):  # some of their bytes mean nothing
        return type(value), repr(value), np.signbit(value.real)
    if isinstance(value, (np.generic, np.ndarray)):
        return type(value), value.dtype, value.dtype.char, value.shape, value.tobytes()
    return type(value), value


def test_partial_results_keep_type_and_every_bit(engine):
    expected = [exactly(value) for value in numbers()]
    x = np.arange(len(expected))
    found = []
    make = lambda i: numbers()[int(np.ravel(i)[0])]  # made there: a pickle would turn a long long into a long
    engine.reduce(make, x, combine=lambda _, p: found.append(p), block_bytes=8, initial=None)
    assert [exactly(value) for value in found] == expected
    futures = [engine.submit(make, i) for i in x]
    assert [exactly(future.result()) for future in futures] == expected
    for window in (1, None):
        for value, bits in zip(engine.map(make, x, window=window), expected, strict=True):
            assert exactly(value) == bits or "longlong" in str(bits[0])


class Count(int):
    """An int that is more than an int."""


def test_a_number_of_one_s_own_class_stays_one(engine):
    results = []
    engine.reduce(
        lambda b: Count(5), np.zeros(2), combine=lambda _, p: results.append(p), block_bytes=8, initial=0
    )
    assert [type(r).__name__ for r in results] == ["Count", "Count"]
    assert results == [5, 5]


@pytest.mark.parametrize("late", [0, 199])
@pytest.mark.parametrize("kind", ["number", "array", "list"])
def test_more_results_wait_for_an_earlier_one_than_may(engine, late, kind):
    """All the others that may be out are back when it comes; then there must be more."""

    def fn(b):
        if b[0] == late:
            time.sleep(0.05)
        return {"number": int(b[0]), "array": np.full(5000, b[0]), "list": [int(b[0])]}[kind]

    folded = engine.reduce(
        fn, np.arange(300), combine=lambda p, q: [*p, int(np.ravel(q)[0])], initial=[], block_bytes=8
    )
    assert folded == list(range(300))


@pytest.mark.parametrize("slow", [1, 37])
def test_partial_results_are_folded_in_order(engine, slow):
    def fn(b):
        if b[0] == slow:
            time.sleep(0.05)
        return int(b[0]) if b[0] % 3 else ([int(b[0])] if b[0] % 2 else np.full(5000, b[0]))

    def combine(so_far, partial):
        return [*so_far, int(np.ravel(partial)[0])]

    assert engine.reduce(fn, np.arange(200), combine=combine, initial=[], block_bytes=8) == list(range(200))
    shared = born_shared(engine, np.arange(200), None)
    assert engine.reduce(fn, shared, combine=combine, initial=[], block_bytes=8) == list(range(200))


def test_combine_may_use_the_engine(engine):
    x = np.arange(100.0)

    def combine(p, q):
        inner = engine.reduce(np.sum, x[:10], combine=np.add, block_bytes=16)
        return (
            p
            + q
            + inner
            + engine.map_blocks(lambda b: b - b, x, block_bytes=80).sum()
            + engine.submit(abs, 0).result()
        )

    assert engine.reduce(np.sum, x, combine=combine, block_bytes=80) == x.sum() + 9 * 45


def test_progress_may_use_the_engine(engine):
    x = np.arange(2000.0)
    inner = []

    def progress(done, total):
        inner.append(engine.map_blocks(lambda b: b + done, x[:50], block_bytes=80).sum() - 50 * done)

    result = engine.map_blocks(lambda b: b * 2, x, block_bytes=800, progress=progress)
    assert_same(result, x * 2)
    assert inner == [x[:50].sum()] * 20


# --- what is counted ---------------------------------------------------------------------------------


def counted(engine, call):
    before = engine.stats()
    call()
    after = engine.stats()
    return after.bytes_copied - before.bytes_copied, after.bytes_shared - before.bytes_shared


def test_bytes_are_copied_once_in_and_once_out(processes):
    x = np.arange(2_000_000.0)
    out = np.empty_like(x)
    shared_x, shared_out = processes.zeros(x.shape), processes.zeros(x.shape)
    fn = lambda b: b + 1
    assert counted(processes, lambda: processes.map_blocks(fn, x, out=out))[0] == 2 * x.nbytes
    assert counted(processes, lambda: processes.map_blocks(fn, x, out=shared_out))[0] == 2 * x.nbytes
    assert counted(processes, lambda: processes.map_blocks(fn, shared_x, out=out))[0] == x.nbytes
    copied, shared = counted(processes, lambda: processes.map_blocks(fn, shared_x, out=shared_out))
    assert copied == x.nbytes
    assert shared >= x.nbytes
    halves = lambda b: b.astype("f4")
    half = np.empty(x.shape, "f4")
    assert counted(processes, lambda: processes.map_blocks(halves, x, out=half))[0] == x.nbytes * 3 // 2
    assert counted(processes, lambda: processes.reduce(np.sum, x, combine=np.add))[0] == x.nbytes
    copied, shared = counted(processes, lambda: processes.reduce(np.sum, shared_x, combine=np.add))
    assert copied == 0
    assert shared >= x.nbytes
    copied, _ = counted(
        processes, lambda: processes.map_overlap(fn, x, 3, "none", out=out, block_bytes=80_000 * 8)
    )
    assert copied == 2 * x.nbytes + 24 * 2 * 3 * 8


def test_tasks_are_counted(engine):
    before = engine.stats()
    engine.map_blocks(np.sqrt, np.ones(1000), block_bytes=80)
    engine.reduce(np.sum, np.ones(1000), combine=np.add, block_bytes=80)
    after = engine.stats()
    assert after.tasks_done - before.tasks_done == 200
    assert after.tasks_failed == before.tasks_failed
    assert after.tasks_in_flight == 0


# --- calls that end early -----------------------------------------------------------------------------


class Enough(BaseException):
    """As KeyboardInterrupt: not an Exception."""


def stop_at(n):
    def progress(done, total):
        if done == n:
            raise Enough

    return progress


def idle(engine):
    stats = engine.stats()
    return stats.tasks_in_flight == 0 and stats.ring_fill == 0


@pytest.mark.parametrize(
    ("into", "how"),
    [
        *(("fresh", how) for how in ("progress", "error", "combine")),
        *(("ordinary", how) for how in ("progress", "error", "timeout")),
        *(("shared", how) for how in ("progress", "error")),
    ],
)
def test_an_abandoned_call_leaves_nothing(into, how):
    with Engine(2, memory="32 MiB") as engine:
        x = np.arange(600_000.0)
        for n in (1, 7):
            out = {"fresh": None, "ordinary": np.zeros(x.shape), "shared": engine.zeros(x.shape)}[into]

            def fn(b, n=n):
                if b[0] == n * 20_000 and how in ("error", "timeout"):
                    if how == "timeout":
                        time.sleep(1000)
                    raise Enough
                return b + 1

            settings = {"block_bytes": 160_000}
            if how == "combine":
                with pytest.raises(Enough):
                    engine.reduce(lambda b: b.copy(), x, combine=lambda *_, n=n: stop_at(n)(n, 0), **settings)
            else:
                settings["timeout"] = 0.15 if how == "timeout" else None
                settings["progress"] = stop_at(n) if how == "progress" else None
                error = TaskTimeout if how == "timeout" else Enough
                with pytest.raises(error):
                    engine.map_blocks(fn, x, out=out, **settings)
            assert list(engine.map(abs, range(50))) == list(range(50))
            if into == "ordinary":
                before = out.copy()
                assert np.array_equal(engine.map_blocks(np.negative, x, block_bytes=8000), -x)
                assert np.array_equal(out, before)
        del out, fn
        poll_until(lambda: idle(engine), what="nothing is on its way any more")
        assert engine._backend._core.region.counters().held == 0
        poll_until(lambda: can_have(engine, 18 * MIB), what="memory is whole again")


def used(engine):
    """Bytes of main's own blocks in shared memory."""
    return engine._backend._core.region.counters().used


def can_have(engine, nbytes):
    try:
        engine.empty(nbytes, "u1")
    except MemoryBudgetExceeded:
        return False
    return True


def test_a_call_that_was_abandoned_is_taken_in_without_another(processes):
    """Nobody calls the engine any more: what was on its way must not stay in the memory."""

    def fn(b):
        if b[0] == 0:
            raise KeyError("first")
        time.sleep(0.1)
        return b + 1

    with pytest.raises(KeyError):
        processes.map_blocks(fn, np.arange(1_000_000.0), block_bytes="1 MiB")
    poll_until(lambda: idle(processes), what="nothing is on its way any more")


def test_arrays_of_a_call_that_has_ended_are_free_while_workers_are_busy():
    """What workers remember of a call must not keep its arrays alive, whatever they do next."""
    with Engine(2, memory="64 MiB") as engine:
        results = engine.map(lambda i: time.sleep(0.003), itertools.count(), window=40)
        stop = threading.Event()

        def consume():
            while not stop.is_set():
                next(results)

        consumer = threading.Thread(target=consume)
        consumer.start()
        try:
            x = engine.zeros(30 * MIB // 8)
            assert engine.reduce(np.sum, x, combine=np.add) == 0
            del x
            poll_until(lambda: used(engine) < MIB, what="the array is gone from shared memory")
        finally:
            stop.set()
            consumer.join()
            results.close()


def test_closing_the_engine_in_the_middle():
    for pause in (0, 0.02, 0.05):
        engine = Engine(2, memory="32 MiB")
        timer = threading.Timer(pause, lambda engine=engine: engine.close(wait=False))
        with contextlib.closing(engine):
            started = []

            def progress(done, total, timer=timer, started=started):
                if not started:
                    started.append(timer.start())

            with pytest.raises(Exception, match="closed"):
                engine.map_blocks(
                    lambda b: time.sleep(0.01) or b, np.zeros(2000), block_bytes=8, progress=progress
                )
            timer.join()


# --- several threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_from_several_threads(backend, workers):
    errors = []

    def repeat(k, call):
        try:
            for i in range(6):
                call(k, i)
        except BaseException as error:
            errors.append(error)

    def blocks(k, i):
        x = np.arange(60_000.0) + k
        out = [None, np.empty_like(x), engine.empty(x.shape), x][i % 4]
        expected = x * 3 + i
        assert np.array_equal(
            engine.map_blocks(lambda b: b * 3 + i, x, out=out, block_bytes=40_000), expected
        )

    def totals(k, i):
        x = np.arange(50_000) + k
        assert (
            engine.reduce(lambda b: int(b.sum()), x, combine=lambda a, b: a + b, block_bytes=8000) == x.sum()
        )

    def stream(k, i):
        assert [a[0] for a in engine.map(lambda j: np.full(6000, j + k), range(60))] == [*range(k, 60 + k)]

    def futures(k, i):
        made = [engine.submit(lambda j: j * k, j) for j in range(40)]
        assert [future.result() for future in made] == [j * k for j in range(40)]

    def fails(k, i):
        with pytest.raises(KeyError):
            engine.map_blocks(raising(7000.0), np.arange(20_000.0), block_bytes=8000)

    def overlapping(k, i):
        x = np.arange(30_000.0) * k
        assert np.array_equal(
            engine.map_overlap(lambda b: b + 1, x, 3, "periodic", block_bytes=24_000), x + 1
        )

    with Engine(workers, backend=backend, memory="64 MiB") as engine:
        calls = [blocks, totals, stream, futures, fails, overlapping, blocks, totals]
        threads = [threading.Thread(target=repeat, args=item) for item in enumerate(calls)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        poll_until(lambda: engine.stats().tasks_in_flight == 0, what="nothing is on its way any more")


# --- little memory ----------------------------------------------------------------------------------------


def test_arrays_of_many_times_the_budget():
    with Engine(2, memory="16 MiB") as engine:
        x = np.arange(15 * MIB, dtype="f8")
        out = np.empty_like(x)
        engine.map_blocks(lambda b: b + 1, x, out=out)
        x += 1
        assert np.array_equal(out, x)
        del out
        assert engine.reduce(np.max, x, combine=max) == x[-1]
        assert np.array_equal(engine.map_blocks(lambda b: b[::1], x), x)
        kept = []
        engine.reduce(
            lambda b: b[::50].copy(), x, combine=lambda _, p: kept.append(p), initial=0, block_bytes="4 MiB"
        )
        assert np.array_equal(np.concatenate([p[:1] for p in kept]), x[:: MIB // 2])


@pytest.mark.parametrize("size", [9, 40])
def test_blocks_that_are_too_large_are_an_error_or_done(size):
    """Blocks in, or results out, of more and less than what there is: right, or the error that says so."""
    with Engine(2, memory="16 MiB") as engine:
        x = np.arange(3 * size * MIB // 8, dtype="f8")
        small = x[:300]
        for call, expected in (
            (lambda: engine.map_blocks(lambda b: b + 1, x, block_bytes=size * MIB), x + 1),
            (lambda: engine.reduce(np.max, x, block_bytes=size * MIB, combine=max), x[-1]),
            (
                lambda: engine.map_blocks(
                    lambda b: np.repeat(b[:, None], size * MIB // 800, 1), small, block_bytes=800
                ),
                np.broadcast_to(small[:, None], (300, size * MIB // 800)),
            ),
        ):
            try:
                result = call()
            except MemoryBudgetExceeded:
                assert size > 4
            else:
                assert np.array_equal(result, expected)
                del result
            assert np.array_equal(engine.map_blocks(np.negative, small, block_bytes=80), -small)
        poll_until(lambda: idle(engine), what="nothing is on its way any more")


def test_results_that_fill_the_memory_while_the_first_is_slow():
    with Engine(2, memory="16 MiB") as engine:
        x = np.arange(200.0)

        def fn(b):
            if b[0] == 0:
                time.sleep(0.3)
            return np.full(100_000, b[0])

        firsts = engine.reduce(fn, x, combine=lambda a, b: [*a, b[0]], initial=[], block_bytes=8)
        assert firsts == x.tolist()


# --- plans ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_a_worker_that_comes_late(processes, shared):
    """It holds a block of before the target was known, while the other runs through all the rest."""
    x = np.arange(3000.0)
    for slow in (1, 0):
        fn = lambda b, slow=slow: (time.sleep(0.15) if b[0] == 10 * slow else None) or b + 1
        out = processes.empty(3000) if shared else np.empty(3000)
        assert_same(processes.map_blocks(fn, x, out=out, block_bytes=80), x + 1)
        assert_same(processes.map_blocks(fn, x, block_bytes=80), x + 1)


def test_many_calls_by_turns(processes):
    """More plans than a worker keeps, again and again; some of large functions."""
    x = np.arange(400.0)
    tables = [np.full(k * 3000 + 1, float(k)) for k in range(7)]
    for turn in range(20):
        for k, table in enumerate(tables):
            fn = lambda b, table=table, turn=turn: b + table[-1] + turn
            assert_same(processes.map_blocks(fn, x, block_bytes=400), x + k + turn)
    assert len({processes.submit(os.getpid).result() for _ in range(9)}) <= 2
    assert processes.stats().worker_deaths == 0


def test_two_calls_at_once_through_more_plans_than_are_kept(processes):
    """Each progress of the outer call runs others, so that workers meet its plan again after many."""
    x = np.arange(100.0)

    def progress(done, total):
        for k in range(6):
            assert (
                processes.reduce(lambda b, k=k: b.sum() * k, x, combine=np.add, block_bytes=200)
                == x.sum() * k
            )

    assert_same(processes.map_blocks(lambda b: b + 1, x, block_bytes=80, progress=progress), x + 1)
