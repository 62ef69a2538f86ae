"""Cutting covers everything exactly once; ghost cells are what np.pad would make; gathering checks."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmengine.engine.blocks import AUTO_BLOCK_BYTES, Cut, Gather, GhostCut, as_source, overlaps
from shmengine.errors import ArrayError, BlockError

DTYPES = ["u1", "<f8", ">f4", "c16", "M8[s]", "U3", [("a", "i2"), ("b", ">f8")], object]

shapes = st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple)


def numbered(shape, dtype="f8"):
    array = np.arange(int(np.prod(shape)))
    if np.dtype(dtype).names:
        result = np.empty(len(array), dtype)
        for name in result.dtype.names:
            result[name] = array
        return result.reshape(shape)
    return array.astype(dtype).reshape(shape)


def all_blocks(cut):
    return [cut.blocks(i) for i in range(cut.count)]


class SlicesOnly:
    """An array-like as zarr and h5py are: it must never be loaded whole."""

    def __init__(self, array):
        self._array = array
        self.shape, self.dtype, self.reads = array.shape, array.dtype, []

    def __getitem__(self, index):
        read = self._array[index]
        self.reads.append(read.size)
        return read.tolist() if read.dtype == object else read

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("loaded whole")


# --- cutting ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(shapes, st.data())
def test_every_position_is_in_exactly_one_block_and_in_order(shape, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    block_bytes = data.draw(st.integers(1, 300))
    array = numbered(shape)
    cut = Cut((array,), axis, block_bytes)
    blocks = [block for (block,) in all_blocks(cut)]
    np.testing.assert_array_equal(np.concatenate(blocks, axis), array)
    spans = [cut.span(i) for i in range(cut.count)]
    assert spans[0][0] == 0
    assert spans[-1][1] == shape[axis]
    assert all(left[1] == right[0] for left, right in pairwise(spans))
    for block in blocks:
        assert np.shares_memory(block, array) or not block.size
        assert block.nbytes <= block_bytes or block.shape[axis] == 1
    assert all(block.shape[axis] > 0 for block in blocks) or shape[axis] == 0


@settings(deadline=None)
@given(shapes, st.sampled_from(["u1", "f8", "c16"]), st.integers(0, 2))
def test_automatic_edges_depend_on_shape_dtype_and_axis_alone(shape, dtype, axis):
    axis %= len(shape)
    shape = tuple(length * 300 for length in shape)
    whole = np.broadcast_to(np.zeros((), dtype), shape)  # huge shapes without the memory
    cut = Cut((whole,), axis)
    others = [np.broadcast_to(np.ones((), dtype), shape), SlicesOnly(whole)]
    assert [cut.span(i) for i in range(min(cut.count, 50))] == [
        Cut((other,), axis).span(i) for i in range(min(cut.count, 50)) for other in others[:1]
    ]
    assert Cut((others[1],), axis).rows == cut.rows
    row_bytes = whole.nbytes // max(shape[axis], 1)
    assert cut.rows == 1 or cut.rows * row_bytes <= AUTO_BLOCK_BYTES
    assert cut.rows >= shape[axis] or (cut.rows + 1) * row_bytes > AUTO_BLOCK_BYTES


def test_the_widest_array_decides():
    narrow, wide = np.zeros(1000, "u1"), np.zeros((1000, 4))
    cut = Cut((narrow, wide), 0, 320)
    assert cut.rows == 10
    assert [b.shape for b in cut.blocks(99)] == [(10,), (10, 4)]


def test_negative_axis_counts_from_the_end_of_each_array():
    cut = Cut((np.zeros((2, 6)), np.zeros(6)), -1, 32)
    assert [b.shape for b in cut.blocks(0)] == [(2, 2), (2,)]


@pytest.mark.parametrize("block_bytes", [16, "16", "16 B"])
def test_block_bytes_as_number_or_text(block_bytes):
    assert Cut((np.zeros(10),), 0, block_bytes).rows == 2


@pytest.mark.parametrize("block_bytes", [0, -1, "0", "many", ""])
def test_bad_block_bytes(block_bytes):
    with pytest.raises(ValueError):
        Cut((np.zeros(10),), 0, block_bytes)


def test_0d_arrays_are_one_block():
    cut = Cut((np.array(3.0), np.array(4)), 5)
    assert cut.count == 1
    assert [type(b) for b in cut.blocks(0)] == [np.ndarray, np.ndarray]
    with pytest.raises(ArrayError, match="array 1 is 0-d"):
        Cut((np.zeros(2), np.array(4)))


def test_empty_arrays_are_one_block():
    for shape in [(0,), (0, 3), (3, 0), (0, 0)]:
        cut = Cut((np.zeros(shape),), 0, 8)
        assert [b.shape for (b,) in all_blocks(cut)] == [shape]


def test_array_likes_are_read_block_by_block():
    source = SlicesOnly(numbered((10, 3)))
    cut = Cut((source,), 0, 48)
    np.testing.assert_array_equal(np.concatenate([b for (b,) in all_blocks(cut)]), numbered((10, 3)))
    assert source.reads == [6] * 5


def test_memmaps_stay_memmaps(tmp_path):
    array = np.memmap(tmp_path / "a", "f8", "w+", shape=(10,))
    (block,) = Cut((array,), 0, 16).blocks(1)
    assert type(block) is np.memmap
    assert block.base is not None


@pytest.mark.parametrize("scalar", [3, 2.5, np.float64(1), None, "text", object(), {1: 2}, (i for i in "ab")])
def test_scalars_cannot_be_cut(scalar):
    with pytest.raises(ArrayError, match="scalar"):
        as_source(scalar)


def test_lists_can_be_cut():
    assert as_source([[1, 2], [3, 4]]).shape == (2, 2)


def test_label_based_slicing_is_not_trusted():
    class Series:
        shape, dtype, iloc = (3,), np.dtype("f8"), None

        def __getitem__(self, index):
            raise AssertionError("sliced by label")

        def __array__(self, dtype=None, copy=None):
            return np.arange(3.0)

    assert type(as_source(Series())) is np.ndarray


@pytest.mark.parametrize("axis", [2, -3, 100])
def test_axis_out_of_bounds(axis):
    with pytest.raises(BlockError, match=rf"axis {axis} is out of bounds for array 0 of shape \(2, 3\)"):
        Cut((np.zeros((2, 3)),), axis)


@pytest.mark.parametrize("axis", [0.0, "0", None])
def test_axis_of_wrong_type(axis):
    with pytest.raises(TypeError):
        Cut((np.zeros((2, 3)),), axis)


def test_lengths_must_agree():
    with pytest.raises(BlockError, match="array 0 has 3, array 1 has 4"):
        Cut((np.zeros(3), np.zeros(4)))


def test_nothing_to_cut():
    with pytest.raises(ArrayError, match="at least one"):
        Cut(())


# --- ghost cells --------------------------------------------------------------------------------

PAD = {"reflect": "symmetric", "periodic": "wrap", "nearest": "edge"}


def padded(array, before, after, boundary, axis):
    """What np.pad makes of it, as the oracle."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (before, after)
    if boundary in PAD:
        index = np.pad(np.arange(array.shape[axis]), (before, after), PAD[boundary])
        return np.take(array, index, axis)
    return np.pad(array, widths, constant_values=boundary)


@settings(deadline=None)
@given(st.data())
def test_ghost_cells_are_what_padding_the_whole_array_gives(data):
    ndim = data.draw(st.integers(1, 3))
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=ndim, max_size=ndim)))
    axis = data.draw(st.integers(-ndim, ndim - 1))
    before = data.draw(st.integers(0, shape[axis]))
    after = data.draw(st.integers(0, shape[axis]))
    boundary = data.draw(st.sampled_from(["reflect", "periodic", "nearest", 7, -1.5]))
    block_bytes = data.draw(st.integers(1, 200))
    dtype = data.draw(st.sampled_from(["f8", ">f4", "c8"]))
    array = numbered(shape, dtype)
    if data.draw(st.booleans()):
        array = np.asfortranarray(array)
    cut = GhostCut(array, (before, after), boundary, axis, block_bytes)
    whole = padded(array, before, after, boundary, axis % ndim)
    for i in range(cut.count):
        (block,) = cut.blocks(i)
        start, stop = cut.span(i)
        assert cut.ghosts(i) == (before, after)
        assert block.dtype == array.dtype
        np.testing.assert_array_equal(block, np.take(whole, range(start, stop + before + after), axis))
        if before <= start and stop + after <= shape[axis]:
            assert np.shares_memory(block, array)


@settings(deadline=None)
@given(st.data())
def test_without_boundary_the_outer_ends_have_no_ghost_cells(data):
    length = data.draw(st.integers(1, 12))
    before, after = data.draw(st.integers(0, length)), data.draw(st.integers(0, length))
    array = np.arange(float(length))
    cut = GhostCut(array, (before, after), data.draw(st.sampled_from(["none", None])), 0, 16)
    for i in range(cut.count):
        start, stop = cut.span(i)
        (block,) = cut.blocks(i)
        np.testing.assert_array_equal(block, array[max(start - before, 0) : stop + after])
        left, right = cut.ghosts(i)
        np.testing.assert_array_equal(block[left : len(block) - right], array[start:stop])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("boundary", ["reflect", "periodic", "nearest"])
def test_ghost_cells_of_every_dtype(dtype, boundary):
    array = numbered((5,), dtype)
    cut = GhostCut(array, 2, boundary, 0, 1)
    got = np.concatenate([cut.blocks(i)[0][2:-2] for i in range(cut.count)])
    assert (got == array).all()
    assert (cut.blocks(0)[0] == padded(array, 2, 2, boundary, 0)[: cut.rows + 4]).all()
    assert cut.blocks(0)[0].dtype == array.dtype


def test_ghost_cells_of_array_likes_are_read_with_the_block():
    source = SlicesOnly(np.arange(100.0))
    cut = GhostCut(source, 1, "periodic", 0, 80)
    assert cut.blocks(0)[0].tolist() == [99.0, *range(11)]
    assert source.reads == [11, 1]


def test_blocks_are_not_shorter_than_the_depth():
    cut = GhostCut(np.arange(20.0), 7, "reflect", 0, 8)
    assert cut.rows == 7


def test_no_ghost_cells_for_an_empty_array():
    cut = GhostCut(np.zeros((0, 2)), 3)
    assert cut.blocks(0)[0].shape == (0, 2)
    assert cut.ghosts(0) == (0, 0)


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"depth": 11}, ValueError, "depth 11 is larger than the array: 10 on axis 0"),
        ({"depth": -1}, ValueError, "negative"),
        ({"depth": (1, 2, 3)}, ValueError, "unpack"),
        ({"depth": 1.5}, TypeError, "integer"),
        ({"depth": 1, "boundary": "mirror"}, ValueError, "boundary must be .* not 'mirror'"),
        ({"depth": 1, "boundary": [1, 2]}, ValueError, "boundary must be"),
        ({"depth": 1, "axis": 1}, BlockError, "axis 1"),
    ],
)
def test_bad_ghost_cells(kwargs, error, text):
    with pytest.raises(error, match=text):
        GhostCut(np.zeros(10), **kwargs)


def test_a_0d_array_has_no_neighbours():
    with pytest.raises(ArrayError, match="0-d"):
        GhostCut(np.array(1.0), 1)


# --- gathering ----------------------------------------------------------------------------------


def gathered(cut, blocks, order=None, **kwargs):
    gather = Gather(cut, "map_blocks(f)", **kwargs)
    for i in order or range(cut.count):
        gather.place(i, blocks[i])
    return gather.result()


@settings(deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 2), st.sampled_from(["f8", ">i2", "M8[D]", "U2"]))
def test_results_do_not_depend_on_the_order_of_arrival(rnd: random.Random, axis, dtype):
    array = numbered((4, 5, 6), dtype)
    cut = Cut((array,), axis, 1)
    order = list(range(cut.count))
    rnd.shuffle(order)
    result = gathered(cut, [b for (b,) in all_blocks(cut)], order)
    np.testing.assert_array_equal(result, array)
    assert result.dtype == array.dtype


def test_other_dimensions_may_grow_shrink_and_vanish():
    cut = Cut((np.zeros((4, 3)),), 0, 24)
    assert gathered(cut, [np.full((1, 7, 2), i) for i in range(4)]).shape == (4, 7, 2)
    assert gathered(cut, [np.full(1, i) for i in range(4)]).tolist() == [0, 1, 2, 3]


def test_fortran_order_is_kept_as_numpy_does():
    array = np.asfortranarray(np.zeros((50, 4)))
    assert gathered(Cut((array,)), [array]).flags.f_contiguous
    assert gathered(Cut((array.copy("C"),)), [array]).flags.c_contiguous


@pytest.mark.parametrize(
    ("block", "text"),
    [
        (np.zeros((3, 5)), r"block 1 .* returned shape \(3, 5\), but must keep the block's length 2"),
        (np.zeros((2, 6)), r"block 1 .* has shape \(2, 6\), an earlier one has \(2, 5\)"),
        (np.zeros(2), r"block 1 .* has shape \(2,\), an earlier one has \(2, 5\)"),
        (np.zeros((2, 5), "f4"), "has dtype float32, an earlier one has float64"),
        (np.zeros((2, 5), ">f8"), "dtype"),
        ([[0.0] * 5] * 2, "returned list"),
        (np.float64(1), "returned float64.*reduce"),
        (None, "returned NoneType"),
        (np.ma.zeros((2, 5)), "mask would be lost"),
        (np.array(1.0), r"returned shape \(\)"),
    ],
)
def test_a_block_that_does_not_fit(block, text):
    cut = Cut((np.zeros((4, 5)),), 0, 80)
    gather = Gather(cut, "map_blocks(f)")
    gather.place(0, np.zeros((2, 5)))
    with pytest.raises(BlockError, match=text):
        gather.place(1, block)


@pytest.mark.parametrize("block", [np.zeros((3, 5)), np.array(1.0), None])
def test_the_first_block_is_checked_too(block):
    with pytest.raises(BlockError, match="block 1"):
        Gather(Cut((np.zeros((4, 5)),), 0, 80), "map_blocks(f)").place(1, block)


def test_out_and_dtype_cast_with_same_kind():
    cut = Cut((np.zeros(4),), 0, 16)
    blocks = [np.array([1, 2], "i8"), np.array([3.5, 4], "f8")]
    assert gathered(cut, blocks, dtype=np.dtype("f4")).tolist() == [1, 2, 3.5, 4]
    out = np.zeros(4)
    assert gathered(cut, blocks, out=out).base is out or out.tolist() == [1, 2, 3.5, 4]
    with pytest.raises(BlockError, match="cannot cast its dtype float64 to int64"):
        gathered(cut, blocks, dtype=np.dtype("i8"))


def test_out_must_have_the_result_s_shape():
    cut = Cut((np.zeros(4),), 0, 16)
    with pytest.raises(BlockError, match="out has length 5 on axis 0, the input has 4"):
        Gather(cut, "f", out=np.zeros(5))
    with pytest.raises(BlockError, match=r"out has shape \(4, 2\), the result of f has \(4,\)"):
        Gather(cut, "f", out=np.zeros((4, 2))).place(0, np.zeros(2))


def test_ghost_cells_are_trimmed():
    array = np.arange(10.0)
    for boundary in ("reflect", "none"):
        cut = GhostCut(array, (2, 1), boundary, 0, 24)
        assert gathered(cut, [b * 2 for (b,) in all_blocks(cut)]).tolist() == (array * 2).tolist()
        with pytest.raises(BlockError, match="must keep the block's length"):
            gathered(cut, [b[2:] for (b,) in all_blocks(cut)])


# --- overlap of out and inputs ------------------------------------------------------------------


def test_overlap_of_out_and_inputs():
    base = np.zeros(20)
    x = base[:10]
    assert overlaps(np.zeros(10), [x]) == "no"
    assert overlaps(x, [x]) == "same"
    assert overlaps(x, [x.view("i8"), np.zeros(10), [1, 2]]) == "same"
    assert overlaps(base[1:11], [x]) == "yes"
    assert overlaps(x[::-1], [x]) == "yes"
    assert overlaps(x.view("f4")[::2], [x]) == "yes"
    assert overlaps(base[1::2], [base[::2]]) == "no"
    assert overlaps(x, [x, base[5:15]]) == "yes"
    square = np.zeros((4, 4))
    assert overlaps(square.T, [square]) == "yes"


@pytest.mark.parametrize("boundary", ["reflect", "periodic", "nearest", "none", 7.0])
@pytest.mark.parametrize("depth", [0, 1, (2, 5), (5, 0)])
def test_blocks_can_be_cut_from_pieces(boundary, depth):
    x = np.arange(92.0).reshape(23, 4)
    cut = GhostCut(x, depth, boundary, block_bytes=5 * x[0].nbytes)
    for first in range(cut.count):
        for last in range(first + 1, cut.count + 1):
            (piece,), spans = cut.piece(first, last)
            for index, (low, high) in zip(range(first, last), spans, strict=True):
                assert np.array_equal(piece[low:high], cut.blocks(index)[0])


def test_pieces_of_several_arrays():
    x, y = np.arange(60).reshape(3, 20), np.arange(20.0)
    cut = Cut((x, y), -1, 32)
    pieces, spans = cut.piece(2, 5)
    for index, (low, high) in zip(range(2, 5), spans, strict=True):
        for piece, block in zip(pieces, cut.blocks(index), strict=True):
            assert np.array_equal(piece[..., low:high], block)
    assert np.shares_memory(pieces[0], x)
