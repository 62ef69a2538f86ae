"""Specs travel exactly, views stay inside of their memory and keep it alive, read-only is real."""

from __future__ import annotations

import itertools
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib import array_utils

from shmengine.arrays import (
    ArraySpec,
    address_of,
    decode_spec,
    encode_spec,
    extent_of,
    pack_spec,
    readonly,
    spec_of,
    view,
)
from shmengine.errors import ArrayError, Corrupt
from tests.helpers.arrays import DTYPES, LAYOUTS, NO_DTYPES, SIMPLE_DTYPES, memory_of, same_bytes

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# --- specs ---------------------------------------------------------------------------------


@each_dtype
def test_a_spec_travels_exactly(dtype):
    for make in LAYOUTS.values():
        spec = spec_of(make(dtype))
        back = decode_spec(encode_spec(spec))
        assert back == spec
        assert back.dtype.type is dtype.type or dtype.char == "q"  # longlong is int64 here
        assert back.dtype.isalignedstruct == dtype.isalignedstruct
        assert back.dtype.fields == dtype.fields
        assert back.dtype.byteorder == dtype.byteorder


@pytest.mark.parametrize("dtype", SIMPLE_DTYPES)
def test_a_usual_spec_is_small(dtype):
    assert len(encode_spec(ArraySpec(np.dtype(dtype), (1 << 40,) * 1 + (1,) * 7))) <= 112


@pytest.mark.parametrize("dtype", NO_DTYPES, ids=str)
def test_what_is_more_than_bytes_has_no_spec(dtype):
    with pytest.raises(ArrayError, match="dtype"):
        encode_spec(ArraySpec(dtype, (1,)))


def test_equal_structured_dtypes_keep_their_differences():
    plain = np.dtype([("a", "<i4")])
    for dtype in (plain, np.dtype((np.record, plain)), np.dtype([("a", "<i4")], align=True), plain):
        back = decode_spec(pack_spec(dtype, (2,))).dtype
        assert (back.type, back.isalignedstruct) == (dtype.type, dtype.isalignedstruct)


def test_nbytes_is_that_of_a_compact_copy():
    assert spec_of(np.broadcast_to(np.zeros(3), (5, 3))).nbytes == 120
    assert ArraySpec(np.dtype("f4"), ()).nbytes == 4


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_rubbish_is_corrupt(raw):
    with pytest.raises(Corrupt):
        decode_spec(b"\xff" + raw)


@settings(deadline=None)
@given(st.sampled_from(DTYPES), st.sampled_from(sorted(LAYOUTS)), st.data())
def test_damaged_specs_are_corrupt_or_other_specs(dtype, layout, data):
    raw = bytearray(encode_spec(spec_of(LAYOUTS[layout](dtype))))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    del raw[data.draw(st.integers(1, len(raw))) :]
    root = np.zeros(4096, "u1")
    try:
        array = view(root, decode_spec(bytes(raw)))
    except Corrupt:
        return
    low, high = extent_of(array)
    assert address_of(root) <= low <= high <= address_of(root) + root.nbytes


OBJECT_FIELD = (
    "{'names': ['a'], 'formats': ['|O8'], 'offsets': [0], 'titles': None, "
    "'itemsize': 8, 'aligned': False, 'record': False}"
)


@pytest.mark.parametrize(
    "text",
    ["|O8", "O", "object", "<f8,<f8", "<M8[zz]", "|V99999999999999999999", "<f3", "{}", "[]",
     "(" * 5000, "()", "1", "__import__('os')", OBJECT_FIELD, "('<f8', (1 << 60,))", "\udcff"],
)  # fmt: skip
def test_dtype_texts_that_are_none(text):
    raw = text.encode("utf-8", "surrogateescape")
    prefix = bytearray(pack_spec(np.dtype("f8"), (1,))[:16])
    prefix[4:8] = len(raw).to_bytes(4, "little")
    with pytest.raises(Corrupt):
        decode_spec(bytes(prefix) + raw)


# --- views ---------------------------------------------------------------------------------


@each_dtype
def test_a_view_reads_what_was_described(dtype):
    for make in LAYOUTS.values():
        array = make(dtype)
        root = np.concatenate([np.zeros(64, "u1"), memory_of(array)])
        again = view(root, spec_of(array), 64)
        assert same_bytes(again, array)
        assert array.size == 0 or again.strides == array.strides


@each_dtype
@pytest.mark.parametrize("writable", [True, False])
def test_the_root_lives_exactly_as_long_as_anything_derived(dtype, writable):
    for make in LAYOUTS.values():
        array = make(dtype)
        memory = bytearray(4096)
        root = np.frombuffer(memory if writable else memoryview(memory).toreadonly(), "u1")
        watch = weakref.ref(root)
        made = view(root, spec_of(array))
        del root
        assert made.flags.writeable == writable
        derived = [made[...], made.T, made.reshape(-1)[:0] if made.flags.c_contiguous else made.T.T]
        derived += [made.view(np.ndarray), np.asarray(made), readonly(made)]
        if dtype.kind not in "mM" and dtype.names is None and made.size:
            derived.append(memoryview(made))
        del made
        while derived:
            assert watch() is not None
            derived.pop()
        assert watch() is None


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "empty" not in layout])
def test_a_view_over_readonly_memory_stays_readonly(layout):
    array = LAYOUTS[layout](np.dtype("f8"))
    root = np.frombuffer(memoryview(bytearray(4096)).toreadonly(), "u1")
    made = view(root, spec_of(array))
    for one in (made, made[...], made.T, made[..., :1] if made.ndim else made.view("u8")):
        with pytest.raises(ValueError, match="WRITEABLE"):
            one.flags.writeable = True


dimensions = st.lists(st.tuples(st.integers(0, 5), st.integers(-40, 40)), max_size=4)


@settings(deadline=None)
@given(dimensions, st.integers(0, 120), st.integers(0, 128), st.sampled_from(["u1", "<f4", "<c16"]))
def test_bounds(dims, offset, nbytes, dtype):
    """Compare with the addresses of all elements, one by one."""
    shape, strides = tuple(d[0] for d in dims), tuple(d[1] for d in dims)
    spec = ArraySpec(np.dtype(dtype), shape, strides, offset)
    starts = [
        offset + sum(index * stride for index, stride in zip(place, strides, strict=True))
        for place in itertools.product(*map(range, shape))
    ]
    fits = all(start >= 0 and start + spec.dtype.itemsize <= nbytes for start in starts) and offset <= nbytes
    root = np.zeros(nbytes, "u1")
    if fits:
        made = view(root, spec)
        assert made.shape == shape
        assert not starts or address_of(made) == address_of(root) + offset
    else:
        with pytest.raises(Corrupt):
            view(root, spec)


@pytest.mark.parametrize(
    "spec",
    [
        ArraySpec(np.dtype("u1"), (2,), ((1 << 63) - 1,)),
        ArraySpec(np.dtype("u1"), (3, 3), (1 << 62, 1 << 62)),
        ArraySpec(np.dtype("u1"), (3,), (-(1 << 62),), 64),
        ArraySpec(np.dtype("u1"), (1 << 40,), (0,), 65),
        ArraySpec(np.dtype("u1"), (1 << 62,)),
        ArraySpec(np.dtype("u1"), (0, 1 << 62, 1 << 62), None, 65),
        ArraySpec(np.dtype("u1"), (2,), (1, 1)),
        ArraySpec(np.dtype("u1"), (65,)),
        ArraySpec(np.dtype("u1"), (1,), None, 64),
    ],
)
def test_huge_numbers_do_not_wrap_around(spec):
    with pytest.raises(Corrupt):
        view(np.zeros(64, "u1"), spec)


# --- addresses -----------------------------------------------------------------------------


@each_dtype
def test_extent_of(dtype):
    for make in LAYOUTS.values():
        array = make(dtype)
        assert address_of(array) == array.__array_interface__["data"][0]
        if array.nbytes:
            assert extent_of(array) == array_utils.byte_bounds(array)
        else:
            assert extent_of(array)[0] == extent_of(array)[1]


# --- readonly ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, np.dtype("O")], ids=str)
def test_readonly_cannot_be_undone(dtype):
    for make in LAYOUTS.values():
        array = make(dtype) if dtype.char != "O" else make(np.dtype("i2")).astype(object)
        made = readonly(array)
        assert same_bytes(made, array)
        assert type(made) is np.ndarray
        if array.nbytes:
            assert address_of(made) == address_of(array)
            assert made.strides == array.strides
        for one in (made, made[...], made.T):
            with pytest.raises(ValueError, match="WRITEABLE"):
                one.flags.writeable = True


def test_readonly_keeps_its_array_alive():
    for dtype, cut in (("f8", slice(None)), ("M8[s]", slice(None)), ("f8", slice(None, None, -3))):
        array = np.zeros(1000, dtype)[cut]
        watch = weakref.ref(array)
        made = readonly(array)
        del array
        assert watch() is not None
        del made
        assert watch() is None


def test_readonly_sees_later_changes():
    array = np.zeros((4, 4))
    made = readonly(array[::2])
    array[2, 1] = 5
    assert made[1, 1] == 5


def test_readonly_memmap_stays_a_memmap(tmp_path):
    array = np.memmap(tmp_path / "data", "f8", "w+", shape=(4, 4))
    made = readonly(array[1:])
    assert type(made) is np.memmap
    assert made.filename == array.filename
    with pytest.raises(ValueError, match="WRITEABLE"):
        made.flags.writeable = True


@pytest.mark.parametrize(
    "array", [np.ma.masked_array([1, 2], [0, 1]), np.rec.array([(1,)], dtype=[("a", "i4")])]
)
def test_readonly_keeps_subclasses(array):
    made = readonly(array)
    assert type(made) is type(array)
    assert not made.flags.writeable
    assert array.flags.writeable
