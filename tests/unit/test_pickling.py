"""Objects travel by value or by reference as they should, and failures say whose fault it was."""

from __future__ import annotations

import collections
import datetime as dt
import enum
import functools
import struct
import sys
import threading
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from shmengine import plain
from shmengine.arrays import pack_spec
from shmengine.codec import decode, encode
from shmengine.culprit import MOST_STEPS
from shmengine.errors import (
    Corrupt,
    RemoteError,
    RemoteTraceback,
    SerializationError,
    Timeout,
)
from shmengine.exceptions import decode_exception, encode_exception
from shmengine.plain import load_plain
from tests.helpers import run_script
from tests.helpers.arrays import STRUCTURED_DTYPES, filled, frame_of, numpy_scalars, round_trip, same

BIG = 1 << 17


# --- objects ---------------------------------------------------------------------------------

numbers = st.integers() | st.floats() | st.booleans() | st.none() | st.complex_numbers(allow_nan=False)
keys = st.integers() | st.text() | st.binary() | st.booleans() | st.tuples(st.integers(), st.text())
small_arrays = st_numpy.arrays(
    st_numpy.scalar_dtypes() | st.just(np.dtype([("a", "i4"), ("b", "f8")])),
    st_numpy.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)
nested = st.recursive(
    numbers | st.text() | st.binary() | small_arrays | numpy_scalars(),
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
        *(None, 1, 1 << 100, "text", "\ud800", b"", {1, 2}, frozenset((1, 2)), ..., NotImplemented, int, len),
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


class Counts:
    """Its methods go by reference, as it does itself."""

    @classmethod
    def count(cls):
        return sys._getframe().f_code.co_filename

    def name(self):
        return self.count()


def test_methods_of_importable_classes_go_by_reference():
    assert decode(encode(Counts.count).to_bytes())() == __file__
    assert decode(encode(Counts().name).to_bytes())() == __file__


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
    with pytest.raises(SerializationError, match="recursion") as caught:
        encode(deep)
    assert caught.value.path == "[0]" * MOST_STEPS  # a few steps in, and not all of them
    while deep:  # so that its deallocation does not recurse
        deep = deep.pop()


def test_a_failure_leaves_nothing_behind():
    array = np.arange(10)
    for _ in range(3):
        with pytest.raises(SerializationError):
            encode([array, LOCK])
        assert same(round_trip([array, 1]), [array, 1])


class Number(np.float64):
    pass


class NoText:
    def __repr__(self):
        raise OSError("no text")


@pytest.mark.parametrize(
    ("obj", "path"),
    [
        ([1, {"a": (2, {3})}], "[1]['a'][1]"),
        ([lambda: 1], "[0]"),
        (np.array([None]), ""),
        ({"a": np.ma.masked_array([1])}, "['a']"),
        ([True, Colour.RED], "[1]"),
        ([Point(1, 2)], "[0]"),
        ([Number(1)], "[0]"),
        ([np.zeros(1, "O,i4")[0]], "[0]"),
        ([bytearray(b"")], "[0]"),
        ({10**5000: {1}}, "[<int>]"),
        ({(10**5000,): {1}}, "[<tuple>]"),
        ({NoText(): 1}, ".key(<NoText>)"),
    ],
)
def test_plain_frames_refuse_what_needs_a_pickle(obj, path):
    with pytest.raises(SerializationError, match="allow_pickle") as caught:
        encode(obj, allow_pickle=False)
    assert caught.value.path == path


SCALARS = [
    *(np.dtype(character).type(True) for character in "?bhilqBHILQefdgFDG"),
    *(np.float64(np.nan), np.float32(-0.0), np.complex128(complex(np.inf, -0.0)), np.longdouble(1) / 3),
    *(np.str_("näme\0"), np.str_(""), np.str_("\ud800"), np.bytes_(b"a\0\0"), np.bytes_(b"")),
    *(np.datetime64("2020-02-29T12", "ms"), np.datetime64(3, "25s"), np.datetime64("NaT", "s")),
    *(np.timedelta64(-5, "D"), np.timedelta64("NaT", "ns")),
    # No unit: NumPy 2.5 warns who makes one otherwise.
    *(np.frombuffer(bytes(7) + b"\x80", dtype)[0] for dtype in ("M8", "m8")),
    *(np.void(b"a\0"), np.zeros(1, "V0")[0]),
    *(filled(2, dtype)[1] for dtype in STRUCTURED_DTYPES),
]


@pytest.mark.parametrize("scalar", SCALARS, ids=lambda scalar: f"{type(scalar).__name__} {scalar.dtype}")
def test_plain_frames_take_scalars_of_numpy(scalar):
    back = round_trip({"mean": scalar}, allow_pickle=False)["mean"]
    assert type(back) is type(scalar)
    assert back.dtype == scalar.dtype
    assert back.flags.writeable == scalar.flags.writeable
    if scalar.dtype.names is None:
        assert back.tobytes() == scalar.tobytes()
    else:
        assert not scalar.dtype.names or back == scalar


def test_plain_frames_take_scalars_of_numpy_as_keys():
    records = np.zeros(1, "i4,f8")
    records.flags.writeable = False  # else they cannot be hashed
    keys = [np.int64(1), np.str_("a"), np.datetime64(3, "D"), np.float32(0.5), records[0], (records[0],)]
    back = round_trip(dict.fromkeys(keys, 1), allow_pickle=False)
    assert list(back) == keys
    assert list(map(type, back)) == list(map(type, keys))


def test_a_record_that_came_keeps_its_names_to_itself():
    one, other = round_trip([np.zeros(1, "i4,f8")[0], np.zeros(1, "i4,f8")[0]], allow_pickle=False)
    one.dtype.names = ("a", "b")
    assert other.dtype.names == ("f0", "f1")


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_large_ints_are_values_and_keys(allow_pickle):
    large = 10**5000
    for obj in (large, [-large], {large: 1}, {(large, 1): -large}):
        assert round_trip(obj, allow_pickle=allow_pickle) == obj


def test_a_path_past_a_large_int_is_told():
    with pytest.raises(SerializationError, match="pickle") as caught:
        encode({10**5000: LOCK})
    assert caught.value.path == "[<int>]"


def test_hostile_scalars_are_refused():
    def load(*pieces):
        return load_plain(b"".join(pieces), [])

    def scalar(spec, raw, tag=plain._SCALAR):
        return load(plain._WORD.pack(tag, len(spec)), spec, raw)

    assert scalar(pack_spec(np.dtype("M8[D]"), ()), bytes(8)) == np.datetime64(0, "D")
    for tag in (plain._SCALAR, plain._RECORD):
        for spec in (
            pack_spec(np.dtype("i4"), (2,)),  # an array
            pack_spec(np.dtype(("i4", (2,))), ()),
            pack_spec(np.dtype("i4"), (1 << 58,)),
            pack_spec(np.dtype("i4"), (1 << 30,), (0,)),
            pack_spec(np.dtype("i4"), (), None, 4),
            pack_spec(np.dtype("V1000000000"), ()),
            pack_spec(np.dtype("M8[D]"), ())[:-1] + b"x",
            b"",
        ):
            for raw in (b"", bytes(8)):
                with pytest.raises(Corrupt):
                    scalar(spec, raw, tag)
    for raw in (b"", b"d", b"d1234567", b"O12345678", b"\xff12345678"):
        with pytest.raises(Corrupt):
            load(bytes([plain._NUMBER]), raw)


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
