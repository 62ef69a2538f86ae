"""What `map`, `submit`, `put` and the like promise, on every backend."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import io
import itertools
import logging
import logging.handlers
import os
import queue
import sys
import threading
import time
import traceback
from fractions import Fraction
from typing import NamedTuple

import cloudpickle
import numpy as np
import pytest

from shmengine import Executor
from shmengine.engine import Engine
from shmengine.engine.backend import task_rng
from shmengine.errors import Closed, TaskTimeout, UseAfterFork


def square(x):
    return x * x


FACTOR = 2


def scaled(x):
    return x * FACTOR


def fail_on(bad, x):
    if x == bad:
        raise ZeroDivisionError(f"no {x}")
    return x


# --- map ----------------------------------------------------------------------------------------


def test_map_yields_in_input_order(engine):
    assert list(engine.map(square, range(100))) == [x * x for x in range(100)]


def test_map_unordered_yields_each_result_once(engine):
    assert sorted(engine.map_unordered(square, range(100))) == [x * x for x in range(100)]


def test_starmap_spreads_tuples(engine):
    assert list(engine.starmap(pow, [(2, 3), [3, 2], (10, 0)])) == [8, 9, 1]


def test_several_iterables_end_with_the_shortest(engine):
    assert list(engine.map(lambda a, b, c: (a, b, c), itertools.count(), "abc", range(9))) == [
        (0, "a", 0),
        (1, "b", 1),
        (2, "c", 2),
    ]


def test_empty_iterables(engine):
    assert list(engine.map(square, [])) == []
    assert list(engine.map_unordered(square, [])) == []
    assert list(engine.starmap(square, [])) == []


def test_lambdas_and_closures(engine):
    offset = 1000
    assert list(engine.map(lambda x: x + offset, range(3))) == [1000, 1001, 1002]


def test_none_is_a_result_like_any_other(engine):
    assert list(engine.map(lambda x: None, range(3))) == [None] * 3


@pytest.mark.parametrize("method", ["map", "map_unordered"])
def test_map_takes_no_more_than_its_window(engine, method):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield taken

    results = getattr(engine, method)(square, endless(), window=5)
    assert taken == 0
    for yielded, _ in zip(range(50), results, strict=False):
        assert taken - yielded <= 5
    results.close()
    assert list(results) == []


def test_endless_input_without_a_window(engine):
    results = engine.map(square, itertools.count())
    assert [next(results) for _ in range(1000)] == [x * x for x in range(1000)]
    results.close()


def test_a_dropped_iterator_abandons_its_tasks(engine):
    for _ in range(5):
        next(engine.map(square, itertools.count()))
    assert list(engine.map(square, range(3))) == [0, 1, 4]


def test_streams_can_be_interleaved(engine):
    pairs = zip(engine.map(square, range(200)), engine.map_unordered(abs, [7] * 200), strict=True)
    assert list(pairs) == [(x * x, 7) for x in range(200)]


def test_threads_share_an_engine(engine):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        sums = list(pool.map(lambda n: sum(engine.map(square, range(n))), [100] * 8))
    assert sums == [sum(x * x for x in range(100))] * 8


# --- errors of tasks ----------------------------------------------------------------------------


def test_the_error_of_a_task_is_raised_and_ends_the_iterator(engine):
    results = engine.map(fail_on, itertools.repeat(3), range(10))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError, match="no 3") as caught:
        next(results)
    assert caught.value.__notes__ == ["task 3 of map(fail_on)"]
    text = "".join(traceback.format_exception(caught.value))
    assert "in fail_on" in text
    assert list(results) == []


@pytest.mark.parametrize("timeout", [float("inf"), 1e300, 1e12, np.float32(60), Fraction(60), 10**400])
def test_a_timeout_as_long_as_you_like(engine, timeout):
    assert list(engine.map(abs, [-1, -2], timeout=timeout)) == [1, 2]
    assert engine.map_blocks(np.sqrt, np.ones(3), timeout=timeout).sum() == 3


def test_errors_can_be_returned_or_skipped(engine):
    returned = list(engine.map(fail_on, [1] * 3, range(3), on_error="return"))
    assert [returned[0], returned[2]] == [0, 2]
    assert isinstance(returned[1], ZeroDivisionError)
    assert returned[1].__notes__ == ["task 1 of map(fail_on)"]
    assert list(engine.map(fail_on, [1] * 3, range(3), on_error="skip")) == [0, 2]
    assert sorted(engine.map_unordered(fail_on, [1] * 5, range(5), on_error="skip")) == [0, 2, 3, 4]


def test_an_error_of_the_input_is_raised_as_it_is(engine):
    def broken():
        yield 1
        yield 2
        raise LookupError("the input broke")

    with pytest.raises(LookupError, match="the input broke"):
        list(engine.map(square, broken()))
    with pytest.raises(TypeError, match="iterable"):
        list(engine.starmap(square, [(1,), 2]))
    assert list(engine.map(square, range(3))) == [0, 1, 4]


def test_system_exit_in_a_task_is_an_error_of_the_task(engine):
    def leave(x):
        raise SystemExit(3)

    (error,) = engine.map(leave, [0], on_error="return")
    assert isinstance(error, SystemExit)
    assert error.code == 3


def test_stop_iteration_in_a_task_does_not_end_the_results(engine):
    def stop(x):
        raise StopIteration(x)

    errors = list(engine.map(stop, range(3), on_error="return"))
    assert [type(error) for error in errors] == [StopIteration] * 3


# --- arguments and results ----------------------------------------------------------------------


def test_arrays_reach_functions_read_only(engine):
    def write(a):
        a[0] = 1

    for call in (
        lambda: list(engine.map(write, [np.zeros(3)])),
        lambda: engine.submit(write, np.zeros(3)).result(),
    ):
        with pytest.raises(ValueError, match="read-only") as caught:
            call()
        assert any("'private'" in note and "'shared'" in note for note in caught.value.__notes__)


def test_read_only_cannot_be_switched_off(engine):
    def write(a):
        a.flags.writeable = True

    with pytest.raises(ValueError, match="WRITEABLE"):
        list(engine.map(write, [np.zeros(3)]))


@pytest.mark.parametrize("writable", ["private", True])
def test_private_copies_stay_private(engine, writable):
    def write(a):
        a += 1
        return a

    array = np.zeros(1000)
    for result in engine.map(write, [array] * 3, writable=writable):
        assert (result == 1).all()
    assert not array.any()


def test_written_in_place(engine):
    def write(a):
        a += 1

    array = engine.zeros((10, 100))
    list(engine.map(write, array[2:4], writable="shared"))
    assert array.sum(axis=1).tolist() == [0, 0, 100, 100, 0, 0, 0, 0, 0, 0]


def test_results_share_memory_with_nothing(engine):
    array = np.zeros(1000)
    same, view, pair = engine.map(
        lambda f: f(array), [lambda a: a, lambda a: a[::2], lambda a: [a, {"a": a}]]
    )
    results = [same, view, pair[0], pair[1]["a"]]
    array += 1
    assert not any(result.any() for result in results)

    scratch = np.zeros(1000)

    def reuse(i):
        scratch.fill(i)
        return scratch

    assert [result[0] for result in list(engine.map(reuse, range(5), window=1))] == [0, 1, 2, 3, 4]


def test_arrays_inside_containers_arrive(engine):
    total = engine.submit(lambda d, *, extra: d["a"].sum() + sum(extra[0]), {"a": np.ones(5)}, extra=[(1, 2)])
    assert total.result() == 8


def test_random_numbers_depend_on_seed_and_task_alone(engine):
    def draw(i, rng):
        return rng.integers(1 << 40)

    expected = [task_rng(42, i).integers(1 << 40) for i in range(50)]
    assert list(engine.map(draw, range(50), rng=42)) == expected
    assert sorted(engine.map_unordered(draw, range(50), rng=42)) == sorted(expected)
    assert len(set(expected)) == 50
    assert list(engine.map(draw, range(2), rng=[1, 2])) != list(engine.map(draw, range(2), rng=[1, 3]))


# --- submit -------------------------------------------------------------------------------------


def test_submit_returns_a_future(engine):
    future = engine.submit(pow, 3, 4)
    assert isinstance(future, concurrent.futures.Future)
    assert future.result() == 81
    assert engine.submit(dict, fn=1, self=2).result() == {"fn": 1, "self": 2}


def test_submit_sets_errors_on_the_future(engine):
    error = engine.submit(fail_on, 1, 1).exception()
    assert isinstance(error, ZeroDivisionError)
    assert error.__notes__ == ["submit(fail_on)"]


def test_many_futures_as_completed(engine):
    futures = {engine.submit(square, i): i for i in range(100)}
    for future in concurrent.futures.as_completed(futures):
        assert future.result() == futures[future] ** 2


def test_a_callback_may_submit(engine):
    results = []
    ended = threading.Event()

    def more(future):
        results.append(future.result())
        if len(results) < 4:
            engine.submit(square, results[-1] + 1).add_done_callback(more)
        else:
            ended.set()

    engine.submit(square, 1).add_done_callback(more)
    assert ended.wait(60)
    assert results == [1, 4, 25, 676]


def test_a_cancelled_future_never_runs(make_engine, gate, tmp_path):
    engine = make_engine(1)
    if engine.backend == "serial":
        gate.open()
    first = engine.submit(gate.wait, 5)
    second = [engine.submit((tmp_path / str(i)).touch) for i in range(50)][-1]
    if engine.backend == "serial":
        assert not second.cancel()
        return
    assert second.cancel()
    gate.open()
    assert first.result() == 5
    assert second.cancelled()
    concurrent.futures.wait([second])
    engine.submit(int).result()
    assert (tmp_path / "48").exists()
    assert not (tmp_path / "49").exists()


# --- put and memory -----------------------------------------------------------------------------


def test_a_reference_arrives_as_its_object(engine):
    table = {"weights": np.arange(5), "names": ["a", "b"]}
    ref = engine.put(table)
    assert ref.get()["weights"].tolist() == [0, 1, 2, 3, 4]
    assert list(engine.map(lambda t, i: t["weights"][i], [ref] * 5, range(5))) == [0, 1, 2, 3, 4]
    nested = engine.submit(lambda deep, *, key: deep["x"][0][key], {"x": [ref, (ref,)]}, key="names")
    assert nested.result() == ["a", "b"]


def test_a_reference_is_a_snapshot_and_read_only(engine):
    array = np.zeros(1000)
    ref = engine.put(array)
    array += 1
    assert engine.submit(np.sum, ref).result() == 0

    def write(nested):
        nested[0][0] = 1

    with pytest.raises(ValueError, match="read-only"):
        engine.submit(write, [ref]).result()


def test_references_reach_block_functions(engine):
    ref = engine.put(np.arange(10.0))
    result = engine.map_blocks(lambda b, *, table: table[b], np.arange(10)[::-1], block_bytes=16, table=ref)
    assert result.tolist() == list(range(10))[::-1]


@dataclasses.dataclass
class Holder:
    ref: object


class Pair(NamedTuple):
    left: object
    right: object


PLACES = {
    "bare": lambda ref: ref,
    "list": lambda ref: [ref],
    "dict": lambda ref: {"a": [ref]},
    "named tuple": lambda ref: Pair(1, ref),
    "dataclass": Holder,
    "defaultdict": lambda ref: collections.defaultdict(list, a=ref),
    "deque": lambda ref: collections.deque([ref]),
    "set": lambda ref: {ref},
    "object array": lambda ref: np.array([None, ref], object),
    "deep": lambda ref: [Holder({"a": collections.OrderedDict(b=(ref, Holder(ref)))})],
}


def content(place):
    """What lies in such a place."""
    while type(place) is not str:
        if isinstance(place, Holder):
            place = place.ref
        else:
            place = list(place.values() if isinstance(place, dict) else place)[-1]
    return place


@pytest.mark.parametrize("place", PLACES)
def test_a_reference_becomes_the_object_wherever_it_lies(engine, place):
    ref = engine.put("object")
    argument = PLACES[place](ref)
    assert engine.submit(content, argument).result() == "object"
    assert list(engine.map(content, [argument] * 3)) == ["object"] * 3
    assert engine.map_blocks(lambda b, place: b + len(content(place)), np.zeros(3), place=argument)[0] == 6
    assert engine.submit(lambda: content(argument)).result() == "object"
    assert engine.submit(functools.partial(content, argument)).result() == "object"
    assert list(engine.starmap(lambda i: content(argument) * i, [(2,)])) == ["object" * 2]
    assert engine.reduce(lambda b: content(argument), np.zeros(3), combine=max) == "object"
    assert engine.submit(lambda: argument).result() is not argument


def test_functions_index_what_they_refer_to(engine):
    weights = engine.put(np.arange(3.0))
    assert list(engine.map(lambda i: float(weights[i]), range(3))) == [0, 1, 2]
    assert not engine.submit(lambda: weights.flags.writeable).result()
    assert engine.submit(lambda pair: pair[0] is pair[1].ref, [weights, Holder(weights)]).result()


def test_what_comes_with_a_reference_in_a_local_engine_is_not_copied(backend, make_engine):
    engine = make_engine()
    x, lock = np.zeros(10), threading.Lock()
    ref = engine.put("object")
    if backend != "process":
        assert engine.submit(lambda holder, y: y[0] is x, Holder(ref), [x]).result()
        assert engine.submit(lambda parts: (parts[0], parts[1] is lock), [ref, lock]).result() == (
            "object",
            True,
        )


def test_references_of_other_engines(engine):
    with Engine(backend="serial") as other:
        assert engine.submit(lambda part: part.ref, Holder(other.put("object"))).result() == "object"
        assert other.submit(lambda part: part.ref, Holder(engine.put("object"))).result() == "object"


def test_arrays_made_by_the_engine(engine):
    assert engine.empty((3, 4), "f4").shape == (3, 4)
    assert engine.empty(5, "i2", order="F").dtype == np.int16
    assert engine.empty((30, 40), order="F").flags.f_contiguous
    zeros = engine.zeros((100, 100), ">i4")
    assert zeros.dtype == np.dtype(">i4")
    assert not zeros.any()
    full = engine.full((2, 2), 7)
    assert full.dtype == np.int64
    assert (full == 7).all()
    assert engine.full(3, "ab").tolist() == ["ab"] * 3
    assert engine.asarray([[1, 2], [3, 4]], "f4").tolist() == [[1, 2], [3, 4]]
    assert (engine.zeros(3, [("a", "i4"), ("b", "f8")])["b"] == 0).all()
    assert engine.zeros((0, 3)).shape == (0, 3)
    assert engine.zeros(()).shape == ()
    for array in (zeros, full):
        assert type(array) is np.ndarray
        array += 1


def test_asarray_returns_what_is_shared_already(engine):
    shared = engine.zeros((100, 100))
    assert engine.asarray(shared) is shared
    assert np.shares_memory(engine.asarray(shared[::2]), shared)


def test_arrays_born_in_the_allocator_s_block_outlive_it(engine):
    with engine.allocator():
        array = np.arange(100_000.0) * 2
    assert engine.submit(np.sum, array).result() == array.sum()


# --- time limits --------------------------------------------------------------------------------


def test_a_task_may_exceed_its_time_and_the_others_go_on(make_engine):
    engine = make_engine(2)
    # Serially the call must end before its lateness is noticed.
    naps = [0, 0.4, 0, 0, 0, 0.4, 0, 0]
    returned = list(engine.map(lambda s: time.sleep(s) or s, naps, timeout=0.2, on_error="return"))
    assert [type(r) for r in returned] == [TaskTimeout if nap else int for nap in naps]
    assert str(returned[1]) == "task 1 of map(<lambda>) did not end within 0.2 s"
    with pytest.raises(TaskTimeout):
        list(engine.map_unordered(time.sleep, [0.4], timeout=0.2))
    assert list(engine.map(square, range(10), timeout=60)) == [x * x for x in range(10)]


# --- life ---------------------------------------------------------------------------------------


def test_everything_says_that_the_engine_is_closed(make_engine):
    engine = make_engine()
    running = engine.map(square, itertools.count())
    assert next(running) == 0
    array = engine.full(1000, 7)
    ref = engine.put([1, 2])
    engine.close()
    engine.close()
    assert engine.closed
    assert "closed" in repr(engine)
    for call in (
        lambda: engine.map(square, [1]),
        lambda: engine.map_unordered(square, [1]),
        lambda: engine.starmap(square, [(1,)]),
        lambda: engine.submit(square, 1),
        lambda: engine.map_blocks(square, np.zeros(3)),
        lambda: engine.map_overlap(square, np.zeros(3), 1),
        lambda: engine.reduce(square, np.zeros(3), combine=max),
        lambda: engine.put(1),
        lambda: engine.empty(3),
        lambda: engine.zeros(3),
        lambda: engine.full(3, 1),
        lambda: engine.asarray([1]),
        engine.allocator,
        engine.__enter__,
        lambda: list(running),
    ):
        with pytest.raises(Closed):
            call()
    assert (array == 7).all()
    assert ref is not None
    assert engine.stats().tasks_done >= 1


def test_close_drops_pending_futures(make_engine, gate):
    engine = make_engine(1)
    if engine.backend == "serial":
        gate.open()
    futures = [engine.submit(gate.wait, i) for i in range(100)]
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.open()
    closing.join()
    for i, future in enumerate(futures):
        if not future.cancelled():
            assert future.exception() is not None or future.result() == i
    assert engine.backend == "serial" or any(f.cancelled() or f.exception() for f in futures)


def test_close_while_another_thread_iterates(make_engine):
    engine = make_engine()
    outcome = []
    started = threading.Event()

    def iterate():
        try:
            for _ in engine.map(square, itertools.count()):
                started.set()
        except Closed as error:
            outcome.append(error)

    thread = threading.Thread(target=iterate)
    thread.start()
    assert started.wait(60)
    engine.close()
    thread.join()
    assert len(outcome) == 1


def test_the_with_block_closes(make_engine):
    with make_engine() as engine:
        assert engine.workers >= 1
        assert not engine.closed
    assert engine.closed
    with pytest.raises(KeyError), make_engine() as other:
        raise KeyError
    assert other.closed


def test_initializer_runs_before_the_first_task(make_engine):
    def prepare(value):
        import os

        os.environ["PREPARED_BY_TEST"] = value

    try:
        engine = make_engine(initializer=prepare, initargs=["yes"])
        assert set(engine.map(lambda i: os.environ["PREPARED_BY_TEST"], range(20))) == {"yes"}
    finally:
        os.environ.pop("PREPARED_BY_TEST", None)


def test_statistics_count_tasks(make_engine):
    engine = make_engine()
    list(engine.map(fail_on, itertools.repeat(3), range(10), on_error="skip"))
    engine.submit(square, 2).result()
    stats = engine.stats()
    assert (stats.backend, stats.workers) == (engine.backend, engine.workers)
    assert (stats.tasks_done, stats.tasks_failed) == (10, 1)
    assert stats.tasks_in_flight == 0
    assert stats.to_dict()["tasks_done"] == 10
    assert "tasks done" in engine._repr_html_()


def test_in_a_forked_child_the_engine_is_dead(engine):
    results = engine.map(square, range(100))
    next(results)

    def child():
        calls = [
            lambda: engine.map(square, [1]),
            lambda: engine.submit(square, 1),
            lambda: engine.map_blocks(square, np.zeros(3)),
            lambda: engine.put(1),
            lambda: engine.empty(3),
            engine.stats,
            lambda: next(results),
        ]
        for call in calls:
            with pytest.raises(UseAfterFork, match="make a new one in the child"):
                call()
        assert "Engine" in engine._repr_html_()  # what notebooks show raises nothing
        engine.close()
        engine.__exit__(None, None, None)
        results.close()

    assert run_in_fork(child) == 0
    assert list(results) == [x * x for x in range(1, 100)]


def run_in_fork(child):
    """Run `child` in a fork and return the exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- what is handed out -------------------------------------------------------------------------------


def make(count):
    return {"large": np.ones(count), "several": (np.zeros(3), [np.full(count, 2.0)[::2]])}


@pytest.mark.parametrize("count", [5, 100_000])
def test_results_are_the_callers_to_write_to(engine, count):
    for found in (engine.submit(make, count).result(), *engine.map(make, [count] * 3)):
        for array in (found["large"], found["several"][0], found["several"][1][0]):
            array += 1
            assert (array == array[0]).all()
        assert (found["large"][0], found["several"][0][0], found["several"][1][0][0]) == (2, 1, 3)


def add_in_place(a, b):
    a += b
    return a


@pytest.mark.parametrize("columns", [2, 50_000])
def test_combine_may_write_to_the_partials(engine, columns):
    x = np.arange(12.0 * columns).reshape(12, columns)
    total = engine.reduce(lambda b: b.sum(0), x, combine=add_in_place, block_bytes=3 * x[0].nbytes)
    assert np.array_equal(total, x.sum(0))


def test_functions_run_where_the_backend_says(engine):
    here = os.getpid()
    found = {
        engine.submit(os.getpid).result(),
        *engine.map(lambda _: os.getpid(), range(5)),
        engine.reduce(lambda _: os.getpid(), np.ones(10), combine=max, block_bytes=8),
        int(engine.map_blocks(lambda b: np.full(len(b), os.getpid()), np.ones(10), block_bytes=8)[-1]),
        int(engine.map_blocks(lambda _: np.array(os.getpid()), np.array(1.0))),
        engine.reduce(lambda _: os.getpid(), np.ones(0), combine=max),
    }
    if engine.backend == "process":
        assert here not in found
    else:
        assert found == {here}


def test_payloads_are_checked_if_asked_for(make_engine):
    engine = make_engine(check="payload")
    x = np.arange(300_000.0)
    assert np.array_equal(engine.map_blocks(np.sqrt, x, block_bytes="64 KiB"), np.sqrt(x))
    assert engine.submit(np.sum, x).result() == x.sum()
    assert [a.sum() for a in engine.map(np.ones, [10, 100_000])] == [10, 100_000]


def divide(x):
    return np.float64(x) / np.zeros(1)


def test_the_errstate_of_the_caller_holds_in_tasks(engine):
    with np.errstate(divide="raise"):
        with pytest.raises(FloatingPointError):
            list(engine.map(divide, [1]))
        with pytest.raises(FloatingPointError):
            engine.map_blocks(lambda b: 1 / b, np.zeros(300), block_bytes=80)
        with pytest.raises(FloatingPointError):
            engine.submit(functools.partial(divide, 1)).result()
        with np.errstate(divide="ignore"):
            assert list(engine.map(divide, [1])) == [np.inf]
    with np.errstate(all="ignore"):
        assert engine.submit(divide, 1).result() == np.inf


# --- logging -------------------------------------------------------------------------------------


def log_something(i):
    logger = logging.getLogger("tests.talk")
    logger.debug("debug %d", i)
    logger.info("info %d", i, extra={"size": i, "what": logger})
    try:
        raise ZeroDivisionError("no")
    except ZeroDivisionError:
        logger.exception("failed %d", i)
    logging.getLogger("tests.silent").info("never heard")
    return os.getpid()


def test_log_records_reach_the_handlers_of_the_main_process(make_engine, backend):
    logger = logging.getLogger("tests.talk")
    records = queue.SimpleQueue()
    handler = logging.handlers.QueueHandler(records)
    logger.addHandler(handler)
    logger.setLevel("INFO")
    try:
        pids = set(make_engine().map(log_something, range(5)))
        found = [records.get(timeout=30) for _ in range(10)]
    finally:
        logger.setLevel("NOTSET")
        logger.removeHandler(handler)
    assert sorted(record.getMessage().splitlines()[0] for record in found) == sorted(
        [f"failed {i}" for i in range(5)] + [f"info {i}" for i in range(5)]
    )
    assert all("ZeroDivisionError: no" in r.getMessage() for r in found if "failed" in r.getMessage())
    assert {record.process for record in found} == pids
    assert {record.size for record in found if record.levelname == "INFO"} == set(range(5))
    if backend == "process":
        assert {record.task for record in found} == set(range(5))
    assert records.empty()


def configure_logging():
    logging.basicConfig(level=logging.DEBUG, stream=io.StringIO())
    return len(logging.root.handlers), logging.root.level


def test_workers_may_configure_logging_themselves():
    with Engine(1, memory="16 MiB") as engine:
        assert engine.submit(configure_logging).result() == (1, logging.DEBUG)
        assert engine.submit(log_something, 1).result() > 0


@pytest.mark.parametrize("make", [Engine, Executor])
def test_a_function_by_reference_goes_by_value_as_soon_as_that_is_asked_for(make, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 3)
    with make(1) as workers:
        assert [workers.submit(scaled, 5).result(60) for _ in range(3)] == [10, 10, 10]
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        try:
            assert workers.submit(scaled, 5).result(60) == 15
        finally:
            cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
        assert workers.submit(scaled, 5).result(60) == 10


def test_a_function_is_sent_anew_when_the_errstate_has_changed():
    with Engine(1) as engine:
        assert engine.submit(np.geterr).result(60)["divide"] == "warn"
        with np.errstate(divide="raise"):
            assert engine.submit(np.geterr).result(60)["divide"] == "raise"
        assert engine.submit(np.geterr).result(60)["divide"] == "warn"
