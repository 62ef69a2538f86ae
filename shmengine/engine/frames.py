"""Rows of DataFrames and Arrow tables as blocks, and the labels of xarray's arrays.

::

    DataFrame ── RowCut ──► blocks of rows ──► fn ──► frames, columns or arrays of any number of rows ── join ──► one
    DataArray ── Labels ──► its values, cut as any array ──► fn ──► arrays ── attach ──► DataArray

A library is looked at only where it is loaded already: nothing here imports one. Block edges follow from the number of
rows and the types of columns alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from shmengine.engine.blocks import AsIs, Cut
from shmengine.errors import ArrayError, BlockError

__all__ = ["Labels", "RowCut", "check_is_no_frame", "cut_of"]

VARIABLE_BYTES = 64
"""What a string, a list or an object counts as: edges must not depend on contents."""

Schema = list[tuple[Any, Any]]
"""Names and types of columns, in order: two may have one name."""


class Library(NamedTuple):
    """How frames of one library, or its columns, are cut and joined."""

    name: str
    classes: tuple[str, ...]
    row_bytes: Callable[[Any], int]
    rows: Callable[[Any, int, int], Any]
    schema: Callable[[Any], Schema]
    join: Callable[[Any, list[Any]], Any]
    """From the library's module, and at least one part."""

    def has(self, obj: Any) -> bool:
        """Tell whether this is a frame, or a column, of this library."""
        module = sys.modules.get(self.name)
        # Another thread may be at importing it.
        classes = (getattr(module, name, None) for name in self.classes)
        return any(isinstance(obj, cls) for cls in classes if cls is not None)


# --- pandas --------------------------------------------------------------------------------------


def _pandas_schema(frame: Any) -> Schema:
    if frame.ndim == 1:
        return [(frame.name, frame.dtype)]
    return list(zip(frame.columns, frame.dtypes, strict=True))


def _pandas_rows(frame: Any, start: int, stop: int) -> Any:
    rows = frame.iloc[start:stop]
    return rows if _copies_on_write(sys.modules["pandas"]) else rows.copy()


def _copies_on_write(pandas: Any) -> bool:
    # From version 3 on, always: what is written to is not the caller's.
    return int(pandas.__version__.partition(".")[0]) >= 3 or pandas.options.mode.copy_on_write is True


def _pandas_row_bytes(frame: Any) -> int:
    return sum(_dtype_bytes(dtype) for _, dtype in _pandas_schema(frame))


def _dtype_bytes(dtype: Any) -> int:
    itemsize = getattr(dtype, "itemsize", None)
    return itemsize if getattr(dtype, "kind", "O") != "O" and isinstance(itemsize, int) else VARIABLE_BYTES


# --- polars, Arrow, NumPy ------------------------------------------------------------------------


def _polars_schema(frame: Any) -> Schema:
    return list(frame.schema.items()) if hasattr(frame, "schema") else [(frame.name, frame.dtype)]


def _polars_row_bytes(frame: Any) -> int:
    none = frame.head(0)
    columns = none.get_columns() if hasattr(none, "get_columns") else [none]
    return sum(_dtype_bytes(column.to_numpy().dtype) for column in columns)


def _arrow_row_bytes(table: Any) -> int:
    return sum(_arrow_type_bytes(field.type) for field in table.schema)


def _arrow_type_bytes(kind: Any) -> int:
    try:
        return -(-int(kind.bit_width) // 8)
    except ValueError:  # "Non-fixed width type"
        return VARIABLE_BYTES


def _arrow_join(pa: Any, tables: list[Any]) -> Any:
    return pa.concat_tables(
        [pa.Table.from_batches([t]) if isinstance(t, pa.RecordBatch) else t for t in tables]
    )


PANDAS = Library(
    "pandas",
    ("DataFrame", "Series"),
    _pandas_row_bytes,
    _pandas_rows,
    _pandas_schema,
    lambda pandas, frames: pandas.concat(frames),
)
POLARS = Library(
    "polars",
    ("DataFrame", "Series"),
    _polars_row_bytes,
    lambda frame, start, stop: frame.slice(start, stop - start),
    _polars_schema,
    lambda polars, frames: polars.concat(frames),
)
ARROW = Library(
    "pyarrow",
    ("Table", "RecordBatch"),
    _arrow_row_bytes,
    lambda table, start, stop: table.slice(start, stop - start),
    lambda table: [(field.name, field.type) for field in table.schema],
    _arrow_join,
)
NUMPY = Library(
    "numpy",
    ("ndarray",),
    lambda array: int(array[:0].nbytes),
    lambda array, start, stop: array[start:stop],
    lambda array: [("values", (array.dtype, array.shape[1:]))],
    lambda numpy, arrays: numpy.concatenate(arrays),
)

FRAMES = (PANDAS, POLARS, ARROW)


def _library(obj: Any, libraries: Sequence[Library] = FRAMES) -> Library | None:
    return next((library for library in libraries if library.has(obj)), None)


# --- cutting and joining -------------------------------------------------------------------------


class _Rows(AsIs):
    """A frame as an array-like of one dimension, for `Cut`: an element is a row."""

    def __init__(self, frame: Any, library: Library) -> None:
        self.frame = frame
        self.shape = (len(frame),)
        self.dtype = np.dtype((np.void, library.row_bytes(frame)))
        self._library = library

    def __getitem__(self, index: tuple[slice, ...]) -> Any:
        return self._library.rows(self.frame, index[0].start, index[0].stop)


class RowCut(Cut):
    """A cut of frames, and of arrays that have an element for each row, by rows.

    Raises
    ------
    BlockError
        Different numbers of rows, or an axis that is not that of rows.
    """

    def __init__(self, arrays: Sequence[Any], axis: int = 0, block_bytes: int | str = "auto") -> None:
        if axis != 0:
            raise BlockError(f"frames and tables are cut by rows: axis must be 0, not {axis!r}")
        rows = [_Rows(array, library) if (library := _library(array)) else array for array in arrays]
        super().__init__(rows, 0, block_bytes)

    def check(self, out: Any, dtype: Any, writable: Any) -> None:
        """Refuse what has no meaning with frames."""
        if out is not None:
            raise ArrayError("out= is for arrays: what blocks of frames give is put together anew")
        if dtype is not None:
            raise ArrayError("dtype= is for arrays: a frame has one for each column; cast in the function")
        if writable == "shared":
            raise ArrayError(
                "frames cannot be written in place; writable='private' gives the function a copy"
            )

    def join(self, parts: list[Any], label: str) -> Any:
        """Return what the blocks gave, in order, as one: a frame, a column or an array.

        Raises
        ------
        BlockError
            Something else, or blocks that differ in kind, columns or their types.
        """
        first = parts[0]
        library = _library(first, (*FRAMES, NUMPY))
        if library is None or (library is NUMPY and first.ndim == 0):
            raise BlockError(
                f"block 0 of {label}: the function returned {type(first).__name__}, but must return a DataFrame, a"
                " table, a column or an ndarray; use reduce(fn, ..., combine=...) for one value per block"
            )
        schema = library.schema(first)
        for index, part in enumerate(parts):
            _check_alike(f"block {index} of {label}", part, first, library, schema)
        return library.join(sys.modules[library.name], parts)


def _check_alike(block: str, part: Any, first: Any, library: Library, schema: Schema) -> None:
    if type(part) is not type(first):
        raise BlockError(
            f"{block}: the function returned {type(part).__name__}, for block 0 {type(first).__name__};"
            " all blocks must agree"
        )
    found = library.schema(part)
    if found == schema:
        return
    names, before = [name for name, _ in found], [name for name, _ in schema]
    if names != before:
        raise BlockError(f"{block} has the columns {names}, block 0 has {before}; all blocks must agree")
    name, kind, known = next((name, a, b) for (name, a), (_, b) in zip(found, schema, strict=True) if a != b)
    raise BlockError(
        f"{block} has {name!r} of type {kind}, block 0 has {known}; all blocks must agree: cast in the function"
    )


def cut_of(arrays: Sequence[Any], axis: int, block_bytes: int | str) -> Cut:
    """Return the cut of these arrays: by rows if there is a frame among them."""
    by_rows = any(_library(array) is not None for array in arrays)
    return (RowCut if by_rows else Cut)(arrays, axis, block_bytes)


def check_is_no_frame(method: str, array: Any) -> None:
    """Refuse frames, tables and their columns, of which NumPy would make an array without labels, often of objects.

    Raises
    ------
    ArrayError
        It is one.
    """
    if _library(array) is not None:
        raise ArrayError(
            f"{method} is for arrays, not for a {type(array).__name__}: give it the values of columns of one type, by"
            " their to_numpy(), and put what comes back into a frame"
        )


# --- xarray --------------------------------------------------------------------------------------


class Labels:
    """What the `xarray.DataArray`s among some arrays know beside values: dimensions, coordinates, attributes, name.

    Parameters
    ----------
    arrays : sequence of array-like

    Attributes
    ----------
    arrays : sequence of array-like
        To be cut.

    Raises
    ------
    BlockError
        Several `DataArray`s whose dimensions or indexes differ.
    """

    def __init__(self, arrays: Sequence[Any]) -> None:
        self.arrays = arrays
        self._first: Any = None
        xarray = sys.modules.get("xarray")
        cls = getattr(xarray, "DataArray", None)
        if cls is None:
            return
        labelled = [array for array in arrays if isinstance(array, cls)]
        if not labelled:
            return
        self._first = labelled[0]
        for other in labelled[1:]:
            self._check_aligned(xarray, other)
        self.arrays = [_values(array) if isinstance(array, cls) else array for array in arrays]

    def _check_aligned(self, xarray: Any, other: Any) -> None:
        first = self._first
        if other.dims != first.dims:
            raise BlockError(f"DataArrays must have the same dimensions: {first.dims} and {other.dims}")
        try:
            xarray.align(first, other, join="exact", copy=False)
        except ValueError as error:
            raise BlockError(f"DataArrays must be aligned, see xarray.align: {error}") from None

    def attach(self, result: Any, label: str) -> Any:
        """Return the result with the labels of the first `DataArray`, if there was one.

        Raises
        ------
        BlockError
            It has another shape.
        """
        first = self._first
        if first is None:
            return result
        if result.shape != first.shape:
            sizes = dict(zip(first.dims, first.shape, strict=True))
            raise BlockError(
                f"the result of {label} has shape {result.shape}, to which the coordinates of {sizes} do not belong;"
                " pass the array's .values and give the result its own"
            )
        return first.copy(data=result)


def _values(array: Any) -> Any:
    # What lies in a file, or with dask, stays there, and is read block by block.
    if not getattr(array.variable, "_in_memory", False):
        return array
    values = array.data
    return values if isinstance(values, np.ndarray) else array
