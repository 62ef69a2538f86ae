"""How objects of other libraries are pickled, so that their memory travels beside the pickle and not in it.

pandas, SciPy and xarray need nothing here: they are made of arrays, and pickle these one by one. A library is
looked at only when an object of it is to be pickled, so it is loaded already. What arrives lies in the memory of the
message, as arrays do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from shmengine.arrays import Array, writable_alias

__all__ = ["reduce_strings", "reducer_of"]

PROTOCOL = 5
# A part of something larger travels alone if that saves at least half of it, and more than a page or two.
SMALL_BYTES = 1 << 14

Reducer = Callable[[Any], Any]


def reducer_of(cls: type) -> Reducer | None:
    """Return how objects of this class are reduced, if not as they say themselves.

    A reducer may still return NotImplemented.
    """
    name = cls.__module__
    package = name.partition(".")[0] if type(name) is str else ""
    make = _LIBRARIES.get(package)
    if make is None:
        return None
    try:
        return _known[cls]
    except KeyError:
        library = sys.modules.get(package)
        reducer = _known[cls] = None if library is None else make(library, cls)
        return reducer


_known: dict[type, Reducer | None] = {}


def _is_part(nbytes: int, whole: int) -> bool:
    return whole > SMALL_BYTES and nbytes * 2 < whole


# --- pyarrow -------------------------------------------------------------------------------------
# Arrow objects name their buffers themselves, but all of each buffer, whatever part of it they use.


def _for_pyarrow(pa: Any, cls: type) -> Reducer | None:
    if issubclass(cls, pa.Array):
        return partial(_reduce_arrow, pa, _compact_array)
    if issubclass(cls, pa.ChunkedArray):
        return partial(_reduce_arrow, pa, _compact_column)
    if issubclass(cls, (pa.Table, pa.RecordBatch)):
        return partial(_reduce_arrow, pa, _compact_table)
    return None


def _reduce_arrow(pa: Any, compact: Callable[[Any, Any], Any], obj: Any) -> Any:
    if not _is_part(obj.nbytes, obj.get_total_buffer_size()):
        return NotImplemented
    try:
        return compact(pa, obj).__reduce_ex__(PROTOCOL)
    except (pa.ArrowException, NotImplementedError):  # a type of array that cannot be copied so
        return NotImplemented


def _compact_array(pa: Any, array: Any) -> Any:
    if not _is_part(array.nbytes, array.get_total_buffer_size()):
        return array
    if isinstance(array, pa.ExtensionArray):
        return pa.ExtensionArray.from_storage(array.type, _compact_array(pa, array.storage))
    return pa.concat_arrays([array])


def _compact_column(pa: Any, column: Any) -> Any:
    return pa.chunked_array([_compact_array(pa, array) for array in column.chunks], column.type)


def _compact_table(pa: Any, table: Any) -> Any:
    compact = _compact_column if isinstance(table, pa.Table) else _compact_array
    columns = [compact(pa, column) for column in table.columns]
    return type(table).from_arrays(columns, schema=table.schema)


# --- polars --------------------------------------------------------------------------------------
# By itself it writes all data into one `bytes`. Its memory is Arrow's, and pyarrow, where that is installed, names it.


def _for_polars(pl: Any, cls: type) -> Reducer | None:
    if cls is pl.DataFrame:
        return partial(_reduce_frame, pl)
    if cls is pl.Series:
        return partial(_reduce_series, pl)
    return None


def _reduce_frame(pl: Any, frame: Any) -> Any:
    if frame.width == 0 or frame.estimated_size() < SMALL_BYTES:
        return NotImplemented
    try:
        table = frame.to_arrow(compat_level=pl.CompatLevel.newest())
        if _is_view_of_more(table, frame.estimated_size()):
            # Views of strings would bring along the strings of all other rows.
            table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
        # What Arrow has no word for would arrive as something else.
        if pl.from_arrow(table.schema.empty_table()).schema != frame.schema:
            return NotImplemented
    except (Exception, pl.exceptions.PanicException):  # no pyarrow, or no Arrow for these types
        return NotImplemented
    flags = {name: flags for name, flags in frame.flags.items() if any(flags.values())}
    return _polars_frame, (table, flags)


def _is_view_of_more(table: Any, nbytes: int) -> bool:
    try:
        return _is_part(min(table.nbytes, nbytes), table.get_total_buffer_size())
    except TypeError:  # views of strings, of which older ones of pyarrow know nothing
        return True


def _reduce_series(pl: Any, series: Any) -> Any:
    reduced = _reduce_frame(pl, series.to_frame())
    return reduced if reduced is NotImplemented else (_polars_series, reduced[1])


def _polars_frame(table: Any, flags: dict[str, dict[str, bool]]) -> Any:
    import polars as pl

    frame: Any = pl.from_arrow(table, rechunk=False)
    for name, of in flags.items():
        if of.get("SORTED_ASC") or of.get("SORTED_DESC"):
            frame = frame.with_columns(frame[name].set_sorted(descending=bool(of.get("SORTED_DESC"))))
    return frame


def _polars_series(table: Any, flags: dict[str, dict[str, bool]]) -> Any:
    return _polars_frame(table, flags).to_series()


# --- torch ---------------------------------------------------------------------------------------
# All that a tensor is made of but its storage, torch says well itself. Storages it writes into a `bytes`.


def _for_torch(torch: Any, cls: type) -> Reducer | None:
    if issubclass(cls, torch.Tensor):
        return partial(_reduce_tensor, torch)
    if issubclass(cls, torch.TypedStorage):
        return _reduce_typed_storage
    if issubclass(cls, torch.UntypedStorage):
        return partial(_reduce_storage, torch)
    return None


def _reduce_tensor(torch: Any, tensor: Any) -> Any:
    if tensor.device.type != "cpu":
        return NotImplemented
    if type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_quantized:
        nbytes = tensor.numel() * tensor.element_size()
        if _is_part(nbytes, tensor.untyped_storage().nbytes()) and not tensor._backward_hooks:
            with torch.no_grad():
                alone = tensor.detach().clone()
            tensor = alone.requires_grad_() if tensor.requires_grad else alone
    # Asked for here, and not left to pickle: torch's reducers for multiprocessing would come first.
    make, args, *rest = tensor.__reduce_ex__(PROTOCOL)
    if make is getattr(torch._tensor, "_rebuild_from_type_v2", None):  # of a subclass, or with attributes
        inner, cls, inner_args, state = args
        args = (inner, cls, _with_typed_storage(torch, inner, inner_args), state)
    return make, _with_typed_storage(torch, make, args), *rest


def _with_typed_storage(torch: Any, make: Any, args: Any) -> Any:
    # Of its newer dtypes (float8, uint16, ...) torch gives an untyped storage, and expects a typed one back.
    if make is not getattr(torch._utils, "_rebuild_tensor_v3", None):
        return args
    return torch.storage.TypedStorage(wrap_storage=args[0], dtype=torch.uint8, _internal=True), *args[1:]


def _reduce_typed_storage(storage: Any) -> Any:
    untyped = storage._untyped_storage
    # The untyped one is one object for all tensors that share it, so they share it on the other side, too.
    return NotImplemented if untyped.device.type != "cpu" else (_typed_storage, (untyped, storage.dtype))


def _reduce_storage(torch: Any, storage: Any) -> Any:
    if storage.device.type != "cpu":
        return NotImplemented
    return _storage, (torch.empty(0, dtype=torch.uint8).set_(storage).numpy(),)


def _typed_storage(untyped: Any, dtype: Any) -> Any:
    import torch

    return torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)


def _storage(array: Array) -> Any:
    import torch

    # Torch has no read-only tensors; it would only warn.
    return torch.from_numpy(writable_alias(array)).untyped_storage()


_LIBRARIES: dict[str, Callable[[Any, type], Reducer | None]] = {
    "pyarrow": _for_pyarrow,
    "polars": _for_polars,
    "torch": _for_torch,
}


# --- NumPy's strings of any length ----------------------------------------------------------------


def reduce_strings(array: Array) -> Any:
    """Reduce an array of `numpy.dtypes.StringDType` to the bytes of all strings, and their lengths."""
    dtype: Any = array.dtype
    strings = array.ravel(order="C").tolist()
    missing = None
    if hasattr(dtype, "na_object"):
        missing = np.array([type(each) is not str for each in strings])
        strings = ["" if gone else each for each, gone in zip(strings, missing, strict=True)]
    lengths = np.fromiter(map(len, strings), np.intp, len(strings))
    lengths = lengths.astype(np.min_scalar_type(int(lengths.max(initial=0))))
    data = np.frombuffer("".join(strings).encode("utf-8", "surrogatepass"), np.uint8)
    return _strings, (data, lengths, missing, array.shape, dtype)


def _strings(data: Array, lengths: Array, missing: Array | None, shape: tuple[int, ...], dtype: Any) -> Array:
    text = str(memoryview(data), "utf-8", "surrogatepass")  # type: ignore[arg-type]
    ends = lengths.cumsum(dtype=np.intp).tolist()
    strings: list[Any] = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    array = np.array(strings, dtype)
    if missing is not None and missing.any():
        array[missing] = dtype.na_object
    return array.reshape(shape)
