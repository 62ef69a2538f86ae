"""What our queues do beyond `multiprocessing`'s (see tests/conformance/test_queue_contract.py for the rest)."""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
from multiprocessing import resource_sharer

import numpy as np
import pytest

from shmengine import config
from shmengine.engine import Engine
from shmengine.errors import Closed, Full, SerializationError, ShmError
from shmengine.queues import JoinableQueue, Queue
from tests.helpers.memory import assert_memory_is_whole

METHODS = ["fork", "spawn", "forkserver"]
FOREVER = 30


@pytest.fixture(autouse=True)
def only_threads_of_the_test(monkeypatch):
    """Those of who runs the tests could take a message, for all that a queue knows: it would hope for them."""
    names = {thread.name for thread in threading.enumerate() if thread is not threading.current_thread()}
    monkeypatch.setattr(config, "SERVICE_THREADS", frozenset(config.SERVICE_THREADS) | names)


@pytest.fixture(params=METHODS)
def ctx(request):
    return multiprocessing.get_context(request.param)


@pytest.fixture(params=[Queue, JoinableQueue])
def kind(request):
    return request.param


# --- making --------------------------------------------------------------------------------------


@pytest.mark.parametrize("maxsize", ["3", 2.0, None, True])
def test_maxsize_must_be_an_int(kind, maxsize):
    with pytest.raises(TypeError, match="maxsize"):
        kind(maxsize)


@pytest.mark.parametrize("memory", [0, "0 MiB", "a lot", -1])
def test_memory_must_be_a_size(kind, memory):
    with pytest.raises(ValueError, match=r"size|memory|negative"):
        kind(memory=memory)


def test_repr_says_what_it_is(kind):
    q = kind(3, memory="4 MiB")
    assert repr(q).startswith(f"<shmengine.{kind.__name__} maxsize=3 memory=4 MiB")
    q.close()
    assert "maxsize=3" in repr(q)


def test_a_huge_maxsize_is_as_good_as_none(kind):
    q = kind(10**12, memory="4 MiB")
    q.put(1)
    assert not q.full()
    assert q.get() == 1


def test_maxsize_holds_however_small_the_messages_and_the_memory(kind):
    q = kind(20_000, memory="4 MiB")
    for i in range(20_000):
        q.put_nowait(i)
    with pytest.raises(Full, match="20000 messages wait, the maxsize"):
        q.put_nowait(0)
    assert [q.get_nowait() for _ in range(20_000)] == list(range(20_000))


# --- pickling ------------------------------------------------------------------------------------


def test_put_takes_what_it_is_given_then(kind):
    q = kind(memory="4 MiB")
    message, array = [1, 2], np.zeros(3)
    q.put((message, array))
    message.append(3)
    array[0] = 1
    got = q.get()
    assert got[0] == [1, 2]
    assert got[1].tolist() == [0, 0, 0]


def test_what_cannot_be_pickled_is_an_error_of_put(kind):
    q = kind(memory="4 MiB")
    with pytest.raises(SerializationError, match=r"lock.*\['jobs'\]\[1\]") as caught:
        q.put({"jobs": [1, threading.Lock()]})
    assert caught.value.path == "['jobs'][1]"
    assert q.empty()
    assert_memory_is_whole(q)


class FailsToLoad:
    def __reduce__(self):
        return int, ("no number",)


def test_what_cannot_be_unpickled_is_an_error_of_get_and_is_gone(kind):
    q = kind(memory="4 MiB")
    q.put(FailsToLoad())
    q.put("next")
    with pytest.raises(SerializationError, match="no number"):
        q.get()
    assert q.get() == "next"
    if kind is JoinableQueue:
        q.task_done()
        q.join()
        with pytest.raises(ValueError, match="too many times"):
            q.task_done()
    assert_memory_is_whole(q)


def test_a_mapped_file_travels_as_data(tmp_path):
    q = Queue(memory="4 MiB")
    mapped = np.memmap(tmp_path / "x.bin", "f8", "w+", shape=(4,))
    q.put(mapped)
    mapped[:] = 1
    got = q.get()
    assert got.tolist() == [0, 0, 0, 0]
    got[:] = 2
    assert mapped.tolist() == [1, 1, 1, 1]


def call_and_answer(q, answers):
    function = q.get(timeout=FOREVER)
    answers.put((function(3), function))


def test_lambdas_and_closures_cross(ctx):
    q, answers = Queue(memory="4 MiB", ctx=ctx), Queue(memory="4 MiB", ctx=ctx)
    process = ctx.Process(target=call_and_answer, args=(q, answers))
    process.start()
    factor = np.arange(3)
    q.put(lambda x: x * factor)
    value, function = answers.get(timeout=FOREVER)
    assert value.tolist() == [0, 3, 6]
    assert function(1).tolist() == [0, 1, 2]
    process.join()


# Children that are spawned from `python -c` cannot import its __main__: everything goes by value.
COMMAND = """
import multiprocessing, sys
from shmengine.queues import Queue
from operator import call
class Point:
    def __init__(self, x): self.x = x
    def double(self): return Point(2 * self.x)
ctx = multiprocessing.get_context(sys.argv[1])
q, answers = Queue(memory="4 MiB", ctx=ctx), Queue(memory="4 MiB", ctx=ctx)
import shmengine_test_child
process = ctx.Process(target=shmengine_test_child.run, args=(q, answers))
process.start()
q.put(lambda: Point(21).double())
got = answers.get(timeout=30)
process.join()
print(type(got) is Point, got.x)
"""
CHILD = "def run(q, answers): answers.put(q.get(timeout=30)())"


@pytest.mark.parametrize("method", METHODS)
def test_classes_of_a_main_that_children_cannot_import(tmp_path, method):
    (tmp_path / "shmengine_test_child.py").write_text(CHILD)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, method],
        cwd=tmp_path,
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("True 42\n", "")


# --- the memory budget ---------------------------------------------------------------------------


def test_a_put_that_nobody_can_relieve_raises(kind):
    q = kind(memory="4 MiB")
    message = np.arange(50_000.0)
    with pytest.raises(
        Full, match=r"no room .* 391 KiB: 1\d messages wait, .* 4 MiB .* nobody is left"
    ) as caught:
        for _ in range(100):
            q.put(message)
    assert isinstance(caught.value, queue.Full)
    assert isinstance(caught.value, ShmError)
    with pytest.raises(Full, match="no room"):
        q.put_nowait(message)
    count = q.qsize()
    assert count >= 9
    for _ in range(count):
        np.testing.assert_array_equal(q.get(), message)
        if kind is JoinableQueue:
            q.task_done()
    assert_memory_is_whole(q)


def test_slots_too_are_not_waited_for_in_vain():
    q = Queue(memory="2 MiB")
    with pytest.raises(Full, match=r"8192 messages wait, as many as .* budget of 2 MiB .* nobody is left"):
        for i in range(10_000):
            q.put(i)


def test_an_engine_beside_it_relieves_nothing():
    with Engine(1, memory="16 MiB") as engine:
        assert engine.submit(abs, -1).result() == 1  # now it has both of its threads
        q = Queue(memory="2 MiB")
        with pytest.raises(Full, match="nobody is left"):
            for _ in range(100):
                q.put(np.arange(50_000.0))


@pytest.mark.parametrize("method", METHODS)
def test_children_that_cannot_have_it_relieve_nothing(method):
    ctx = multiprocessing.get_context(method)
    stop = ctx.Event()
    child = ctx.Process(target=stop.wait)
    child.start()
    try:
        q = Queue(memory="2 MiB", ctx=ctx)
        with pytest.raises(Full, match="nobody is left"):
            for _ in range(100):
                q.put(np.arange(50_000.0))
    finally:
        stop.set()
        child.join()


def get_late(q, go, count):
    go.wait()
    for _ in range(count):
        q.get(timeout=FOREVER)


@pytest.mark.parametrize("way", [*METHODS, "later"])
def test_a_child_that_may_come_to_it_is_waited_for(way):
    ctx = multiprocessing.get_context("spawn" if way == "later" else way)
    q = Queue(memory="2 MiB", ctx=ctx)
    go, count = ctx.Event(), 20
    if way == "later":
        here, there = ctx.Pipe()
        child = ctx.Process(target=receive_it, args=(there, go, count))
    else:
        child = ctx.Process(target=get_late, args=(q, go, count))
    child.start()
    if way == "later":
        here.send(q)
    late = threading.Timer(0.5, go.set)
    late.name = "shmengine-pool"  # no thread that might take a message
    late.start()
    for _ in range(count):
        q.put(np.arange(50_000.0))
    child.join()
    late.join()
    assert child.exitcode == 0
    if way == "later":
        here.close()
        there.close()


def receive_it(pipe, go, count):
    go.wait()
    get_late(pipe.recv(), go, count)


def test_threads_that_never_got_anything_are_hoped_for_a_while(monkeypatch):
    q = Queue(memory="2 MiB")
    stop = threading.Event()
    idle = threading.Thread(target=stop.wait)
    idle.start()
    monkeypatch.setattr("shmengine.queues.STRANGERS_NS", 300_000_000)
    try:
        with pytest.raises(Full, match="nobody is left"):
            for _ in range(100):
                q.put(np.arange(50_000.0))
    finally:
        stop.set()
        idle.join()


def test_a_message_larger_than_the_budget_is_refused_at_once(kind):
    q = kind(memory="4 MiB")
    with pytest.raises(Full, match=r"7\.63 MiB is larger than the whole memory budget of this queue, 4 MiB"):
        q.put(np.zeros(1_000_000))
    q.put(np.zeros(300_000))  # does fit
    assert q.get().nbytes == 2_400_000


def test_while_another_thread_may_get_put_waits(kind):
    q = kind(memory="4 MiB")
    total = 40
    received = []

    def consume():
        for _ in range(total):
            received.append(int(q.get(timeout=FOREVER)[0]))
            if kind is JoinableQueue:
                q.task_done()

    thread = threading.Thread(target=consume)
    thread.start()
    for i in range(total):
        q.put(np.full(100_000, i))
    thread.join()
    assert received == list(range(total))
    assert_memory_is_whole(q)


def test_a_timeout_ends_the_wait_for_memory(kind):
    q = kind(memory="4 MiB")
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    try:
        with pytest.raises(Full, match="budget of 4 MiB is used up") as caught:
            for _ in range(100):
                q.put(np.zeros(100_000), timeout=0.3)
        assert "nobody" not in str(caught.value)
    finally:
        release.set()
        thread.join()


def get_all(q, answers, count):
    answers.put(sum(int(q.get(timeout=FOREVER)[0]) for _ in range(count)))


def test_while_a_child_may_get_put_waits(ctx):
    q, answers = Queue(memory="4 MiB", ctx=ctx), Queue(memory="4 MiB", ctx=ctx)
    process = ctx.Process(target=get_all, args=(q, answers, 40))
    process.start()  # has not joined yet
    for i in range(40):
        q.put(np.full(100_000, i))
    assert answers.get(timeout=FOREVER) == sum(range(40))
    process.join()


def test_the_memory_of_a_producer_that_ended_is_used_again(ctx):
    q = Queue(memory="4 MiB", ctx=ctx)
    for _ in range(3):
        process = ctx.Process(target=put_and_end, args=(q, 3, 100_000))
        process.start()
        process.join()
        for i in range(3):
            assert q.get(timeout=FOREVER).shape == (100_000,), i
    q.put(np.zeros(450_000))
    assert q.get().shape == (450_000,)


# --- nothing is lost -----------------------------------------------------------------------------


def put_and_end(q, count, size):
    for _ in range(count):
        q.put(np.zeros(size))


def test_a_producer_may_end_before_anybody_reads(ctx):
    q = Queue(memory="32 MiB", ctx=ctx)
    process = ctx.Process(target=put_and_end, args=(q, 10, 200_000))
    process.start()
    process.join()  # with multiprocessing's queue this is a deadlock
    assert process.exitcode == 0
    assert [q.get(timeout=FOREVER).shape for _ in range(10)] == [(200_000,)] * 10


def put_and_die(q):
    q.put("the last words")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_producer_may_be_killed_right_after_put(ctx):
    q = Queue(memory="4 MiB", ctx=ctx)
    process = ctx.Process(target=put_and_die, args=(q,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert q.get(timeout=FOREVER) == "the last words"


def get_and(end, q, answers):
    answers.put((os.getpid(), q.get(timeout=FOREVER)))
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif end == "raise":
        sys.stderr.close()
        raise RuntimeError
    elif end == "done":
        q.task_done()


@pytest.mark.parametrize("end", ["kill", "raise", "return"])
def test_what_a_worker_did_not_finish_is_delivered_again(ctx, end):
    q, answers = JoinableQueue(memory="4 MiB", ctx=ctx), Queue(memory="4 MiB", ctx=ctx)
    q.put("precious")
    worker = ctx.Process(target=get_and, args=(end, q, answers))
    worker.start()
    assert answers.get(timeout=FOREVER) == (worker.pid, "precious")
    worker.join()
    # The work is not done: join would wait. The next worker gets it.
    second = ctx.Process(target=get_and, args=("done", q, answers))
    second.start()
    q.join()
    assert answers.get(timeout=FOREVER) == (second.pid, "precious")
    second.join()
    assert q.empty()
    assert_memory_is_whole(q)


def test_join_waits_for_work_that_a_dead_worker_left():
    ctx = multiprocessing.get_context("fork")
    q, answers = JoinableQueue(memory="4 MiB", ctx=ctx), Queue(memory="4 MiB", ctx=ctx)
    q.put("precious")
    worker = ctx.Process(target=get_and, args=("kill", q, answers))
    worker.start()
    answers.get(timeout=FOREVER)
    worker.join()
    joined = threading.Event()
    thread = threading.Thread(target=lambda: (q.join(), joined.set()))
    thread.start()
    assert not joined.wait(0.6)  # longer than it takes to find out about the death
    assert q.get(timeout=FOREVER) == "precious"
    assert not joined.wait(0.05)
    q.task_done()
    thread.join()


def test_a_queue_that_is_dropped_gives_its_work_back():
    first = JoinableQueue(memory="4 MiB")
    second = JoinableQueue.__new__(JoinableQueue)
    type(first)._setup(second, first._region, 0, False)
    first.put("a")
    first.put("b")
    assert first.get() == "a"
    del first
    gc.collect()
    assert second.get() == "b"
    assert second.get() == "a"


# --- processes -----------------------------------------------------------------------------------


def put_own_pid(q):
    q.put(os.getpid())


def test_more_processes_one_after_the_other_than_there_are_places():
    q = Queue(memory="4 MiB")
    ctx = multiprocessing.get_context("fork")
    for _ in range(300):
        process = ctx.Process(target=put_own_pid, args=(q,))
        process.start()
        assert q.get(timeout=FOREVER) == process.pid
        process.join()


def test_many_processes_at_once():
    q, go = Queue(memory="64 MiB"), Queue(memory="4 MiB")
    ctx = multiprocessing.get_context("fork")
    processes = [ctx.Process(target=wait_and_put, args=(go, q)) for _ in range(60)]
    for process in processes:
        process.start()
    for _ in processes:
        go.put("go")
    assert {q.get(timeout=FOREVER) for _ in processes} == {process.pid for process in processes}
    for process in processes:
        process.join()


def wait_and_put(go, q):
    go.get(timeout=FOREVER)
    q.put(os.getpid())


def test_bare_fork():
    q = Queue(memory="4 MiB")
    q.put("before")
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if q.get(timeout=FOREVER) == "before":
                q.put(("child", q.qsize()))
                q.close()
                status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert q.get(timeout=FOREVER) == ("child", 0)
    q.put(1)
    assert q.get() == 1


def test_work_got_before_a_fork_is_the_parents():
    q = JoinableQueue(memory="4 MiB")
    q.put(1)
    q.get()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            q.task_done()
        except ValueError:
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    q.task_done()
    q.join()


def answer_on(questions):
    questions.get(timeout=FOREVER).put("through the queue that came through a queue")


def test_a_queue_goes_through_a_queue(ctx):
    questions, answers = Queue(memory="4 MiB", ctx=ctx), Queue(memory="4 MiB", ctx=ctx)
    process = ctx.Process(target=answer_on, args=(questions,))
    process.start()
    questions.put(answers)
    assert answers.get(timeout=FOREVER) == "through the queue that came through a queue"
    process.join()


def test_a_queue_unpickled_where_it_was_made_is_the_same_region(kind):
    import pickle

    q = kind(memory="4 MiB")
    again = pickle.loads(pickle.dumps(q))
    again.put(1)
    assert q.get() == 1
    assert type(again) is kind


# --- closing -------------------------------------------------------------------------------------


def test_close_ends_a_wait_in_another_thread():
    q = Queue(memory="4 MiB")
    caught = []
    started = threading.Event()

    def wait():
        started.set()
        try:
            q.get()
        except Closed as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    started.wait()
    q.close()
    thread.join()
    assert "is closed" in str(caught[0])


def test_a_closed_queue_cannot_be_sent(kind):
    import pickle

    q = kind(memory="4 MiB")
    q.close()
    with pytest.raises(ValueError, match="is closed"):
        pickle.dumps(q)
    with pytest.raises(ValueError, match="is closed"):
        q.qsize()


@pytest.mark.parametrize("by_value", [False, True])
def test_descriptors_go_as_multiprocessing_says(by_value):
    q = Queue(memory="4 MiB")
    q._by_value = by_value
    here, there = multiprocessing.Pipe()
    with here, there:
        q.put([there, lambda x: x])
        got, _ = q.get(timeout=FOREVER)
        with got:
            assert got.fileno() != there.fileno()
            got.send(1)
            assert here.recv() == 1
    resource_sharer.stop(timeout=FOREVER)


def test_what_is_to_blame_beside_a_descriptor():
    q = Queue(memory="4 MiB")
    here, there = multiprocessing.Pipe()
    with here, there, pytest.raises(SerializationError, match=r"'lock' object at \[1\]"):
        q.put([there, threading.Lock()])
    resource_sharer.stop(timeout=FOREVER)


def test_a_descriptor_that_does_not_go_out_is_closed():
    q = Queue(1, memory="4 MiB")
    q.put(0)
    here, there = multiprocessing.Pipe()
    with here:
        with pytest.raises(Full):
            q.put(there, timeout=0.01)
        there.close()
        assert here.poll(FOREVER)  # nobody has the other end any more
    resource_sharer.stop(timeout=FOREVER)


def take_and_put_back(q, count):
    taken = [q.get(timeout=FOREVER) for _ in range(count)]
    for item in taken:
        q.put(item, timeout=FOREVER)


def test_records_of_a_process_that_only_waits_for_others_are_not_missed():
    q = Queue(10_000)
    for number in range(10_000):
        q.put(number)
    child = multiprocessing.get_context("fork").Process(target=take_and_put_back, args=(q, 6000))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert [q.get() for _ in range(10_000)] == [*range(6000, 10_000), *range(6000)]
    q.close()


def test_a_timeout_that_is_no_number_of_seconds(kind):
    q = kind(1, memory="4 MiB")
    with pytest.raises(ValueError, match="timeout"):
        q.get(timeout=float("nan"))
    with pytest.raises(ValueError, match="timeout"):
        q.put(0, timeout=float("nan"))
