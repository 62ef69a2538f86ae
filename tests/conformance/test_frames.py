"""DataFrames, Arrow tables and labelled arrays in `map_blocks` and `reduce`: what each library itself would give."""

from __future__ import annotations

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import xarray as xr
from xarray.core import indexing

from shmengine import ArrayError, BlockError, Engine, RemoteTraceback
from shmengine.engine.frames import Labels, RowCut

ROWS = 1000
SMALL = "4 KiB"  # some tens of blocks


def pandas_frame(rows=ROWS):
    numbers = np.arange(rows)
    return pd.DataFrame(
        {
            "x": numbers / 7,
            "n": pd.array([None if i % 5 == 0 else i for i in range(rows)], dtype="Int64"),
            "kind": pd.Categorical.from_codes(numbers % 3, ["low", "middle", "high"], ordered=True),
            "when": pd.date_range("2020-01-01", periods=rows, freq="h"),
            "there": pd.date_range("2020-01-01", periods=rows, freq="h", tz="Europe/Berlin"),
            "text": [f"row {i}" for i in range(rows)],
        }
    )


def polars_frame(rows=ROWS):
    return pl.DataFrame(
        {
            "x": np.arange(rows) / 7,
            "text": [None if i % 5 == 0 else f"row {i}" for i in range(rows)],
            "many": [[i] * (i % 3) for i in range(rows)],
            "yes": [i % 2 == 0 for i in range(rows)],
        },
        schema={"x": pl.Float64, "text": pl.String, "many": pl.List(pl.Int32), "yes": pl.Boolean},
    )


def arrow_table(rows=ROWS):
    numbers = np.arange(rows)
    return pa.table(
        {
            "x": numbers / 7,
            "text": pa.array([f"row {i % 10}" for i in range(rows)]).dictionary_encode(),
            "when": pa.array(numbers.astype("M8[s]")),
            "many": pa.array([[i] * (i % 3) for i in range(rows)], pa.list_(pa.int32())),
        },
    ).replace_schema_metadata({"made": "here"})


def indexed(index):
    frame = pandas_frame()
    frame.index = index
    return frame


# polars opens descriptors at first use, and keeps them: not in a test.
polars_frame().lazy().filter(pl.col("yes")).collect()

PANDAS = {
    "range": pandas_frame(),
    "dates": indexed(pd.date_range("2021-01-01", periods=ROWS, freq="min", name="minute")),
    "duplicate index": indexed(np.arange(ROWS) % 3),
    "levels": indexed(pd.MultiIndex.from_arrays([np.arange(ROWS) % 3, np.arange(ROWS)], names=["a", "b"])),
    "duplicate columns": pandas_frame()[["x", "text", "x"]],
    "levels of columns": pd.concat({"left": pandas_frame(), "right": pandas_frame()}, axis=1),
    "no columns": pd.DataFrame(index=np.arange(ROWS)),
    "no rows": pandas_frame().iloc[:0],
    "one block": pandas_frame().iloc[:5],
}


@pytest.mark.parametrize("name", PANDAS)
def test_pandas(engine, name):
    frame = PANDAS[name]
    result = engine.map_blocks(lambda block: block, frame, block_bytes=SMALL)
    pd.testing.assert_frame_equal(result, frame)
    assert type(result.index) is type(frame.index)


def test_pandas_with_other_columns_and_fewer_rows(engine):
    def chosen(block, *, least):
        return block[block["x"] > least].assign(double=lambda part: part["x"] * 2)[["double", "kind"]]

    frame = pandas_frame()
    result = engine.map_blocks(chosen, frame, block_bytes=SMALL, least=100.0)
    pd.testing.assert_frame_equal(result, chosen(frame, least=100.0))


def test_pandas_columns(engine):
    frame = pandas_frame()
    result = engine.map_blocks(lambda block: block["x"] * 2, frame, block_bytes=SMALL)
    pd.testing.assert_series_equal(result, frame["x"] * 2)
    result = engine.map_blocks(lambda block: block + 1, frame["x"], block_bytes=SMALL)
    pd.testing.assert_series_equal(result, frame["x"] + 1)


def test_arrays_of_frames_and_with_frames(engine):
    frame, weights = pandas_frame(), np.arange(ROWS * 2.0).reshape(ROWS, 2)

    def weighed(block, part):
        return block["x"].to_numpy()[:, None] * part

    result = engine.map_blocks(weighed, frame, weights, block_bytes=SMALL)
    assert type(result) is np.ndarray
    np.testing.assert_array_equal(result, weighed(frame, weights))


def test_the_result_is_the_caller_s_own(engine):
    for rows in (5, ROWS):
        frame = pandas_frame(rows)
        result = engine.map_blocks(lambda block: block, frame, block_bytes=SMALL)
        result.loc[0, "x"] = -1.0
        assert frame.loc[0, "x"] == 0


def test_a_frame_that_the_function_may_write_to(engine):
    def reset(block):
        block.loc[block.index[0], "x"] = -1.0
        return block

    frame = pandas_frame()[["x"]]
    result = engine.map_blocks(reset, frame, block_bytes="800 B", writable="private")
    assert np.flatnonzero(result["x"] == -1).tolist() == list(range(0, ROWS, 100))
    assert (frame["x"] >= 0).all()


@pytest.mark.parametrize("rows", [0, 5, ROWS])
def test_polars(engine, rows):
    frame = polars_frame(rows)
    result = engine.map_blocks(lambda block: block, frame, block_bytes=SMALL)
    assert result.equals(frame)
    assert result.schema == frame.schema


def test_polars_with_other_columns_and_rows(engine):
    frame = polars_frame()
    chosen = engine.map_blocks(
        lambda block: block.filter(block["yes"]).with_columns(block["x"].filter(block["yes"]).alias("z")),
        frame,
        block_bytes=SMALL,
    )
    expected = frame.filter(frame["yes"])
    assert chosen.equals(expected.with_columns(expected["x"].alias("z")))
    column = engine.map_blocks(lambda block: block["x"] + 1, frame, block_bytes=SMALL)
    assert column.equals(frame["x"] + 1)
    assert engine.map_blocks(lambda block: block * 2, frame["x"], block_bytes=SMALL).equals(frame["x"] * 2)


@pytest.mark.parametrize("rows", [0, 5, ROWS])
def test_arrow(engine, rows):
    table = arrow_table(rows)
    result = engine.map_blocks(lambda block: block, table, block_bytes=SMALL)
    result.validate(full=True)
    assert result.equals(table)
    assert result.schema.equals(table.schema, check_metadata=True)


def test_arrow_batches_and_other_columns(engine):
    batch = arrow_table().combine_chunks().to_batches()[0]
    result = engine.map_blocks(lambda block: block.select(["x"]), batch, block_bytes=SMALL)
    assert result.equals(arrow_table().select(["x"]))
    result = engine.map_blocks(lambda block: block.slice(0, 1), arrow_table(), block_bytes=SMALL)
    assert result.num_rows == RowCut([arrow_table()], 0, SMALL).count


def labelled():
    return xr.DataArray(
        np.arange(600.0).reshape(100, 6),
        dims=("time", "x"),
        coords={
            "time": pd.date_range("2020", periods=100),
            "x": list("abcdef"),
            "height": ("x", np.arange(6.0), {"units": "m"}),
            "run": 7,
        },
        attrs={"units": "K"},
        name="temperature",
    )


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_xarray_keeps_its_labels(engine, axis):
    array = labelled()
    result = engine.map_blocks(lambda block: block * 2, array, axis=axis, block_bytes="480 B")
    xr.testing.assert_identical(result, array.copy(data=array.values * 2))
    result = engine.map_overlap(lambda block: block + 1, array, depth=1, axis=axis, block_bytes="480 B")
    xr.testing.assert_identical(result, array.copy(data=array.values + 1))


def test_xarray_with_others(engine):
    array, out = labelled(), np.empty((100, 6), "f4")
    result = engine.map_blocks(lambda a, b, c: a + b + c, array, array.values, array, out=out)
    xr.testing.assert_identical(result, array.copy(data=(array.values * 3).astype("f4")))
    assert np.shares_memory(result.values, out)
    assert engine.reduce(np.sum, array, combine=np.add, block_bytes="480 B") == array.sum()


class InFile(xr.backends.BackendArray):
    """Values that are read when somebody asks for a part of them, as xarray has those of files."""

    def __init__(self, values):
        self.values, self.shape, self.dtype = values, values.shape, values.dtype
        self.rows = []

    def __getitem__(self, key):
        support = indexing.IndexingSupport.BASIC
        return indexing.explicit_indexing_adapter(key, self.shape, support, self.read)

    def read(self, key):
        part = self.values[key]
        self.rows.append(len(part))
        return part


def test_an_xarray_in_a_file_is_read_block_by_block(engine):
    array = labelled()
    source = InFile(array.values)
    variable = xr.Variable(array.dims, indexing.LazilyIndexedArray(source), array.attrs)
    lazy = xr.DataArray(variable, array.coords, name=array.name)
    result = engine.map_blocks(np.negative, lazy, block_bytes="480 B")
    assert source.rows == [10] * 10
    xr.testing.assert_identical(result, array.copy(data=-array.values))


def test_reduce_gets_frames(engine):
    counts = engine.reduce(
        lambda block: block["kind"].value_counts(sort=False),
        pandas_frame(),
        combine=lambda a, b: a.add(b),
        block_bytes=SMALL,
    )
    assert counts.to_dict() == {"low": 334, "middle": 333, "high": 333}
    assert engine.reduce(len, pandas_frame(0), combine=max, initial=-1) == -1


def test_blocks_have_streams_of_random_numbers_of_their_own(engine):
    def noise(block, rng):
        return block.assign(x=rng.random(len(block)))

    result = engine.map_blocks(noise, pandas_frame(), rng=1, block_bytes=SMALL)
    with Engine(1, backend="serial") as oracle:
        expected = oracle.map_blocks(noise, pandas_frame(), rng=1, block_bytes=SMALL)
    pd.testing.assert_frame_equal(result, expected)


@pytest.mark.parametrize(
    "frame", [pandas_frame(), polars_frame(), arrow_table()], ids=["pandas", "polars", "arrow"]
)
def test_edges_depend_on_rows_and_types_alone(frame):
    def edges(frame):
        cut = RowCut([frame], 0, SMALL)
        return [cut.span(index) for index in range(cut.count)]

    assert len(edges(frame)) > 10
    texts = ["text" * 100] * ROWS
    if isinstance(frame, pd.DataFrame):
        long = frame.assign(text=texts)
        parts = pd.concat([frame.iloc[:10], frame.iloc[10:]])
    elif isinstance(frame, pl.DataFrame):
        long = frame.with_columns(pl.Series("text", texts))
        parts = pl.concat([frame.slice(0, 10), frame.slice(10, ROWS)], rechunk=False)
    else:
        long = frame.set_column(1, "text", pa.array(texts).dictionary_encode())
        parts = pa.concat_tables([frame.slice(0, 10), frame.slice(10)])
    assert edges(long) == edges(parts) == edges(frame)


def test_what_a_row_takes():
    assert RowCut([pd.DataFrame({"x": np.zeros(100), "n": np.zeros(100, "i2")})], 0, 100).rows == 10
    assert RowCut([pl.DataFrame({"x": np.zeros(100), "n": np.zeros(100, "i2")})], 0, 100).rows == 10
    assert RowCut([pa.table({"x": np.zeros(100), "n": np.zeros(100, "i2")})], 0, 100).rows == 10
    assert RowCut([pl.DataFrame({"x": np.zeros(100)}), np.zeros((100, 4))], 0, 96).rows == 3
    assert RowCut([pd.DataFrame({"x": ["a", "b"]})], 0, 64).rows == 1


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"axis": 1}, BlockError, "cut by rows: axis must be 0, not 1"),
        ({"out": np.empty(ROWS)}, ArrayError, "out= is for arrays"),
        ({"dtype": "f4"}, ArrayError, "dtype= is for arrays.*cast in the function"),
        ({"writable": "shared"}, ArrayError, "frames cannot be written in place; writable='private'"),
    ],
)
def test_what_makes_no_sense_with_frames(engine, arguments, error, text):
    with pytest.raises(error, match=text):
        engine.map_blocks(len, pandas_frame(), **arguments)


@pytest.mark.parametrize(
    "frame",
    [
        PANDAS["range"],
        PANDAS["range"]["x"],
        polars_frame(5),
        polars_frame(5)["x"],
        arrow_table(5),
        arrow_table(5).to_batches()[0],
    ],
    ids=lambda frame: f"{type(frame).__module__.partition('.')[0]}-{type(frame).__name__}",
)
def test_ghost_cells_are_for_arrays(engine, frame):
    with pytest.raises(
        ArrayError, match=f"map_overlap is for arrays, not for a {type(frame).__name__}: .*to_numpy"
    ):
        engine.map_overlap(np.copy, frame, 1)


def test_lengths_must_agree(engine):
    with pytest.raises(BlockError, match="array 0 has 1000, array 1 has 5"):
        engine.map_blocks(len, pandas_frame(), pandas_frame(5))
    with pytest.raises(ArrayError, match="array 1 is 0-d"):
        engine.map_blocks(len, pandas_frame(), np.array(1))


@pytest.mark.parametrize(
    ("fn", "text"),
    [
        (
            len,
            r"block 0 of map_blocks\(len\): the function returned int, but must return a DataFrame.*use reduce",
        ),
        (lambda b: b["x"].to_numpy().sum(keepdims=False)[()], "the function returned float64"),
        (lambda b: b if b.index[0] == 0 else b["x"], r"block 1 .* returned Series, for block 0 DataFrame"),
        (lambda b: b if b.index[0] < 100 else b[["x"]], r"has the columns \['x'\], block 0 has \['x', 'n', "),
        (
            lambda b: b.astype({"x": "f4"}) if b.index[0] else b,
            "has 'x' of type float32, block 0 has float64; all blocks must agree: cast in the function",
        ),
        (lambda b: b.assign(kind=b["text"].astype("category")), "has 'kind' of type category"),
        (lambda b: np.zeros((len(b), 1 + bool(b.index[0]))), "has 'values' of type"),
    ],
)
def test_results_that_do_not_fit(engine, fn, text):
    with pytest.raises(BlockError, match=text) as caught:
        engine.map_blocks(fn, pandas_frame(), block_bytes=SMALL)
    assert isinstance(caught.value.__cause__, RemoteTraceback)


def test_labels_that_do_not_fit(engine):
    array = labelled()
    with pytest.raises(
        BlockError, match=r"shape \(100,\), to which the coordinates of \{'time': 100, 'x': 6\}"
    ):
        engine.map_blocks(lambda block: block.sum(axis=1), array)
    with pytest.raises(BlockError, match=r"same dimensions: \('time', 'x'\) and \('x', 'time'\)"):
        engine.map_blocks(np.add, array, array.T)
    with pytest.raises(BlockError, match=r"must be aligned, see xarray\.align"):
        engine.map_blocks(np.add, array, array.assign_coords(x=list("bcdefg")))


def test_without_labels_arrays_are_as_they_were():
    arrays = (np.zeros(3), [1, 2, 3])
    labels = Labels(arrays)
    assert labels.arrays is arrays
    assert labels.attach(arrays[0], "") is arrays[0]


def test_errors_of_the_function_are_its_own(engine):
    with pytest.raises(KeyError, match="missing"):
        engine.map_blocks(lambda block: block["missing"], pandas_frame(), block_bytes=SMALL)
