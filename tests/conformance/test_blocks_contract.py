"""`map_blocks`, `map_overlap` and `reduce` equal plain NumPy, on every backend, for all kinds of arrays."""

from __future__ import annotations

import functools
import itertools
import operator
import types

import numpy as np
import pytest

from shmengine.engine.backend import task_rng
from shmengine.errors import ArrayError, BlockError
from tests.helpers.scripts import run_script

NUMERIC = ["?", *"bhilqBHILQ", "e", "f", "d", "g", "F", "D", "G", ">i4", ">u2", ">f8", ">c16"]
OTHER = ["M8[us]", ">m8[s]", "S5", "U4", ">U3", [("a", "i2"), ("b", ">f8", (2,))], object]
RARE = ["V3", "S0", [("a", object), ("b", "i4")], np.dtypes.StringDType()]


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


LAYOUTS = {
    "C": lambda a: a,
    "Fortran": np.asfortranarray,
    "strided": lambda a: np.repeat(np.repeat(a, 2, 0), 3, 1)[::2, ::3],
    "negative": lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
    "transposed": lambda a: np.ascontiguousarray(a.T).T,
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
    "empty": lambda a: a[:0],
    "no columns": lambda a: a[:, :0],
    "read-only": read_only,
    "0-d": lambda a: a[1, 1:2].reshape(()),
}


def example(dtype, shape=(11, 5)):
    count = int(np.prod(shape))
    dtype = np.dtype(dtype)
    if dtype.names:
        array = np.zeros(count, dtype)
        array["a"], array["b"] = np.arange(count), np.arange(2 * count).reshape(-1, 2) / 3
    elif dtype.hasobject:
        array = np.array([None, "text", (1, 2), 3.5, {"a": 1}] * count, object)[:count]
    elif dtype.kind in "SU":
        array = np.arange(count).astype(dtype)
    elif dtype.kind in "mM":
        array = (np.arange(count) * 1_000_003).astype("i8").view(f"{dtype.kind}8[s]").astype(dtype)
    else:
        array = (np.arange(count) * 7 % 101).astype(dtype)
        if dtype.kind == "c":
            array -= array[::-1] * 1j
    return array.reshape(shape)


def assert_same(result, expected):
    assert isinstance(result, np.ndarray)
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    assert repr(result.tolist()) == repr(expected.tolist())  # NaN and nested arrays too


# --- map_blocks: dtypes and layouts -------------------------------------------------------------


@pytest.mark.parametrize("dtype", RARE, ids=str)
def test_rare_dtypes(engine, dtype):
    array = np.zeros((11, 5), dtype)
    dtype = np.dtype(dtype)
    if dtype.kind == "V" and not dtype.names:
        array[:] = [[bytes([i, 0, 5 - i % 5])] for i in range(11)]
    elif dtype.names:
        array["a"], array["b"] = "text", np.arange(55).reshape(11, 5)
    elif dtype.itemsize:
        array[:] = [[f"string {i}" * i] for i in range(11)]
    result = engine.map_blocks(lambda b: b, array, block_bytes=3 * 5 * max(array.itemsize, 1))
    assert (result.dtype, result.shape) == (array.dtype, array.shape)
    assert result.tolist() == array.tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", NUMERIC + OTHER, ids=str)
def test_every_dtype_in_every_layout(engine, dtype, layout):
    array = LAYOUTS[layout](example(dtype))
    block_bytes = 3 * 5 * array.itemsize  # does not divide 11 rows
    result = engine.map_blocks(lambda b: b, array, block_bytes=block_bytes)
    assert_same(result, array)
    assert result.flags.writeable
    assert not np.shares_memory(result, array)
    if np.dtype(dtype).kind in "biufc":
        assert_same(
            engine.map_blocks(lambda b: b + b, array, block_bytes=block_bytes), np.asarray(array + array)
        )
    if np.dtype(dtype).kind in "biufcmMO" and array.ndim:
        assert_same(engine.map_blocks(lambda b: b == b[:1], array, block_bytes="1 GiB"), array == array[:1])


@pytest.mark.parametrize("dtype", ["f8", ">i2", "U4", object], ids=str)
def test_arrays_as_arguments_in_every_layout(engine, dtype):
    arrays = [make(example(dtype)) for make in LAYOUTS.values()]
    for result, array in zip(engine.map(lambda a: a, arrays), arrays, strict=True):
        assert_same(result, array)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("block_bytes", [1, 100, 333, "1 MiB", "auto"])
def test_every_axis_and_block_size(engine, axis, block_bytes):
    array = example("f8", (7, 6, 5))
    result = engine.map_blocks(lambda b: np.sqrt(b) * 2 + 1, array, axis=axis, block_bytes=block_bytes)
    assert_same(result, np.sqrt(array) * 2 + 1)


def test_many_automatic_blocks(engine):
    array = np.random.default_rng(0).random((1001, 3000))
    assert (engine.map_blocks(lambda b: np.sqrt(b) * 2 + 1, array) == np.sqrt(array) * 2 + 1).all()


def test_several_inputs_of_different_width_and_type(engine):
    a, b, c = example("f8", (100, 3)), example("i2", (100,)), example("c8", (100, 3, 2))
    result = engine.map_blocks(lambda a, b, c: a[..., None] * b[:, None, None] + c, a, b, c, block_bytes=200)
    assert_same(result, a[..., None] * b[:, None, None] + c)


def test_growing_and_shrinking_blocks(engine):
    array = example("i4", (10, 3))
    assert_same(
        engine.map_blocks(lambda b: np.repeat(b, 2, 1).astype("f4"), array, block_bytes=24),
        np.repeat(array, 2, 1).astype("f4"),
    )
    assert_same(engine.map_blocks(lambda b: b.sum(1), array, block_bytes=24), array.sum(1))
    assert_same(
        engine.map_blocks(lambda b: b[:, :, None] * b[:, None], array), array[:, :, None] * array[:, None]
    )
    assert_same(engine.map_blocks(lambda b: b.sum(0), array, axis=-1, block_bytes=40), array.sum(0))


def test_born_shared_arrays_and_their_views(engine):
    array = engine.zeros((20, 30))
    array[...] = np.arange(600).reshape(20, 30)
    for view in (array, array[::2, ::3], array.T, array[::-1], array.view("i8")):
        assert_same(engine.map_blocks(lambda b: b * 3, view, block_bytes=300), view * 3)


def test_memory_mapped_files(engine, tmp_path):
    array = example("f8", (50, 4))
    np.save(tmp_path / "a.npy", array)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    result = engine.map_blocks(lambda b: b + 1, mapped[5:], block_bytes=64)
    assert type(result) is np.ndarray
    assert_same(result, array[5:] + 1)
    out = np.lib.format.open_memmap(tmp_path / "out.npy", "w+", "f8", (50, 4))
    assert engine.map_blocks(np.negative, mapped, out=out, block_bytes=64) is out
    assert_same(np.load(tmp_path / "out.npy"), -array)


@pytest.mark.parametrize("dtype", ["f8", float, np.float64, np.dtype("f8")], ids=repr)
@pytest.mark.parametrize("shape", [(100, 3), [100, 3]], ids=repr)
def test_array_likes_say_their_shape_and_dtype_in_any_way(engine, dtype, shape):
    array = np.arange(300.0).reshape(100, 3)
    longest = []

    class Stored(types.SimpleNamespace):
        def __getitem__(self, index):
            longest.append(len(array[index]))
            return array[index]

    stored = Stored(shape=shape, dtype=dtype)
    assert_same(engine.map_blocks(np.sqrt, stored, block_bytes=240), np.sqrt(array))
    assert_same(engine.map_overlap(np.sqrt, stored, 1, block_bytes=240), np.sqrt(array))
    assert max(longest) < 20


def test_an_array_like_that_gives_too_little_is_blamed(engine):
    class Short:
        shape, dtype = (10, 3), np.dtype("f8")

        def __getitem__(self, index):
            return np.ones((10, 3))[index][:-1]

    for call in (engine.map_blocks, lambda fn, x: engine.map_overlap(fn, x, 1)):
        with pytest.raises(ArrayError, match=r"Short.*shape \(9, 3\) .* \(10, 3\)"):
            call(np.sqrt, Short())


def test_array_likes_are_read_block_by_block(engine):
    class Stored:
        """As zarr and h5py: slices are read on demand, and it cannot be pickled."""

        shape, dtype = (100, 3), np.dtype("f8")
        longest = 0

        def __getitem__(self, index):
            rows = np.arange(100.0)[index[0]]
            self.longest = max(self.longest, len(rows))
            return np.repeat(rows[:, None], 3, 1)

        def __reduce__(self):
            raise AssertionError("sent whole")

    stored = Stored()
    result = engine.map_blocks(lambda b: b * 2, stored, block_bytes=240)
    assert result.tolist() == [[2.0 * i] * 3 for i in range(100)]
    assert stored.longest == 10


def test_datasets_of_h5py(engine, tmp_path):
    import h5py

    data = np.random.default_rng(1).random((1000, 7))
    with h5py.File(tmp_path / "data.h5", "w") as file:
        stored = file.create_dataset("x", data=data, chunks=(100, 7), compression="gzip")
        assert_same(engine.map_blocks(np.sqrt, stored, block_bytes=100 * 56), np.sqrt(data))
        assert engine.reduce(np.sum, stored, combine=np.add) == pytest.approx(data.sum())


ZARR = """
import sys
import numpy as np
import zarr
from shmengine import Engine

data = np.random.default_rng(2).normal(size=(1000, 7))
stored = zarr.create_array(sys.argv[2], data=data, chunks=(100, 7))
with Engine(None if sys.argv[1] == "serial" else 2, backend=sys.argv[1]) as engine:
    doubled = engine.map_blocks(lambda b: b * 2, stored, block_bytes=100 * 56)
    assert np.array_equal(doubled, data * 2)
    smooth = lambda b: b + np.roll(b, 1, 0)
    both = [engine.map_overlap(smooth, x, 1, block_bytes=100 * 56) for x in (stored, data)]
    assert np.array_equal(*both)
    assert engine.reduce(np.max, stored, combine=np.maximum) == data.max()
print("equal")
"""


def test_arrays_of_zarr(engine, tmp_path):
    """In a process of its own: zarr has an event loop that stays."""
    done = run_script(ZARR, args=[engine.stats().backend, str(tmp_path / "x.zarr")], check=True)
    assert done.stdout == "equal\n"


def test_lists_are_arrays(engine):
    assert_same(
        engine.map_blocks(lambda a, b: a + b, [1, 2, 3], [10, 20, 30], block_bytes=8), np.array([11, 22, 33])
    )


def test_0d_and_empty_arrays(engine):
    assert_same(engine.map_blocks(lambda b: b + 1, np.array(2.5), axis=3), np.array(3.5))
    assert_same(engine.map_blocks(lambda b: np.stack([b, b]), np.array(2)), np.array([2, 2]))
    empty = engine.map_blocks(lambda b: b.astype("c8")[:, None], np.zeros(0))
    assert (empty.shape, empty.dtype) == ((0, 1), np.complex64)


def test_an_array_subclass_arrives_as_such_and_comes_back_plain(engine):
    table = np.rec.fromarrays([np.arange(10), np.arange(10) / 2], names="i,x")
    assert_same(engine.map_blocks(lambda r: r.i * r.x, table, block_bytes=64), table.i * table.x)
    masked = np.ma.array(np.arange(10), mask=[0, 1] * 5)
    assert_same(engine.map_blocks(lambda m: m.filled(-1), masked, block_bytes=16), masked.filled(-1))


# --- keywords -----------------------------------------------------------------------------------


def test_keywords_go_to_the_function(engine):
    def scale(block, *, by, offsets, method):
        assert method == "fast"
        return block * by + offsets.sum()

    offsets = np.ones(100_000)
    array = example("f8")
    result = engine.map_blocks(scale, array, block_bytes=80, by=2, offsets=offsets, method="fast")
    assert_same(result, array * 2 + 100_000)


def test_large_keyword_arrays_are_read_only_too(engine):
    def write(block, *, table):
        table[0] = 1

    with pytest.raises(ValueError, match="read-only"):
        engine.map_blocks(write, np.zeros(3), table=np.zeros(100_000))


def test_random_numbers_per_block(engine):
    result = engine.map_blocks(lambda b, rng: b + rng.random(len(b)), np.zeros(10), rng=7, block_bytes=32)
    assert_same(result, np.concatenate([task_rng(7, i).random(n) for i, n in enumerate([4, 4, 2])]))


def test_dtype_casts_the_result(engine):
    array = example("f8")
    assert_same(engine.map_blocks(np.sqrt, array, dtype="f4"), np.sqrt(array).astype("f4"))
    assert_same(engine.map_blocks(lambda b: b, array, dtype=">f8"), array.astype(">f8"))
    with pytest.raises(BlockError, match="cannot cast its dtype float64 to int64"):
        engine.map_blocks(lambda b: b, array, dtype=int)


@pytest.mark.parametrize("writable", ["private", True])
def test_private_blocks(engine, writable):
    def increment(block):
        block += 1
        return block

    array = np.zeros(100)
    assert (engine.map_blocks(increment, array, writable=writable, block_bytes=80) == 1).all()
    assert not array.any()


def test_blocks_in_place(engine):
    def increment(block):
        block += 1
        return block

    array = engine.zeros(100)
    result = engine.map_blocks(increment, array, writable="shared", block_bytes=80)
    assert (result == 1).all()
    assert (array == 1).all()
    assert engine.map_blocks(increment, array, out=array, writable="shared", block_bytes=80) is array
    assert (array == 2).all()


def test_in_place_in_a_mapped_file(engine, tmp_path):
    def increment(block):
        block += 1
        return block[:, :0]

    array = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", "i4", (30, 4))
    engine.map_blocks(increment, array, writable="shared", block_bytes=64)
    assert (array == 1).all()


# --- out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f8", "f4", ">f8", "c16"])
def test_out_is_written_and_returned(engine, dtype):
    array = example("f8")
    for out in (np.empty((11, 5), dtype), np.empty((5, 11), dtype).T, np.empty((22, 10), dtype)[::2, ::-2]):
        assert engine.map_blocks(lambda b: b * 2, array, out=out, block_bytes=80) is out
        assert_same(out, (array * 2).astype(dtype))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "place",
    [
        lambda base: (base[:40], base[:40]),
        lambda base: (base[:40], base[1:41]),
        lambda base: (base[1:41], base[:40]),
        lambda base: (base[:40], base[:40][::-1]),
        lambda base: (base[::2], base[1::2]),
        lambda base: (base[:36].reshape(6, 6), base[:36].reshape(6, 6).T),
        lambda base: (base[:20], base[:20].view("i8")),
    ],
    ids=["same", "later", "earlier", "reversed", "interleaved", "transposed", "other dtype"],
)
def test_out_may_share_memory_with_an_input(engine, place, shared):
    base = engine.zeros(80) if shared else np.zeros(80)
    base[:] = np.arange(80)
    array, out = place(base)
    expected = np.array(array * 2 + 1).astype(out.dtype)
    fn = (lambda b: b * 2 + 1) if out.dtype == array.dtype else (lambda b: (b * 2 + 1).astype("i8"))
    assert engine.map_blocks(fn, array, out=out, block_bytes=16) is out
    assert_same(out, expected)


def test_out_may_be_a_keyword_of_the_function_too(engine):
    array = np.arange(20.0)
    engine.map_blocks(lambda b, *, whole: b + whole.sum(), array, out=array, whole=array, block_bytes=16)
    assert_same(array, np.arange(20.0) + 190)


@pytest.mark.parametrize(
    ("out", "error", "text"),
    [
        (np.zeros(9), BlockError, "out has length 9 on axis 0, the input has 10"),
        (np.zeros((10, 2)), BlockError, r"out has shape \(10, 2\), the result of .* has \(10,\)"),
        (np.zeros(10, int), BlockError, "cannot cast"),
        (np.zeros(()), BlockError, "axis 0 is out of bounds for out"),
        ([0.0] * 10, ArrayError, "out must be an ndarray, not list"),
        (read_only(np.zeros(10)), ValueError, "out is read-only"),
    ],
)
def test_an_out_that_does_not_fit(engine, out, error, text):
    with pytest.raises(error, match=text):
        engine.map_blocks(np.sqrt, np.zeros(10), out=out)


def test_out_and_dtype_must_not_contradict(engine):
    with pytest.raises(ValueError, match="contradicts"):
        engine.map_blocks(np.sqrt, np.zeros(10), out=np.zeros(10), dtype="f4")


# --- what functions may not return --------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "text"),
    [
        (lambda b: b[1:], r"block 0 .* returned shape \(9,\), but must keep the block's length 10"),
        (np.sum, "returned float64, but a block must be an ndarray; use reduce"),
        (lambda b: None, "returned NoneType"),
        (list, "returned list"),
        (lambda b: np.ma.masked_equal(b, 0), "mask would be lost"),
    ],
)
def test_a_result_that_does_not_fit(engine, fn, text):
    with pytest.raises(BlockError, match=text):
        engine.map_blocks(fn, np.zeros(10))
    assert_same(engine.map_blocks(np.sqrt, np.ones(3)), np.ones(3))


def test_blocks_must_agree(engine):
    with pytest.raises(BlockError, match="dtype"):
        engine.map_blocks(lambda b: b.astype("f4") if b[0] == 8 else b, np.arange(10.0), block_bytes=16)
    with pytest.raises(BlockError, match="shape"):
        engine.map_blocks(lambda b: np.zeros((len(b), int(b[0]))), np.arange(10.0), block_bytes=16)


def test_the_error_of_a_block(engine):
    def fail(block):
        if 6 in block:
            raise OSError(5, "bad block")
        return block

    with pytest.raises(OSError, match="bad block") as caught:
        engine.map_blocks(fail, np.arange(10), block_bytes=16)
    assert caught.value.errno == 5
    assert caught.value.__notes__ == ["task 3 of map_blocks(fail)"]


def test_a_refused_write_names_the_cure(engine):
    def write(block):
        block += 1
        return block

    with pytest.raises(ValueError, match="read-only") as caught:
        engine.map_blocks(write, np.zeros(10))
    assert any("writable='private'" in note for note in caught.value.__notes__)


# --- map_overlap --------------------------------------------------------------------------------

PAD = {"reflect": "symmetric", "periodic": "wrap", "nearest": "edge"}


def neighbour_sum(block, axis):
    return np.roll(block, 1, axis) + 2 * block + 3 * np.roll(block, -1, axis)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("boundary", ["reflect", "periodic", "nearest", 0, -2.5])
def test_stencils_equal_those_over_the_padded_array(engine, boundary, axis):
    array = np.random.default_rng(1).random((23, 9))
    widths = [(0, 0), (0, 0)]
    widths[axis] = (1, 1)
    mode = {"mode": PAD[boundary]} if boundary in PAD else {"constant_values": boundary}
    inner = [slice(None), slice(None)]
    inner[axis] = slice(1, -1)
    expected = neighbour_sum(np.pad(array, widths, **mode), axis)[tuple(inner)]
    for block_bytes in (1, 300, "auto"):
        result = engine.map_overlap(
            functools.partial(neighbour_sum, axis=axis), array, 1, boundary, axis, block_bytes=block_bytes
        )
        assert (result == expected).all()


def test_overlap_of_uneven_depth_and_without_boundary(engine):
    def running_mean(block):
        sums = np.cumsum(np.concatenate([[0], block]))
        low = np.maximum(np.arange(len(block)) - 3, 0)
        return (sums[1:] - sums[low]) / (np.arange(1, len(block) + 1) - low)

    array = np.random.default_rng(2).random(100)
    result = engine.map_overlap(running_mean, array, (3, 0), "none", block_bytes=80)
    np.testing.assert_allclose(result, running_mean(array))


def test_overlap_into_its_own_input(engine):
    array = np.arange(50.0)
    expected = neighbour_sum(np.pad(array, 1, mode="edge"), 0)[1:-1]
    fn = functools.partial(neighbour_sum, axis=0)
    assert engine.map_overlap(fn, array, 1, "nearest", out=array, block_bytes=32) is array
    assert (array == expected).all()


def test_overlap_errors(engine):
    with pytest.raises(ValueError, match="larger than the array"):
        engine.map_overlap(np.sqrt, np.zeros(3), 4)
    with pytest.raises(ValueError, match="boundary"):
        engine.map_overlap(np.sqrt, np.zeros(3), 1, "mirror")
    with pytest.raises(ValueError, match="in place"):
        engine.map_overlap(np.sqrt, np.zeros(3), 1, writable="shared")
    with pytest.raises(BlockError, match="must keep the block's length 5"):
        engine.map_overlap(lambda b: b[1:-1], np.zeros(3), 1)


def test_overlap_of_an_empty_array(engine):
    assert engine.map_overlap(lambda b: b * 1j, np.zeros((0, 2)), 3).dtype == np.complex128


# --- reduce -------------------------------------------------------------------------------------


def test_reduce_folds_in_the_order_of_blocks(engine):
    result = engine.reduce(lambda b: [b.tolist()], np.arange(20), combine=operator.add, block_bytes=24)
    assert result == [list(range(i, min(i + 3, 20))) for i in range(0, 20, 3)]
    fold = engine.reduce(lambda b: int(b[0]), np.arange(5), combine=lambda a, b: (a, b), block_bytes=8)
    assert fold == ((((0, 1), 2), 3), 4)


def test_reduce_is_reproducible_to_the_last_bit(engine):
    array = np.random.default_rng(3).random(300_000)
    expected = functools.reduce(operator.add, (np.sum(array[i : i + 1000]) for i in range(0, 300_000, 1000)))
    assert engine.reduce(np.sum, array, combine=operator.add, block_bytes=8000) == expected


def test_reduce_of_several_arrays_with_keywords(engine):
    x, y = np.arange(100.0), np.arange(100.0)[::-1]
    result = engine.reduce(lambda x, y, k: (x * y).sum() * k, x, y, combine=np.add, block_bytes=80, k=2)
    assert result == (x * y).sum() * 2


def test_reduce_to_arrays(engine):
    array = np.random.default_rng(4).integers(0, 256, 100_000).astype("u1")
    histogram = engine.reduce(lambda b: np.bincount(b, minlength=256), array, combine=np.add, block_bytes=999)
    assert (histogram == np.bincount(array, minlength=256)).all()


def test_reduce_with_initial(engine):
    assert engine.reduce(np.sum, np.arange(10), combine=operator.add, initial=100, block_bytes=16) == 145
    assert engine.reduce(np.max, np.zeros(0), combine=max, initial=-1) == -1
    assert engine.reduce(np.sum, np.zeros(0), combine=operator.add) == 0
    assert engine.reduce(np.sum, np.array(5), combine=operator.add, initial=1) == 6


def test_reduce_errors(engine):
    with pytest.raises(TypeError, match="combine must be callable"):
        engine.reduce(np.sum, np.zeros(3), combine=None)
    with pytest.raises(TypeError, match="combine"):
        engine.reduce(np.sum, np.zeros(3))
    with pytest.raises(ZeroDivisionError):
        engine.reduce(len, np.zeros(100), combine=lambda a, b: a / 0, block_bytes=8)
    with pytest.raises(ValueError, match="zero-size"):
        engine.reduce(np.max, np.zeros(0), combine=max)


def test_progress_counts_completed_blocks(engine):
    seen = []
    engine.map_blocks(np.sqrt, np.zeros(10), block_bytes=16, progress=lambda *counts: seen.append(counts))
    assert seen == [(i, 5) for i in range(1, 6)]
    engine.reduce(np.sum, np.zeros(4), combine=max, block_bytes=16, progress=lambda *c: seen.append(c))
    assert seen[5:] == [(1, 2), (2, 2)]
    list(itertools.islice(engine.map(abs, itertools.count(), progress=lambda *c: seen.append(c)), 2))
    assert seen[7:9] == [(1, None), (2, None)]
