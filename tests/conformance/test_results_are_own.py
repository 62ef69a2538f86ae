"""What a function returns belongs to the caller alone, also if the function keeps it and writes to it again."""

from __future__ import annotations

import array
import ctypes
import functools
import itertools
import mmap
import types

import numpy as np
import pytest

from shmengine.engine import Engine
from shmengine.errors import SerializationError
from tests.conformance.conftest import BACKENDS

SMALL, LARGE = 6, 20_000  # elements: copied anyway; born shared
COUNT = 150  # enough that tasks travel in batches

serial_numbers = itertools.count()


@pytest.fixture(scope="module", params=BACKENDS)
def lone(request):
    """An engine with one worker: functions here keep a buffer, and would race with themselves in two threads."""
    with Engine(1, backend=request.param, memory="128 MiB") as engine:
        yield engine


# --- where the buffer comes from, and how it is returned --------------------------------------------


class Interface:
    """Lends its memory by ``__array_interface__``, as libraries do that know nothing of ndarrays."""

    def __init__(self, owner):
        self.owner = owner
        self.__array_interface__ = owner.__array_interface__


class Kind(np.ndarray):
    """A subclass."""


def read_only(b):
    view = b.view()
    view.flags.writeable = False
    return view


ONE = {
    "whole": lambda b: b,
    "view": lambda b: b[:],
    "view of a view": lambda b: b[1:][:-1].view("i8").view("f8"),
    "reshaped": lambda b: b.reshape(2, -1),
    "transposed": lambda b: b.reshape(2, -1).T,
    "every second": lambda b: b[::2],
    "backwards": lambda b: b[::-1],
    "read-only": read_only,
    "broadcast": lambda b: np.broadcast_to(b, (2, b.size)),
    "subclass": lambda b: b.view(Kind),
    "masked": lambda b: np.ma.array(b, copy=False),
    "as_strided": lambda b: np.lib.stride_tricks.as_strided(b, (b.size // 2,), (16,)),
    "sliding window": lambda b: np.lib.stride_tricks.sliding_window_view(b, 2),
    "through a memoryview": lambda b: np.asarray(memoryview(b)),
    "frombuffer": np.frombuffer,
    "array interface": lambda b: np.asarray(Interface(b)),
    "dlpack": np.from_dlpack,
}
SEVERAL = {
    "tuple": lambda b: (1, b),
    "list": lambda b: [b, b[1:]],
    "dict": lambda b: {"a": b, "b": "text"},
    "nested": lambda b: ("x", {"a": b[::2], "b": 1}),
}
WAYS = {**ONE, **SEVERAL}

MAKERS = {
    "ndarray": np.empty,
    "bytearray": lambda n: np.frombuffer(bytearray(8 * n)),
    "array.array": lambda n: np.frombuffer(array.array("d", bytes(8 * n))),
    "anonymous mapping": lambda n: np.frombuffer(mmap.mmap(-1, 8 * n)),
    "ctypes": lambda n: np.ctypeslib.as_array((ctypes.c_double * n)()),
    "buffer of an ndarray": lambda n: np.ndarray(n, "f8", np.empty(n + 1), 8),
    "buffer of a bytearray": lambda n: np.ndarray(n, "f8", bytearray(8 * n)),
}


def refilling(n, way, make=np.empty):
    """Return a function that fills one buffer anew in each call, and returns it."""
    kept = []
    number = next(serial_numbers)  # a function with the same bytes is the same function to a worker

    def fill(i):
        assert number >= 0
        if not kept:
            kept.append(make(n))
        kept[0][...] = i
        return way(kept[0])

    return fill


def arrays_in(value):
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, types.SimpleNamespace):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    return [a for part in value for a in arrays_in(part)] if isinstance(value, (list, tuple)) else []


def assert_own(results, numbers, n, way):
    results = list(results)
    assert len(results) == len(numbers)
    wrong = []
    for result, i in zip(results, numbers, strict=True):
        expected = arrays_in(way(np.full(n, float(i))))
        found = arrays_in(result)
        assert [a.shape for a in found] == [a.shape for a in expected]
        if not all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)):
            wrong.append(i)
    assert not wrong, (
        f"{len(wrong)} of {len(results)} were written to after they had been returned: {wrong[:9]}"
    )


# --- streams and futures --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize("way", WAYS)
def test_a_buffer_that_is_filled_anew(lone, way, n):
    way = WAYS[way]
    assert_own(lone.map(refilling(n, way), range(COUNT)), range(COUNT), n, way)


@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize("make", MAKERS)
def test_a_buffer_of_any_origin(lone, make, n):
    assert_own(lone.map(refilling(n, read_only, MAKERS[make]), range(COUNT)), range(COUNT), n, read_only)


@pytest.mark.parametrize("way", WAYS)
def test_futures(lone, way):
    for n in (SMALL, LARGE):
        fill = refilling(n, WAYS[way])
        futures = [lone.submit(fill, i) for i in range(12)]
        assert_own([future.result() for future in futures], range(12), n, WAYS[way])


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_in_order_of_completion(lone, n):
    fill = refilling(n, lambda b: (b[0].item(), b))
    results = list(lone.map_unordered(fill, range(COUNT)))
    assert sorted(i for i, _ in results) == list(range(COUNT))
    assert all((a == i).all() for i, a in results)


def test_an_object_of_one_s_own_from_a_future():
    """With processes; within one, an object stays what it is. Of one batch: see docs/decisions/0014."""
    way = lambda b: types.SimpleNamespace(deep=[[[b]]])
    fill = refilling(LARGE, way)
    with Engine(1, memory="64 MiB") as engine:
        assert_own([engine.submit(fill, i).result() for i in range(8)], range(8), LARGE, way)


_kept = {}


def fill_global(i, n, number):
    if (number, n) not in _kept:
        _kept[number, n] = np.empty(n)
    _kept[number, n][:] = i
    return _kept[number, n]


class Filler:
    """Keeps its buffer in itself."""

    def __init__(self, n):
        self.buffer = np.empty(n)

    def __call__(self, i):
        self.buffer[:] = i
        return self.buffer


@pytest.mark.parametrize("keeper", ["global", "default", "object", "captured", "attribute", "frame"])
def test_wherever_it_is_kept(lone, keeper):
    for n in (SMALL, LARGE):

        def frame():
            b = np.empty(n)
            while True:
                i = yield b
                b[:] = i

        def by_frame(i):
            if not running:
                running.append(frame())
                next(running[0])
            return running[0].send(i)

        def by_default(i, b=np.empty(n)):  # noqa: B008  # that it is made once is the point
            b[:] = i
            return b

        def by_attribute(i):
            if not hasattr(by_attribute, "b"):
                by_attribute.b = np.empty(n)
            by_attribute.b[:] = i
            return by_attribute.b

        def captured(i):
            buffer[:] = i
            return buffer

        running = []
        buffer = np.empty(n)
        fn = {
            "global": functools.partial(fill_global, n=n, number=next(serial_numbers)),
            "default": by_default,
            "object": Filler(n),
            "captured": captured,
            "attribute": by_attribute,
            "frame": by_frame,
        }[keeper]
        same = lambda b: b
        assert_own(lone.map(fn, range(COUNT)), range(COUNT), n, same)
        assert_own([lone.submit(fn, i).result() for i in range(6)], range(6), n, same)


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_a_cached_table_is_another_one_each_time(lone, n):
    number = next(serial_numbers)

    @functools.lru_cache
    def table(k):
        return np.full(n, k + number * 0)

    first, *others = lone.map(lambda i: table(7), range(60))
    for result in (first, *others):
        assert (result == 7).all()
    if first.flags.writeable:
        first[:] = 0
    assert not any(np.shares_memory(first, other) for other in others)
    assert all((other == 7).all() for other in others)
    assert (lone.submit(lambda i: table(7), 0).result() == 7).all()


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_two_results_of_which_the_second_is_the_first(lone, n):
    """Aliases within one result: both are what they were, whatever comes next."""

    def fn(i):
        last.append(np.full(n, i))
        return last[-1], last[max(0, len(last) - 2)]

    last = []
    for i, (now, before) in enumerate(lone.map(fn, range(40))):
        assert (now == i).all()
        assert (before == max(0, i - 1)).all()


# --- arguments ------------------------------------------------------------------------------------


def keeping_its_argument():
    kept = []
    number = next(serial_numbers)

    def count(a):
        assert number >= 0
        if not kept:
            kept.append(a)
        kept[0] += 1
        return kept[0]

    return count


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_a_private_argument_that_is_kept(lone, n):
    results = list(lone.map(keeping_its_argument(), [np.zeros(n)] * COUNT, writable="private"))
    assert [a[0] for a in results] == list(range(1, COUNT + 1))
    assert all((a == a[0]).all() for a in results)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_a_private_block_that_is_kept(lone, n, shared):
    x = (lone.zeros if shared else np.zeros)(20 * n)
    fn = keeping_its_argument()
    assert lone.map_blocks(fn, x, writable="private", block_bytes=8 * n)[::n].tolist() == list(range(1, 21))
    partials = []
    lone.reduce(
        fn, x, combine=lambda _, p: partials.append(p), initial=0, writable="private", block_bytes=8 * n
    )
    assert [p[0] for p in partials] == list(range(21, 41))
    assert not np.any(x)


# --- blocks ---------------------------------------------------------------------------------------

SAME_SHAPE = ("whole", "view", "read-only", "through a memoryview", "frombuffer", "array interface", "dlpack")


def sums(way, n, make=np.empty):
    """Return a block function that puts its result into one buffer."""
    kept = []
    number = next(serial_numbers)

    def fn(block):
        assert number >= 0
        if not kept:
            kept.append(make(n))
        np.multiply(block, 2, out=kept[0][: len(block)])
        return way(kept[0][: len(block)])

    return fn


@pytest.mark.parametrize("way", SAME_SHAPE)
@pytest.mark.parametrize("into", ["fresh", "out", "shared out", "strided out", "input"])
def test_blocks_in_a_buffer(lone, way, into):
    for n in (SMALL, LARGE):
        x = np.arange(15 * n + n // 2, dtype="f8")
        expected = x * 2
        out = {
            "fresh": lambda: None,
            "out": lambda: np.empty_like(x),
            "shared out": lambda: lone.empty(x.shape),
            "strided out": lambda: np.empty(2 * x.size)[::2],
            "input": lambda: x,
        }[into]()
        result = lone.map_blocks(sums(ONE[way], n), x, out=out, block_bytes=8 * n)
        assert np.array_equal(result, expected)


@pytest.mark.parametrize("make", MAKERS)
def test_blocks_in_a_buffer_of_any_origin(lone, make):
    x = np.arange(15.0 * LARGE)
    fn = sums(lambda b: b, LARGE, MAKERS[make])
    assert np.array_equal(lone.map_blocks(fn, x, block_bytes=8 * LARGE), x * 2)
    assert np.array_equal(lone.map_blocks(fn, x, out=np.empty_like(x), block_bytes=8 * LARGE), x * 2)


@pytest.mark.parametrize("way", WAYS)
def test_partial_results_in_a_buffer(lone, way):
    for n in (SMALL, LARGE):
        fill = refilling(n, WAYS[way])
        if way != "nested":  # deeper than anybody looks
            partials = lone.reduce(
                lambda b: [fill(b[0])], np.arange(20.0), combine=lambda a, b: a + b, block_bytes=8, initial=[]
            )
            assert_own(partials, range(20), n, WAYS[way])
        bare = []
        lone.reduce(
            lambda b: fill(b[0]),
            np.arange(20.0),
            combine=lambda _, b: bare.append(b),
            block_bytes=8,
            initial=0,
        )
        assert_own(bare, range(20), n, WAYS[way])


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_ghost_cells_in_a_buffer(lone, n):
    x = np.arange(10.0 * n)
    fn = sums(lambda b: b, n + 4)
    for boundary in ("none", "reflect"):
        assert np.array_equal(lone.map_overlap(fn, x, 2, boundary, block_bytes=8 * n), x * 2)


# --- what cannot be decoded where it comes from --------------------------------------------------------


def refuse():
    raise RuntimeError("cannot be made again")


class Refused:
    def __reduce__(self):
        return refuse, ()


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_a_result_that_cannot_be_decoded_beside_an_array_that_is_kept(n):
    """An error of this task, as it is without the array; not the end of the worker, and no waiting for ever."""
    kept = []

    def fn(i):
        if not kept:
            kept.append(np.zeros(n))
        return kept[0], Refused()

    with Engine(1, memory="64 MiB", retries=0) as engine:
        with pytest.raises(SerializationError, match="cannot be made again"):
            engine.submit(fn, 1).result(60)
        errors = list(engine.map(fn, range(5), on_error="return"))
        assert [type(error) for error in errors] == [SerializationError] * 5
        assert engine.stats().worker_deaths == 0
