"""What goes into a frame comes out of it; a damaged frame is refused; its memory lives with its arrays."""

from __future__ import annotations

import pickle
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from shmengine.arrays import address_of, extent_of
from shmengine.codec import (
    HEADER_BYTES,
    SharedReference,
    decode,
    encode,
    inspect_frame,
)
from shmengine.errors import (
    Corrupt,
    ShmError,
    StaleReference,
)
from tests.helpers.arrays import DTYPES, LAYOUTS, aligned, filled, frame_of, round_trip, same, same_bytes

BIG = 1 << 17


class Holder:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


# --- arrays ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("allow_pickle", [True, False])
def test_every_array_travels(dtype, allow_pickle):
    for layout, make in LAYOUTS.items():
        array = make(dtype)
        array.flags.writeable = False
        for pack, unpack in (
            (lambda x: x, lambda x: x),
            (lambda x: (1, [((x,), {})]), lambda x: x[1][0][0][0]),
        ):
            encoded = encode(pack(array), allow_pickle=allow_pickle)
            back = unpack(decode(encoded.to_bytes(), allow_pickle=allow_pickle))
            assert same_bytes(back, array), layout
            assert not back.flags.writeable
            if array.size > 1 and layout in ("C", "F") and dtype.itemsize:
                assert back.strides == np.empty_like(array).strides, layout
            private = unpack(decode(encoded.to_bytes(), allow_pickle=allow_pickle, copy=True))
            assert same_bytes(private, array), layout
            assert private.flags.writeable
            assert private.flags.owndata


def test_memory_order_is_kept():
    cube = np.arange(24).reshape(2, 3, 4)
    assert round_trip(np.asfortranarray(cube)).flags.f_contiguous
    assert round_trip(np.asfortranarray(cube)[::-1]).flags.f_contiguous
    assert round_trip(cube[:, ::2]).flags.c_contiguous
    assert round_trip(cube.transpose(1, 0, 2)).flags.c_contiguous


def test_repeated_elements_travel_once():
    array = np.broadcast_to(np.arange(3.0)[:, None], (4, 3, 1 << 20))
    encoded = encode(array)
    assert encoded.bytes_inline == 24
    memory = aligned(encoded.nbytes)
    encoded.write_into(memory)
    back = decode(memory)
    assert back.shape == array.shape
    assert (back[:, :, ::1000] == array[:, :, ::1000]).all()
    assert not back.flags.writeable  # many elements in one place


any_array = st_numpy.arrays(
    st_numpy.array_dtypes(allow_subarrays=True) | st_numpy.scalar_dtypes(),
    st_numpy.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)


@settings(deadline=None)
@given(any_array, st.data())
def test_any_array_in_any_slicing(array, data):
    if array.ndim:
        array = array[
            data.draw(st_numpy.basic_indices(array.shape, allow_ellipsis=False, allow_newaxis=True))
        ]
        array = np.asarray(array).T
    back = round_trip(array)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    if array.dtype.names is None:
        assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "array",
    [
        np.ma.masked_array(
            np.arange(6.0).reshape(2, 3), [[0, 1, 0], [1, 1, 0]], fill_value=-1, hard_mask=True
        ),
        np.ma.masked_array([1, 2, 3]),
        np.ma.masked_array(np.arange(8).reshape(2, 4).T, mask=True)[::2],
        np.ma.masked_array([(1, 2.0)], [(0, 1)], dtype=[("a", "i4"), ("b", "f8")]),
        np.ma.masked_array(np.array(["2020", "2021"], "M8[Y]"), [1, 0]),
    ],
)
def test_masked_arrays(array):
    back = round_trip(array)
    assert type(back) is np.ma.MaskedArray
    assert back.dtype == array.dtype
    assert (back.data == array.data).all()
    assert (np.ma.getmaskarray(back) == np.ma.getmaskarray(array)).all()
    assert (back.mask is np.ma.nomask) == (array.mask is np.ma.nomask)
    assert str(back.fill_value) == str(array.fill_value)
    assert back.hardmask == array.hardmask
    assert str(back) == str(array)
    private = decode(frame_of(array), copy=True)
    private[0] = np.ma.masked
    assert private[0] is np.ma.masked or private[0].mask is not False


def test_the_masked_constant_stays_one():
    assert round_trip([np.ma.masked])[0] is np.ma.masked


class Tagged(np.ndarray):
    """A subclass with attributes, found under its name by readers."""

    def __array_finalize__(self, source):
        self.tag = getattr(source, "tag", None)


class CustomPickled(np.ndarray):
    """The pattern of numpy's documentation."""

    unit = "m"

    def __reduce__(self):
        function, args, state = super().__reduce__()
        return function, args, (*state, self.unit)

    def __setstate__(self, state):
        self.unit = state[-1]
        super().__setstate__(state[:-1])


def test_subclasses_keep_class_and_attributes():
    array = np.arange(6.0).reshape(2, 3).view(Tagged)
    array.tag = [array, "tag"]  # refers to itself
    back = round_trip(array)
    assert type(back) is Tagged
    assert back.tag[0] is back
    assert back.tag[1] == "tag"
    assert (back == array).all()

    custom = np.arange(6.0).view(CustomPickled)
    custom.unit = "km"
    back = round_trip(custom)
    assert type(back) is CustomPickled
    assert back.unit == "km"
    assert (back == custom).all()


def test_records_and_matrices():
    record = np.rec.array([(1, 2.5), (3, 4.5)], dtype=[("a", "i4"), ("b", "f8")])
    back = round_trip(record)
    assert type(back) is np.recarray
    assert (back.b == [2.5, 4.5]).all()
    assert type(back[0]) is np.record
    matrix = np.arange(4).reshape(2, 2).view(np.matrix)
    assert type(round_trip(matrix)) is np.matrix
    assert (round_trip(matrix) == matrix).all()


def test_what_is_more_than_bytes_goes_by_pickle():
    inner = np.arange(5.0)
    array = np.array([None, {"a": inner}, "x"], dtype=object)
    back = round_trip(array)
    assert back.dtype == object
    assert (back[1]["a"] == inner).all()
    assert encode(array).bytes_inline == inner.nbytes
    text = np.array(["a", "longer than before" * 3], dtype=np.dtypes.StringDType())
    assert (round_trip(text) == text).all()
    mixed = np.array([(1, None)], dtype=[("a", "i4"), ("b", "O")])
    assert round_trip(mixed).tolist() == mixed.tolist()


def out_of_band_examples():
    floats = np.arange(float(BIG))
    times = floats.astype("M8[s]")
    yield "contiguous", floats
    yield "Fortran", floats.reshape(2, -1).T
    yield "strided", floats[::2]
    yield "negative", floats[::-1]
    yield "datetime64", times
    yield "timedelta64", times - times[0]
    yield "structured", np.zeros(BIG, [("a", "i4"), ("b", "M8[ns]")])
    yield "recarray", np.zeros(BIG, [("a", "i4"), ("b", "f8")]).view(np.recarray)
    yield "masked", np.ma.masked_array(floats, floats > 5)
    yield "masked strided datetimes", np.ma.masked_array(times, times > times[5])[::3]
    yield "subclass", floats.view(Tagged)
    yield "strings", floats.astype("S8")
    yield "memoryview", memoryview(floats)
    yield "pieces of a memoryview", memoryview(floats)[::2]


@pytest.mark.parametrize(
    ("what", "obj"), [pytest.param(*example, id=example[0]) for example in out_of_band_examples()]
)
def test_array_data_is_never_in_the_pickle(what, obj):
    encoded = encode([obj])
    info = inspect_frame(encoded.to_bytes())
    assert info.in_band_bytes < 1000
    assert encoded.bytes_inline >= obj.nbytes
    assert encoded.nbytes < encoded.bytes_inline + 2000


@pytest.mark.parametrize("cls", [bytes, bytearray])
def test_big_bytes_are_copied_straight_into_the_frame(cls):
    big = cls(b"x" * BIG)
    encoded = encode({"big": big, "small": cls(b"y")})
    assert encoded.bytes_inline == BIG
    assert any(piece is big for piece in encoded._body)
    back = decode(encoded.to_bytes())
    assert back == {"big": big, "small": cls(b"y")}
    assert type(back["big"]) is cls


def test_memoryviews():
    floats = np.arange(6.0).reshape(2, 3)
    back = round_trip(memoryview(floats))
    assert type(back) is memoryview
    assert (back.format, back.shape, back.readonly) == ("d", (2, 3), True)
    assert back == memoryview(floats)
    assert round_trip(memoryview(b"abc")) == b"abc"
    assert round_trip(memoryview(floats.T)).tolist() == floats.T.tolist()
    assert round_trip(memoryview(b"")).tolist() == []
    assert round_trip([memoryview(bytearray(b"abcdef"))[::2]])[0].tolist() == list(b"ace")


# --- shared memory ---------------------------------------------------------------------------


class Arena:
    """A block of pretended shared memory."""

    def __init__(self):
        self.root = aligned(1 << 16)
        self.asked = []

    def share(self, array):
        low, high = extent_of(array)
        start = address_of(self.root)
        if start <= low and high <= start + self.root.nbytes:
            return SharedReference(1 << 62, 5, 77, low - start)
        return None

    def resolve(self, reference):
        self.asked.append(reference)
        assert reference[:3] == (1 << 62, 5, 77)
        return self.root


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype", [np.dtype("<f8"), np.dtype("M8[s]"), np.dtype([("a", "i4"), ("b", "i1")])], ids=str
)
def test_shared_arrays_go_by_reference(dtype, layout):
    arena = Arena()
    sample = LAYOUTS[layout](dtype)
    if layout in ("strided", "negative", "empty strided"):
        base = arena.root[64 : 64 + 12 * 12 * dtype.itemsize].view(dtype).reshape(12, 12)
        array = base[10:2:-3, 1::2] if layout != "empty strided" else base[4:4, ::-2]
    else:
        array = np.ndarray(sample.shape, dtype, arena.root, 128, sample.strides)
    for obj in (array, {"k": [array]}):
        encoded = encode(obj, share=arena.share)
        assert (encoded.bytes_inline, encoded.bytes_shared) == (0, array.nbytes)
        assert len(encoded.references) == 1
        assert encoded.nbytes < 900
        back = decode(encoded.to_bytes(), resolve=arena.resolve)
        back = back if obj is array else back["k"][0]
        assert (back.shape, back.dtype) == (array.shape, array.dtype)
        if array.size:
            assert (address_of(back), back.strides) == (address_of(array), array.strides)
            assert back.flags.writeable
        private = decode(encoded.to_bytes(), resolve=arena.resolve, copy=True)
        assert not np.shares_memory(private if obj is array else private["k"][0], arena.root)
    assert set(arena.asked) == set(encoded.references)


def test_shared_and_other_arrays_in_one_object():
    arena = Arena()
    arena.root[:] = np.arange(arena.root.size) % 251
    shared, other = arena.root[256:512], np.arange(100)
    masked = np.ma.masked_array(shared, shared > 5)
    obj = [other, shared, masked, lambda: shared, Holder(a=other[::2])]
    encoded = encode(obj, share=arena.share)
    assert len(encoded.references) >= 2
    back = decode(encoded.to_bytes(), resolve=arena.resolve)
    assert (back[0] == other).all()
    assert address_of(back[1]) == address_of(shared)
    assert np.shares_memory(back[2].data, arena.root)
    assert np.shares_memory(back[3](), arena.root)
    assert (back[4].a == other[::2]).all()


def test_shared_buffers_are_bytes():
    arena = Arena()
    root = arena.root[: 1 << 12]
    frame = frame_of([pickle.PickleBuffer(root)], share=arena.share)
    (got,) = decode(frame, resolve=arena.resolve)
    assert type(got) is memoryview
    assert got.nbytes == root.nbytes
    frame = frame_of([root.view("M8[s]")], share=arena.share).copy()
    what = HEADER_BYTES + 20
    assert frame[what] == 2
    frame[what] = 4  # an array that pretends to be a buffer
    with pytest.raises(Corrupt, match="a buffer of 1 dimensions of datetime64"):
        decode(frame, resolve=arena.resolve, verify=False)


def test_references_that_nobody_resolves():
    arena = Arena()
    frame = frame_of(arena.root[:64], share=arena.share)
    with pytest.raises(StaleReference):
        decode(frame)

    def gone(reference):
        raise StaleReference(f"block {reference.block} is free")

    with pytest.raises(StaleReference, match="block 5"):
        decode(frame, resolve=gone)
    with pytest.raises(Corrupt):
        decode(frame, resolve=lambda reference: arena.root[:63])


# --- frames ----------------------------------------------------------------------------------


def test_header_says_who_sent_it():
    encoded = encode([1, np.arange(3)])
    memory = aligned(encoded.nbytes + 100)
    encoded.write_into(memory, sequence=1 << 63, producer=77)
    info = inspect_frame(memory)
    assert (info.sequence, info.producer, info.nbytes) == (1 << 63, 77, encoded.nbytes)
    assert (memory[encoded.nbytes :] == 0xAA).all()
    assert same(decode(memory), [1, np.arange(3)])


def test_one_encoding_can_be_written_often():
    array = np.zeros(3)
    encoded = encode([array])
    frames = []
    for value in range(3):
        array[:] = value
        frames.append(encoded.to_bytes())
    assert [decode(frame)[0][0] for frame in frames] == [0, 1, 2]


@pytest.mark.parametrize("obj", [filled((9,), "f8"), (1, [filled((3, 3), "f4").T, filled((5,), "S3")])])
def test_parts_are_aligned(obj):
    frame = frame_of(obj)
    back = decode(frame)
    for part in [back] if isinstance(back, np.ndarray) else back[1]:
        assert address_of(part) % 64 == 0
        assert np.shares_memory(part, frame)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, np.array])
def test_frames_come_in_any_buffer(kind):
    raw = encode([1, np.arange(3)]).to_bytes()
    frame = np.frombuffer(raw, "u1").copy() if kind is np.array else kind(raw)
    assert same(decode(frame), [1, np.arange(3)])
    encode([2]).write_into(memory := bytearray(500))
    assert decode(memory) == [2]


EXAMPLES = [
    np.arange(20.0),
    np.asfortranarray(np.arange(12).reshape(3, 4)),
    (3, 4, [((np.arange(9), np.arange(4.0)[::2]), {"k": "v"})]),
    [1, 2.5, "text", None, {"k": (1, 2)}, np.int16(3), np.datetime64(3, "s"), np.str_("text"), np.void(b"v")],
    np.ma.masked_array([1, 2, 3], [0, 1, 0]),
    {"view": memoryview(b"abc" * 50)},
]


@pytest.mark.parametrize("obj", EXAMPLES, ids=lambda obj: type(obj).__name__)
@pytest.mark.parametrize("checksum", [False, True])
def test_every_flipped_bit_is_noticed_or_harmless(obj, checksum):
    """With a checksum over everything no flip goes unnoticed; without, only array data can change."""
    encoded = encode(obj)
    memory = aligned(encoded.nbytes)
    encoded.write_into(memory, checksum=checksum)
    info = inspect_frame(memory)
    checked_end = 64 + info.checked_bytes
    assert checked_end >= (encoded.nbytes if checksum else 64 + info.prefix_bytes + info.in_band_bytes)
    for position in range(encoded.nbytes):
        memory[position] ^= 1 << (position % 8)
        if position < checked_end:
            with pytest.raises(Corrupt):
                decode(memory)
        else:
            decode(memory)
        memory[position] ^= 1 << (position % 8)
    decode(memory)


@pytest.mark.parametrize("obj", EXAMPLES, ids=lambda obj: type(obj).__name__)
def test_a_cut_frame_is_corrupt(obj):
    frame = frame_of(obj)
    for nbytes in range(frame.nbytes):
        with pytest.raises(Corrupt):
            decode(frame[:nbytes])


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_corrupt(raw):
    for verify in (True, False):
        with pytest.raises(Corrupt):
            decode(raw, verify=verify)
        with pytest.raises(Corrupt):
            decode(b"SHMF\x01" + raw, verify=verify)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(range(len(EXAMPLES))), st.booleans(), st.data())
def test_without_checksums_nothing_leaves_the_frame(number, plain, data):
    """Damage the header and tables behind the checksum's back: a clean error, or arrays inside."""
    obj = EXAMPLES[number]
    if number == 3 and plain:
        frame = frame_of(obj, allow_pickle=False).copy()
    else:
        frame = frame_of(obj).copy()
    info = inspect_frame(frame)
    for _ in range(data.draw(st.integers(1, 4))):
        # The pickle itself is left alone: without a checksum it may do whatever a pickle can.
        end = frame.nbytes if info.kind != 1 else 64 + info.prefix_bytes
        frame[data.draw(st.integers(4, end - 1))] = data.draw(st.integers(0, 255))
    try:
        back = decode(frame, verify=False)
    except ShmError:
        return
    stack, start = [back], address_of(frame)
    while stack:
        one = stack.pop()
        if isinstance(one, np.ndarray) and one.nbytes:
            low, high = extent_of(one)
            assert start <= low <= high <= start + frame.nbytes
        elif isinstance(one, (list, tuple)):
            stack += one
        elif isinstance(one, dict):
            stack += one.values()


# --- lifetimes -------------------------------------------------------------------------------


@pytest.mark.parametrize("obj", EXAMPLES, ids=lambda obj: type(obj).__name__)
def test_the_frame_lives_exactly_as_long_as_its_arrays(obj):
    raw = encode(obj).to_bytes()
    root = np.frombuffer(memoryview(bytearray(raw)).toreadonly(), "u1")
    watch = weakref.ref(root)
    back = decode(root)
    del root
    if type(obj) is list:  # no array in it
        assert watch() is None
        return
    assert watch() is not None
    part = back[2][0][0][0] if type(back) is tuple else back["view"] if type(back) is dict else back
    part = part[1:]
    del back
    assert watch() is not None
    del part
    assert watch() is None


def test_private_copies_let_the_frame_go():
    for obj in EXAMPLES:
        root = np.frombuffer(bytearray(encode(obj).to_bytes()), "u1")
        watch = weakref.ref(root)
        back = decode(root, copy=True)
        del root
        assert watch() is None
        del back


def test_encoders_keep_nothing():
    array = np.arange(5.0)
    watch = weakref.ref(array)
    encoded = encode((1, [array, Holder(a=array)]))
    decode(encoded.to_bytes())
    encode((1, [array]))
    del array
    assert watch() is not None  # it has not been written yet
    del encoded
    assert watch() is None
