"""Workers that die at any moment, for any reason: nothing hangs, nothing is lost, others go on."""

from __future__ import annotations

import ctypes
import os
import random
import re
import signal
import threading
import time

import numpy as np
import pytest

from shmengine.errors import RemoteError, TaskTimeout, WorkerDied
from tests.helpers import poll_until

MIB = 1 << 20


@pytest.fixture
def engine(make_engine):
    engine = make_engine()
    yield engine
    if not engine.closed:
        assert list(engine.map(abs, range(100))) == list(range(100))  # still whole after all that


def pids(engine):
    return engine._backend.pids


def signal_worker(pid, number=signal.SIGKILL):
    """Send a signal to a worker, which may have died meanwhile."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


class Killer:
    """Kills workers at random moments, most of them at work, until the end of the block.

    Between two kills there is always a result: workers that are only ever killed get nothing done.
    """

    def __init__(self, engine, pause, at_once=1):
        self.seed = random.SystemRandom().randrange(1 << 32)
        print("seed of the killer:", self.seed)
        self.random = random.Random(self.seed)
        self.engine = engine
        self.pause = pause
        self.at_once = at_once
        self.kills = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self):
        while not self.stop.wait(self.random.uniform(0, self.pause)):
            done = self.engine.stats().tasks_done
            victims = pids(self.engine)
            if self.random.random() < 0.7:
                victims = [pid for pid, *_ in self.engine._backend._core.pool.busy()]
            for pid in self.random.sample(victims, min(self.at_once, len(victims))):
                self.kills += signal_worker(pid)
            while self.engine.stats().tasks_done == done and not self.stop.wait(0.002):
                pass

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()


def total(array, i):
    return float(array.sum()) + i


def spread(array, i):
    """Return something born shared, of a size that tells."""
    return np.full((1 + i % 3) * 100_000, i % 251, "u1")


def counters(engine):
    return engine._backend._core.region.counters()


def assert_whole(engine):
    """Nothing is held any more by anybody, and nearly all of the budget can be had."""
    list(engine.map(abs, range(200)))
    c = counters(engine)
    assert engine.stats().tasks_in_flight == 0
    assert c.held == 0, f"{c.held} bytes are still held by main"
    budget = engine.stats().memory_budget
    arrays = [engine.empty(MIB, "u1") for _ in range(budget // 2 // MIB)]
    for array in arrays:
        array[:] = 1
    del array, arrays
    assert counters(engine).used < budget // 4


# --- SIGKILL from outside -------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 2])
def test_ten_thousand_tasks_survive_random_kills(make_engine, at_once):
    engine = make_engine(memory="32 MiB")
    arrays = [np.arange(n % 700, dtype="f8") for n in range(10_000)]
    with Killer(engine, 0.15, at_once) as killer:
        done = lost = rounds = 0
        while killer.kills < 12:
            for i, result in enumerate(engine.map(total, arrays, range(10_000), on_error="return")):
                if isinstance(result, WorkerDied):
                    assert result.returncode == -signal.SIGKILL
                    assert f"task {i} of map(total)" in str(result)
                    lost += 1
                else:
                    assert result == arrays[i].sum() + i
                    done += 1
            rounds += 1
    assert done + lost == 10_000 * rounds
    assert lost < done / 100
    poll_until(lambda: len(pids(engine)) == 2, what="two workers are there again")
    stats = engine.stats()
    assert stats.workers == 2
    assert 1 <= stats.worker_deaths <= killer.kills
    assert (stats.tasks_done, stats.tasks_failed) == (done, lost)
    assert_whole(engine)


def test_born_shared_results_in_flight_are_not_lost_with_their_maker(make_engine):
    engine = make_engine(memory="32 MiB")  # a leak of a block a kill would soon be felt
    with Killer(engine, 0.1) as killer:
        kept = []
        while killer.kills < 15:
            for i, result in enumerate(
                engine.map_unordered(spread, [np.zeros(10)] * 300, range(300), on_error="return")
            ):
                if not isinstance(result, WorkerDied):
                    assert (result == result[0]).all()
                    if i % 50 == 0:
                        kept = [*kept[-9:], (int(result[0]), result)]
    assert len(kept) == 10
    for value, array in kept:  # outlive the process that made them
        assert (array == value).all()
    del kept, array, result
    assert_whole(engine)


def test_block_functions_survive_random_kills(make_engine):
    engine = make_engine(retries=100)
    x = np.random.default_rng(0).random((3000, 700))
    expected = np.sqrt(x) * 2 + 1
    out = np.empty_like(x)
    with Killer(engine, 0.1) as killer:
        while killer.kills < 8:
            out[:] = 0
            engine.map_blocks(lambda b: np.sqrt(b) * 2 + 1, x, out=out)
            assert np.array_equal(out, expected)
            assert engine.reduce(np.sum, np.ones(1_000_000), combine=lambda a, b: a + b) == 1_000_000
    assert_whole(engine)


def test_futures_survive_random_kills(make_engine):
    engine = make_engine(retries=100)
    with Killer(engine, 0.1) as killer:
        while killer.kills < 8:
            futures = [engine.submit(total, np.ones(i), i) for i in range(500)]
            for i, future in enumerate(futures):
                assert future.result() == 2 * i


def test_an_idle_worker_is_replaced(make_engine):
    engine = make_engine()
    assert list(engine.map(abs, range(10))) == list(range(10))
    before = set(pids(engine))
    for pid in before:
        signal_worker(pid)
    poll_until(lambda: len(set(pids(engine)) - before) == 2, what="both workers are replaced")
    assert list(engine.map(abs, range(10))) == list(range(10))
    stats = engine.stats()
    assert (stats.worker_deaths, stats.retries, stats.tasks_failed) == (2, 0, 0)


def test_a_stopped_worker_is_not_taken_for_dead(make_engine):
    engine = make_engine()
    results = engine.map(lambda i: os.getpid(), range(5000))
    first = next(results)
    signal_worker(first, signal.SIGSTOP)
    other = engine.submit(os.getpid).result()
    assert other != first
    threading.Timer(0.5, signal_worker, (first, signal.SIGCONT)).start()
    assert set(results) <= {first, other}
    assert engine.stats().worker_deaths == 0


def test_kills_while_memory_is_full(make_engine):
    """Tasks in the ring fill the memory, the only worker dies: its successor must still come."""
    engine = make_engine(1, memory="16 MiB", retries=100)
    arrays = [np.full(1_500_000, i, "u1") for i in range(40)]
    with Killer(engine, 0.3) as killer:
        while killer.kills < 5:
            for i, result in enumerate(engine.map(lambda a: a.copy(), arrays)):
                assert (result == i).all()
            del result
            for i, future in enumerate([engine.submit(np.max, array) for array in arrays[:4]]):
                assert future.result() == i


# --- tasks that kill their process ----------------------------------------------------------------


def die(how):
    if how == "exit":
        os._exit(7)
    elif how == "segfault":
        ctypes.string_at(0)
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "abort":
        os.abort()


DEATHS = {
    "exit": (7, "exited with code 7 (the task ended the process)"),
    "segfault": (-signal.SIGSEGV, "was killed by SIGSEGV (a crash in native code)"),
    "kill": (-signal.SIGKILL, "was killed by SIGKILL"),
    "abort": (-signal.SIGABRT, "was killed by SIGABRT (a crash in native code)"),
}


@pytest.mark.parametrize("how", DEATHS)
def test_a_poison_task_is_named_and_the_others_go_on(engine, how, capfd):
    def task(i):
        if i == 57:
            print("last words", i, file=__import__("sys").stderr, flush=True)
            die(how)
        return i * i

    before = engine.stats()
    results = list(engine.map(task, range(200), on_error="return"))
    error = results.pop(57)
    assert results == [i * i for i in range(200) if i != 57]
    assert isinstance(error, WorkerDied)
    returncode, text = DEATHS[how]
    assert error.returncode == returncode
    assert text in str(error)
    assert "while it ran task 57 of map(task); tried 2 times" in str(error)
    assert "last lines of its stderr:" in str(error)
    assert "last words 57" in error.stderr_tail
    assert error.attempts == 2
    after = engine.stats()
    assert after.worker_deaths - before.worker_deaths >= 2
    assert after.tasks_failed - before.tasks_failed == 1
    assert after.retries - before.retries == 1


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_retries_bound_the_attempts(make_engine, retries, tmp_path):
    engine = make_engine(retries=retries)
    path = str(tmp_path / "attempts")

    def task(i):
        if i == 20:
            with open(path, "a") as file:
                file.write("x")
            os._exit(1)
        return i

    results = list(engine.map(task, range(50), on_error="return"))
    assert [r for r in results if not isinstance(r, WorkerDied)] == [i for i in range(50) if i != 20]
    assert results[20].attempts == retries + 1
    assert len((tmp_path / "attempts").read_text()) == retries + 1
    assert engine.stats().retries == retries


def test_a_task_that_dies_once_succeeds(engine, tmp_path):
    def task(path):
        if not os.path.exists(path):
            with open(path, "w"):
                os._exit(1)
        return os.path.basename(path)

    assert engine.submit(task, str(tmp_path / "a")).result() == "a"
    assert list(engine.map(task, [str(tmp_path / name) for name in "bcd"])) == ["b", "c", "d"]


def test_without_retries_a_task_is_never_begun_twice(make_engine, tmp_path):
    """Neither the one that dies nor one that had already ended in the same worker."""
    engine = make_engine(1, retries=0)
    counts = engine.zeros(2000, "i8")

    def task(cell, i):
        cell += 1
        if i == 1500:
            os._exit(1)

    results = list(engine.map(task, counts[:, None], range(2000), writable="shared", on_error="return"))
    assert [type(r) for r in results].count(WorkerDied) >= 1
    assert isinstance(results[1500], WorkerDied)
    assert counts.max() == 1
    done = [i for i, result in enumerate(results) if result is None]
    assert (counts[done] == 1).all()


def test_a_future_gets_the_death(engine):
    future = engine.submit(die, "exit")
    error = future.exception()
    assert isinstance(error, WorkerDied)
    assert "submit(die)" in str(error)
    assert list(engine.map(abs, [-1])) == [1]


def test_death_ends_a_block_call_with_its_cause(engine):
    with pytest.raises(WorkerDied, match=r"exited with code 7.* of map_blocks\(<lambda>\)"):
        engine.map_blocks(lambda b: die("exit"), np.zeros(10))
    with pytest.raises(WorkerDied, match=r" of reduce\(<lambda>\)"):
        engine.reduce(lambda b: die("exit"), np.zeros(10), combine=max)
    assert engine.map_blocks(lambda b: b + 1, np.zeros(10)).sum() == 10


def test_several_streams_are_hit_apart(engine):
    """The death of a worker harms only the stream whose task it ran."""
    poison = engine.map(lambda i: os._exit(3) if i % 7 == 3 else i, range(30), on_error="return")
    healthy = engine.map(lambda i: i + 1, range(30))
    for i, (bad, good) in enumerate(zip(poison, healthy, strict=True)):
        assert good == i + 1
        assert isinstance(bad, WorkerDied) if i % 7 == 3 else bad == i


# --- death outside of the function ----------------------------------------------------------------


class DiesWhenPickled:
    def __reduce__(self):
        if "SHMENGINE_WORKER" in os.environ:
            os._exit(11)
        return (DiesWhenPickled, ())


class DiesWhenUnpickled:
    def __reduce__(self):
        return (os._exit, (12,))


def test_death_while_a_result_is_pickled(engine):
    results = list(engine.map(lambda i: DiesWhenPickled() if i == 31 else i, range(64), on_error="return"))
    error = results.pop(31)
    assert isinstance(error, WorkerDied)
    assert error.returncode == 11
    assert "task 31 " in str(error)
    assert results == [i for i in range(64) if i != 31]


def test_death_while_arguments_are_unpickled(engine):
    items = [DiesWhenUnpickled() if i == 31 else i for i in range(64)]
    results = list(engine.map(lambda x: x, items, on_error="return"))
    error = results.pop(31)
    assert isinstance(error, WorkerDied)
    assert error.returncode == 12
    assert "task 31 " in str(error)
    assert results == [i for i in range(64) if i != 31]
    error = engine.submit(print, DiesWhenUnpickled()).exception()
    assert isinstance(error, WorkerDied)


def test_death_while_the_function_is_unpickled(engine):
    poison = DiesWhenUnpickled()
    error = engine.submit(lambda: poison).exception()
    assert isinstance(error, WorkerDied)
    assert error.returncode == 12
    assert engine.submit(abs, -3).result() == 3


# --- initializers ---------------------------------------------------------------------------------


def test_an_initializer_that_raises_is_reported(make_engine):
    def initializer(x):
        raise KeyError(f"no model {x}")

    engine = make_engine(initializer=initializer, initargs=(5,))
    for _ in range(2):
        with pytest.raises(
            RemoteError, match="initializer failed in a worker: KeyError: 'no model 5'"
        ) as caught:
            list(engine.map(abs, range(3)))
        assert isinstance(caught.value.__cause__, KeyError)
        assert "in initializer" in str(caught.value.__cause__.__cause__)
    with pytest.raises(RemoteError, match="no model 5"):
        engine.submit(abs, 1).result()
    with pytest.raises(RemoteError, match="no model 5"):
        engine.map_blocks(np.sqrt, np.ones(3))


@pytest.mark.parametrize("touch", ["map", "submit", "nothing"])
def test_an_initializer_that_kills_does_not_start_workers_for_ever(make_engine, tmp_path, touch):
    path = str(tmp_path / "starts")

    def initializer():
        with open(path, "a") as file:
            file.write("x")
        os._exit(13)

    engine = make_engine(initializer=initializer)
    if touch == "map":
        for _ in range(2):
            with pytest.raises(
                WorkerDied, match=r"exited with code 13.* its start and the initializer; tried \d+ times"
            ) as caught:
                list(engine.map(abs, range(3)))
        assert caught.value.returncode == 13
    elif touch == "submit":
        futures = [engine.submit(abs, i) for i in range(20)]
        for future in futures:
            assert isinstance(future.exception(), WorkerDied)
    poll_until(lambda: not pids(engine), what="no more workers are started")
    starts = len((tmp_path / "starts").read_text())
    assert 2 <= starts <= 10
    with pytest.raises(WorkerDied):
        engine.submit(abs, 1).result()
    with pytest.raises(WorkerDied):
        engine.map_blocks(np.sqrt, np.ones(3))
    assert len((tmp_path / "starts").read_text()) == starts


def test_an_initializer_that_dies_now_and_then_is_tried_again(make_engine, tmp_path):
    path = str(tmp_path / "died")

    def initializer():
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os._exit(13)

    engine = make_engine(initializer=initializer)
    assert list(engine.map(abs, range(30))) == list(range(30))
    poll_until(lambda: engine.stats().worker_deaths == 1, what="the first to come has died")
    assert list(engine.map(abs, range(30))) == list(range(30))


# --- time limits ----------------------------------------------------------------------------------


def hold_the_interpreter():
    ctypes.PyDLL(None).sleep(1000)


def ignore_signals():
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while True:
        time.sleep(1000)


def backtrack():
    re.match(r"(a+)+$", "a" * 60 + "b")


def import_this_module():
    """Do nothing; where it is unpickled the module has been imported."""


@pytest.mark.parametrize("stuck", [hold_the_interpreter, ignore_signals, backtrack])
def test_a_time_limit_ends_any_task(make_engine, stuck):
    engine = make_engine(
        initializer=import_this_module
    )  # which takes long, and must not count as a task's time
    before = engine.stats()
    results = list(engine.map(lambda i: stuck() if i == 5 else i, range(40), timeout=1, on_error="return"))
    error = results.pop(5)
    assert isinstance(error, TaskTimeout)
    assert str(error) == "task 5 of map(<lambda>) did not end within 1 s"
    assert error.seconds == 1
    where = "(no answer: it blocks signals)" if stuck is ignore_signals else f"in {stuck.__name__}"
    assert where in error.__notes__[0]
    assert results == [i for i in range(40) if i != 5]
    after = engine.stats()
    assert after.worker_deaths - before.worker_deaths == 1
    assert after.retries == before.retries  # what is too slow once is not tried again
    assert after.tasks_failed - before.tasks_failed == 1


def test_a_time_limit_is_for_a_task_not_for_the_call(engine):
    results = list(engine.map(lambda i: time.sleep(0.1) or i, range(30), timeout=1))
    assert results == list(range(30))


def test_a_time_limit_of_one_stream_is_not_another_s(engine):
    """Those with no limit stay alive, whatever others ask for."""
    slow = engine.map(lambda i: time.sleep(1.5) or i, range(2))
    first = next(slow)
    limited = list(engine.map(lambda i: time.sleep(1000 * (i == 1)), range(3), timeout=1, on_error="skip"))
    assert limited == [None, None]
    assert [first, *slow] == [0, 1]


def test_time_limits_reach_blocks(engine):
    with pytest.raises(TaskTimeout, match=r"task 0 of map_blocks\(<lambda>\) did not end within 0.5 s"):
        engine.map_blocks(lambda b: time.sleep(1000), np.zeros(10), timeout=0.5)
    with pytest.raises(TaskTimeout, match=r"task 0 of reduce\(<lambda>\)"):
        engine.reduce(lambda b: time.sleep(1000), np.zeros(10), combine=max, timeout=0.5)
    assert engine.map_blocks(np.sqrt, np.ones(5), timeout=30).sum() == 5


def test_a_worker_whose_descriptors_were_closed_lives_on(make_engine):
    """What it watches the main process by is gone, too; only the main process's own end must end it."""
    engine = make_engine(workers=1)
    (worker,) = pids(engine)
    assert engine.submit(lambda: os.closerange(3, 512) or os.getpid()).result() == worker
    # Longer than the 250 ms after which the watching thread looks again.
    assert engine.submit(lambda: time.sleep(1) or os.getpid()).result() == worker
    assert engine.stats().worker_deaths == 0
