"""What goes into a frame comes out of it; a damaged frame is refused; its memory lives with its arrays."""

from __future__ import annotations

import collections
import datetime as dt
import enum
import functools
import struct
import threading
import weakref
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from shmengine.arrays import address_of, extent_of
from shmengine.codec import (
    SharedReference,
    decode,
    decode_exception,
    encode,
    encode_exception,
    inspect_frame,
)
from shmengine.errors import (
    Corrupt,
    RemoteError,
    RemoteTraceback,
    SerializationError,
    ShmError,
    StaleReference,
    Timeout,
)
from tests.helpers import run_script
from tests.helpers.arrays import DTYPES, LAYOUTS, filled, same_bytes

BIG = 1 << 17


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


@pytest.mark.parametrize(("what", "obj"), list(out_of_band_examples()), ids=lambda value: str(value)[:30])
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


# --- objects ---------------------------------------------------------------------------------

numbers = st.integers() | st.floats() | st.booleans() | st.none() | st.complex_numbers(allow_nan=False)
keys = st.integers() | st.text() | st.binary() | st.booleans() | st.tuples(st.integers(), st.text())
small_arrays = st_numpy.arrays(
    st_numpy.scalar_dtypes() | st.just(np.dtype([("a", "i4"), ("b", "f8")])),
    st_numpy.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)
nested = st.recursive(
    numbers | st.text() | st.binary() | small_arrays,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(nested, st.booleans())
def test_any_nest_of_values_and_arrays(obj, allow_pickle):
    frame = frame_of(obj, allow_pickle=allow_pickle, extra=9)
    assert same(decode(frame, allow_pickle=allow_pickle), obj)
    assert same(decode(frame, allow_pickle=allow_pickle, copy=True), obj)


class Colour(enum.Enum):
    RED = 1


class Point(NamedTuple):
    x: object
    y: object


@pytest.mark.parametrize(
    "obj",
    [
        *(None, 1, 1 << 100, "text", "\ud800", b"", {1, 2}, frozenset("ab"), ..., NotImplemented, int, len),
        *(np.float32(1.5), np.datetime64("2020-01-01"), np.dtype("f8"), np.bool(True), np.sqrt, np.ndarray),
        *(dt.date(2020, 1, 1), collections.OrderedDict(a=1), collections.deque([1, 2]), Colour.RED),
        *(Point(1, 2), slice(1, 2), range(3), functools.reduce),
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("by_value", [True, False])
def test_objects(obj, by_value):
    back = round_trip(obj, by_value=by_value)
    assert back == obj
    assert type(back) is type(obj)


def test_random_generators_continue():
    generator = np.random.default_rng(7)
    assert round_trip(generator).random() == np.random.default_rng(7).random()


def test_one_object_met_twice_stays_one():
    array = np.arange(1000)
    shared = [1]
    encoded = encode([array, {"again": array}, shared, shared])
    assert encoded.bytes_inline == array.nbytes
    back = decode(encoded.to_bytes())
    assert back[0] is back[1]["again"]
    assert back[2] is back[3]
    plain = encode([array, [array]], allow_pickle=False)
    assert plain.bytes_inline == array.nbytes
    back = decode(plain.to_bytes())
    assert back[0] is back[1][0]


def test_many_arrays_are_not_mixed_up():
    arrays = [np.full(n % 5, n) for n in range(500)]
    back = round_trip({n: [array, arrays[n // 2]] for n, array in enumerate(arrays)})
    assert all(same(back[n], [arrays[n], arrays[n // 2]]) for n in range(500))


def test_lambdas_closures_and_local_classes_go_by_value():
    captured = np.arange(float(BIG))

    class Local:
        def __init__(self):
            self.data = captured

    function, instance = round_trip([lambda x: x + captured.sum(), Local()])
    assert function(1) == 1 + captured.sum()
    assert (instance.data == captured).all()
    assert encode(lambda: captured).bytes_inline == captured.nbytes


MAIN_SCRIPT = """
import functools, subprocess, sys, types, typing
from shmengine.codec import encode

class Thing:
    def __init__(self, x): self.x = x
    def double(self): return helper(self.x)

def helper(x): return 2 * x

dynamic = types.ModuleType("made_at_run_time")
exec("class Made:\\n    value = 7\\ndef made(): return Made.value", dynamic.__dict__)
sys.modules["made_at_run_time"] = dynamic

@functools.lru_cache(maxsize=50)
def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

T = typing.TypeVar("T")
alone = [encode(obj).to_bytes() for obj in (fibonacci, T, functools.partial(helper, 3), Thing(3).double)]
frame = encode([Thing(21), {"k": (helper, Thing)}, dynamic.Made(), dynamic.made, alone]).to_bytes()
reader = '''
import sys
from shmengine.codec import decode
thing, rest, made, function, alone = decode(sys.stdin.buffer.read())
print(thing.double(), rest["k"][0](4), rest["k"][1](5).double(), made.value, function())
fibonacci, T, partial, method = map(decode, alone)
print(fibonacci(50), fibonacci.cache_parameters()["maxsize"], T.__name__, partial(), method())
'''
print(subprocess.run([sys.executable, "-c", reader], input=frame, capture_output=True).stdout.decode())
"""


def test_what_others_cannot_import_goes_by_value():
    result = run_script(MAIN_SCRIPT)
    assert result.stdout.split() == ["42", "8", "10", "7", "7", "12586269025", "50", "T", "6", "6"], (
        result.stderr
    )


def test_by_reference_is_what_pickle_does():
    with pytest.raises(SerializationError):
        encode([lambda: 1], by_value=False)


def test_encoding_inside_of_encoding():
    class Nested:
        def __reduce__(self):
            return decode, (encode([np.arange(3), 5]).to_bytes(),)

    array = np.arange(10)
    back = round_trip([array, Nested(), array])
    assert back[0] is back[2]
    assert same(back[1], [np.arange(3), 5])


def test_threads_do_not_mix_their_frames():
    failures = []

    def work(number):
        for step in range(200):
            obj = [number, np.full(step, number), {"s": step}, Point(number, np.arange(step))]
            if not same(round_trip(obj), obj):
                failures.append((number, step))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# --- what cannot be pickled ------------------------------------------------------------------

LOCK = threading.Lock()


class Holder:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


class Slotted:
    __slots__ = ("lock",)


def slotted():
    holder = Slotted()
    holder.lock = LOCK
    return holder


def closing_over():
    lock = LOCK
    return lambda: lock


class Refuses:
    def __reduce__(self):
        raise RuntimeError("not me")


@pytest.mark.parametrize(
    ("obj", "path"),
    [
        (LOCK, "x"),
        ([1, {"lock": LOCK}], "x[1]['lock']"),
        ((Holder(a=1, b=[LOCK]),), "x[0].b[0]"),
        (slotted(), "x.lock"),
        ({LOCK: 1}, f"x.key({LOCK!r})"),
        (closing_over(), "x.<closure lock>"),
        (functools.partial(print, 1, end=LOCK), "x.keywords['end']"),
        (np.array([[None, LOCK]], dtype=object), "x[0, 1]"),
        ([Refuses()], "x[0]"),
        ((x for x in ()), "x"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_path_leads_to_the_culprit(obj, path):
    with pytest.raises(SerializationError) as caught:
        encode(obj, label="x")
    assert caught.value.path == path
    assert path in str(caught.value)
    assert caught.value.__cause__ is not None


def test_endless_recursion_is_an_error_with_a_path():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(SerializationError):
        encode(deep)
    while deep:  # so that its deallocation does not recurse
        deep = deep.pop()


def test_a_failure_leaves_nothing_behind():
    array = np.arange(10)
    for _ in range(3):
        with pytest.raises(SerializationError):
            encode([array, LOCK])
        assert same(round_trip([array, 1]), [array, 1])


@pytest.mark.parametrize(
    ("obj", "path"),
    [
        ([1, {"a": (2, {3})}], "[1]['a'][1]"),
        ([lambda: 1], "[0]"),
        (np.array([None]), ""),
        ({"a": np.ma.masked_array([1])}, "['a']"),
        ([True, Colour.RED], "[1]"),
        ([Point(1, 2)], "[0]"),
        ([np.float64(1)], "[0]"),
        ([bytearray(b"")], "[0]"),
    ],
)
def test_plain_frames_refuse_what_needs_a_pickle(obj, path):
    with pytest.raises(SerializationError, match="allow_pickle") as caught:
        encode(obj, allow_pickle=False)
    assert caught.value.path == path


def test_plain_frames_refuse_cycles():
    cycle = []
    cycle.append(cycle)
    with pytest.raises(SerializationError, match="nested"):
        encode(cycle, allow_pickle=False)


def test_a_pickle_is_refused_unread():
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    frame = frame_of(Trap())
    with pytest.raises(SerializationError, match="allow_pickle"):
        decode(frame, allow_pickle=False)


def test_what_cannot_be_unpickled_here():
    class Broken:
        def __reduce__(self):
            return struct.unpack, ("<Q", b"")

    with pytest.raises(SerializationError, match=r"unpickle.*unpack requires") as caught:
        decode(frame_of(Broken()))
    assert isinstance(caught.value.__cause__, struct.error)


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
    [1, 2.5, "text", None, {"k": (1, 2)}],
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


# --- exceptions ------------------------------------------------------------------------------


class NeedsTwo(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


class HoldsLock(Exception):
    def __init__(self, text):
        super().__init__(text)
        self.lock = LOCK


class TextFails(Exception):
    def __str__(self):
        raise ValueError("no text")


def raised(error):
    try:
        try:
            raise KeyError("first")
        except KeyError:
            raise error from None
    except BaseException as caught:
        return caught


def travel(error):
    return decode_exception(decode(encode(encode_exception(error), allow_pickle=False).to_bytes()))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bad", 3),
        KeyError("k"),
        OSError(2, "gone", "file"),
        UnicodeDecodeError("utf-8", b"abc", 0, 1, "why"),
        SystemExit(3),
        KeyboardInterrupt(),
        Timeout("waiting", 2.5),
        Corrupt("bits", "magic"),
        ExceptionGroup("several", [ValueError(1), TypeError(2)]),
        np.exceptions.AxisError(3, 2),
    ],
    ids=lambda error: type(error).__name__,
)
def test_exceptions_travel(error):
    error = raised(error)
    error.add_note("task 17")
    back = travel(error)
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert back.args == error.args or isinstance(error, ExceptionGroup)
    assert back.__notes__ == ["task 17"]
    assert isinstance(back.__cause__, RemoteTraceback)
    assert "raise error from None" in str(back.__cause__)
    assert type(error).__name__ in str(back.__cause__)


@pytest.mark.parametrize("error", [NeedsTwo(1, 2), HoldsLock("held")], ids=lambda e: type(e).__name__)
def test_exceptions_that_cannot_travel(error):
    error = raised(error)
    error.add_note("task 17")
    back = travel(error)
    assert type(back) is RemoteError
    assert back.type_name.endswith(type(error).__name__)
    assert type(error).__name__ in str(back)
    assert back.__notes__ == ["task 17"]
    assert "raise error from None" in str(back.__cause__)


def test_an_exception_without_a_text_travels():
    back = travel(raised(TextFails()))
    assert type(back) is TextFails
    assert "TextFails" in str(back.__cause__)


def test_an_exception_may_carry_arrays():
    error = ValueError(np.arange(1000))
    back = travel(error)
    assert (back.args[0] == error.args[0]).all()
    assert back.args[0].flags.writeable


def test_a_local_exception_class_travels():
    class Local(Exception):
        pass

    back = travel(raised(Local("here")))
    assert type(back).__name__ == "Local"
    assert str(back) == "here"
