"""Objects of other libraries cross as they are, beside the pickle and not in it, both ways.

The table in docs/objects.md says what is copied; ``python -m tests.conformance.test_objects`` measures and prints it.
"""

from __future__ import annotations

import gc
import importlib
import pickle
import re

import numpy as np
import pytest

import shmengine
from shmengine.codec import decode, encode
from shmengine.engine import Engine
from shmengine.errors import SerializationError
from shmengine.filemap import forget_files
from tests.helpers import ROOT, poll_until, run_script
from tests.helpers.arrays import same
from tests.helpers.objects import KINDS, N, floats, is_installed, lies_shared

MARKED = re.compile(r"<!-- objects:begin -->\n(.*?)<!-- objects:end -->", re.DOTALL)
HEADINGS = ["", "as an argument", "as a result", "made within `allocator()`", "read where it lies", ""]
PICKLED_BYTES = 100_000  # at most, of millions


def is_usable(kind):
    # Loading torch takes seconds, in each process: its tests are a few, below.
    return is_installed(kind.library) and kind.library != "torch"


if is_installed("polars"):  # it has threads and descriptors for ever: not what a test leaves behind
    KINDS["polars `DataFrame`"].make().with_columns(c=1)

USABLE = [pytest.param(name, id=name.replace("`", "")) for name, kind in KINDS.items() if is_usable(kind)]


def identity(obj):
    return obj


def look(data, obj):
    """Whether it lies in shared memory here."""
    return None if data is None else lies_shared(data(obj))


def equal(name, a, b):
    kind = KINDS[name]
    return kind.same(a, b) if kind.same is not None else same(a, b)


@pytest.fixture(scope="module")
def processes():
    """One worker, which loads the libraries once."""
    with Engine(1, memory="512 MiB") as engine:
        yield engine


@pytest.fixture(autouse=True)
def no_open_files():
    """What was mapped for a test is kept open for the next message that names it."""
    yield
    forget_files()


@pytest.fixture(scope="module", params=["serial", "thread", "process"])
def engine(request):
    if request.param == "process":
        yield request.getfixturevalue("processes")
    else:
        with Engine(1, backend=request.param) as local:
            yield local


def used(engine):
    gc.collect()
    return int(engine._backend._core.region.counters().used)


class Copied:
    """What was copied within the block: bytes, and in a word."""

    def __init__(self, engine, nbytes):
        self.engine, self.nbytes = engine, nbytes

    def __enter__(self):
        self.before = self.engine.stats().bytes_copied
        return self

    def __exit__(self, *_):
        self.bytes = self.engine.stats().bytes_copied - self.before
        part = self.bytes / self.nbytes
        self.word = "0" if part < 0.02 else "once" if 0.9 < part < 1.02 else f"{part:.1f}"


def measure(engine, name):
    """One row of the table."""
    kind = KINDS[name]
    obj = kind.make()
    encoded = encode(obj)
    nbytes = encoded.bytes_inline + encoded.bytes_shared
    with Copied(engine, nbytes) as argument:
        there = engine.submit(look, kind.data, obj).result()
    with Copied(engine, nbytes) as result:
        returned = engine.submit(kind.make).result()
    here = look(kind.data, returned)
    assert here == there
    del obj, returned
    with engine.allocator():
        obj = kind.make()
    with Copied(engine, nbytes) as shared:
        engine.submit(look, kind.data, obj).result()
    return [name, argument.word, result.word, shared.word, "yes" if here else "no", kind.note]


def line(cells):
    return f"| {' | '.join(cells)} |\n"


def documented():
    marked = MARKED.search((ROOT / "docs" / "objects.md").read_text())
    assert marked, "docs/objects.md has no table between its markers"
    return marked[1]


# --- what crosses, and how -----------------------------------------------------------------------


@pytest.mark.parametrize("name", USABLE)
def test_the_table_says_what_is_copied(processes, name):
    row = line(measure(processes, name))
    assert row in documented(), f"docs/objects.md has not the row {row}"


def test_the_table_has_all_kinds():
    lines = documented().splitlines(keepends=True)
    assert lines[:2] == [line(HEADINGS), line(["---"] * len(HEADINGS))]
    assert [each.split(" | ")[0].removeprefix("| ") for each in lines[2:]] == list(KINDS)


@pytest.mark.parametrize("name", USABLE)
def test_values_are_equal_both_ways(engine, name):
    make = KINDS[name].make
    obj = make()
    there_and_back = engine.submit(identity, obj).result()
    made_there = engine.submit(make).result()
    assert type(there_and_back) is type(made_there) is type(obj)
    assert equal(name, obj, there_and_back)
    assert equal(name, obj, made_there)


@pytest.mark.parametrize("name", USABLE)
def test_data_are_not_in_the_pickle(name):
    encoded = encode(KINDS[name].make())
    in_band = encoded.nbytes - encoded.bytes_inline
    assert encoded.bytes_inline + encoded.bytes_shared > 300_000
    assert in_band < PICKLED_BYTES


@pytest.mark.parametrize("name", USABLE)
def test_what_was_put_is_read_where_it_lies(processes, name):
    kind = KINDS[name]
    ref = processes.put(kind.make())
    with Copied(processes, 1) as copied:
        shared = [processes.submit(look, kind.data, ref).result() for _ in range(3)]
    assert copied.bytes == 0
    assert shared == [look(kind.data, ref.get())] * 3


def test_what_came_by_reference_goes_back_by_reference(processes):
    pa = pytest.importorskip("pyarrow")
    ref = processes.put({"table": pa.table({"a": floats()}), "array": floats()})
    with Copied(processes, 1) as copied:
        back = processes.submit(identity, ref).result()
    assert copied.bytes == 0
    assert back["table"].equals(pa.table({"a": floats()}))
    assert same(back["array"], floats())


def test_arrow_memory_over_arrays_that_are_born_shared_crosses_by_reference(processes):
    pa = pytest.importorskip("pyarrow")
    array = processes.empty(N)
    array[:] = 3
    with Copied(processes, 1) as copied:
        assert processes.submit(lambda table: table["a"][7].as_py(), pa.table({"a": array})).result() == 3
    assert copied.bytes == 0


# --- whose memory it is --------------------------------------------------------------------------


def write_first(frame):
    frame.iloc[0, 0] = -1.0
    return float(frame.iloc[0, 0])


def test_arguments_are_read_only_and_results_are_not(processes):
    pd = pytest.importorskip("pandas")
    with pytest.raises(ValueError, match="read-only"):
        processes.submit(write_first, pd.DataFrame({"a": floats()})).result()
    (wrote,) = processes.map(write_first, [pd.DataFrame({"a": floats()})], writable="private")
    assert wrote == -1
    result = processes.submit(KINDS["pandas `DataFrame`"].make).result()
    assert write_first(result) == -1


def test_what_was_got_outlives_its_engine():
    names = [each.values[0] for each in USABLE if KINDS[each.values[0]].data is not None]
    with Engine(1, memory="512 MiB") as engine:
        refs = [engine.put(KINDS[name].make()) for name in names]
        results = [ref.get() for ref in refs]
        del refs
    gc.collect()
    for name, result in zip(names, results, strict=True):
        assert look(KINDS[name].data, result) == (not isinstance(result, bytes))
        assert equal(name, result, KINDS[name].make())


class Doubled:
    """Pickles an array that nobody else has."""

    def __init__(self, array):
        self.array = array

    def __reduce__(self):
        return Doubled, (self.array * 2,)


def test_arrays_that_pickling_makes_live_until_they_are_sent(processes):
    result = processes.submit(lambda: Doubled(np.ones(N))).result()
    assert same(result.array, np.full(N, 2.0))
    with processes.allocator():
        ones = np.ones(N)
        assert processes.submit(lambda doubled: doubled.array.sum(), Doubled(ones)).result() == 2 * N


# --- parts of something larger -------------------------------------------------------------------


def wide(pa):
    ints = np.arange(N)
    strings = pa.array(ints).cast(pa.string())
    uuids = pa.array([bytes(16)] * (N // 10), pa.binary(16))
    return {
        "ints": pa.array(ints),
        "strings": strings,
        "large strings": strings.cast(pa.large_string()),
        "words": pa.array((ints % 7).astype("U1")).dictionary_encode(),
        "lists": pa.ListArray.from_arrays(np.arange(0, N + 1, 10, dtype="i4"), pa.array(ints)),
        "structs": pa.StructArray.from_arrays([pa.array(ints), strings], names=["a", "b"]),
        # pyarrow before 18 has no extension type of its own.
        "uuids": pa.ExtensionArray.from_storage(pa.uuid(), uuids) if hasattr(pa, "uuid") else uuids,
        "with gaps": pa.array(ints, mask=ints % 3 == 0),
        "bits": pa.array(ints % 3 == 0),
    }


def test_a_part_of_an_arrow_object_travels_alone():
    pa = pytest.importorskip("pyarrow")
    for name, array in wide(pa).items():
        part = array[777:999]
        assert encode(part).nbytes < 20_000, name
        assert decode(encode(part).to_bytes()).equals(part), name
        assert decode(encode(array).to_bytes()).equals(array), name
    whole = pa.table({name: array[: N // 10] for name, array in wide(pa).items()})
    for part in (whole[777:999], whole[777:999].to_batches()[0], whole["strings"][5:9], whole[:0]):
        frame = encode(part).to_bytes()
        assert len(frame) < 60_000
        assert decode(frame).equals(part)
        assert decode(frame).nbytes == part.nbytes


def frames(pl):
    numbers = pl.Series("a", range(20_000))
    yield pl.DataFrame(
        {"a": numbers, "b": numbers * 0.5, "s": numbers.cast(pl.String), "t": numbers % 2 == 0}
    )
    yield pl.select(pl.lit(numbers).cast(pl.Datetime("us", "UTC")), d=pl.lit(numbers).cast(pl.Decimal(20, 2)))
    words = pl.Series("w", ["one", "two", None, "three"] * 5000)
    yield pl.DataFrame([words.cast(pl.Categorical), words.cast(pl.Enum(["one", "two", "three"])).alias("e")])
    yield pl.DataFrame({"l": [[1, 2], None, []] * 5000, "st": [{"x": 1, "y": "b"}] * 15000})
    yield pl.DataFrame({"i": numbers}).with_columns(big=pl.col("i").cast(pl.Int128))  # Arrow has no such
    yield pl.concat([pl.DataFrame({"a": numbers}), pl.DataFrame({"a": numbers})], rechunk=False)
    yield pl.DataFrame()
    yield pl.DataFrame({"a": numbers.set_sorted()})


def test_all_of_polars_survives():
    pl = pytest.importorskip("polars")
    for frame in frames(pl):
        got = decode(encode(frame).to_bytes())
        assert got.equals(frame)
        assert got.schema == frame.schema
        assert got.flags == frame.flags
        for column in frame.get_columns():
            series = decode(encode(column).to_bytes())
            assert series.equals(column, check_names=True)
            assert series.dtype == column.dtype


def test_a_part_of_a_polars_frame_travels_alone():
    pl = pytest.importorskip("polars")
    frame = pl.DataFrame({"a": range(N // 10)}).with_columns(
        s=pl.format("a string that is too long to lie within its view: {}", "a")
    )
    for part in (frame[777:999], frame.filter(pl.col("a") % 500 == 0)):
        frame_bytes = encode(part).to_bytes()
        assert len(frame_bytes) < 40_000
        assert decode(frame_bytes).equals(part)


def test_polars_without_pyarrow():
    pytest.importorskip("polars")
    script = """
        import sys
        sys.modules["pyarrow"] = None
        import numpy as np, polars as pl
        from shmengine.codec import decode, encode
        frame = pl.DataFrame({"a": np.arange(100_000), "s": [str(i) for i in range(100_000)]})
        assert decode(encode(frame).to_bytes()).equals(frame)
        assert decode(encode(frame["a"]).to_bytes()).equals(frame["a"])
        print("equal")
    """
    assert run_script(script).stdout == "equal\n"


# --- NumPy's strings -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([], np.dtypes.StringDType()),
        (["", "a", "é", "\N{SNOWMAN}" * 300, "nul\0inside", "😀"], np.dtypes.StringDType()),
        (["a", None, ""], np.dtypes.StringDType(na_object=None)),
        (["a", np.nan, "b"], np.dtypes.StringDType(na_object=np.nan)),
        (["a", "missing", "b"], np.dtypes.StringDType(na_object="missing")),
        (["a", "b"], np.dtypes.StringDType(coerce=False)),
    ],
)
def test_strings_of_numpy(values, dtype):
    array = np.array(values, dtype)
    for original in (array, array[::2], np.stack([array, array]).T):
        got = decode(encode(original).to_bytes())
        assert got.dtype == original.dtype
        assert got.shape == original.shape
        assert repr(got.tolist()) == repr(original.tolist())


# --- errors --------------------------------------------------------------------------------------


REFUSED = {
    "pyarrow": lambda: importlib.import_module("pyarrow").Tensor.from_numpy(floats()),
    "polars": lambda: importlib.import_module("polars").Series([object()] * 10),
    "h5py": lambda: importlib.import_module("h5py").File.in_memory(libver="v110"),
}


@pytest.mark.parametrize("library", [library for library in REFUSED if is_installed(library)])
def test_what_a_library_refuses_to_pickle_is_its_own_error(processes, library):
    before = used(processes)
    make = REFUSED[library]
    obj = make()
    with pytest.raises(Exception) as own:
        pickle.dumps(obj)
    with pytest.raises(SerializationError, match=r"cannot pickle .* at args\[0\]") as argument:
        processes.submit(identity, obj)
    assert type(argument.value.__cause__) is type(own.value)
    assert str(argument.value.__cause__) == str(own.value)
    with pytest.raises(SerializationError, match=r"cannot pickle .* at result"):
        processes.submit(make).result()
    assert processes.submit(identity, 1).result() == 1
    del obj, own, argument
    poll_until(lambda: used(processes) == before, what="the worker has let go of its last task, too")


def test_nothing_is_loaded_for_what_does_not_need_it():
    script = """
        import sys
        import numpy as np
        import shmengine
        from shmengine.codec import decode, encode
        decode(encode([np.ones(3), "text", {1: 2}, np.array(["a"], np.dtypes.StringDType())]).to_bytes())
        print([name for name in ("pandas", "pyarrow", "polars", "torch", "scipy", "xarray") if name in sys.modules])
    """
    assert run_script(script).stdout == "[]\n"


# --- torch ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def test_torch_in_the_table(torch, processes):
    for name, kind in KINDS.items():
        if kind.library == "torch":
            row = line(measure(processes, name))
            assert row in documented(), f"docs/objects.md has not the row {row}"
            assert equal(name, kind.make(), processes.submit(identity, kind.make()).result())


def tensors(torch):
    numbers = torch.arange(20_000, dtype=torch.float32)
    for dtype in ("bfloat16", "float16", "float64", "complex64", "int8", "uint8", "int64", "bool"):
        yield numbers.to(getattr(torch, dtype))
    for dtype in ("uint16", "uint32", "float8_e5m2"):  # of which a plain pickle cannot be read
        yield numbers.to(getattr(torch, dtype))
    noted = numbers.to(torch.uint16)
    noted.note = "attributes go another way"
    yield noted
    yield numbers.reshape(100, 200).T
    yield numbers.reshape(100, 200)[:, ::2]
    yield numbers[5:10]
    yield numbers.expand(3, -1)
    yield torch.complex(numbers, numbers).conj()
    yield torch.tensor(3.0)
    yield torch.empty(0, 3)
    yield numbers.reshape(100, 200).to_sparse()
    yield numbers.reshape(100, 200).to_sparse_csr()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_all_kinds_of_tensors_survive(torch):
    for tensor in tensors(torch):
        got = decode(encode(tensor).to_bytes())
        assert got.dtype == tensor.dtype
        assert got.layout == tensor.layout
        assert vars(got) == vars(tensor)
        got_bits, bits = (each.to_dense() for each in (got, tensor))
        if tensor.dtype is torch.float8_e5m2:  # which cannot be compared
            got_bits, bits = got_bits.view(torch.uint8), bits.view(torch.uint8)
        assert torch.equal(got_bits, bits)
        if tensor.layout is torch.strided and tensor.numel() > 100:
            assert got.stride() == tensor.stride()
            assert encode(tensor).nbytes - encode(tensor).bytes_inline < 1000


def test_gradients_parameters_and_attributes(torch):
    weight = torch.nn.Parameter(torch.ones(300, 300))
    for tensor in (weight, torch.ones(90_000).requires_grad_(), weight.detach()):
        got = decode(encode(tensor).to_bytes())
        assert type(got) is type(tensor)
        assert got.requires_grad == tensor.requires_grad
        if got.requires_grad:
            got.sum().backward()
            assert torch.equal(got.grad, torch.ones_like(got))
    model = torch.nn.Sequential(torch.nn.Linear(200, 300), torch.nn.ReLU(), torch.nn.Linear(300, 10))
    got = decode(encode(model).to_bytes())
    x = torch.ones(5, 200)
    assert torch.equal(got(x), model(x))


def test_tensors_that_share_memory_still_do(torch):
    tensor = torch.zeros(10_000)
    encoded = encode([tensor, tensor[1000:], {"again": tensor.reshape(100, 100)}])
    assert encoded.bytes_inline == tensor.nbytes
    first, rest, mapping = decode(encoded.to_bytes(), copy=True)
    first[1000] = 5
    assert rest[0] == 5
    assert mapping["again"][10, 0] == 5


def test_a_small_part_of_a_tensor_travels_alone(torch):
    whole = torch.arange(float(N)).reshape(1000, -1).requires_grad_()
    part = whole.detach()[:, 5].requires_grad_()
    assert encode(part).nbytes < 20_000
    got = decode(encode(part).to_bytes())
    assert torch.equal(got, part)
    assert got.requires_grad


def test_tensors_go_through_a_queue_without_torch_sharing_them(torch):
    tensor = torch.arange(float(N))
    queue = shmengine.Queue()
    queue.put({"tensor": tensor, "weight": torch.nn.Parameter(tensor)})
    got = queue.get()
    queue.close()
    assert not tensor.is_shared()  # torch would have moved it
    assert torch.equal(got["tensor"], tensor)
    got["tensor"][0] = 7  # the receiver's own
    assert tensor[0] == 0


def test_tensors_over_arrays_that_are_born_shared_cross_by_reference(torch, processes):
    tensor = torch.from_numpy(processes.zeros(N))
    with Copied(processes, 1) as copied:
        assert processes.submit(lambda t: float(t.sum()), tensor).result() == 0
    assert copied.bytes == 0


if __name__ == "__main__":
    with Engine(1, memory="512 MiB") as engine:
        rows = [measure(engine, name) for name in KINDS]
    print("".join(map(line, [HEADINGS, ["---"] * len(HEADINGS), *rows])), end="")
