"""What `Engine` refuses, and the parts of it that no backend sees: progress, the default engine."""

from __future__ import annotations

import io
import os
import sys
import threading
import types
import weakref

import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

from shmengine.config import default_workers
from shmengine.engine import Engine, default
from shmengine.engine.progress import reporter
from shmengine.errors import ArrayError, Closed, MemoryBudgetExceeded
from shmengine.queues import Queue
from shmengine.ring import Ring


@pytest.fixture
def engine():
    with Engine(backend="serial") as engine:
        yield engine


# --- the constructor ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"workers": 0}, "workers must be an integer of at least 1, not 0"),
        ({"workers": -1}, "workers must be an integer of at least 1, not -1"),
        ({"workers": 1.5}, "workers must be an integer of at least 1, not 1.5"),
        ({"workers": True}, "workers must be an integer"),
        ({"workers": "2"}, "workers must be an integer of at least 1, not '2'"),
        ({"threads_per_worker": 0}, "threads_per_worker must be an integer of at least 1"),
        ({"backend": "fork"}, "backend must be one of 'process', 'thread', 'serial', not 'fork'"),
        ({"backend": None}, "backend must be one of"),
        ({"check": "all"}, "check must be one of 'frame', 'payload', not 'all'"),
        ({"retries": -1}, "retries must be an integer of at least 0, not -1"),
        ({"retries": None}, "retries must be an integer of at least 0"),
        ({"memory": 0}, "memory must be positive"),
        ({"memory": -5}, "negative"),
        ({"memory": "plenty"}, "plenty"),
    ],
)
@pytest.mark.parametrize("backend", ["serial", "thread", "process"])
def test_settings_out_of_range(backend, settings, text):
    with pytest.raises(ValueError, match=text):
        Engine(**{"backend": backend, **settings})


def test_settings_of_a_wrong_type():
    with pytest.raises(TypeError, match="initializer must be callable, not int"):
        Engine(backend="serial", initializer=3)
    with pytest.raises(TypeError):
        Engine(backend="serial", memory=1.5)


def test_default_number_of_workers():
    with Engine(backend="thread") as engine:
        assert engine.workers == default_workers()
    with Engine(np.int64(3), backend="thread", memory="1 GiB", threads_per_worker=np.int8(1)) as engine:
        assert engine.workers == 3
        assert repr(engine) == "<Engine backend='thread' workers=3>"
    assert repr(engine) == "<Engine backend='thread' workers=3 closed>"


def test_an_engine_in_a_worker_is_serial(monkeypatch):
    monkeypatch.setenv("SHMENGINE_WORKER", "1")
    with pytest.warns(RuntimeWarning, match="inside a worker process"):
        engine = Engine()
    assert engine.backend == "serial"
    engine.close()
    with Engine(backend="thread") as engine:
        assert engine.backend == "thread"


# --- arguments of methods -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda e: e.map(3, [1]), TypeError, "fn must be callable, not int"),
        (lambda e: e.map(abs), TypeError, "map needs at least one iterable"),
        (lambda e: e.map_unordered(abs), TypeError, "map_unordered needs at least one iterable"),
        (lambda e: e.map(abs, 3), TypeError, "map: int object is not iterable"),
        (lambda e: e.map(abs, np.array(3)), TypeError, "iteration over a 0-d array"),
        (lambda e: e.starmap(abs, None), TypeError, "starmap: NoneType object is not iterable"),
        (lambda e: e.map(abs, [1], on_error="ignore"), ValueError, "on_error must be one of .* not 'ignore'"),
        (lambda e: e.map(abs, [1], window=0), ValueError, "window must be an integer of at least 1, not 0"),
        (lambda e: e.map(abs, [1], window="many"), ValueError, "window must be an integer"),
        (lambda e: e.map(abs, [1], timeout=0), ValueError, "timeout must be positive"),
        (lambda e: e.map(abs, [1], timeout=-1), ValueError, "timeout must be positive"),
        (lambda e: e.map(abs, [1], timeout=float("nan")), ValueError, "timeout must be positive"),
        (lambda e: e.map(abs, [1], timeout="1 s"), TypeError, "timeout must be a number of seconds or None"),
        (lambda e: e.map(abs, [1], timeout=True), TypeError, "timeout must be a number of seconds or None"),
        (lambda e: e.map(abs, [1], timeout=np.ones(2)), TypeError, "timeout must be a number of seconds"),
        (lambda e: e.map(abs, [1], timeout=1j), TypeError, "timeout must be a number of seconds or None"),
        (
            lambda e: e.map(abs, [1], writable="yes"),
            ValueError,
            "writable must be one of 'private', 'shared'",
        ),
        (lambda e: e.map(abs, [1], writable=None), ValueError, "writable must be"),
        (lambda e: e.map(abs, [1], rng=-1), ValueError, "rng must not be negative"),
        (lambda e: e.map(abs, [1], rng=1.5), TypeError, "rng must be a seed"),
        (lambda e: e.map(abs, [1], rng=True), TypeError, "rng must be a seed"),
        (lambda e: e.map(abs, [1], rng=np.random.default_rng(1)), TypeError, "rng must be a seed"),
        (lambda e: e.map(abs, [1], progress=3), TypeError, "progress must be True, False"),
        (lambda e: e.map(abs, [1], chunksize=3), TypeError, "chunksize"),
        (lambda e: e.submit(None), TypeError, "fn must be callable"),
        (lambda e: e.submit(), TypeError, "fn"),
        (lambda e: e.map_blocks(None, np.zeros(3)), TypeError, "fn must be callable"),
        (lambda e: e.map_blocks(abs), ArrayError, "at least one array"),
        (lambda e: e.map_blocks(abs, 3.0), ArrayError, "scalar"),
        (lambda e: e.map_blocks(abs, np.zeros(3), block_bytes=0), ValueError, "block_bytes must be positive"),
        (lambda e: e.map_blocks(abs, np.zeros(3), timeout=0), ValueError, "timeout"),
        (lambda e: e.map_blocks(abs, np.zeros(3), progress=3), TypeError, "progress"),
        (lambda e: e.map_blocks(abs, np.zeros(3), dtype="nonsense"), TypeError, "nonsense"),
        (lambda e: e.empty(3, object), ArrayError, "pointers"),
        (lambda e: e.zeros(3, [("a", object)]), ArrayError, "pointers"),
        (lambda e: e.asarray([None]), ArrayError, "pointers"),
        (lambda e: e.empty(-1), ValueError, "negative"),
        (lambda e: e.empty(3, order="K"), ValueError, "order must be one of 'C', 'F'"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(engine, call, error, text):
    with pytest.raises(error, match=text):
        call(engine)


def test_a_closed_engine_says_so_before_anything_else():
    engine = Engine(backend="serial")
    engine.close()
    with pytest.raises(Closed, match="this engine is closed; make a new one"):
        engine.map(abs, [1])


def test_an_engine_cannot_be_sent(engine):
    with pytest.raises(TypeError, match="cannot be sent"):
        engine.__reduce__()


def test_a_dropped_engine_ends_its_threads():
    before = set(threading.enumerate())
    engine = Engine(2, backend="thread")
    results = engine.map(abs, range(3))
    assert next(results) == 0
    threads = set(threading.enumerate()) - before
    assert len(threads) == 2
    gone = weakref.ref(engine)
    del engine
    assert gone() is not None  # its results may still be asked for
    del results
    assert gone() is None
    for thread in threads:
        thread.join()


# --- threads ------------------------------------------------------------------------------------


def test_a_task_may_map_on_its_own_engine():
    with Engine(1, backend="thread") as engine:
        inner = lambda n: sum(engine.map(abs, range(n))) + engine.submit(abs, -1).result()
        assert list(engine.map(inner, [3, 4])) == [4, 7]


def test_a_thread_that_hangs_is_replaced_and_not_waited_for():
    hang = threading.Event()
    engine = Engine(1, backend="thread")
    outcomes = list(
        engine.map(lambda event: event and event.wait(), [hang, None], timeout=0.05, on_error="return")
    )
    assert [type(outcome).__name__ for outcome in outcomes] == ["TaskTimeout", "NoneType"]
    engine.close()
    hang.set()


def test_abandoned_tasks_do_not_run():
    ran = []
    go_on = threading.Event()

    def task(i):
        ran.append(i)
        if i:
            go_on.wait()
        return i

    with Engine(1, backend="thread") as engine:
        results = engine.map(task, range(100), window=50)
        assert next(results) == 0
        results.close()
        go_on.set()
        engine.submit(int).result()
    assert ran in ([0], [0, 1])


# --- progress -----------------------------------------------------------------------------------


def test_progress_as_lines_where_there_is_no_terminal(engine, capsys):
    assert list(engine.map(abs, range(3), progress=True)) == [0, 1, 2]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("map(abs): 3/3 (100 %), 0.0 s")
    list(engine.map(abs, iter([1, 2]), progress=True))
    assert capsys.readouterr().err.startswith("map(abs): 2, ")
    list(engine.map(abs, [], progress=True))
    assert capsys.readouterr().err.startswith("map(abs): 0/0 (0 %), ")


def test_progress_as_a_bar_in_a_terminal(engine, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    before = threading.active_count()
    list(engine.map(abs, range(7), progress=True))
    assert "7/7" in terminal.getvalue()
    assert "map(abs)" in terminal.getvalue()
    assert threading.active_count() == before


def test_progress_objects_and_classes(engine):
    class Bar:
        made = []

        def __init__(self, total=None):
            self.total, self.done, self.closed = total, 0, False
            self.made.append(self)

        def update(self, n):
            self.done += n

        def close(self):
            self.closed = True

    mine = Bar()
    list(engine.map(abs, range(4), progress=mine))
    assert (mine.done, mine.closed) == (4, False)
    list(engine.map(abs, range(5), progress=Bar))
    assert (Bar.made[1].done, Bar.made[1].total, Bar.made[1].closed) == (5, 5, True)


def test_progress_in_a_bar_of_rich(engine):
    bar = Progress(console=Console(file=io.StringIO()))
    list(engine.map(abs, range(4), progress=bar))
    assert bar.tasks[0].completed == 4
    assert bar.tasks[0].total == 4


def test_progress_ends_after_an_error_too(engine):
    closed = []
    bar = types.SimpleNamespace(update=lambda n: None)
    with pytest.raises(TypeError):
        list(engine.map(abs, [1, None], progress=bar))
    report = reporter(True, "x", None)
    report.close = lambda: closed.append(True)
    assert reporter(None, "x", None) is None
    assert reporter(False, "x", None) is None
    report.close()
    assert closed


# --- the default engine -------------------------------------------------------------------------


@pytest.fixture
def serial_default(monkeypatch):
    monkeypatch.setattr(default, "Engine", lambda: Engine(backend="serial"))
    monkeypatch.setattr(default, "_engine", None)


@pytest.mark.usefixtures("serial_default")
def test_functions_of_the_module_use_one_engine():
    assert list(default.map(abs, [-1, -2])) == [1, 2]
    assert default.map_blocks(np.sqrt, np.array([4.0]), out=np.zeros(1)).tolist() == [2]
    assert default.reduce(np.sum, np.arange(4), combine=max, initial=0) == 6
    first = default.default_engine()
    assert default.default_engine() is first
    assert first.stats().tasks_done == 4
    first.close()
    assert default.default_engine() is not first


@pytest.mark.usefixtures("serial_default")
def test_a_forked_child_makes_its_own_default_engine():
    parent = default.default_engine()
    with default._lock:  # as another thread might at the moment of the fork
        pid = os.fork()
    if pid == 0:
        try:
            assert default.default_engine() is not parent
            assert list(default.map(abs, [-1])) == [1]
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert default.default_engine() is parent


def test_heavy_modules_are_imported_late():
    from tests.helpers.scripts import run_script

    heavy = ["rich", "concurrent.futures", "multiprocessing", "cloudpickle", "psutil", "joblib"]
    source = (
        "import sys, shmengine.engine, shmengine.engine.default\n"
        f"print([name for name in {heavy} if name in sys.modules])\n"
    )
    assert run_script(source).stdout.strip() == "[]"


@pytest.mark.parametrize("workers", [256, 10**6])
def test_more_workers_than_can_share_memory(workers):
    with pytest.raises(ValueError, match=f"workers must be at most 255, not {workers}"):
        Engine(workers)


@pytest.mark.parametrize("make", [Engine, Queue, lambda memory: Ring(4, memory)])
@pytest.mark.parametrize("memory", ["20 TiB", 1 << 80, (1 << 41) + 1])
def test_more_memory_than_a_region_can_have(make, memory):
    with pytest.raises(MemoryBudgetExceeded, match=r"a memory budget of .* more than .* 2 TiB") as caught:
        make(memory=memory)
    assert caught.value.asked > caught.value.budget == 1 << 41


def test_the_largest_memory_of_a_region():
    Queue(memory=1 << 41).close()
