"""Objects of many libraries, of some megabytes each: how to make one, how to compare two, and where its data lie."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

N = 400_000


class Kind(NamedTuple):
    """One row of the table in docs/objects.md."""

    library: str
    make: Callable[[], Any]
    data: Callable[[Any], np.ndarray] | None
    """A view of a large piece of its memory; None: there is none."""
    note: str = ""
    same: Callable[[Any, Any], bool] | None = None


def floats() -> np.ndarray:
    return np.arange(N) * 0.5


def lies_shared(array: np.ndarray) -> bool:
    """Tell whether memory is a region's, or a mapped file's, by what the kernel says of this process."""
    address = array.__array_interface__["data"][0]
    with open("/proc/self/maps") as maps:
        for line in maps:
            low, high = (int(part, 16) for part in line.split()[0].split("-"))
            if low <= address < high:
                return "/dev/shm/#" in line or "/memfd:shmengine" in line or mapped_file() in line
    return False


def at(address: int, nbytes: int) -> np.ndarray:
    import ctypes

    return np.frombuffer((ctypes.c_char * nbytes).from_address(address), np.uint8)


def mapped_file() -> str:
    """A file of some megabytes that everybody has."""
    return np._core._multiarray_umath.__file__


# --- NumPy ---------------------------------------------------------------------------------------


class Labelled(np.ndarray):
    """A subclass with an attribute."""


def labelled() -> Labelled:
    array = floats().view(Labelled)
    array.unit = "m"
    return array


def records() -> np.recarray:
    return np.rec.fromarrays([np.arange(N // 2), np.arange(N // 2) * 0.5], names="a,b")


def masked() -> np.ma.MaskedArray:
    array = floats()
    return np.ma.masked_array(array, array % 3 == 0)


def strings() -> np.ndarray:
    return np.array([f"string number {i}" for i in range(N // 10)] * 3, np.dtypes.StringDType())


def raw_bytes() -> bytes:
    return b"0123456789abcdef" * (N // 2)


def itself(array: Any) -> Any:
    return array


def filled(array: Any) -> np.ndarray:
    return array.data


NUMPY = {
    "`ndarray`": Kind("numpy", floats, itself),
    "`ndarray`, every second row": Kind("numpy", lambda: floats().reshape(-1, 100)[::2], itself),
    "`datetime64`, `timedelta64`": Kind("numpy", lambda: np.arange(N).astype("M8[ns]"), itself),
    "structured, `recarray`": Kind("numpy", records, itself),
    "masked array": Kind("numpy", masked, filled),
    "`memmap`, and views of one": Kind(
        "numpy",
        lambda: np.memmap(mapped_file(), np.uint8, "r"),
        itself,
        "the file's name travels; the reader maps it, too",
    ),
    "subclass of `ndarray`": Kind("numpy", labelled, itself, "with its attributes"),
    "`StringDType`": Kind(
        "numpy", strings, None, "as one piece of text beside the pickle; each side has its own strings"
    ),
    "`bytes`, `bytearray`": Kind(
        "", raw_bytes, lambda b: np.frombuffer(b, np.uint8), "must own their memory, so the reader copies too"
    ),
    "`memoryview`": Kind("", lambda: memoryview(floats()), np.asarray, "with its format and shape"),
}

# --- pandas --------------------------------------------------------------------------------------


def frame() -> Any:
    import pandas as pd

    return pd.DataFrame({"a": floats(), "b": np.arange(N), "c": np.arange(N).astype("M8[s]")})


def series(dtype: str) -> Callable[[], Any]:
    def make() -> Any:
        import pandas as pd

        return pd.Series(np.arange(N), dtype=dtype)

    return make


def arrow_strings() -> Any:
    import pandas as pd

    return pd.Series(np.arange(N // 2), dtype="string[pyarrow]")


def python_strings() -> Any:
    import pandas as pd

    return pd.Series([f"string number {i}" for i in range(N // 10)], dtype="string[python]")


def categories() -> Any:
    import pandas as pd

    return pd.Series(np.arange(N) % 70_000).astype("category")


def pandas_same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a.equals(b)


def arrow_data(extension: Any) -> np.ndarray:
    return buffer_data(extension.array._pa_array.chunk(0))


PANDAS = {
    "pandas `DataFrame`": Kind("pandas", frame, lambda f: f["b"].to_numpy(), same=pandas_same),
    "pandas `Series`, `Index`": Kind("pandas", series("f8"), lambda s: s.to_numpy(), same=pandas_same),
    "pandas nullable (`Int64`)": Kind("pandas", series("Int64"), lambda s: s.array._data, same=pandas_same),
    "pandas categories": Kind("pandas", categories, lambda s: s.array.codes, same=pandas_same),
    "pandas `ArrowDtype`": Kind("pyarrow", series("int64[pyarrow]"), arrow_data, same=pandas_same),
    "pandas strings in Arrow": Kind("pyarrow", arrow_strings, arrow_data, same=pandas_same),
    "pandas strings in Python": Kind(
        "pandas", python_strings, None, "Python objects are pickled, one by one", same=pandas_same
    ),
}

# --- Arrow, polars -------------------------------------------------------------------------------


def table() -> Any:
    import pyarrow as pa

    return pa.table({"a": floats(), "b": np.arange(N), "s": pa.array(np.arange(N)).cast(pa.string())})


def arrow_array() -> Any:
    import pyarrow as pa

    return pa.array(floats())


def part_of_table() -> Any:
    import pyarrow as pa

    return pa.table({"a": np.arange(4 * N), "b": np.arange(4 * N) * 0.5}).slice(12_345, N // 2)


def buffer_data(array: Any) -> np.ndarray:
    buffer = max((each for each in array.buffers() if each is not None), key=lambda each: each.size)
    return at(buffer.address, buffer.size)


def column_data(arrow: Any) -> np.ndarray:
    return buffer_data(arrow.column(0).chunk(0) if hasattr(arrow.column(0), "chunk") else arrow.column(0))


def polars_frame() -> Any:
    import polars as pl

    numbers = pl.Series("b", np.arange(N))
    return pl.DataFrame([pl.Series("a", floats()), numbers, numbers.cast(pl.String).alias("s")])


def polars_series() -> Any:
    import polars as pl

    return pl.Series("a", floats())


def polars_data(column: Any) -> np.ndarray:
    return column.to_numpy(allow_copy=False)


ARROW = {
    "pyarrow `Table`, `RecordBatch`": Kind("pyarrow", table, column_data, same=lambda a, b: a.equals(b)),
    "pyarrow `Array`, `ChunkedArray`": Kind(
        "pyarrow", arrow_array, buffer_data, same=lambda a, b: a.equals(b)
    ),
    "pyarrow, an eighth of a table": Kind(
        "pyarrow", part_of_table, column_data, "the part alone travels", same=lambda a, b: a.equals(b)
    ),
    "polars `DataFrame`": Kind(
        "polars",
        polars_frame,
        lambda f: polars_data(f["a"]),
        "needs pyarrow on both sides, else it is pickled",
        same=lambda a, b: a.equals(b),
    ),
    "polars `Series`": Kind("polars", polars_series, polars_data, same=lambda a, b: a.equals(b)),
}

# --- SciPy, xarray -------------------------------------------------------------------------------


def sparse(layout: str) -> Callable[[], Any]:
    def make() -> Any:
        import scipy.sparse

        rows, columns = np.arange(N // 2) // 50, np.arange(N // 2) % 9973
        matrix = scipy.sparse.coo_array((np.arange(N // 2) * 0.5, (rows, columns)), (N // 100, 10_000))
        return matrix.asformat(layout)

    return make


def same_sparse(a: Any, b: Any) -> bool:
    return a.format == b.format and a.shape == b.shape and (a != b).nnz == 0


def data_array() -> Any:
    import xarray as xr

    return xr.DataArray(floats().reshape(400, -1), dims=("y", "x"), coords={"y": np.arange(400.0)}, name="t")


def dataset() -> Any:
    return data_array().to_dataset()


def lazy_array() -> Any:
    return data_array().chunk(y=100)


def array_in_graph(lazy: Any) -> np.ndarray:
    values = (getattr(node, "value", node) for node in dict(lazy.__dask_graph__()).values())
    arrays = (getattr(each, "array", each) for each in values)
    return max((each for each in arrays if isinstance(each, np.ndarray)), key=lambda each: each.nbytes)


def same_lazy(a: Any, b: Any) -> bool:
    a, b = (each.compute(scheduler="synchronous") for each in (a, b))
    return a.identical(b)


ARRAYS = {
    "scipy.sparse CSR, CSC, BSR": Kind("scipy", sparse("csr"), lambda m: m.data, same=same_sparse),
    "scipy.sparse COO, DIA": Kind("scipy", sparse("coo"), lambda m: m.data, same=same_sparse),
    "xarray `DataArray`": Kind("xarray", data_array, lambda a: a.values, same=lambda a, b: a.identical(b)),
    "xarray `Dataset`": Kind("xarray", dataset, lambda a: a["t"].values, same=lambda a, b: a.identical(b)),
    "xarray over Dask": Kind(
        "dask", lazy_array, array_in_graph, "its graph, with the arrays in it", same=same_lazy
    ),
}

# --- torch ---------------------------------------------------------------------------------------


def tensor(dtype: str = "float64") -> Callable[[], Any]:
    def make() -> Any:
        import torch

        return torch.from_numpy(floats()).to(getattr(torch, dtype))

    return make


def layer() -> Any:
    import torch

    torch.manual_seed(0)
    return torch.nn.Linear(1000, 2000)


def tensor_part() -> Any:
    import torch

    return torch.from_numpy(np.arange(8 * N)).reshape(8, N)[3]


def tensor_data(tensor: Any) -> np.ndarray:
    return at(tensor.data_ptr(), tensor.element_size() * tensor.numel())


def same_tensor(a: Any, b: Any) -> bool:
    import torch

    if a.dtype != b.dtype or a.requires_grad != b.requires_grad:
        return False
    if a.element_size() == 1:  # not all of these can be compared
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return torch.equal(a, b)


def same_layer(a: Any, b: Any) -> bool:
    return all(same_tensor(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


TORCH = {
    "torch `Tensor` on the CPU": Kind(
        "torch", tensor(), tensor_data, "every dtype, layout and stride", same=same_tensor
    ),
    "torch, `bfloat16`": Kind("torch", tensor("bfloat16"), tensor_data, same=same_tensor),
    "torch, `float8_e4m3fn`, `uint16`, ...": Kind(
        "torch", tensor("float8_e4m3fn"), tensor_data, "dtypes that plain pickle refuses", same=same_tensor
    ),
    "torch, an eighth of a tensor": Kind(
        "torch", tensor_part, tensor_data, "the part alone travels", same=same_tensor
    ),
    "torch `nn.Module`, `state_dict`": Kind(
        "torch", layer, lambda m: tensor_data(m.weight), "tensors that share memory still do", same=same_layer
    ),
}

KINDS = NUMPY | PANDAS | ARROW | ARRAYS | TORCH


def is_installed(library: str) -> bool:
    return not library or library in sys.modules or importlib.util.find_spec(library) is not None
