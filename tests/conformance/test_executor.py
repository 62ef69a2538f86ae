"""`shmengine.Executor` is as strict as `concurrent.futures.ProcessPoolExecutor`: each contract holds for both."""

from __future__ import annotations

import concurrent.futures
import functools
import gc
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import weakref
from concurrent.futures.process import BrokenProcessPool, _RemoteTraceback

import numpy as np
import pytest

import shmengine as shm
from shmengine.errors import RemoteError, SerializationError, WorkerDied
from shmengine.workers import messages
from tests.helpers import poll_until, run_script

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(params=["ours", "standard"])
def pool(request):
    """The class, with a start method that both have."""
    if request.param == "ours":
        return functools.partial(shm.Executor, memory="64 MiB", mp_context=SPAWN)
    return functools.partial(concurrent.futures.ProcessPoolExecutor, mp_context=SPAWN)


@pytest.fixture
def ours():
    """Makes executors of ours, and ends them."""
    made = []

    def make(workers=2, **settings):
        made.append(shm.Executor(workers, **{"memory": "64 MiB", **settings}))
        return made[-1]

    yield make
    for executor in made:
        executor.kill_workers()
        executor.shutdown()


def square(x):
    return x * x


def reciprocal(x):
    return 1 / x  # as it was written


def die(code=3):
    os._exit(code)


# --- constructor --------------------------------------------------------------------------------

BAD_ARGUMENTS = [
    ({"max_workers": 0}, ValueError, "max_workers must be greater than 0"),
    ({"max_workers": -1}, ValueError, "max_workers must be greater than 0"),
    ({"max_workers": "2"}, TypeError, "not supported between"),
    ({"initializer": 3}, TypeError, "initializer must be a callable"),
    ({"max_tasks_per_child": 1.5}, TypeError, "max_tasks_per_child must be an integer"),
    ({"max_tasks_per_child": 0}, ValueError, "max_tasks_per_child must be >= 1"),
    (
        {"max_tasks_per_child": 1, "mp_context": multiprocessing.get_context("fork")},
        ValueError,
        "incompatible with the 'fork' multiprocessing start method",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused(pool, arguments, error, text):
    with pytest.raises(error, match=text):
        pool(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"max_workers": 256}, ValueError, "max_workers must be at most 255, not 256"),
        ({"memory": "lots"}, ValueError, "lots"),
        ({"memory": 0}, ValueError, "memory must be positive, not 0"),
        ({"memory": "1 MiB"}, shm.MemoryBudgetExceeded, "1 workers need"),
        ({"threads_per_worker": 0}, ValueError, "threads_per_worker must be an integer of at least 1, not 0"),
        (
            {"threads_per_worker": "a"},
            ValueError,
            "threads_per_worker must be an integer of at least 1, not 'a'",
        ),
        ({"check": "payloads"}, ValueError, "check must be one of 'frame', 'payload', not 'payloads'"),
        ({"check": None}, ValueError, "check must be one of 'frame', 'payload', not None"),
        ({"writable": "shared"}, ValueError, "writable must be False or 'private', not 'shared'"),
    ],
)
def test_bad_arguments_of_ours_are_refused(arguments, error, text):
    with pytest.raises(error, match=text):
        shm.Executor(**{"max_workers": 1, "memory": "64 MiB", **arguments})


def test_the_default_start_method_follows_max_tasks_per_child(ours):
    assert ours()._mp_context.get_start_method() == multiprocessing.get_start_method()
    assert ours(max_tasks_per_child=1)._mp_context.get_start_method() == "spawn"


def test_what_dask_looks_at(ours):
    executor = ours(3)
    assert isinstance(executor, concurrent.futures.Executor)
    assert executor._max_workers == 3
    assert not callable(executor)
    assert "Client" not in type(executor).__name__


def test_it_cannot_be_sent_away(pool):
    with pool(1) as executor, pytest.raises(TypeError):
        pickle.dumps(executor)


# --- submit -------------------------------------------------------------------------------------


def test_submit(pool):
    with pool(2) as executor:
        future = executor.submit(pow, 3, 4)
        assert isinstance(future, concurrent.futures.Future)
        assert future.result() == 81
        assert executor.submit(dict, fn=1, self=2).result() == {"fn": 1, "self": 2}
        with pytest.raises(TypeError):
            executor.submit(fn=square, x=1)


def test_an_error_has_the_worker_s_traceback(pool):
    with pool(1) as executor:
        error = executor.submit(reciprocal, 0).exception()
    assert type(error) is ZeroDivisionError
    assert type(error.__cause__) is _RemoteTraceback
    assert "return 1 / x  # as it was written" in str(error.__cause__)
    assert str(error.__cause__).startswith('\n"""\nTraceback')


def test_states_of_futures(pool, gate):
    with pool(1) as executor:
        futures = [executor.submit(gate.wait, i) for i in range(40)]
        assert futures[0].running() or not poll_until(futures[0].running)
        assert not futures[0].cancel()
        assert futures[-1].cancel()
        assert futures[-1].cancelled()
        gate.open()
        assert [future.result(60) for future in futures[:-1]] == list(range(39))
        assert futures[0].done()
        with pytest.raises(concurrent.futures.CancelledError):
            futures[-1].result()


def test_a_callback_may_submit(pool):
    ended = threading.Event()
    results = []
    with pool(1) as executor:

        def more(future):
            results.append(future.result())
            if len(results) < 4:
                executor.submit(square, results[-1] + 1).add_done_callback(more)
            else:
                ended.set()

        executor.submit(square, 1).add_done_callback(more)
        assert ended.wait(60)
    assert results == [1, 4, 25, 676]


def test_lambdas_closures_and_arrays(ours):
    executor = ours()
    factor = 3
    assert executor.submit(lambda x: x * factor, 2).result() == 6
    array = np.arange(100_000.0)
    assert np.array_equal(executor.submit(lambda a: a * 2, array).result(), array * 2)


def quotient(x):
    return np.float64(1.0) / x


def test_the_caller_s_errstate_holds_each_time(ours):
    executor = ours(1)
    with np.errstate(divide="ignore"):
        assert executor.submit(quotient, 0).result() == np.inf
        assert executor.submit(quotient, 0).result() == np.inf
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        executor.submit(quotient, 0).result()
    with np.errstate(divide="ignore"):
        assert executor.submit(quotient, 0).result() == np.inf


def test_a_function_by_value_is_pickled_each_time():
    result = run_script("""
        import shmengine as shm

        factor = 2

        def scaled(x):
            return factor * x

        with shm.Executor(1, memory="32 MiB") as executor:
            print(executor.submit(scaled, 1).result())
            factor = 3
            print(executor.submit(scaled, 1).result())
    """)
    assert result.stdout.split() == ["2", "3"]


class Thing:
    def method(self):
        return 7


def test_no_stale_references(pool):
    with pool(1) as executor:
        thing = Thing()
        gone = threading.Event()
        callback = weakref.ref(thing, lambda _: gone.set())
        executor.submit(thing.method)
        del thing
        assert gone.wait(60)
        assert callback() is None


def make_thing(_):
    return Thing()


@pytest.mark.parametrize("options", [{}, {"chunksize": 3}, {"buffersize": 2}])
def test_map_keeps_no_result(ours, options):
    for thing in ours().map(make_thing, range(10), **options):
        reference = weakref.ref(thing)
        del thing
        poll_until(
            lambda reference=reference: reference() is None
        )  # the thread that brought it lets go of it, too


# --- what cannot be sent ------------------------------------------------------------------------


class Unsendable:
    """Raises an error of its own when it is pickled."""

    def __reduce__(self):
        raise LookupError("not this one")


class Unreadable:
    """Can be pickled and not be unpickled."""

    def __reduce__(self):
        return refuse, ()


def refuse():
    raise LookupError("not here")


@pytest.mark.parametrize("argument", [threading.Lock(), Unsendable()])
def test_what_cannot_be_pickled_fails_in_the_future_as_it_does_in_pickle(pool, argument):
    with pytest.raises(Exception) as expected:
        pickle.dumps(argument)
    with pool(1) as executor:
        future = executor.submit(id, argument)
        error = future.exception(60)
        assert type(error) is expected.type
        assert str(expected.value) in str(error)
        assert type(error.__cause__) is _RemoteTraceback
        assert executor.submit(square, 2).result() == 4


def test_the_path_to_the_culprit_is_a_note(ours):
    executor = ours(1)
    error = executor.submit(id, {"a": [threading.Lock()]}).exception()
    assert "cannot pickle 'lock' object at args[0]['a'][0]" in error.__notes__[0]
    lock = threading.Lock()
    assert "fn.<closure lock>" in executor.submit(lambda: lock).exception().__notes__[0]
    error = executor.submit(lambda: {"b": threading.Lock()}).exception()
    assert type(error) is TypeError
    assert "result['b']" in error.__notes__[0]


def test_one_that_waits_and_cannot_be_pickled_harms_no_other(ours, gate):
    executor = ours(1)
    futures = [executor.submit(gate.wait, i) for i in range(20)]
    bad = executor.submit(id, Unsendable())
    futures += [executor.submit(gate.wait, i) for i in range(20, 40)]
    gate.open()
    assert [future.result(60) for future in futures] == list(range(40))
    assert type(bad.exception(60)) is LookupError


def return_it(cls):
    return cls()


def test_a_result_that_cannot_be_pickled_is_the_future_s_error(pool):
    with pool(1) as executor:
        error = executor.submit(return_it, Unsendable).exception(60)
        assert type(error) is LookupError
        assert type(error.__cause__) is _RemoteTraceback
        assert executor.submit(square, 2).result() == 4


class Odd(Exception):
    """As people write them: it pickles, and its constructor then misses an argument."""

    def __init__(self, a, b):
        super().__init__(a)


class OfOneProcess(Exception):
    """Can be unpickled where it was raised only."""

    def __reduce__(self):
        return unless_elsewhere, (os.getpid(),)


def unless_elsewhere(pid):
    if os.getpid() != pid:
        raise LookupError("not here")
    return OfOneProcess("here")


class NoMoreAnError(Exception):
    def __reduce__(self):
        return int, ("3",)


ODD_ERRORS = [Odd, OfOneProcess, NoMoreAnError]


def raise_odd(cls):
    raise cls(*["odd", "one"][: 2 if cls is Odd else 1])  # as it was written


UNREADABLE = [(id, Unreadable()), (return_it, Unreadable)]


@pytest.mark.parametrize(("fn", "argument"), UNREADABLE + [(raise_odd, cls) for cls in ODD_ERRORS])
def test_what_cannot_be_unpickled_is_a_broken_process_pool(pool, fn, argument, capfd):
    with pool(1) as executor:
        assert isinstance(executor.submit(fn, argument).exception(60), BrokenProcessPool)
    capfd.readouterr()  # the standard's worker has died of it


@pytest.mark.parametrize(("fn", "argument"), UNREADABLE)
def test_which_harms_no_other_of_ours(ours, fn, argument):
    executor = ours(1)
    error = executor.submit(fn, argument).exception(60)
    assert "LookupError: not here" in str(error)
    assert isinstance(error.__cause__, SerializationError)
    assert executor.submit(square, 2).result() == 4


@pytest.mark.parametrize("cls", ODD_ERRORS)
def test_nor_does_an_exception_of_that_kind_which_says_what_it_was(ours, cls):
    executor = ours(1)
    error = executor.submit(raise_odd, cls).exception(60)
    assert isinstance(error, RemoteError)
    assert error.type_name.endswith(cls.__name__)
    assert str(error).startswith("it cannot be unpickled: ")
    assert f"{cls.__name__}: odd" in str(error)
    assert type(error.__cause__) is _RemoteTraceback
    assert "raise cls(" in str(error.__cause__)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert executor.submit(square, 2).result() == 4


# --- deaths -------------------------------------------------------------------------------------


def test_a_death_breaks_it(pool, gate):
    with pool(2) as executor:
        executor.submit(square, 1).result()
        futures = [executor.submit(gate.wait) for _ in range(20)]
        os.kill(next(iter(executor._processes)), signal.SIGKILL)
        for future in futures:
            assert isinstance(future.exception(60), BrokenProcessPool)
        poll_until(lambda: executor._broken)
        with pytest.raises(BrokenProcessPool):
            executor.submit(square, 1)
        with pytest.raises(BrokenProcessPool):
            executor.map(square, [1])


def test_the_error_says_what_worker_died_says(ours):
    executor = ours(1)
    futures = [executor.submit(die), executor.submit(square, 2)]
    for future in futures:
        error = future.exception(60)
        assert isinstance(error, WorkerDied)
        assert error.returncode == 3
        assert error.task == "submit(die)"
        assert "exited with code 3" in str(error)
    assert futures[0].exception() is not futures[1].exception()
    assert type(pickle.loads(pickle.dumps(error))) is type(error)
    with pytest.raises(WorkerDied, match="exited with code 3"):
        executor.submit(square, 2)


def test_the_death_of_an_idle_worker_is_noticed(ours):
    executor = ours(1)
    executor.submit(square, 1).result()
    (process,) = executor._processes.values()
    process.terminate()
    poll_until(lambda: executor._broken)
    with pytest.raises(BrokenProcessPool, match="SIGTERM"):
        executor.submit(square, 1)
    process.join()
    assert process.exitcode == -signal.SIGTERM
    assert not process.is_alive()


def test_after_a_death_nobody_is_left(ours, gate):
    executor = ours(2)
    futures = [executor.submit(gate.wait) for _ in range(2)]
    processes = executor._processes
    next(iter(processes.values())).kill()
    concurrent.futures.wait(futures)
    for process in processes.values():
        process.join()
    poll_until(lambda: not executor._processes)


def fail(*_):
    raise ValueError("no start")


def test_an_initializer_that_fails_breaks_it(pool, capfd):
    with pool(1, initializer=fail) as executor:
        error = executor.submit(square, 1).exception(60)
        assert isinstance(error, BrokenProcessPool)
        poll_until(lambda: executor._broken)
        with pytest.raises(BrokenProcessPool):
            executor.submit(square, 1)
    capfd.readouterr()


@pytest.mark.parametrize("step", ["encode_batch", "dispatch", "write_frame"])
@pytest.mark.parametrize("ended", [False, True])
def test_also_when_the_worker_is_quicker_than_submit(ours, step, ended, capfd, monkeypatch):
    with ours(1, initializer=fail) as executor:
        core = executor._backend._core
        owner = messages if step == "write_frame" else core
        go_on = getattr(owner, step)

        def see_it_fail_and_go_on(*args, **kwargs):
            core.collector.wake()
            poll_until(lambda: core.closed if ended else executor._broken)
            return go_on(*args, **kwargs)

        monkeypatch.setattr(owner, step, see_it_fail_and_go_on)
        assert isinstance(executor.submit(square, 1).exception(60), BrokenProcessPool)
        with pytest.raises(BrokenProcessPool):
            executor.submit(square, 1)
    capfd.readouterr()


def test_and_it_is_logged_and_said(ours, caplog, capfd):
    with caplog.at_level(logging.CRITICAL, "concurrent.futures"):
        error = ours(1, initializer=fail).submit(square, 1).exception(60)
    assert isinstance(error, RemoteError)
    assert "the initializer failed in a worker: ValueError: no start" in str(error)
    assert isinstance(error.__cause__, ValueError)
    poll_until(lambda: "Exception in initializer:" in caplog.text)
    capfd.readouterr()


# --- initializer and workers --------------------------------------------------------------------


def keep(*things):
    keep.things = things


def kept():
    return keep.things


def test_initializer(pool):
    with pool(2, initializer=keep, initargs=("a", 1)) as executor:
        assert [executor.submit(kept).result() for _ in range(4)] == [("a", 1)] * 4


def use_inherited(value):
    queue, lock, connection = keep.things
    with lock:
        connection.send(value)
        queue.put(value)


def test_an_initializer_gets_locks_queues_and_connections(pool):
    queue, lock, (left, right) = SPAWN.Queue(), SPAWN.Lock(), SPAWN.Pipe()
    with left, right:
        with pool(2, initializer=keep, initargs=(queue, lock, right)) as executor:
            list(executor.map(use_inherited, range(10)))
        assert sorted(left.recv() for _ in range(10)) == list(range(10))
        assert sorted(queue.get(timeout=60) for _ in range(10)) == list(range(10))
    queue.close()
    queue.join_thread()


def test_objects_of_the_fork_method_say_so():
    lock = multiprocessing.get_context("fork").Lock()
    with pytest.raises(SerializationError, match="fork context"):
        shm.Executor(1, initializer=keep, initargs=(lock,))


def test_workers_start_on_demand(pool):
    with pool(4) as executor:
        assert len(executor._processes) == 0
        for _ in range(3):
            executor.submit(square, 1).result()
            assert len(executor._processes) == 1


def test_with_fork_they_start_at_once(ours):
    executor = ours(3, mp_context=multiprocessing.get_context("fork"))
    assert not executor._processes
    executor.submit(square, 1).result()
    assert len(executor._processes) == 3


def test_max_tasks_per_child(ours):  # Python 3.11's own may hang
    executor = ours(1, max_tasks_per_child=3)
    pids = [executor.submit(os.getpid).result() for _ in range(7)]
    assert pids[0] == pids[1] == pids[2] != pids[3] == pids[4] == pids[5] != pids[6]
    assert len(executor._processes) == 1
    futures = [executor.submit(os.getpid) for _ in range(9)]
    executor.shutdown()
    assert len({future.result() for future in futures}) >= 3


def put_into(queue, value):
    queue.put(value)


def test_queues_of_a_manager_reach_tasks(pool):
    with SPAWN.Manager() as manager, pool(1) as executor:
        queue = manager.Queue()
        executor.submit(put_into, queue, 5).result()
        assert queue.get(timeout=60) == 5


def test_an_executor_inside_of_a_task():
    result = run_script("""
        import shmengine as shm

        def outer(x):
            with shm.Executor(1, memory="32 MiB") as executor:
                return executor.submit(lambda y: y + 1, x).result()

        with shm.Executor(1, memory="32 MiB") as executor:
            print(executor.submit(outer, 1).result())
    """)
    assert result.stdout == "2\n"


# --- map ----------------------------------------------------------------------------------------


def test_map(pool):
    with pool(2) as executor:
        assert list(executor.map(pow, range(10), range(10))) == list(map(pow, range(10), range(10)))
        assert list(executor.map(pow, range(10), range(7), chunksize=3)) == list(
            map(pow, range(10), range(7))
        )
        assert list(executor.map(square, [])) == []
        results = executor.map(divmod, [1, 1, 1, 1], [2, 3, 0, 5])
        assert [next(results), next(results)] == [(0, 1), (0, 1)]
        with pytest.raises(ZeroDivisionError):
            next(results)
        with pytest.raises(ValueError, match="chunksize must be >= 1"):
            executor.map(square, [1], chunksize=0)


def test_map_times_out(pool, gate):
    with pool(2) as executor:
        results = executor.map(return_or_wait, [1, gate.wait], timeout=2)
        got = []
        with pytest.raises(concurrent.futures.TimeoutError):
            got += (each for each in results)
        gate.open()


def return_or_wait(what):
    return what() if callable(what) else what


def test_map_with_a_buffer_is_lazy(ours):
    executor = ours(1)
    taken = []

    def numbers():
        for number in range(100):
            taken.append(number)
            yield number

    results = executor.map(square, numbers(), buffersize=5)
    assert len(taken) == 5
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert len(taken) == 8
    results.close()
    with pytest.raises(ValueError, match="buffersize must be None or > 0"):
        executor.map(square, [1], buffersize=0)
    with pytest.raises(TypeError, match="buffersize must be an integer or None"):
        executor.map(square, [1], buffersize=1.5)
    results = executor.map(square, range(10), buffersize=2)
    executor.shutdown()
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        list(results)


def test_leaving_map_cancels_the_rest(pool, gate, tmp_path):
    with pool(1) as executor:
        results = executor.map(
            return_or_wait, [1, gate.wait, *[(tmp_path / str(i)).touch for i in range(50)]]
        )
        assert next(results) == 1
        results.close()
        gate.open()
    assert not (tmp_path / "49").exists()


# --- end ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", [True, False])
def test_shutdown_runs_what_was_submitted(pool, wait):
    executor = pool(2)
    futures = [executor.submit(square, i) for i in range(50)]
    executor.shutdown(wait=wait)
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.submit(square, 1)
    assert [future.result(60) for future in futures] == [i * i for i in range(50)]
    executor.shutdown()


def test_shutdown_cancels_what_has_not_begun(pool, gate):
    executor = pool(1)
    futures = [executor.submit(gate.wait, i) for i in range(40)]
    poll_until(futures[0].running)
    executor.shutdown(wait=False, cancel_futures=True)
    poll_until(futures[-1].cancelled)
    gate.open()
    executor.shutdown()
    assert all(future.cancelled() or future.result() == i for i, future in enumerate(futures))
    assert futures[0].result() == 0
    if isinstance(executor, shm.Executor):  # the standard's leaves those that wait for futures waiting
        assert not concurrent.futures.wait(futures).not_done


def test_a_forgotten_executor_does_its_work(pool):
    executor = pool(2)
    futures = [executor.submit(square, i) for i in range(50)]
    processes = list(executor._processes.values())
    del executor
    gc.collect()
    assert [future.result(60) for future in futures] == [i * i for i in range(50)]
    for process in processes:
        process.join()


@pytest.mark.parametrize("how", ["terminate_workers", "kill_workers"])
def test_ending_the_workers(ours, gate, how):
    executor = ours(2)
    futures = [executor.submit(gate.wait) for _ in range(40)]
    poll_until(futures[0].running)
    processes = executor._processes
    getattr(executor, how)()
    concurrent.futures.wait(futures)
    assert isinstance(futures[0].exception(), BrokenProcessPool)
    assert futures[-1].cancelled()
    for process in processes.values():
        process.join()
        assert process.exitcode < 0
    executor.shutdown()
    getattr(executor, how)()


def test_shutdown_in_a_callback(ours):
    executor = ours(1)
    ended = threading.Event()

    def end(_):
        executor.shutdown()
        ended.set()

    executor.submit(square, 2).add_done_callback(end)
    assert ended.wait(60)
    executor.shutdown()
    assert not executor._processes


def test_ctrl_c_inside_of_the_block_stops_at_once(ours, gate):
    executor = ours(1)
    future = None
    with pytest.raises(KeyboardInterrupt), executor:
        future = executor.submit(gate.wait)
        raise KeyboardInterrupt
    assert isinstance(future.exception(60), BrokenProcessPool)


AT_EXIT = """
    import atexit

    @atexit.register
    def last():
        try:
            executor.submit(id, None)
        except RuntimeError as error:
            print(error)

    import shmengine, time
    executor = shmengine.Executor(2, memory="32 MiB")
    def late(text):
        time.sleep(0.3)
        print(text, flush=True)
    futures = [executor.submit(late, i) for i in range(5)]
    {more}
"""


@pytest.mark.parametrize("more", ["", "executor.shutdown(wait=False)"])
def test_the_interpreter_waits_for_what_was_submitted(more):
    result = run_script(AT_EXIT.format(more=more))
    *numbers, text = result.stdout.splitlines()
    assert sorted(numbers) == list("01234")
    assert text.startswith("cannot schedule new futures after")
    assert result.stderr == ""


def wait_for(path):
    while not os.path.exists(path):
        threading.Event().wait(0.01)


@pytest.mark.parametrize("workers", [1, 2])
def test_only_few_more_are_running_than_there_are_workers(pool, workers, tmp_path):
    """The others can be cancelled."""
    path = tmp_path / "gate"
    with pool(workers) as executor:
        futures = [executor.submit(wait_for, path) for _ in range(20)]
        try:
            poll_until(lambda: sum(future.running() for future in futures) >= workers)
            threading.Event().wait(0.2)
            assert workers <= sum(future.running() for future in futures) <= 2 * workers + 1
            assert sum(future.cancel() for future in futures) >= 20 - 2 * workers - 1
        finally:
            path.touch()


def test_but_not_after_ctrl_c():
    result = run_script(AT_EXIT.format(more="executor.submit(time.sleep, 10_000); raise KeyboardInterrupt"))
    assert result.stdout.splitlines()[-1].startswith("cannot schedule new futures after")
    assert "KeyboardInterrupt" in result.stderr


def test_in_a_forked_child_it_says_so(ours):
    executor = ours(1)
    executor.submit(square, 1).result()
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            executor.submit(square, 1)
        except BaseException as error:
            os.write(write, repr(error).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    said = os.read(read, 1000)
    os.close(read)
    assert b"UseAfterFork" in said
    assert executor.submit(square, 3).result() == 9
