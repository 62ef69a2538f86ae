"""Who is slow: what `Engine.stalls` says of all backends, and of workers in every state."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import pickle
import re
import signal
import threading
import time

import numpy as np
import pytest

from shmengine.engine import Engine
from shmengine.errors import MemoryBudgetExceeded, TaskTimeout
from shmengine.workers import stacks
from tests.helpers import poll_until


def stalls_of(engine):
    """Wait until a task waits at the gate."""
    seen = []
    poll_until(
        lambda: seen.append(engine.stalls(0.05)) or "in wait_for_file" in str(seen[-1]), what="a stall"
    )
    return seen[-1]


@contextlib.contextmanager
def looking(engine, gate):
    """Look at the engine from another thread until something stalls, and then open the gate."""
    found = []

    def look():
        try:
            found.append(stalls_of(engine))
        finally:
            gate.open()

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield found
    finally:
        watcher.join()


def at_the_gate(found):
    """Return the stalls that were waited for; a worker may be importing our module at the same time."""
    return [stall for stall in found[0] if "in wait_for_file" in stall.stack]


# --- every backend ---------------------------------------------------------------------------------


def test_nothing_stalls(engine):
    assert list(engine.map(abs, range(-50, 0))) == list(range(50, 0, -1))
    poll_until(lambda: engine.stalls(0) == (), what="nothing runs")
    stalls = engine.stalls()
    assert not stalls
    assert str(stalls) == stalls.report == stalls.summary
    assert f"0 of {engine.workers} workers ({engine.backend}) stalled, tasks in flight 0" in str(stalls)


def test_a_slow_task_is_shown_while_another_thread_waits_for_it(engine, gate):
    if engine.backend == "serial":
        return  # nothing runs but in the caller
    wait = gate.wait

    def held_up(i):
        return wait(i) if i == 7 else i

    with looking(engine, gate) as found:
        assert list(engine.map(held_up, range(20))) == list(range(20))
    [stall] = at_the_gate(found)
    assert (stall.function, stall.task, stall.waits_for_memory) == ("map(held_up)", 7, 0)
    assert 0.05 <= stall.seconds < 1e6
    assert "in held_up" in stall.stack
    assert "in wait_for_file" in stall.stack
    if engine.backend == "process":
        assert stall.pid in engine._backend.pids
        assert stall.worker == f"worker {stall.pid}"
        assert re.search(r"task ring \d+ of 4096, result ring \d+ of 4096, memory \d", str(found[0]))
    else:
        assert stall.pid == os.getpid()
        assert stall.worker.startswith("thread ")
    assert f"{stall.worker}: task 7 of map(held_up) for " in str(found[0])
    assert "in wait_for_file" in found[0]._repr_html_()
    again = pickle.loads(pickle.dumps(found[0]))
    assert (again, again.summary) == (found[0], found[0].summary)


def test_blocks_are_named_by_their_number(engine, gate):
    if engine.backend == "serial":
        return
    wait = gate.wait
    x = np.arange(40_000)
    with looking(engine, gate) as found:
        engine.map_blocks(lambda block: wait(block) if block[0] == 17_000 else block, x, block_bytes=8000)
    assert [(stall.function, stall.task) for stall in at_the_gate(found)] == [("map_blocks(<lambda>)", 17)]


def wait_for_file(path):
    while not os.path.exists(path):
        time.sleep(0.001)


def nap_on(path):
    while not os.path.exists(path):
        time.sleep(0.01)


def test_a_timeout_says_where_the_task_was(make_engine, backend, tmp_path):
    if backend == "serial":
        return  # it ends before anybody looks
    engine = make_engine(1)
    path = str(tmp_path / "end")
    list(engine.map(nap_on, ["/"]))  # imports this module
    with pytest.raises(TaskTimeout, match=r"task 0 of map\(nap_on\) did not end within 0.2 s") as caught:
        list(engine.map(nap_on, [path], timeout=0.2))
    open(path, "w").close()
    [where, task] = caught.value.__notes__
    assert where.startswith("where it was then:\n")
    assert "in nap_on" in where
    assert task == "task 0 of map(nap_on)"


# --- worker processes in every state ---------------------------------------------------------------


def sleep_in_python():
    time.sleep(1000)


def compute():
    n = 0
    while True:
        n += 1


def hold_the_interpreter():
    re.match(r"(a+)+$", "a" * 60 + "b")


def sleep_in_c():
    while True:
        ctypes.CDLL(None).sleep(1000)  # ends early at each question


def recurse():
    def down(depth):
        return down(depth - 1) if depth else time.sleep(1000)

    down(300)


def block_signals():
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    time.sleep(1000)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1000)


SAYS = {
    sleep_in_python: "in sleep_in_python",
    compute: "in compute",
    hold_the_interpreter: "in hold_the_interpreter",
    sleep_in_c: "in sleep_in_c",
    recurse: "in down",
    block_signals: "(no answer: it blocks signals)",
    stop: "(no answer: it is stopped)",
}


def test_a_worker_says_where_it_is_whatever_it_does():
    engine = Engine(len(SAYS), memory="64 MiB", retries=0)
    try:
        for function in SAYS:
            engine.submit(function)
        for function, text in SAYS.items():
            wait_for_stack(engine, function, text)
        stacks = {stall.function: stall.stack for stall in engine.stalls(0)}  # all at once, and once more
        assert len(stacks) == len(SAYS)
        for function, text in SAYS.items():
            assert text in stacks[f"submit({function.__name__})"]
        assert "child.py" not in stacks["submit(compute)"]
        os.kill(next(stall.pid for stall in engine.stalls(0) if "is stopped" in stall.stack), signal.SIGCONT)
        wait_for_stack(engine, stop, "in stop")
    finally:
        engine.close(wait=False)
    assert engine.stalls(0) == ()


def wait_for_stack(engine, function, text):
    """Wait until it runs, and not the imports that come before."""
    name = f"submit({function.__name__})"
    poll_until(
        lambda: any(stall.function == name and text in stall.stack for stall in engine.stalls(0)),
        what=f"{text} in the stack of {name}",
    )


def be_called_by_c():
    """Frames come and go between Python and C, at every moment of a question."""
    while True:
        max(range(1000), key=lambda number: -number)


def yield_from_c():
    """The same, and no step of the interpreter looks for signals."""

    def items():
        yield from itertools.repeat(1)

    sum(items())


def wait_for_the_interpreter():
    """Other threads have it, again and again: asleep at one moment, in Python at the next."""
    for _ in range(2):
        threading.Thread(target=be_called_by_c, daemon=True).start()
    be_called_by_c()


def block_signals_for_moments():
    """As the C library does while it makes a thread or a process."""
    while True:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        time.sleep(0.01)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        time.sleep(0.005)


def test_who_blocks_signals_for_a_moment_answers_then():
    with Engine(1, memory="64 MiB", retries=0) as engine:
        engine.submit(block_signals_for_moments)
        wait_for_stack(engine, block_signals_for_moments, "in block_signals_for_moments")
        for _ in range(30):
            (stall,) = engine.stalls(0)
            assert "in block_signals_for_moments" in stall.stack
        engine.close(wait=False)


@pytest.mark.parametrize(
    ("function", "questions"), [(be_called_by_c, 1000), (yield_from_c, 100), (wait_for_the_interpreter, 100)]
)
def test_many_questions_harm_no_worker(function, questions):
    with Engine(1, memory="64 MiB", retries=0) as engine:
        engine.submit(function)
        wait_for_stack(engine, function, f"in {function.__name__}")
        for _ in range(questions):
            (stall,) = engine.stalls(0)
            assert f"in {function.__name__}" in stall.stack
            assert stall.stack.count(f"in {function.__name__}") == 1
        engine.close(wait=False)


def take_a_name(path):
    """One that is no text: a Cyrillic one, cut in the middle of a letter as the kernel does."""
    ctypes.CDLL(None).prctl(15, "наблюдение".encode()[:15])  # PR_SET_NAME
    wait_for_file(path)


def test_a_worker_may_have_any_name(tmp_path):
    with Engine(1, memory="64 MiB", retries=0) as engine:
        list(engine.map(abs, range(3)))
        future = engine.submit(take_a_name, str(tmp_path / "end"))
        wait_for_stack(engine, take_a_name, "in wait_for_file")
        (tmp_path / "end").touch()
        future.result()
        with pytest.raises(TaskTimeout) as caught:
            list(engine.map(take_a_name, [str(tmp_path / "never")], timeout=0.2))
        assert "in take_a_name" in caught.value.__notes__[0]


def test_a_worker_that_starves_waits_for_memory(gate):
    with Engine(2, memory="16 MiB") as engine:
        busy = engine.submit(gate.wait)  # somebody who could give memory back
        kept = [engine.empty(1 << 20, "u1") for _ in range(9)]
        future = engine.submit(np.ones, 900_000)
        poll_until(
            lambda: any(stall.waits_for_memory for stall in engine.stalls(0)), what="it waits for memory"
        )
        for _ in range(100):  # and goes on to, for whoever asks again at once
            stall = next(stall for stall in engine.stalls(0) if stall.function == "submit(ones)")
            assert stall.waits_for_memory >= 7_200_000
        assert "MiB of memory" in str(stall)
        kept.clear()
        gate.open()
        busy.result()
        with contextlib.suppress(MemoryBudgetExceeded):
            assert future.result().sum() == 900_000


def test_a_start_that_hangs_is_a_stall():
    def initializer():
        time.sleep(1000)

    engine = Engine(1, memory="16 MiB", initializer=initializer)
    try:
        seen = []
        poll_until(
            lambda: seen.append(engine.stalls(0)) or "in initializer" in str(seen[-1]), what="the initializer"
        )
        assert [(stall.function, stall.task) for stall in seen[-1]] == [("start", None)]
    finally:
        engine.close(wait=False)
    assert engine.stalls(0) == ()


def test_who_has_ended_its_task_in_time_is_not_killed_for_it(make_engine, backend, gate):
    """What the clock was read for may be over when its turn to be killed comes."""
    if backend != "process":
        return
    engine = make_engine(1, retries=0)
    pool = engine._backend._core.pool
    progress, late = pool._progress, []

    def read_late(pid):
        found = progress(pid)
        if found is not None and found[0] and threading.current_thread() is pool._thread and not late:
            late.append(found)
            return found[0], found[1], 1, found[3]  # as if it had begun long ago
        return found

    pool._progress = read_late
    threading.Thread(target=lambda: (poll_until(lambda: late), gate.open())).start()
    assert list(engine.map(gate.wait, range(3), timeout=1000)) == [0, 1, 2]
    assert engine.stats().worker_deaths == 0


# --- what faulthandler writes ----------------------------------------------------------------------


def test_names_are_read_as_they_were():
    dump = 'Stack (most recent call first):\n  File "/tmp/b\\xe4r \\u20ac.py", line 3 in f\n  File "x", line 1 in g\n'
    frames = stacks.frames_of(dump)
    assert [(f.filename, f.lineno, f.name) for f in frames] == [("x", 1, "g"), ("/tmp/bär €.py", 3, "f")]
