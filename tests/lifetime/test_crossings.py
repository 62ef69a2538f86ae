"""Arrays of an engine through multiprocessing's queues, pipes and arguments: the same memory, as long as needed."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.reduction
import os
import pickle
import signal
import threading

import numpy as np
import pytest

from shmengine import crossings
from shmengine.engine import Engine
from shmengine.errors import ShmError, StaleReference
from shmengine.region import Region
from tests.helpers import poll_until, run_script

N = 102_400  # whole pages
METHODS = ["spawn", "forkserver", "fork"]


@pytest.fixture(scope="module")
def engine():
    with Engine(1, memory="64 MiB") as shared:
        yield shared


@pytest.fixture(params=METHODS)
def ctx(request):
    return multiprocessing.get_context(request.param)


@pytest.fixture
def spawn():
    return multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def helper(engine):
    """A process that the tests share: starting one takes a second."""
    with Child(multiprocessing.get_context("spawn")) as shared:
        yield shared


@pytest.fixture
def child(helper):
    yield helper
    helper(forget_all)


def core_of(engine):
    return engine._backend._core


def used(engine):
    """Bytes of main's own blocks that somebody needs."""
    gc.collect()
    engine.stats()
    return int(core_of(engine).region.counters().used)


def is_shared_here(array):
    """Whether an array came by reference, in a process that has no engine."""
    return any(joined.crossings.arena.contains(array) for joined in crossings._joined.values())


def dumps(obj):
    return bytes(multiprocessing.reduction.ForkingPickler.dumps(obj))


class Child:
    """A process that runs functions of this module, one after the other, and keeps what they return by name."""

    def __init__(self, ctx, *args):
        self.pipe, theirs = ctx.Pipe()
        self.process = ctx.Process(target=serve, args=(theirs, *args))
        self.process.start()
        theirs.close()

    def __call__(self, fn, *args, keep=None):
        self.pipe.send((fn, args, keep))
        return self.pipe.recv()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.is_alive():
            self.pipe.send(None)  # a forked child has our end, too, and would never see it closed
        self.pipe.close()
        self.process.join()
        self.process.close()


KEPT = {}


def serve(pipe, *args):
    KEPT.update(enumerate(args))
    del args
    while (request := pipe.recv()) is not None:
        fn, args, keep = request
        value = fn(*(KEPT[arg.name] if isinstance(arg, Kept) else arg for arg in args))
        if keep is not None:
            KEPT[keep], value = value, None
        pipe.send(value)
        del request, fn, args, value


class Kept:
    """Stands for what a child has kept."""

    def __init__(self, name):
        self.name = name


def identity(obj):
    return obj


def write(array, value):
    array[0] = value


def describe(array):
    return (
        type(array),
        array.shape,
        array.strides,
        str(array.dtype),
        array.flags.writeable,
        is_shared_here(array),
    )


def total(array):
    return float(array.sum())


def forget(name):
    del KEPT[name]
    gc.collect()


def forget_all():
    KEPT.clear()
    gc.collect()


def regions_joined():
    return len(crossings._joined)


# --- the same memory -----------------------------------------------------------------------------


def test_as_arguments_of_a_process(engine, ctx):
    array = engine.zeros(N)
    with Child(ctx, array, array[10::2]) as child:
        child(write, Kept(0), 5)
        child(write, Kept(1), 6)
        assert (array[0], array[10]) == (5, 6)
        array[0] = 7
        assert child(total, Kept(0)) == 13


def test_through_a_pipe(engine, ctx):
    array = engine.zeros(N)
    with Child(ctx) as child:
        child(identity, array, keep="array")
        child(write, Kept("array"), 5)
        assert array[0] == 5
        assert child(describe, array) == (np.ndarray, (N,), (8,), "float64", True, True)


def take_and_write(queue, answers):
    array = queue.get()
    array[0] = 3
    shared = is_shared_here(array)
    del array
    answers.put((shared, regions_joined()))


def test_through_a_queue(engine, ctx):
    queue, answers = ctx.Queue(), ctx.Queue()
    process = ctx.Process(target=take_and_write, args=(queue, answers))
    process.start()
    array = engine.zeros(N)
    queue.put(array)
    assert answers.get() == (True, 0)
    assert array[0] == 3
    process.join()
    process.close()
    for each in (queue, answers):
        each.close()
        each.join_thread()


def doubled(array):
    array *= 2
    return array.shape


def test_through_a_pool(engine, spawn):
    arrays = [engine.full(N, 1.0), engine.full((10, 5), 2.0)]
    with spawn.Pool(1) as pool:
        assert pool.map(doubled, arrays) == [(N,), (10, 5)]
        pool.close()
        pool.join()
    assert (arrays[0] == 2).all()
    assert (arrays[1] == 4).all()


LAYOUTS = {
    "C": lambda array: array,
    "a few numbers": lambda array: array[:3, :2],
    "Fortran": lambda array: array.T,
    "strided": lambda array: array[::2, ::3],
    "negative": lambda array: array[::-1],
    "fields": lambda array: array.view([("a", "f4"), ("b", "i4")])["b"],
    "times": lambda array: array.view("M8[ns]"),
    "broadcast": lambda array: np.broadcast_to(array[:1], array.shape),
}


def test_views_of_every_layout(engine, child):
    array = engine.zeros((100, 60))
    array[:] = np.arange(6000).reshape(100, 60)
    for name, layout in LAYOUTS.items():
        view = layout(array)
        got = child(describe, view)
        assert got == (*describe(view)[:5], True), name
        assert np.array_equal(child(np.copy, view), view), name
    array.flags.writeable = False
    assert child(describe, array)[4:] == (False, True)


def test_within_other_objects(engine, child):
    pd = pytest.importorskip("pandas")
    array = engine.zeros(N)
    assert child(len, {"a": [array, array], "b": (array,)}) == 2
    child(identity, [array, {"again": array}], keep="list")
    assert child(all_shared, Kept("list"))
    assert child(describe_column, pd.DataFrame({"a": array}, copy=False))


def all_shared(objects):
    return is_shared_here(objects[0]) and objects[1]["again"] is objects[0]


def describe_column(frame):
    return is_shared_here(frame["a"].to_numpy())


def test_results_of_workers_are_the_engines_too(engine, child):
    result = engine.submit(np.ones, N).result()
    assert child(describe, result)[5]


def test_passed_on_once_more(engine, spawn, child):
    array = engine.zeros(N)
    with Child(spawn) as second:
        child(identity, array, keep="array")
        second(identity, child(identity, Kept("array")), keep="array")  # by way of us
        second(write, Kept("array"), 9)
        assert array[0] == 9
        assert child(total, Kept("array")) == 9


def test_passed_on_and_dropped(engine, child):
    before = used(engine)
    child(identity, engine.full(N, 3.0), keep="array")
    raw = child(dumps, Kept("array"))
    child(forget, "array")
    assert used(engine) == before + 8 * N  # held by the child for whoever receives it
    assert child(regions_joined) == 1
    got = pickle.loads(raw)
    assert total(got) == 3 * N
    del got
    child(len, engine.zeros(3))  # it looks when it receives the next one
    assert child(regions_joined) == 0
    assert used(engine) == before


def test_in_the_same_process(engine):
    array = engine.zeros(N)
    got = pickle.loads(dumps(array))
    got[0] = 4
    assert array[0] == 4


# --- nobody else's -------------------------------------------------------------------------------


def test_other_arrays_go_as_ever(engine, child, tmp_path):
    mapped = np.memmap(tmp_path / "file", "f8", "w+", shape=(10,))
    others = [
        np.zeros(N),
        np.zeros((3, 4), order="F"),
        np.array([None, "a"]),
        np.ma.masked_array([1, 2], [True, False]),
        mapped,
        np.arange(3).astype("U5"),
        np.array(["a"], np.dtypes.StringDType()),
        engine.zeros(10).view(np.matrix),
    ]
    expected = [pickle.dumps(each, pickle.DEFAULT_PROTOCOL) for each in others]
    assert [dumps(each) for each in others] == expected
    assert child(describe, np.zeros(3))[4:] == (True, False)


def test_a_reducer_that_was_there_before_still_is(monkeypatch):
    reducers = multiprocessing.reduction.ForkingPickler._extra_reducers
    monkeypatch.setitem(reducers, np.ndarray, lambda array: (identity, ("other's",)))
    monkeypatch.setattr(crossings, "_reduce_before", None)
    with Engine(1, memory="8 MiB") as engine:
        assert pickle.loads(dumps(np.zeros(3))) == "other's"
        assert isinstance(pickle.loads(dumps(engine.zeros(3))), np.ndarray)


def test_arrays_of_a_closed_engine_are_copied():
    with Engine(1, memory="8 MiB") as engine:
        array = engine.full(N, 2.0)
    raw = dumps(array)
    assert len(raw) > array.nbytes
    assert (pickle.loads(raw) == 2).all()


def test_where_no_room_is_left_for_the_message_the_data_are_copied():
    with Engine(1, memory="8 MiB") as engine:
        arrays = [engine.full(30_000, 1.0)]
        while True:
            with engine.allocator():
                arrays.append(np.ones(200))
            if not core_of(engine).arena.contains(arrays[-1]):
                break
        while True:
            with engine.allocator():
                arrays.append(np.ones(128))
            if not core_of(engine).arena.contains(arrays[-1]):
                break
        flags = []
        with core_of(engine).arena.allocator(1):
            while core_of(engine).arena.contains(each := np.empty(1)):
                flags.append(each)
        raw = dumps(arrays[0])
        assert len(raw) > arrays[0].nbytes
        assert (pickle.loads(raw) == 1).all()


# --- how long it lives ---------------------------------------------------------------------------


def test_it_lives_from_the_sending_to_the_last_view(engine, child):
    before = used(engine)
    child(identity, engine.full(N, 1.0), keep="array")  # nobody else has it
    assert used(engine) == before + 8 * N
    assert child(total, Kept("array")) == N
    child(forget, "array")
    assert used(engine) == before
    assert child(regions_joined) == 0


def test_it_waits_for_a_receiver_without_the_senders_array(engine, spawn):
    before = used(engine)
    queue = spawn.Queue()
    queue.put(engine.full(N, 2.0))
    poll_until(lambda: core_of(engine).crossings._waiting)
    assert used(engine) > before
    got = queue.get()
    assert total(got) == 2 * N
    del got
    assert used(engine) == before
    queue.close()
    queue.join_thread()


def test_many_messages_leave_nothing(engine, child):
    before = used(engine)
    for number in range(3):
        assert child(total, engine.full(N, float(number))) == number * N
    held = child(inventory)
    for number in range(50):
        assert child(total, engine.full(N, float(number))) == number * N
    assert child(inventory) == held
    assert used(engine) == before
    assert core_of(engine).region.counters().participants == 2
    assert not core_of(engine).crossings._waiting


def inventory():
    from multiprocessing import util

    gc.collect()
    with open("/proc/self/maps") as maps:
        mappings = sum("/dev/shm/#" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), mappings, len(util._finalizer_registry), regions_joined()


def test_what_nobody_receives_ends_with_the_engine():
    with Engine(1, memory="8 MiB") as engine:
        arena = core_of(engine).arena
        raw = dumps(engine.zeros(N))
        assert used(engine) >= 8 * N
        assert len(raw) < 2000
        region = core_of(engine).region
    assert region.counters().pins == 0
    assert not arena.pinned_bytes
    with pytest.raises(ShmError, match="its engine be open, until the array is received"):
        pickle.loads(raw)


def test_an_engine_that_is_closed_before_it_is_received(spawn):
    reading, writing = spawn.Pipe(duplex=False)
    with Engine(1, memory="8 MiB") as engine:
        array = engine.full(N, 1.0)
        writing.send(array)
    assert total(array) == N  # the sender's stays
    with pytest.raises(ShmError, match="has closed it"):
        reading.recv()
    reading.close()
    writing.close()


def test_an_engine_that_is_closed_while_it_is_read(child):
    with Engine(1, memory="8 MiB") as engine:
        array = engine.full(N, 1.0)
        child(identity, array, keep="array")
    del array
    gc.collect()
    assert child(total, Kept("array")) == N
    child(forget, "array")
    assert child(regions_joined) == 0


def test_received_twice(engine):
    raw = dumps(engine.full(N, 1.0))
    first = pickle.loads(raw)
    assert total(pickle.loads(raw)) == N  # as long as anybody has it
    engine.stats()
    del first
    used(engine)
    with pytest.raises(StaleReference, match="received before, and freed"):
        pickle.loads(raw)


def test_a_sender_that_has_ended():
    script = """
        import sys
        from multiprocessing.reduction import ForkingPickler
        import shmengine
        with shmengine.Engine(1, memory="8 MiB") as engine:
            print(bytes(ForkingPickler.dumps(engine.zeros(1000))).hex())
    """
    raw = bytes.fromhex(run_script(script).stdout)
    with pytest.raises(ShmError, match=r"the engine that this array lies in cannot be reached: .* has ended"):
        pickle.loads(raw)


def test_a_receiver_that_is_killed(engine, spawn):
    before = used(engine)
    child = Child(spawn)
    child(identity, engine.zeros(N), keep="array")
    assert used(engine) == before + 8 * N
    os.kill(child.process.pid, signal.SIGKILL)
    child.process.join()
    assert used(engine) == before
    child.__exit__()
    assert engine.submit(total, np.ones(3)).result() == 3


def test_a_receiver_that_ends_with_the_array(spawn):
    with Engine(1, memory="8 MiB") as engine:
        before = used(engine)
        with Child(spawn) as child:
            child(identity, engine.zeros(N), keep="array")
            assert used(engine) == before + 8 * N
        assert used(engine) == before


def test_in_a_forked_child_arrays_are_copied(engine):
    array = engine.full(N, 1.0)
    ctx = multiprocessing.get_context("fork")
    with Child(ctx, array) as child:
        got = child(identity, Kept(0))  # what a child has inherited is no part of it in the region
    got[0] = 7
    assert array[0] == 1


def test_several_threads_send_and_receive(engine):
    before = used(engine)
    errors = []

    def cross(number):
        try:
            for i in range(50):
                array = engine.full(500, float(number * i))
                raw = dumps([array, array[::2]])
                del array
                first, second = pickle.loads(raw)
                assert first[0] == second[-1] == number * i
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=cross, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert used(engine) == before


def test_a_worker_of_the_engine_may_receive(engine):
    array = engine.zeros(N)
    raw = dumps(array)
    assert engine.submit(write_there, raw).result() == (1, 0)
    assert array[0] == 1
    assert engine.submit(total, np.ones(3)).result() == 3


def write_there(raw):
    array = pickle.loads(raw)
    array[0] = 1
    first = float(array[0])
    del array
    return first, regions_joined()


def test_regions_are_known_by_number(engine):
    number = core_of(engine).region.number
    assert Region.is_joined(number)
    assert not Region.is_joined(number ^ 1)
