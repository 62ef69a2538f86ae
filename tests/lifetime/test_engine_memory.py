"""Whose memory an array is, how often it is copied, how long it lives, and what happens when there is no more."""

from __future__ import annotations

import concurrent.futures
import gc
import os
import pickle
import threading
import time

import numpy as np
import pytest

from shmengine.engine import Engine
from shmengine.errors import ArrayError, BlockError, Closed, MemoryBudgetExceeded
from tests.helpers import open_fds, poll_until, run_script

MIB = 1 << 20


@pytest.fixture(scope="module")
def engine():
    with Engine(2, memory="64 MiB") as shared:
        yield shared


@pytest.fixture
def make_engine():
    made = []

    def make(workers=2, **settings):
        made.append(Engine(workers, **{"memory": "32 MiB", **settings}))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


class Bytes:
    """What crossed within the block: ``copied`` and ``shared``, by the engine's own count."""

    def __init__(self, engine):
        self.engine = engine

    def __enter__(self):
        self.before = self.engine.stats()
        return self

    def __exit__(self, *_):
        after = self.engine.stats()
        self.copied = after.bytes_copied - self.before.bytes_copied
        self.shared = after.bytes_shared - self.before.bytes_shared


def region_counters(engine):
    return engine._backend._core.region.counters()


def used(engine):
    """Bytes of main's own blocks in shared memory."""
    gc.collect()
    return int(region_counters(engine).used)


def held(engine):
    """Bytes of others' blocks that main keeps alive."""
    gc.collect()
    return int(region_counters(engine).held)


def strides_of(array):
    """Strides that mean something."""
    return [stride for stride, length in zip(array.strides, array.shape, strict=True) if length > 1]


def count_mappings():
    with open("/proc/self/maps") as file:
        return len(file.readlines())


def is_mapped(inode):
    with open("/proc/self/maps") as file:
        return any(line.split()[4] == str(inode) for line in file)


def is_shared(engine, array):
    return engine._backend.is_shared(array)


# --- born shared: nothing is copied ---------------------------------------------------------------

VIEWS = {
    "whole": lambda a: a,
    "slice": lambda a: a[100:900],
    "strided": lambda a: a[::3, ::2],
    "transposed": lambda a: a.T,
    "negative strides": lambda a: a[::-1, ::-2],
    "reshaped": lambda a: a.reshape(100, -1),
    "0-d": lambda a: a[5, 5, ...],
    "new axis": lambda a: a[:, None],
    "other type": lambda a: a.view("i8"),
    "view of a view": lambda a: a[1:][::2].T[3:],
    "diagonal": np.diagonal,
    "broadcast": lambda a: np.broadcast_to(a[0], (50, a.shape[1])),
}


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("view", VIEWS)
def test_views_of_born_shared_arrays_go_out_for_free(engine, view, order):
    whole = engine.empty((1000, 80), "f8", order=order)
    whole[:] = np.arange(80_000).reshape(1000, 80)
    array = VIEWS[view](whole)

    def look(a):
        return a.shape, strides_of(a), a.flags.writeable, float(np.sum(a, dtype="f8"))

    with Bytes(engine) as crossed:
        shape, strides, writeable, total = engine.submit(look, array).result()
    if not (view == "reshaped" and order == "F"):  # NumPy copies that one itself
        assert crossed.copied == 0
        assert crossed.shared >= array.nbytes > 0
    assert (shape, strides, writeable) == (array.shape, strides_of(array), False)
    assert total == float(np.sum(array, dtype="f8"))


@pytest.mark.parametrize("view", VIEWS)
def test_results_and_their_views_come_back_for_free(engine, view):
    def make(view):
        return view(np.arange(80_000.0).reshape(1000, 80) * 2)

    expected = make(VIEWS[view])
    with Bytes(engine) as crossed:
        result = engine.submit(make, VIEWS[view]).result()
    assert crossed.copied == 0
    assert crossed.shared >= expected.nbytes
    assert strides_of(result) == strides_of(expected)
    assert np.array_equal(result, expected)
    assert is_shared(engine, result)


def test_a_result_goes_out_again_for_free(engine):
    result = engine.submit(np.ones, 100_000).result()
    with Bytes(engine) as crossed:
        total = engine.submit(np.sum, result[::2]).result()
        again = engine.submit(lambda a: a[1:], result).result()
    assert total == 50_000
    assert crossed.copied == 0
    assert np.shares_memory(again, result)


def test_several_arrays_of_one_result_come_back_for_free(engine):
    def make():
        a = np.ones(50_000)
        return {"a": a, "part": a[10:20], "other": [np.zeros(60_000), (a * 3,)]}

    with Bytes(engine) as crossed:
        result = engine.submit(make).result()
    assert crossed.copied == 0
    assert np.shares_memory(result["a"], result["part"])
    assert result["other"][1][0].sum() == 150_000


def test_blocks_of_born_shared_arrays_are_not_copied(engine):
    x = engine.full((4000, 100), 2.0)
    with Bytes(engine) as crossed:
        assert engine.reduce(np.sum, x, combine=lambda a, b: a + b) == 800_000
    assert crossed.copied == 0
    assert crossed.shared >= x.nbytes
    out = engine.empty(x.shape)
    with Bytes(engine) as crossed:
        engine.map_blocks(np.sqrt, x[::-1], out=out)
    assert crossed.copied <= out.nbytes  # at most from the worker's block to its place
    assert np.array_equal(out, np.sqrt(x))


def test_allocator_gives_shared_arrays(engine, tmp_path):
    np.save(tmp_path / "a.npy", np.arange(5000.0))
    outside = np.arange(5000.0)
    with engine.allocator():
        a = np.zeros(5000)
        born = {
            "zeros": a,
            "product": outside * 2,
            "concatenate": np.concatenate([outside, outside]),
            "load": np.load(tmp_path / "a.npy"),
            "copy": outside.copy(),
            "fromiter": np.fromiter(range(5000), "i8"),
            "astype": outside.astype("f4"),
            "sort": np.sort(outside),
            "fortran": np.asfortranarray(outside.reshape(50, 100)),
            "string": np.full(500, "abc"),
        }
    assert not is_shared(engine, np.zeros(5000))
    for name, array in born.items():
        assert is_shared(engine, array), name
        assert type(array) is np.ndarray
        with Bytes(engine) as crossed:
            back = engine.submit(lambda a: a.flat[0], array).result()
        assert crossed.copied == 0, name
        assert back == array.flat[0]


def test_allocator_belongs_to_its_thread_and_nests(engine):
    seen = []
    with engine.allocator():
        thread = threading.Thread(target=lambda: seen.append(np.zeros(5000)))
        thread.start()
        thread.join()
        with engine.allocator():
            seen.append(np.zeros(5000))
        seen.append(np.zeros(5000))
    seen.append(np.zeros(5000))
    assert [is_shared(engine, array) for array in seen] == [False, True, True, False]
    with pytest.raises(KeyError), engine.allocator():
        raise KeyError
    assert not is_shared(engine, np.zeros(5000))


def test_allocators_of_two_engines(engine, make_engine):
    other = make_engine()
    with engine.allocator(), other.allocator():
        a = np.zeros(5000)
    assert is_shared(other, a)
    assert not is_shared(engine, a)
    with Bytes(engine) as crossed:
        assert engine.submit(np.size, a).result() == 5000
    assert crossed.copied == a.nbytes


# --- ordinary memory: copied once -----------------------------------------------------------------


def test_ordinary_arrays_are_copied_once_in_and_once_out(engine):
    x = np.random.default_rng(0).random((3000, 100))
    with Bytes(engine) as crossed:
        assert engine.reduce(np.sum, x, combine=lambda a, b: a + b, block_bytes="256 KiB") > 0
    assert crossed.copied == x.nbytes

    with Bytes(engine) as crossed:
        y = engine.map_blocks(np.sqrt, x, block_bytes="256 KiB")
    assert crossed.copied == x.nbytes + y.nbytes
    with Bytes(engine) as crossed:
        engine.map_blocks(np.sqrt, x, out=np.empty_like(x), block_bytes="256 KiB")
    assert crossed.copied == x.nbytes + y.nbytes
    with Bytes(engine) as crossed:
        engine.map_blocks(lambda b: b > 0.5, x, out=np.empty(x.shape, bool), block_bytes="1 MiB")
    assert crossed.copied == x.nbytes + x.size

    with Bytes(engine) as crossed:
        assert list(engine.map(np.sum, [x])) == [x.sum()]
    assert crossed.copied == x.nbytes


@pytest.mark.parametrize("writable", [False, "private"])
def test_private_copies_are_made_by_the_worker(engine, writable):
    x = np.ones(200_000)
    with Bytes(engine) as crossed:
        assert list(engine.map(np.sum, [x], writable=writable)) == [200_000]
    assert crossed.copied == x.nbytes


def test_small_results_are_copied_and_counted(engine):
    with Bytes(engine) as crossed:
        result = engine.submit(np.ones, 10).result()
    assert crossed.copied == result.nbytes


# --- put ------------------------------------------------------------------------------------------


def test_put_is_one_copy_for_all(make_engine):
    engine = make_engine()
    before = used(engine)
    table = np.arange(500_000.0)
    with Bytes(engine) as crossed:
        ref = engine.put({"table": table, "name": "n"})
        assert crossed.engine.stats().bytes_copied - crossed.before.bytes_copied == table.nbytes
        sums = list(engine.map(lambda d, i: d["table"][i], [ref] * 200, range(200)))
        engine.map_blocks(lambda b, *, d: b + d["table"][0], np.zeros(10), d=ref)
    assert sums == list(range(200))
    assert crossed.copied < table.nbytes + 10_000
    assert used(engine) >= before + table.nbytes
    assert not ref.get()["table"].flags.writeable
    del ref
    poll_until(lambda: used(engine) < before + 100_000, what="the object is freed, by idle workers too")


def test_put_objects_are_read_only(engine):
    ref = engine.put([np.zeros(1000), {"a": np.zeros(100_000)}])

    def write(d):
        d[1]["a"][0] = 1

    with pytest.raises(ValueError, match="read-only"):
        engine.submit(write, ref).result()
    with pytest.raises(ValueError, match="read-only"):
        ref.get()[0][:] = 1


def test_a_put_object_lives_while_tasks_need_it(make_engine):
    engine = make_engine(1)
    for i in range(30):  # 30 times the budget, were they not freed
        ref = engine.put(np.full(MIB, i, "f8")[: MIB // 4 * (1 + i % 4)])
        future = engine.submit(lambda a: (a[0], a[-1], a.size), ref)
        del ref
        assert future.result() == (i, i, MIB // 4 * (1 + i % 4))


def test_views_of_a_put_object_keep_it(make_engine):
    engine = make_engine()
    ref = engine.put(np.arange(300_000.0))
    view = ref.get()[::1000]
    del ref
    gc.collect()
    for _ in range(5):  # would overwrite it
        engine.put(np.ones(300_000))
        list(engine.map(np.ones, [300_000] * 3))
    assert np.array_equal(view, np.arange(0, 300_000, 1000.0))


# --- more than the budget -------------------------------------------------------------------------


def test_a_list_of_results_of_four_times_the_budget(make_engine):
    engine = make_engine(memory="64 MiB")

    def make(i):
        a = np.empty(16 * MIB, "u1")
        a[:] = i
        return a

    results = list(engine.map(make, range(16)))
    for i, result in enumerate(results):
        assert (result == i).all()
    assert sum(is_shared(engine, result) for result in results) < 4
    del results, result
    assert held(engine) == 0
    assert all((r[::4096] == i).all() for i, r in enumerate(engine.map(make, range(8))))


def test_a_list_of_futures_of_four_times_the_budget(make_engine):
    engine = make_engine(memory="32 MiB")
    futures = [engine.submit(np.full, 2 * MIB, i, "u1") for i in range(64)]
    for i, future in enumerate(futures):
        assert (future.result() == i).all()
    assert (futures[0].result() == 0).all()


def test_kept_results_of_many_small_arrays(make_engine):
    engine = make_engine(memory="32 MiB")
    kept = list(engine.map(np.full, [10_000] * 2000, range(2000)))  # 160 MB
    assert all((a == i).all() for i, a in enumerate(kept))


def test_arrays_larger_than_the_budget_stream_through(make_engine):
    engine = make_engine(memory="16 MiB")
    x = np.random.default_rng(1).random((8000, 1000))  # 64 MB
    assert engine.reduce(np.max, x, combine=max) == x.max()
    y = engine.map_blocks(lambda b: b * 2, x)
    assert np.array_equal(y, x * 2)
    y = engine.map_blocks(lambda b: b[:, ::4], x, block_bytes="2 MiB")
    assert np.array_equal(y, x[:, ::4])
    z = engine.map_overlap(lambda b: b, x, 2, out=x)
    assert z is x
    assert engine.stats().memory_used <= 16 * MIB


# --- too little -----------------------------------------------------------------------------------


def test_a_budget_too_small_for_the_workers():
    with pytest.raises(
        MemoryBudgetExceeded, match=r"memory budget of 2 MiB is too small: 2 workers need"
    ) as caught:
        Engine(2, memory="2 MiB")
    assert caught.value.budget == 2 * MIB
    assert caught.value.asked > 2 * MIB


def test_memory_too_small_for_one_block(make_engine):
    engine = make_engine(memory="16 MiB")
    x = np.zeros((4, 5 * MIB))
    with pytest.raises(
        MemoryBudgetExceeded, match=r"40 MiB are more than the whole memory budget of 16 MiB"
    ) as caught:
        engine.map_blocks(np.sqrt, x)
    assert caught.value.budget == 16 * MIB
    assert caught.value.asked >= 40 * MIB
    with pytest.raises(MemoryBudgetExceeded, match="smaller blocks"):
        list(engine.map(np.sum, x))
    with pytest.raises(MemoryBudgetExceeded, match="40 MiB"):
        engine.submit(np.sum, x[0]).result()
    with pytest.raises(MemoryBudgetExceeded, match="160 MiB"):
        engine.put(x)
    with pytest.raises(MemoryBudgetExceeded, match="160 MiB"):
        engine.empty(x.shape)
    assert engine.map_blocks(np.sqrt, np.ones(10)).sum() == 10


@pytest.mark.parametrize("size", [15, 20, 100])
def test_a_result_larger_than_the_budget(make_engine, size):
    engine = make_engine(memory="16 MiB")
    error = engine.submit(np.ones, size * MIB, "u1").exception()
    assert isinstance(error, MemoryBudgetExceeded)
    assert error.asked >= size * MIB
    assert error.budget == 16 * MIB
    first, second, third = engine.map(np.ones, [10, size * MIB, 20], ["u1"] * 3, on_error="return")
    assert (first.size, type(second), third.size) == (10, MemoryBudgetExceeded, 20)
    with pytest.raises(MemoryBudgetExceeded):
        engine.map_blocks(lambda b: np.ones((len(b), size * MIB), "u1"), np.zeros(3), block_bytes=8)
    assert engine.submit(abs, -1).result() == 1


def test_memory_full_of_kept_arrays_gives_an_error_with_numbers(make_engine):
    engine = make_engine(memory="16 MiB")
    kept = []
    with pytest.raises(
        MemoryBudgetExceeded, match=r"memory budget of 16 MiB is used up: 1\d MiB by arrays of"
    ) as caught:
        kept.extend(engine.zeros(MIB, "u1") for _ in range(100))
    assert caught.value.used >= len(kept) * MIB
    assert len(kept) >= 10
    # Now tasks find no room either: an error, or (small ones) room that is left; never a hang.
    for call in (
        lambda: engine.submit(np.sum, np.ones(2 * MIB)).result(),
        lambda: list(engine.map(np.sum, [np.ones(2 * MIB)])),
        lambda: engine.map_blocks(np.sqrt, np.ones((2, 2 * MIB))),
        lambda: engine.put(np.ones(2 * MIB)),
    ):
        with pytest.raises(MemoryBudgetExceeded, match="16 MiB"):
            call()
    try:
        assert engine.submit(np.sum, kept[0]).result() == 0
    except MemoryBudgetExceeded:
        pass
    del kept[:]
    assert engine.submit(np.sum, np.ones(MIB)).result() == MIB
    assert len([engine.zeros(MIB, "u1") for _ in range(8)]) == 8


@pytest.mark.parametrize("size", [1000, 40_000, MIB])
def test_kept_results_never_block_further_tasks(make_engine, size):
    """Results that are kept fill half of the budget at most."""
    engine = make_engine(memory="16 MiB")
    count = 40 * MIB // size if size > 1000 else 3000
    kept = [engine.submit(np.full, size, i % 251, "u1").result() for i in range(count)]
    assert all((a == i % 251).all() for i, a in enumerate(kept))
    assert engine.submit(np.sum, np.ones(MIB // 4)).result() == MIB // 4


def test_a_callback_that_submits_while_memory_is_short(make_engine):
    """The thread that takes results must not wait for room that only it can make."""
    engine = make_engine(memory="16 MiB")
    ended = threading.Event()
    array = np.ones(3 * MIB, "u1")
    total = [0]
    lock = threading.Lock()

    def more(future):
        try:
            with lock:
                total[0] += len(future.result())
                again = total[0] < 60 * len(array)
            if again:
                engine.submit(np.copy, array).add_done_callback(more)
            else:
                ended.set()
        except BaseException:
            ended.set()
            raise

    for _ in range(6):
        engine.submit(np.copy, array).add_done_callback(more)
    assert ended.wait(60)
    assert total[0] >= 60 * len(array)


def test_a_callback_that_maps(make_engine):
    engine = make_engine()
    found = []
    ended = threading.Event()

    def use(future):
        try:
            found.append(list(engine.map(abs, range(-50, 0))))
        finally:
            ended.set()

    engine.submit(abs, 1).add_done_callback(use)
    assert ended.wait(60)
    assert found == [list(range(50, 0, -1))]


# --- lifetimes ------------------------------------------------------------------------------------


def test_arrays_outlive_the_engine():
    engine = Engine(2, memory="32 MiB")
    zeros = engine.zeros(100_000)
    with engine.allocator():
        made = np.arange(100_000.0)
    results = list(engine.map(np.full, [50_000] * 4, range(4)))
    view = results[3][::7]
    ref = engine.put(np.arange(1000))
    inside = ref.get()
    engine.close()
    zeros += 5
    assert (zeros == 5).all()
    del engine, ref, results
    gc.collect()
    with Engine(2, memory="32 MiB") as other:  # new memory over the old, were it free
        for a in other.map(np.ones, [50_000] * 20):
            assert a[0] == 1
        assert (zeros == 5).all()
        assert np.array_equal(made, np.arange(100_000.0))
        assert (view == 3).all()
        assert np.array_equal(inside, np.arange(1000))
        assert other.submit(np.sum, zeros).result() == 500_000


@pytest.mark.parametrize("order", ["engine first", "array first"])
def test_the_mapping_of_a_closed_engine_goes_with_its_last_array(order):
    """Until then its memory stays in use, and nothing names it any more."""
    engine = Engine(1, memory="16 MiB")
    inode = engine._backend._core.region.inode
    array = engine.full(100_000, 7.0)
    assert engine.submit(np.sum, array).result() == 700_000
    assert len(engine.submit(np.ones, 100_000).result()) == 100_000
    view = array[::2]
    del array
    if order == "array first":
        del view
    engine.close()
    del engine
    gc.collect()
    if order == "engine first":
        assert is_mapped(inode)
        assert (view == 7).all()
        del view
        gc.collect()
    assert not is_mapped(inode)


def test_arrays_of_a_forgotten_engine():
    arrays = []
    for i in range(3):
        engine = Engine(1, memory="16 MiB")
        arrays.append(engine.full(1000, i))
        arrays.append(engine.submit(np.full, 50_000, i).result())
        del engine
        gc.collect()
    assert [a[-1] for a in arrays] == [0, 0, 1, 1, 2, 2]


def test_what_numpy_does_with_shared_arrays(engine):
    with engine.allocator():
        a = np.arange(10_000.0)
        b = np.arange(10_000.0)
        c = np.zeros((100, 100))
        strings = np.array(["x" * 50] * 100)
    a.resize(40_000, refcheck=False)  # grows outside of the block: realloc
    assert (a[:10_000] == np.arange(10_000.0)).all()
    assert not a[10_000:].any()
    b.resize(100, refcheck=False)
    assert (b == np.arange(100.0)).all()
    c = c.reshape(50, 200)
    assert np.array_equal(pickle.loads(pickle.dumps(c)), np.zeros((50, 200)))
    assert np.array_equal(c.copy(), c)
    strings.sort()
    assert strings[0] == "x" * 50
    assert not c.view("i8").any()


def test_shared_arrays_outlive_the_engine_in_every_way():
    engine = Engine(1, memory="32 MiB")
    with engine.allocator():
        a, b, c = (np.arange(10_000.0) for _ in range(3))
        views = [np.arange(10_000.0)[i::7] for i in range(50)]
    engine.close()
    del engine
    gc.collect()
    a.resize(40_000, refcheck=False)
    assert (a[:10_000] == np.arange(10_000.0)).all()
    assert np.array_equal(pickle.loads(pickle.dumps(b)), np.arange(10_000.0))
    b *= 2
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # freed by other threads
        holder = [views]
        del views
        list(pool.map(lambda _: holder and holder.clear(), range(4)))
    thread = threading.Thread(target=lambda box: box.clear(), args=([c],))
    del c
    thread.start()
    thread.join()
    assert b[-1] == 2 * 9999


def test_threads_free_and_make_shared_arrays_at_once(make_engine):
    engine = make_engine(memory="64 MiB")
    before = used(engine)
    boxes = [[] for _ in range(4)]
    errors = []

    def work(seed):
        rng = np.random.default_rng(seed)
        try:
            with engine.allocator():
                for _ in range(1500):
                    n = int(rng.integers(200, 20_000))
                    array = np.full(n, seed, "i4")
                    boxes[int(rng.integers(4))].append(array)  # another thread frees it
                    mine = boxes[seed]
                    while len(mine) > 20:
                        old = mine.pop(0)
                        assert (old == old[0]).all()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for box in boxes:
        box.clear()
    assert used(engine) <= before + 1000


def test_memory_is_back_after_everything(make_engine):
    engine = make_engine(memory="32 MiB")
    list(engine.map(abs, range(100)))
    before = used(engine)
    for _ in range(3):
        x = engine.zeros((1000, 500))
        y = engine.map_blocks(lambda b: b + 1, x)
        kept = list(engine.map(np.full, [20_000] * 50, range(50)))
        ref = engine.put(kept[:3])
        assert engine.submit(lambda k: k[2][0], ref).result() == 2
        results = engine.map(np.full, [20_000] * 50, range(50))
        next(results)
        del results
        engine.submit(np.ones, 100_000)  # nobody keeps the future
        del x, y, kept, ref
    engine.submit(abs, 1).result()
    poll_until(lambda: engine.stats().tasks_in_flight == 0)
    poll_until(lambda: used(engine) <= before + 200_000, what="main's blocks are free")
    poll_until(lambda: held(engine) == 0, what="nothing of the workers' is held")


def wait_for_file(path):
    while not os.path.exists(path):
        time.sleep(0.001)


@pytest.mark.parametrize("memory", [None, "256 MiB"], ids=["default", "256 MiB"])
def test_a_hundred_thousand_small_arrays_live(make_engine, memory):
    engine = make_engine(memory=memory)
    fds = len(open_fds())
    mappings = count_mappings()
    results = list(engine.map(lambda i: np.full(3, i), range(50_000)))
    made = [engine.full(4, i) for i in range(40_000)]
    with engine.allocator():
        made += [np.full(200, i) for i in range(40_000, 50_000)]
    for i, array in enumerate(results):
        assert array[2] == i
    for i, array in enumerate(made):
        assert array[3] == i
    assert len(open_fds()) <= fds
    assert count_mappings() < mappings + 200
    assert list(engine.map(np.sum, made[::1000])) == [a.sum() for a in made[::1000]]


def test_what_a_busy_worker_has_free_is_not_lost_to_others(make_engine, tmp_path):
    engine = make_engine(1, memory="64 MiB")
    size = 40 << 20
    assert engine.submit(np.ones, size, "u1").result().nbytes == size  # the worker's, and free again
    busy = engine.submit(wait_for_file, str(tmp_path / "gate"))
    poll_until(busy.running)
    array = engine.empty(size, "u1")  # while the worker is in user code
    del array
    ref = engine.put(np.ones(size, "u1"))
    assert not busy.done()
    del ref
    (tmp_path / "gate").touch()
    busy.result()


def test_descriptors_do_not_grow(make_engine):
    engine = make_engine()
    list(engine.map(abs, range(10)))
    engine.submit(abs, 1).result()
    before = open_fds()
    for _ in range(5):
        engine.put(np.ones(1000))
        engine.map_blocks(np.sqrt, np.ones(100_000))
        list(engine.map(np.ones, [100_000] * 10))
        with engine.allocator():
            np.ones(100_000)
        engine.map(abs, range(10)).close()
    assert open_fds() == before


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    np.arange(400_000.0).tofile(tmp_path / "data")
    return tmp_path / "data"


def test_memmaps_are_read_by_the_workers(engine, data):
    x = np.memmap(data, "f8", "r", shape=(4000, 100))
    with Bytes(engine) as crossed:
        assert engine.reduce(np.sum, x, combine=lambda a, b: a + b) == np.arange(400_000.0).sum()
        assert engine.submit(np.sum, x[::7, 3]).result() == x[::7, 3].sum()
        assert engine.submit(np.sum, np.asarray(x)[5:10].T).result() == x[5:10].sum()
    assert crossed.copied < 1000
    assert crossed.shared >= x.nbytes


def test_memmaps_are_read_only_unless_asked_for(engine, data):
    x = np.memmap(data, "f8", "r+")

    def write(a):
        a[:] = -1
        return float(a[0])

    with pytest.raises(ValueError, match="read-only"):
        engine.submit(write, x).result()
    assert list(engine.map(write, [x[:10]], writable="private")) == [-1]
    assert x[5] == 5
    assert list(engine.map(write, [x[10:20]], writable="shared")) == [-1]
    assert (x[10:20] == -1).all()
    assert (np.fromfile(data)[8:22] == [8, 9, *[-1] * 10, 20, 21]).all()
    read_only = np.memmap(data, "f8", "r")
    with pytest.raises(ArrayError, match="read-only"):
        list(engine.map(write, [read_only], writable="shared"))


def test_blocks_of_a_memmap_written_in_place(make_engine, data):
    engine = make_engine()
    x = np.memmap(data, "f8", "r+")

    def double(block):
        block *= 2
        return block

    with Bytes(engine) as crossed:
        engine.map_blocks(double, x, out=x, writable="shared", block_bytes="256 KiB")
    assert np.array_equal(np.fromfile(data), np.arange(400_000.0) * 2)
    assert crossed.shared >= x.nbytes


# --- writable -------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["whole", "strided", "transposed", "negative strides"])
def test_born_shared_arrays_are_written_in_place(engine, view):
    whole = engine.zeros((500, 40))
    array = VIEWS[view](whole)

    def write(a):
        a += 1
        return a.flags.writeable

    with Bytes(engine) as crossed:
        assert list(engine.map(write, [array], writable="shared")) == [True]
    assert crossed.copied == 0
    assert (array == 1).all()
    assert whole.sum() == array.size
    assert list(engine.map(write, [array], writable="private")) == [True]
    assert whole.sum() == array.size
    with pytest.raises(ValueError, match="read-only"):
        engine.submit(write, array).result()


def test_results_are_written_in_place(engine):
    """What a worker made is an array like any other: main and other workers may write into it."""
    result = engine.submit(np.zeros, 100_000).result()
    before = result.flags.writeable

    def write(a):
        a[:] = 7

    if before:
        list(engine.map(write, [result[:10]], writable="shared"))
        assert result.sum() == 70
    else:
        with pytest.raises(ArrayError, match="read-only"):
            list(engine.map(write, [result[:10]], writable="shared"))


def test_shared_needs_memory_that_workers_reach(engine):
    def write(a):
        a[:] = 1

    with pytest.raises(ArrayError, match=r"engine\.empty.*allocator\(\).*memmap"):
        list(engine.map(write, [np.zeros(10)], writable="shared"))
    read_only = engine.zeros(10)
    read_only.flags.writeable = False
    with pytest.raises(ArrayError, match="read-only"):
        list(engine.map(write, [read_only], writable="shared"))
    with pytest.raises(ArrayError, match=r"engine\.empty"):
        engine.map_blocks(write, np.zeros(10), writable="shared")


def test_a_closed_engine_s_arrays_cannot_be_written_by_tasks():
    engine = Engine(1, memory="16 MiB")
    array = engine.zeros(10)
    engine.close()
    with pytest.raises(Closed):
        engine.submit(np.sum, array)
    with Engine(1, memory="16 MiB") as other, pytest.raises(ArrayError, match="workers can reach"):
        list(other.map(np.sum, [array], writable="shared"))


def test_peak_memory_of_a_long_stream(tmp_path):
    """Streaming a large array takes blocks, not copies of it."""
    source = """
        import resource, sys
        import numpy as np
        import shmengine as shm
        x = np.ones((16_000, 1000))
        out = np.zeros_like(x)
        with shm.Engine(2, memory="64 MiB") as engine:
            engine.map_blocks(np.sqrt, x[:100], out=out[:100])
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            engine.map_blocks(np.sqrt, x, out=out)
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert out.sum() == x.size
        print((after - before) * 1024 / x.nbytes)
    """
    result = run_script(source, check=True)
    assert float(result.stdout) < 0.5


def test_block_errors_free_their_memory(make_engine):
    engine = make_engine(memory="16 MiB")
    for _ in range(20):
        with pytest.raises(BlockError):
            engine.map_blocks(lambda b: b[1:], np.zeros((20, MIB // 8)))
    assert engine.submit(os.getpid).result() in engine._backend.pids
    assert held(engine) == 0
