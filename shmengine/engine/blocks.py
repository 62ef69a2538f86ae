"""Split and gather: cutting arrays into blocks along one axis, and putting result blocks together.

Block edges depend on shapes, dtypes and the axis alone, never on workers or timing, so results are
reproducible. Cutting makes views; nothing is copied but what array-likes without memory (zarr, h5py)
read, and the outermost blocks with ghost cells.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from shmengine.config import parse_bytes
from shmengine.errors import ArrayError, BlockError, RemoteTraceback

__all__ = [
    "AUTO_BLOCK_BYTES",
    "BOUNDARIES",
    "AsIs",
    "Cut",
    "Gather",
    "GhostCut",
    "as_source",
    "overlaps",
    "returned_by",
]

# Somewhat less than 2 MiB: with its frame, and some ghost cells, a block still fits into one huge page.
AUTO_BLOCK_BYTES = (2 << 20) - (128 << 10)
"""What ``block_bytes="auto"`` aims at: large against the cost of a task, small against a cache."""

BOUNDARIES = ("reflect", "periodic", "nearest", "none")


def as_source(array: Any) -> Any:
    """Return `array` if it can be cut without loading it whole, or else ``np.asarray(array)``.

    Kept as they are: ndarrays (subclasses such as `numpy.memmap` included) and array-likes with
    ``shape``, ``dtype`` and slicing.

    Raises
    ------
    ArrayError
        For scalars, and for what NumPy makes no array of.
    """
    if isinstance(array, np.ndarray):
        return array
    # Slices of pandas objects go by label, so they are not array-likes in this sense.
    if hasattr(array, "__getitem__") and not isinstance(array, np.generic) and not hasattr(array, "iloc"):
        shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
        if isinstance(shape, tuple) and isinstance(dtype, np.dtype):
            return array
        # Not whatever NumPy makes a dtype of: from a class that it does not know it makes "object".
        if isinstance(dtype, str) or dtype in (bool, int, float, complex) or _is_scalar_type(dtype):
            dtype = np.dtype(dtype)
        if isinstance(shape, (tuple, list)) and isinstance(dtype, np.dtype):
            return _Source(array, tuple(map(operator.index, shape)), dtype)
    made = np.asarray(array)
    if made.ndim == 0:
        raise ArrayError(
            f"cannot cut {type(array).__name__} into blocks: it is a scalar, not an array"
            " (pass it as a keyword argument if the function needs it)"
        )
    return made


def _is_scalar_type(dtype: Any) -> bool:
    return isinstance(dtype, type) and issubclass(dtype, np.generic)


class _Source:
    """An array-like that gives its shape or dtype in other words than NumPy."""

    def __init__(self, array: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._array = array
        self.shape = shape
        self.dtype = dtype
        self.name = type(array).__name__

    def __getitem__(self, index: Any) -> Any:
        return self._array[index]


class AsIs:
    """An array-like whose parts go to functions as they are, and not as arrays."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: Any) -> Any:
        raise NotImplementedError


def axis_of(axis: int, shape: Sequence[int], what: str) -> int:
    """Return `axis` as a non-negative number, for an array of this shape."""
    ndim = len(shape)
    if not -ndim <= axis < ndim:
        raise BlockError(f"axis {axis} is out of bounds for {what} of shape {tuple(shape)}")
    return axis % ndim


def parse_block_bytes(block_bytes: Any) -> int:
    """Return the target size of a block in bytes; accepts ``"auto"``, a number or text like ``"4 MiB"``."""
    if isinstance(block_bytes, str) and block_bytes == "auto":
        return AUTO_BLOCK_BYTES
    count = parse_bytes(block_bytes)
    if count < 1:
        raise ValueError(f"block_bytes must be positive, not {block_bytes!r}")
    return count


class Cut:
    """How a set of arrays with one common length on an axis is cut into blocks.

    Every block but the last has `rows` positions on the axis. There is always at least one block: an
    empty array is one empty block, and 0-d arrays are one block (`axis` is None then).

    Parameters
    ----------
    arrays : sequence of array-like
        At least one.
    axis : int
        Negative values count from the end of each array's own dimensions.
    block_bytes : int or str
        Upper bound of a block of the widest array, in bytes (but at least one row).

    Raises
    ------
    ArrayError
        No arrays, a scalar, or 0-d arrays among others.
    BlockError
        An axis out of bounds, or different lengths on it.
    """

    def __init__(self, arrays: Sequence[Any], axis: int = 0, block_bytes: int | str = "auto") -> None:
        if not arrays:
            raise ArrayError("nothing to cut: give at least one array")
        target = parse_block_bytes(block_bytes)
        self.arrays = tuple(as_source(array) for array in arrays)
        self.given_axis = operator.index(axis)
        self.axis: int | None
        dimensions = [len(array.shape) for array in self.arrays]
        if not any(dimensions):
            self.axis = None
            self.axes: tuple[int, ...] = ()
            self.length = self.rows = self.count = 1
            return
        if not all(dimensions):
            raise ArrayError(
                f"array {dimensions.index(0)} is 0-d and cannot be cut together with the others"
                " (pass it as a keyword argument)"
            )
        self.axes = tuple(
            axis_of(self.given_axis, array.shape, f"array {i}") for i, array in enumerate(self.arrays)
        )
        self.axis = self.axes[0]
        lengths = [int(array.shape[ax]) for array, ax in zip(self.arrays, self.axes, strict=True)]
        self.length = lengths[0]
        for i, length in enumerate(lengths):
            if length != self.length:
                raise BlockError(
                    f"arrays must have the same length on axis {axis}:"
                    f" array 0 has {self.length}, array {i} has {length}"
                )
        # An object counts as the pointer to it: what it really takes nobody knows.
        row_bytes = max(
            array.dtype.itemsize * _product(array.shape) // max(self.length, 1) for array in self.arrays
        )
        rows = target // row_bytes if row_bytes else self.length
        self._set_rows(rows)

    def _set_rows(self, rows: int) -> None:
        self.rows = max(1, min(rows, self.length))
        self.count = max(1, -(-self.length // self.rows))

    def span(self, index: int) -> tuple[int, int]:
        """Return start and stop of block `index` on the axis."""
        start = index * self.rows
        return start, min(start + self.rows, self.length)

    def blocks(self, index: int) -> tuple[np.ndarray, ...]:
        """Return block `index` of every array (views wherever the array is an ndarray)."""
        if self.axis is None:
            return tuple(_read(array, ()) for array in self.arrays)
        return self._part(*self.span(index), 0, 0)

    def piece(self, first: int, last: int) -> tuple[tuple[np.ndarray, ...], list[tuple[int, int]]]:
        """Return the part of every array that blocks `first` to `last` - 1 are cut from, and their spans in it."""
        start, stop = self.span(first)[0], self.span(last - 1)[1]
        before, after = self.ghosts(first)[0], self.ghosts(last - 1)[1]
        spans = []
        for index in range(first, last):
            (low, high), (ghosts, more) = self.span(index), self.ghosts(index)
            spans.append((low - ghosts - start + before, high + more - start + before))
        return self._part(start, stop, before, after), spans

    def _part(self, start: int, stop: int, before: int, after: int) -> tuple[np.ndarray, ...]:  # noqa: ARG002
        """Return this span of every array, with so many ghost positions."""
        return tuple(
            [_read(array, along(ax, start, stop)) for array, ax in zip(self.arrays, self.axes, strict=True)]
        )

    def ghosts(self, index: int) -> tuple[int, int]:  # noqa: ARG002  # GhostCut needs it
        """Return how many positions block `index` has before and after its own span."""
        return 0, 0

    @property
    def depth(self) -> tuple[int, int]:
        """Most positions that a block has before and after its own span."""
        return 0, 0

    def whole_blocks(self) -> range:
        """Return which blocks have no positions from beyond the ends of the arrays."""
        return range(self.count)


class GhostCut(Cut):
    """A cut of one array whose blocks also hold `depth` positions of their neighbours at each end.

    Boundaries mean what they mean in ``dask.array.overlap``: at the outer ends ``"reflect"`` mirrors
    with the edge element repeated, ``"periodic"`` wraps around, ``"nearest"`` repeats the edge element,
    a number fills, and ``"none"`` (or None) leaves the outer ends without ghost cells. Blocks are made
    larger where they would be shorter than the depth.

    Raises
    ------
    ValueError
        A negative depth, a depth beyond the array's length, an unknown boundary.
    """

    def __init__(
        self,
        array: Any,
        depth: int | tuple[int, int],
        boundary: Any = "reflect",
        axis: int = 0,
        block_bytes: int | str = "auto",
    ) -> None:
        super().__init__((array,), axis, block_bytes)
        if self.axis is None:
            raise ArrayError("a 0-d array has no neighbours: map_overlap needs at least one dimension")
        before, after = depth if isinstance(depth, (tuple, list)) else (depth, depth)
        self.before, self.after = operator.index(before), operator.index(after)
        if min(self.before, self.after) < 0:
            raise ValueError(f"depth must not be negative, got {depth!r}")
        deepest = max(self.before, self.after)
        if self.length and deepest > self.length:
            raise ValueError(f"depth {deepest} is larger than the array: {self.length} on axis {axis}")
        self.boundary = "none" if boundary is None else boundary
        if self.boundary not in BOUNDARIES if isinstance(self.boundary, str) else np.ndim(self.boundary):
            raise ValueError(
                f"boundary must be a number or one of {', '.join(map(repr, BOUNDARIES))}, not {boundary!r}"
            )
        self._set_rows(max(self.rows, deepest))

    def ghosts(self, index: int) -> tuple[int, int]:
        """Return how many ghost positions block `index` has before and after its own span."""
        if not self.length:
            return 0, 0
        if self.boundary != "none":
            return self.before, self.after
        start, stop = self.span(index)
        return min(self.before, start), min(self.after, self.length - stop)

    @property
    def depth(self) -> tuple[int, int]:
        """Most ghost positions of a block."""
        return self.before, self.after

    def whole_blocks(self) -> range:
        """Return which blocks have no ghost cells from beyond the ends of the array."""
        if self.boundary == "none":
            return range(self.count)
        first = -(-self.before // self.rows)
        last = self.count
        while last > first and self.span(last - 1)[1] + self.after > self.length:
            last -= 1
        return range(first, last)

    def blocks(self, index: int) -> tuple[np.ndarray, ...]:
        """Return block `index` with its ghost cells: a view of the array, except at the outer ends."""
        return self._part(*self.span(index), *self.ghosts(index))

    def _part(self, start: int, stop: int, before: int, after: int) -> tuple[np.ndarray, ...]:
        assert self.axis is not None
        (array,), ax = self.arrays, self.axis
        low, high = start - before, stop + after
        inner = _read(array, along(ax, max(low, 0), min(high, self.length)))
        missing_before, missing_after = max(-low, 0), max(high - self.length, 0)
        if not missing_before and not missing_after:
            return (inner,)
        shape = list(inner.shape)
        shape[ax] = high - low
        # np.empty and assignments, because np.concatenate and np.pad would lose the byte order.
        block = np.empty_like(inner, shape=tuple(shape), subok=False)
        block[along(ax, missing_before, high - low - missing_after)] = inner
        if missing_before:
            block[along(ax, 0, missing_before)] = self._outside(missing_before, first=True)
        if missing_after:
            block[along(ax, high - low - missing_after, high - low)] = self._outside(
                missing_after, first=False
            )
        return (block,)

    def _outside(self, count: int, *, first: bool) -> Any:
        """Return `count` positions beyond the first or last edge (or what broadcasts to them)."""
        assert self.axis is not None
        (array,), ax = self.arrays, self.axis
        near_first = along(ax, 0, count)
        near_last = along(ax, self.length - count, self.length)
        match self.boundary:
            case "reflect":
                return np.flip(_read(array, near_first if first else near_last), ax)
            case "periodic":
                return _read(array, near_last if first else near_first)
            case "nearest":
                return _read(array, along(ax, 0, 1) if first else along(ax, self.length - 1, self.length))
        return self.boundary


class Gather:
    """Puts result blocks into one array, in whatever order they arrive.

    The first block tells dtype and other dimensions; all others must agree. With `dtype` or `out`,
    blocks are cast to it (``same_kind``).

    Parameters
    ----------
    cut : Cut
        What the blocks belong to.
    label : str
        For error texts.
    out : ndarray, optional
        Where to write.
    dtype : dtype, optional
        Of a fresh result.
    copy_into : callable
        ``copy_into(target, source)``.
    allocate : callable
        Like `numpy.empty`, for a fresh result.
    """

    def __init__(
        self,
        cut: Cut,
        label: str,
        *,
        out: np.ndarray | None = None,
        dtype: np.dtype | None = None,
        copy_into: Callable[[np.ndarray, np.ndarray], None] = np.copyto,
        allocate: Callable[..., np.ndarray] = np.empty,
    ) -> None:
        self._allocate = allocate
        self._cut = cut
        self._label = label
        self._copy_into = copy_into
        self._cast = out is not None or dtype is not None
        self._dtype = out.dtype if out is not None else dtype
        self._seen_dtype: np.dtype | None = None  # the last dtype found to be acceptable
        self._target: np.ndarray | None = None
        self._given: np.ndarray | None = None
        self._axis = 0
        self._rest: tuple[int, ...] = ()  # shape without the axis
        self._first: tuple[int, Any] = 0, ((), None)  # the block that came first: its number, shape and dtype
        if out is not None:
            self._given = out.view(np.ndarray)
            if cut.axis is not None:
                axis = axis_of(cut.given_axis, out.shape, "out")
                if out.shape[axis] != cut.length:
                    raise BlockError(
                        f"out has length {out.shape[axis]} on axis {axis}, the input has {cut.length}"
                    )

    def place(self, index: int, block: Any) -> None:
        """Check result block `index` and copy it to its place.

        Raises
        ------
        BlockError
            Not an array, a wrong length on the axis, or other dimensions or a dtype that do not fit.
        """
        if type(block) is not np.ndarray:
            block = self._as_block(index, block)
        cut = self._cut
        if cut.axis is None:
            if self._target is None:
                self._start(index, block)
            target = self._target
            assert target is not None
            if block.dtype is not self._seen_dtype:
                self._check_dtype(index, block)
            self._copy_into(target, block)
            return
        start, stop = cut.span(index)
        before, after = cut.ghosts(index)
        if self._target is None:
            self._start(index, block)
        ax, shape = self._axis, block.shape
        if (
            len(shape) != len(self._rest) + 1
            or shape[ax] != before + stop - start + after
            or shape[:ax] + shape[ax + 1 :] != self._rest
        ):
            self._refuse_shape(index, block)
        if block.dtype is not self._seen_dtype:
            self._check_dtype(index, block)
        if before or after:
            block = block[along(ax, before, before + stop - start)]
        target = self._target
        assert target is not None
        self._copy_into(target[along(ax, start, stop)], block)

    def target(self) -> tuple[np.ndarray, int] | None:
        """Return the array that results go to and its axis; None until the first block, and where there is no axis."""
        if self._target is None or self._cut.axis is None:
            return None
        return self._target, self._axis

    def result(self) -> np.ndarray:
        """Return the gathered array (every block has been placed)."""
        assert self._target is not None
        return self._target

    def _as_block(self, index: int, block: Any) -> np.ndarray:
        if isinstance(block, np.generic) and self._cut.axis is None:
            return np.asarray(block)  # ufuncs turn 0-d arrays into scalars
        if hasattr(block, "mask") and hasattr(block, "filled"):
            raise BlockError(
                f"block {index} of {self._label}: the function returned a masked array, and its mask would"
                " be lost; return block.filled(...) instead"
            )
        if isinstance(block, np.ndarray):
            return block.view(np.ndarray)
        raise BlockError(
            f"block {index} of {self._label}: the function returned {type(block).__name__}, but a block"
            " must be an ndarray; use reduce(fn, ..., combine=...) for one value per block,"
            " or map(fn, ...) to collect other objects"
        )

    def _start(self, index: int, block: np.ndarray) -> None:
        """Learn from the first block, and allocate the result."""
        cut = self._cut
        self._seen_dtype = None
        if cut.axis is None:
            shape = block.shape
        else:
            start, stop = cut.span(index)
            before, after = cut.ghosts(index)
            if not -block.ndim <= cut.given_axis < block.ndim:
                self._refuse_length(index, block)
            self._axis = cut.given_axis % block.ndim
            if block.shape[self._axis] != before + stop - start + after:
                self._refuse_length(index, block)
            self._rest = block.shape[: self._axis] + block.shape[self._axis + 1 :]
            self._first = index, (block.shape, block.dtype)
            shape = (*block.shape[: self._axis], cut.length, *block.shape[self._axis + 1 :])
        if self._dtype is None:
            self._dtype = block.dtype
        if self._given is None:
            self._target = self._allocate(shape, self._dtype, order=self._order())
        elif self._given.shape != shape:
            raise BlockError(f"out has shape {self._given.shape}, the result of {self._label} has {shape}")
        else:
            self._target = self._given

    def _order(self) -> Literal["C", "F"]:
        # As NumPy does: a Fortran array gives a Fortran result. From the input, as arrivals vary.
        first = self._cut.arrays[0]
        return "F" if isinstance(first, np.ndarray) and first.flags.fnc else "C"

    def _check_dtype(self, index: int, block: np.ndarray) -> None:
        assert self._dtype is not None
        if self._cast:
            if not np.can_cast(block.dtype, self._dtype, "same_kind"):
                raise BlockError(
                    f"block {index} of {self._label}: cannot cast its dtype {block.dtype} to"
                    f" {self._dtype} with casting 'same_kind'"
                )
        elif block.dtype != self._dtype:
            (_, (_, one)), (later, (_, other)) = self._beside_first(index, block)
            raise BlockError(
                f"block {later} of {self._label} has dtype {other}, an earlier one has {one};"
                " all blocks must agree, or pass dtype= to cast them"
            )
        self._seen_dtype = block.dtype

    def _refuse_shape(self, index: int, block: np.ndarray) -> None:
        start, stop = self._cut.span(index)
        length, axis = sum(self._cut.ghosts(index)) + stop - start, self._cut.given_axis
        if not -block.ndim <= axis < block.ndim or block.shape[axis] != length:
            self._refuse_length(index, block)
        (_, (one, _)), (later, (other, _)) = self._beside_first(index, block)
        raise BlockError(
            f"block {later} of {self._label} has shape {other}, an earlier one has {one}:"
            " all blocks must agree in their other dimensions"
        )

    def _beside_first(self, index: int, block: np.ndarray) -> list[tuple[int, Any]]:
        """Return this block and the one that all were compared with, in order: who came first does not matter."""
        return sorted([self._first, (index, (block.shape, block.dtype))], key=lambda item: item[0])

    def _refuse_length(self, index: int, block: np.ndarray) -> None:
        start, stop = self._cut.span(index)
        expected = sum(self._cut.ghosts(index)) + stop - start
        raise BlockError(
            f"block {index} of {self._label}: the function returned shape {block.shape}, but must keep the"
            f" block's length {expected} on axis {self._cut.given_axis};"
            " use reduce(fn, ..., combine=...) if it makes less of a block"
        )


def returned_by(fn: Any) -> RemoteTraceback:
    """Return, as the cause of a `BlockError`, where the function is that made the block: its own traceback is over."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    code = getattr(getattr(fn, "__func__", fn), "__code__", None)
    if code is None:
        return RemoteTraceback(f"it was returned by {fn!r}")
    name = getattr(fn, "__qualname__", code.co_name)
    return RemoteTraceback(
        f'it was returned by\n  File "{code.co_filename}", line {code.co_firstlineno}, in {name}'
    )


def overlaps(out: np.ndarray, arrays: Sequence[Any]) -> Literal["no", "same", "yes"]:
    """Say whether writing blocks to `out` could change blocks of `arrays` that are not read yet.

    ``"same"``: `out` is laid out exactly over every input it touches, so each result block covers only
    the input blocks it was made from. ``"yes"``: any other overlap (also where finding out is too hard).
    """
    found: Literal["no", "same"] = "no"
    for array in arrays:
        if not isinstance(array, np.ndarray) or not _shares(out, array):
            continue
        if (
            out.shape != array.shape
            or out.strides != array.strides
            or out.dtype.itemsize != array.dtype.itemsize
            or out.__array_interface__["data"][0] != array.__array_interface__["data"][0]
        ):
            return "yes"
        found = "same"
    return found


def _shares(a: np.ndarray, b: np.ndarray) -> bool:
    if not np.may_share_memory(a, b):
        return False
    try:
        return bool(np.shares_memory(a, b, max_work=10_000))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def along(axis: int, start: int, stop: int) -> tuple[slice, ...]:
    """Return the index of ``start:stop`` on `axis`."""
    return (slice(None),) * axis + (slice(start, stop),)


def _read(array: Any, index: tuple[slice, ...]) -> np.ndarray:
    # An ellipsis keeps 0-d ndarrays arrays.
    if isinstance(array, np.ndarray):
        return array[index] if index else array[...]
    if isinstance(array, AsIs):
        return array[index]  # type: ignore[no-any-return]
    made = np.asarray(array[index])
    wanted = tuple(int(length) for length in array.shape)
    if index:
        axis = len(index) - 1
        wanted = (*wanted[:axis], index[axis].stop - index[axis].start, *wanted[axis + 1 :])
    if made.shape != wanted:
        name = array.name if isinstance(array, _Source) else type(array).__name__
        raise ArrayError(f"a block that was read from {name} has shape {made.shape} instead of {wanted}")
    return made


def _product(shape: Sequence[int]) -> int:
    product = 1
    for length in shape:
        product *= int(length)
    return product
