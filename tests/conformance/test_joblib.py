"""The joblib backend: what `joblib.Parallel` promises, and arrays that cross once. (joblib's tests: `make peers`.)"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
import time
import warnings
from concurrent.futures.process import BrokenProcessPool
from operator import neg
from pathlib import Path
from pickle import PicklingError

import joblib
import numpy as np
import pandas as pd
import pytest
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky.process_executor import BrokenProcessPool as LokyBrokenProcessPool
from joblib.externals.loky.process_executor import TerminatedWorkerError

import shmengine
from shmengine.errors import RemoteError, RemoteTraceback, WorkerDied
from tests.helpers import children, poll_until, run_script
from tests.helpers.scripts import start_script

SETTINGS = {"backend": "shmengine", "n_jobs": 2, "memory": "256 MiB"}
# Workers of their own, for tests of errors: those that are at work then are ended, and others come some time later.
OTHERS = {**SETTINGS, "memory": "128 MiB"}


@pytest.fixture(scope="module", autouse=True)
def kept():
    """Workers that all tests share; others end with their test."""
    shmengine.joblib.register()
    with Parallel(**SETTINGS) as parallel:
        # All of them are here: one that comes later would be taken for what a test has left behind.
        poll_until(lambda: len(set(parallel(delayed(pid_after)(0.1) for _ in range(4)))) == 2)
        yield
    shmengine.joblib.shutdown()


@pytest.fixture(autouse=True)
def ended(kept):
    yield
    shmengine.joblib.shutdown()


@pytest.fixture
def x():
    return np.random.default_rng(3).random((500, 1000))  # 4 MB


@contextlib.contextmanager
def copied():
    """A list to which the bytes that were copied within are added."""
    found = []
    before = shmengine.joblib.stats().bytes_copied
    yield found
    found.append(shmengine.joblib.stats().bytes_copied - before)


def pid_after(seconds=0.0):
    time.sleep(seconds)
    return os.getpid()


def look(array):
    return float(array.sum()), array.flags.writeable


def write(array, value):
    before = float(array.flat[0])
    array.flat[0] = value
    time.sleep(0.01)
    return before, float(array.flat[0])


def touch_then_sleep(path, seconds=60):
    with open(path, "x"):  # fails when it is run a second time
        time.sleep(seconds)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


# --- calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("return_as", ["list", "generator", "generator_unordered"])
@pytest.mark.parametrize("batch_size", [1, 7, "auto"])
def test_results(return_as, batch_size):
    parallel = Parallel(return_as=return_as, batch_size=batch_size, **SETTINGS)
    results = parallel(delayed(lambda a, b: a - b)(i, b=1) for i in range(100))
    assert sorted(results) if return_as == "generator_unordered" else list(results) == list(range(-1, 99))


def test_functions_of_several_kinds_in_one_call():
    some = [1]
    calls = [delayed(neg)(1), delayed(abs)(-2), delayed(some.index)(1), delayed(lambda: some)()] * 3
    assert Parallel(batch_size=2, **SETTINGS)(calls) == [-1, 2, 0, [1]] * 3


def test_a_function_with_a_state_begins_anew_with_each_batch():
    seen = []

    def count():
        seen.append(1)
        return len(seen)

    assert Parallel(batch_size=1, **SETTINGS)(delayed(count)() for _ in range(20)) == [1] * 20


def test_number_of_workers():
    with parallel_config("shmengine"):
        assert joblib.effective_n_jobs(3) == 3
        assert joblib.effective_n_jobs(-1) == joblib.cpu_count()
        assert joblib.effective_n_jobs(None) == 1
        with pytest.raises(ValueError, match="n_jobs == 0 in Parallel has no meaning"):
            Parallel(n_jobs=0)([])
        assert Parallel(n_jobs=1)(delayed(os.getpid)() for _ in range(2)) == [os.getpid()] * 2


def test_workers_are_kept_until_others_are_wanted():
    def pids(**settings):
        with Parallel(**settings) as parallel:
            return {*parallel(delayed(pid_after)(0.02) for _ in range(20))}

    ours = pids(**SETTINGS)
    assert len(ours) == 2
    assert pids(**SETTINGS) == ours
    others = pids(**OTHERS)
    assert not others & ours
    with pytest.raises(ProcessLookupError):
        shmengine.joblib.shutdown()
        os.kill(others.pop(), 0)
    assert pids(**SETTINGS) == ours


def pids_of(**settings):
    return {*Parallel(**{**OTHERS, **settings})(delayed(pid_after)(0.02) for _ in range(20))}


def is_gone(pids):
    return not pids & set(children())


@pytest.mark.parametrize("seconds", [0, 0.05, np.float64(0.01)])
def test_idle_workers_end_by_themselves(seconds):
    pids = pids_of(idle_worker_timeout=seconds)  # while those of `kept` have five minutes
    poll_until(lambda: is_gone(pids))


@pytest.mark.parametrize(("first", "then"), [(None, 0), (1e10, 0), (1e308, 0.05), (float("inf"), 0)])
def test_the_latest_timeout_counts(first, then):
    pids = pids_of(idle_worker_timeout=first)
    assert pids_of(idle_worker_timeout=then) == pids
    poll_until(lambda: is_gone(pids))


def test_each_pool_has_a_timeout_of_its_own():
    with Parallel(idle_worker_timeout=0, **OTHERS) as parallel:
        staying = pids_of(idle_worker_timeout=float("inf"), memory="64 MiB")
        ending = {*parallel(delayed(pid_after)(0.02) for _ in range(20))}
    poll_until(lambda: is_gone(ending))
    assert staying <= set(children())
    assert pids_of(idle_worker_timeout=0, memory="64 MiB") == staying
    poll_until(lambda: is_gone(staying))


def test_workers_of_a_call_that_was_forgotten_end_too():
    parallel = Parallel(idle_worker_timeout=0, **OTHERS).__enter__()
    pids = {*parallel(delayed(pid_after)(0.02) for _ in range(20))}
    del parallel
    poll_until(lambda: gc.collect() is not None and is_gone(pids))


def test_calls_in_each_other_through_one_instance():
    with parallel_config("shmengine", n_jobs=2, memory="256 MiB"):
        first = Parallel(return_as="generator")(delayed(neg)(i) for i in range(50))
        second = Parallel(return_as="generator")(delayed(abs)(i) for i in range(50))
        assert [*zip(first, second, strict=True)] == [(-i, i) for i in range(50)]


def test_calls_in_threads():
    results = {}

    def run(number):
        results[number] = Parallel(**SETTINGS)(delayed(neg)(number + i) for i in range(100))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [-number - i for i in range(100)] for number in range(4)}


def test_a_call_in_a_task_runs_in_threads_and_none_of_ours():
    def nested(backend):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pids = Parallel(n_jobs=2, backend=backend)(delayed(os.getpid)() for _ in range(3))
        return {*pids} == {os.getpid()}, [str(each.message) for each in caught]

    import shmengine.joblib

    def registered():
        shmengine.joblib.register()
        return nested("shmengine")

    assert Parallel(**SETTINGS)([delayed(nested)(None)]) == [(True, [])]
    (inline, (warning,)), *_ = Parallel(**SETTINGS)([delayed(registered)()])
    assert inline
    assert "shmengine-backed parallel loops cannot be nested below its own workers" in warning


@pytest.mark.parametrize(("limit", "expected"), [(None, str(max(joblib.cpu_count() // 2, 1))), (3, "3")])
def test_threads_of_libraries(monkeypatch, limit, expected):
    for name in joblib.parallel.ParallelBackendBase.MAX_NUM_THREADS_VARS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")  # the user's own
    with parallel_config("shmengine", n_jobs=2, memory="128 MiB", inner_max_num_threads=limit):
        (found,) = Parallel()([delayed(environment)()])
    assert found["OPENBLAS_NUM_THREADS"] == expected
    assert found["MKL_NUM_THREADS"] == ("7" if limit is None else expected)


def environment():
    return dict(os.environ)


# --- arrays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["array", "nested", "fortran", "strided", "view", "frame", "memoryless"])
def test_an_array_crosses_once(x, kind):
    given, total, nbytes = {
        "array": (x, x.sum(), x.nbytes),
        "nested": ([{"x": (x, x)}], x.sum(), x.nbytes),
        "fortran": (np.asfortranarray(x), x.sum(), x.nbytes),
        "strided": (x[:, ::2], x[:, ::2].sum(), x.nbytes // 2),
        "view": (x[100:400], x[100:400].sum(), x.nbytes * 3 // 5),
        "frame": (pd.DataFrame(x), x.sum(), x.nbytes),
        "memoryless": (np.broadcast_to(x[0], x.shape), x[0].sum() * 500, x.nbytes),
    }[kind]

    def total_of(value):
        array = value[0]["x"][1] if isinstance(value, list) else np.asarray(value)
        return float(array.sum())

    with copied() as bytes_copied:
        results = Parallel(batch_size=1, **SETTINGS)(delayed(total_of)(given) for _ in range(20))
    np.testing.assert_allclose(results, total)
    assert nbytes <= bytes_copied[0] < nbytes + 100_000


def test_each_call_sees_the_array_as_it_is_then(x):
    with Parallel(**SETTINGS) as parallel:
        for value in range(3):
            x[:] = value
            assert {*parallel(delayed(look)(x) for _ in range(4))} == {(value * x.size, False)}


def test_arrays_that_die_make_room():
    with Parallel(**{**SETTINGS, "memory": "32 MiB"}, batch_size=1) as parallel:  # each batch must fit
        totals = parallel(delayed(look)(np.full(1 << 20, i, "f8")) for i in range(12))  # 96 MiB
    assert [total for total, _ in totals] == [i << 20 for i in range(12)]


@pytest.mark.parametrize("options", [{"mmap_mode": "c"}, {"mmap_mode": None}, {"max_nbytes": None}])
def test_arrays_of_their_own(x, options):
    first = x[0, 0]
    found = Parallel(batch_size=1, **options, **SETTINGS)(delayed(write)(x, i) for i in range(6))
    assert found == [(first, i) for i in range(6)]
    assert x[0, 0] == first


@pytest.mark.parametrize("mode", ["r+", "w+"])
def test_arrays_in_common(x, mode):
    x[0, 0] = -1
    with Parallel(batch_size=1, mmap_mode=mode, **SETTINGS) as parallel:
        found = parallel(delayed(write)(x, i) for i in range(6))
    assert {before for before, _ in found} > {-1.0}  # they see what others have written
    assert x[0, 0] == -1


def test_read_only_arrays(x):
    with pytest.raises(ValueError, match="read-only"):
        Parallel(**OTHERS)(delayed(write)(x, i) for i in range(6))


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_a_task_may_write_to_a_small_array(mode):
    small = np.zeros(10)
    found = Parallel(batch_size=1, mmap_mode=mode, **SETTINGS)(delayed(write)(small, i) for i in range(6))
    assert found == [(0, i) for i in range(6)]
    assert not small.any()


def test_max_nbytes_says_what_is_large():
    some = np.ones(1000)
    assert {*Parallel(max_nbytes=8000, **SETTINGS)(delayed(look)(some) for _ in range(3))} == {(1000, False)}
    assert {*Parallel(max_nbytes="8K", **SETTINGS)(delayed(look)(some) for _ in range(3))} == {(1000, True)}


def test_files_keep_their_mode(tmp_path):
    output = np.memmap(tmp_path / "output", "f8", "w+", shape=(6, 1000))
    Parallel(**SETTINGS)(delayed(np.copyto)(output[i], np.full(1000, i)) for i in range(6))
    assert (output == np.arange(6)[:, None]).all()
    readable = np.memmap(tmp_path / "output", "f8", "r", shape=(6, 1000))
    with pytest.raises(ValueError, match="read-only"):
        Parallel(mmap_mode="r+", **OTHERS)(delayed(write)(readable, i) for i in range(3))


def test_results_are_the_callers_own(x):
    for result in Parallel(**SETTINGS)(delayed(lambda a: {"part": a[3:]})(x) for _ in range(3)):
        assert not np.shares_memory(result["part"], x)
        result["part"][0] = 0


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["r", "c"])
def test_workers_import_nothing_of_the_backend(mode):
    """It is main's, and would take memory and time in each of them."""
    script = f"""
    import numpy as np
    from joblib import Parallel, delayed
    import shmengine.joblib

    def loaded(_):
        import sys
        return {{name for name in sys.modules if name.startswith(("shmengine.engine", "shmengine.joblib"))}}

    array = np.ones(1 << 20)
    print(set().union(*Parallel(2, backend="shmengine", mmap_mode={mode!r})(delayed(loaded)(array) for _ in range(4))))
    """
    assert run_script(script, check=True).stdout == "set()\n"


def test_a_task_may_name_the_backend_itself():
    """Which workers import only then."""
    script = """
    from joblib import Parallel, delayed, parallel_config
    import shmengine.joblib

    def inner(number):
        with parallel_config("shmengine"):
            first = Parallel(2)(delayed(abs)(-i) for i in range(number))
        assert Parallel(2, backend="shmengine")(delayed(abs)(-i) for i in range(number)) == first
        return first

    print(Parallel(2, backend="shmengine")(delayed(inner)(number) for number in (1, 2, 3)))
    """
    assert run_script(script, check=True).stdout == "[[0], [0, 1], [0, 1, 2]]\n"


def test_an_error_says_where_it_was_raised():
    with pytest.raises(ZeroDivisionError) as caught:
        Parallel(**OTHERS)(delayed(lambda d: 1 / d)(i) for i in (1, 0, 2))
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert "<lambda>" in str(caught.value.__cause__)


@pytest.mark.parametrize("n_tasks", [1, 50])
def test_what_cannot_be_pickled(n_tasks):
    with pytest.raises(PicklingError, match=r"Could not pickle the task to send.*lock"):
        Parallel(**OTHERS)(delayed(id)({"lock": threading.Lock()}) for _ in range(n_tasks))
    with pytest.raises(TypeError, match="lock"):
        Parallel(**OTHERS)(delayed(threading.Lock)() for _ in range(n_tasks))


class Unreadable:
    def __reduce__(self):
        return int, ("no number",)


class Odd(Exception):
    def __init__(self, a, b):
        super().__init__(a)


def raise_odd():
    raise Odd("what it", "was")


@pytest.mark.parametrize(
    ("task", "text"), [(delayed(id)(Unreadable()), "no number"), (delayed(raise_odd)(), "Odd: what it")]
)
def test_what_cannot_be_unpickled(task, text):
    with pytest.raises(LokyBrokenProcessPool, match=text) as caught:
        Parallel(**OTHERS)([task] * 2)
    assert isinstance(caught.value, BrokenProcessPool)
    assert isinstance(caught.value, RemoteError)
    assert Parallel(**OTHERS)([delayed(neg)(1)]) == [-1]


def test_the_death_of_a_worker():
    with Parallel(**OTHERS) as parallel:
        with pytest.raises(TerminatedWorkerError) as caught:
            parallel([delayed(die)()] + [delayed(neg)(i) for i in range(20)])
        assert isinstance(caught.value, BrokenProcessPool)
        assert isinstance(caught.value, WorkerDied)
        assert caught.value.returncode == -signal.SIGKILL
        assert "SIGKILL" in str(caught.value)
        assert "Parallel" in str(caught.value)
        assert parallel(delayed(neg)(i) for i in range(20)) == [-i for i in range(20)]


def test_retries_are_there_for_the_asking(tmp_path):
    def die_once(path):
        try:
            with open(path, "x"):
                die()
        except FileExistsError:
            return "alive"

    assert Parallel(retries=1, **OTHERS)([delayed(die_once)(tmp_path / "died")] * 1) == ["alive"]


def test_a_timeout_ends_what_runs_and_nothing_else(tmp_path):
    paths = [str(tmp_path / str(number)) for number in range(8)]
    with Parallel(return_as="generator", **OTHERS) as bystander:
        results = bystander(delayed(neg)(i) for i in range(3))
        assert next(results) == 0
        with pytest.raises(multiprocessing.TimeoutError):
            Parallel(timeout=0.5, batch_size=1, **OTHERS)(delayed(touch_then_sleep)(path) for path in paths)
        assert list(results) == [-1, -2]
        began = {path for path in paths if Path(path).exists()}
        assert len(began) <= 2
        # Those who ran are ended, and the others never begin.
        assert len({*bystander(delayed(pid_after)(0.05) for _ in range(20))}) == 2
        assert {path for path in paths if Path(path).exists()} == began


def test_quick_tasks_that_were_on_their_way_do_not_begin_after_an_error():
    def fail_at(number):
        if number == 200:
            raise LookupError(number)
        return number

    with Parallel(pre_dispatch="all", batch_size=1, **OTHERS) as parallel:
        for _ in range(3):
            with pytest.raises(LookupError, match="200"):
                parallel(delayed(fail_at)(i) for i in range(2000))
        assert parallel(delayed(neg)(i) for i in range(20)) == [-i for i in range(20)]


def test_a_generator_that_is_dropped_ends_its_tasks(tmp_path):
    path = str(tmp_path / "began")
    results = Parallel(return_as="generator", **OTHERS)(delayed(touch_then_sleep)(path) for _ in range(1))
    poll_until(lambda: Path(path).exists())
    with pytest.warns(UserWarning, match="have been cancelled"):
        del results
    assert Parallel(**OTHERS)([delayed(neg)(1)] * 4) == [-1] * 4


def test_an_error_of_the_tasks_own_iterable():
    def calls():
        yield delayed(neg)(1)
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        Parallel(**OTHERS)(calls())


def test_an_initializer():
    def prepare(value):
        os.environ["PREPARED"] = value

    options = {**OTHERS, "initializer": prepare, "initargs": ("yes",)}
    assert Parallel(**options)(delayed(os.getenv)("PREPARED") for _ in range(4)) == ["yes"] * 4
    with pytest.raises(BrokenProcessPool, match="LookupError"):
        Parallel(**{**OTHERS, "initializer": fail})(delayed(neg)(i) for i in range(4))
    with pytest.raises(BrokenProcessPool, match="LookupError"):  # it is tried again
        Parallel(**{**OTHERS, "initializer": fail})(delayed(neg)(i) for i in range(4))


def fail():
    raise LookupError("in the initializer")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"mmap_mode": "x"}, ValueError, "mmap_mode must be one of"),
        ({"colour": 3}, TypeError, "the shmengine backend has no parameter colour"),
        ({"retries": -1}, ValueError, "retries must be an integer of at least 0"),
        ({"check": "all"}, ValueError, "check must be one of"),
        ({"memory": "much"}, ValueError, "much"),
        ({"memory": 0}, ValueError, "memory must be positive, not 0"),
        (
            {"idle_worker_timeout": -1},
            ValueError,
            "idle_worker_timeout must be at least 0 .* or None, not -1",
        ),
        ({"idle_worker_timeout": float("nan")}, ValueError, "idle_worker_timeout must be .* not nan"),
        ({"idle_worker_timeout": "1"}, TypeError, "idle_worker_timeout must be a number of seconds"),
        ({"idle_worker_timeout": True}, TypeError, "idle_worker_timeout must be a number of seconds"),
        ({"initializer": 3}, TypeError, "initializer must be callable"),
        ({"n_jobs": 300}, ValueError, "n_jobs must be at most 255, not 300"),
        ({"require": "sharedmem"}, ValueError, "does not support shared memory"),
    ],
)
def test_bad_input(options, error, text):
    with pytest.raises(error, match=text):
        Parallel(**{**SETTINGS, **options})([delayed(neg)(1)])


@pytest.mark.parametrize("threads", ["x", -1, 0, 1.5, True])
def test_bad_numbers_of_threads(threads):
    with (
        parallel_config(**SETTINGS, inner_max_num_threads=threads),
        pytest.raises(
            ValueError, match=f"inner_max_num_threads must be an integer of at least 1, not {threads!r}"
        ),
    ):
        Parallel()([delayed(neg)(1)])


# --- programs -------------------------------------------------------------------------------------

PROGRAM = """
    import os, time
    import joblib, shmengine
    shmengine.joblib.register()

    def task(i):
        print("began", flush=True)
        time.sleep(i)
        return i

    def run(seconds):
        with joblib.parallel_config("shmengine", n_jobs=2):
            return joblib.Parallel()(joblib.delayed(task)(seconds) for _ in range(4))

    """


def test_a_program_without_a_guard_and_a_forked_child():
    source = """
        print(run(0))
        if (pid := os.fork()) == 0:
            print(run(0))
            shmengine.joblib.shutdown()
        else:
            os.waitpid(pid, 0)
            print(run(0))
        """
    result = run_script(PROGRAM + source.replace("\n    ", "\n"), check=True)
    assert result.stdout.count("[0, 0, 0, 0]") == 3


def test_workers_that_end_at_once_keep_nobody_busy_before():
    source = """
        import threading
        seen = set()
        with joblib.Parallel(backend="shmengine", n_jobs=2, idle_worker_timeout=0) as parallel:
            parallel(joblib.delayed(abs)(i) for i in range(4))
            before = time.process_time()
            for _ in range(100):
                seen.update(threading.enumerate())
                time.sleep(0.01)
            print(len(seen), time.process_time() - before)
        """
    threads, seconds = run_script(PROGRAM + source.replace("\n    ", "\n"), check=True).stdout.split()
    assert int(threads) <= 4  # the program's, two of the workers', one that ends them
    assert float(seconds) < 0.5  # of processor


def test_control_c():
    with start_script(PROGRAM + "run(60)") as process:
        assert process.stdout.readline() == "began\n"
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGINT
        assert errors.count("KeyboardInterrupt") == 1


# --- scikit-learn ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled():
    from sklearn.datasets import make_classification

    return make_classification(4000, 100, random_state=0)  # 3.2 MB


def grid_search(samples, labels):
    from sklearn.linear_model import RidgeClassifier
    from sklearn.model_selection import GridSearchCV

    search = GridSearchCV(RidgeClassifier(), {"alpha": [0.1, 1.0, 10.0]}, cv=3).fit(samples, labels)
    return search.cv_results_["mean_test_score"]


def cross_validation(samples, labels):
    from sklearn.linear_model import RidgeClassifier
    from sklearn.model_selection import cross_val_score

    return cross_val_score(RidgeClassifier(), samples, labels, cv=3)


def forest_of_classifiers(samples, labels):
    from sklearn.ensemble import RandomForestClassifier

    forest = RandomForestClassifier(10, max_depth=4, random_state=0)
    return forest.fit(samples, labels).predict_proba(samples)


def forest_of_regressors(samples, labels):
    from sklearn.ensemble import RandomForestRegressor

    forest = RandomForestRegressor(10, max_depth=4, random_state=0)
    return forest.fit(samples, labels).predict(samples)


@pytest.mark.parametrize(
    ("run", "itemsize", "tasks", "rtol"),
    [
        (grid_search, 8, 9, 0),
        (cross_validation, 8, 3, 0),
        # Trees are of single precision, and threads add them up, in any order.
        (forest_of_classifiers, 4, 10, 1e-7),
        (forest_of_regressors, 4, 10, 1e-7),
    ],
)
def test_scikit_learn_unchanged_and_the_training_array_crosses_once(labelled, run, itemsize, tasks, rtol):
    samples, labels = labelled
    expected = run(samples, labels)
    with parallel_config("shmengine", n_jobs=2, memory="256 MiB"), copied() as bytes_copied:
        found = run(samples, labels)
    np.testing.assert_allclose(found, expected, rtol)
    array = samples.size * itemsize
    small = tasks * (labels.nbytes + samples.shape[0] * 8)  # labels and indices go with each task
    assert array <= bytes_copied[0] <= array + small + 200_000
