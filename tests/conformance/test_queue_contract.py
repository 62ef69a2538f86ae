"""Where `multiprocessing.Queue` has a meaning, ours has the same: it is the oracle of these tests."""

from __future__ import annotations

import enum
import multiprocessing
import os
import queue
import signal
import socket
import threading
import time
from multiprocessing import resource_sharer

import numpy as np
import pytest

from shmengine.queues import JoinableQueue, Queue
from tests.helpers import poll_until

METHODS = ["fork", "spawn", "forkserver"]
FOREVER = 30  # no test waits so long unless it has failed


class Ours:
    """Makes queues of ours, as a context does."""

    def __init__(self, ctx):
        self.ctx = ctx

    def Queue(self, maxsize=0):
        return Queue(maxsize, memory="64 MiB", ctx=self.ctx)

    def JoinableQueue(self, maxsize=0):
        return JoinableQueue(maxsize, memory="64 MiB", ctx=self.ctx)


@pytest.fixture(params=["ours", "multiprocessing"])
def makers(request):
    """A function from a start method to (context, maker of queues); at the end all queues are closed."""
    made = []

    class Recorder:
        def __init__(self, maker):
            self.maker = maker

        def __getattr__(self, kind):
            def make(*args):
                made.append(getattr(self.maker, kind)(*args))
                return made[-1]

            return make

    def choose(method):
        ctx = multiprocessing.get_context(method)
        return ctx, Recorder(Ours(ctx) if request.param == "ours" else ctx)

    yield choose
    for each in made:
        each.cancel_join_thread()
        each.close()
    made.clear()


@pytest.fixture(params=["Queue", "JoinableQueue"])
def make(request, makers):
    return getattr(makers("fork")[1], request.param)


@pytest.fixture(params=METHODS)
def processes(request, makers):
    return makers(request.param)


class Job:
    """An instance of this must be an instance of this in the other process too."""

    def __init__(self, number):
        self.number = number

    def __eq__(self, other):
        return type(other) is type(self) and other.number == self.number

    __hash__ = None


def square(x):
    return x * x


def assert_same(one, other):
    if isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    else:
        assert one == other


OBJECTS = [
    None,
    7,
    2**200,
    "text",
    b"bytes" * 40_000,
    [1, [2, {"three": (4.5, {6})}]],
    Job(3),
    Job,
    square,
    {"empty": []},
    np.arange(50_000.0),
    np.arange(24, dtype="i4").reshape(2, 3, 4)[:, ::-1],
    [np.arange(3), np.array(["2020-01-01"], "M8[D]"), np.array([{}, None])],
]


@pytest.fixture
def sharer():
    """The standard library's thread that hands out descriptors, which it would keep."""
    yield
    resource_sharer.stop(timeout=FOREVER)


# --- in one process ------------------------------------------------------------------------------


def test_first_in_first_out(make):
    q = make()
    for i in range(50):
        q.put(i)
    assert [q.get(timeout=FOREVER) for _ in range(50)] == list(range(50))


def test_any_picklable_object(make):
    q = make()
    for each in OBJECTS:
        q.put(each)
    for each in OBJECTS[:-1]:
        assert_same(q.get(timeout=FOREVER), each)
    assert len(q.get(timeout=FOREVER)) == 3


def test_arrays_are_private_and_writable(make):
    q = make()
    x = np.arange(1000.0)
    x.flags.writeable = False
    q.put({"x": x})
    got = q.get(timeout=FOREVER)["x"]
    got += 1
    q.put(got)
    again = q.get(timeout=FOREVER)
    again[0] = -1
    assert got[0] == 1
    assert x[0] == 0


@pytest.mark.parametrize("timeout", [0.01, 0, -1])
def test_get_from_an_empty_queue(make, timeout):
    q = make()
    with pytest.raises(queue.Empty):
        q.get(timeout=timeout)
    with pytest.raises(queue.Empty):
        q.get(True, timeout)
    with pytest.raises(queue.Empty):
        q.get_nowait()
    with pytest.raises(queue.Empty):
        q.get(block=False, timeout=1e6)


@pytest.mark.parametrize("timeout", [0.01, 0, -1])
def test_put_into_a_full_queue(make, timeout):
    q = make(2)
    q.put(1)
    q.put(2, True, 1.0)
    with pytest.raises(queue.Full):
        q.put(3, timeout=timeout)
    with pytest.raises(queue.Full):
        q.put_nowait(3)
    with pytest.raises(queue.Full):
        q.put(3, block=False, timeout=1e6)
    assert q.get(timeout=FOREVER) == 1
    q.put_nowait(3)
    assert [q.get(timeout=FOREVER), q.get(timeout=FOREVER)] == [2, 3]


def test_a_timeout_is_waited_for(make):
    q = make(1)
    start = time.monotonic()
    with pytest.raises(queue.Empty):
        q.get(timeout=0.1)
    assert time.monotonic() - start >= 0.09
    q.put(1)
    start = time.monotonic()
    with pytest.raises(queue.Full):
        q.put(2, timeout=0.1)
    assert time.monotonic() - start >= 0.09


@pytest.mark.parametrize("maxsize", [3, 0, -1])
def test_sizes(make, maxsize):
    q = make(maxsize)
    assert (q.qsize(), q.empty(), q.full()) == (0, True, False)
    for i in range(3):
        assert not q.full()
        q.put(i)
        assert q.qsize() == i + 1
    assert q.full() == (maxsize == 3)
    poll_until(lambda: not q.empty())
    for i in range(3):
        assert q.get(timeout=FOREVER) == i
        assert q.qsize() == 2 - i
        assert not q.full()
    assert q.empty()


def test_closed(make):
    q = make()
    q.put(1)
    assert q.get(timeout=FOREVER) == 1
    with pytest.raises(AssertionError, match="not closed"):
        q.join_thread()
    q.close()
    with pytest.raises(ValueError, match="is closed"):
        q.put(2)
    with pytest.raises(ValueError, match="is closed"):
        q.get()
    with pytest.raises(ValueError, match="is closed"):
        q.put_nowait(2)
    with pytest.raises(ValueError, match="is closed"):
        q.get(timeout=-1)
    q.close()
    q.join_thread()


def test_cancel_join_thread_before_and_after(make):
    q = make()
    q.cancel_join_thread()
    q.put(1)
    assert q.get(timeout=FOREVER) == 1
    q.close()
    q.join_thread()


def test_a_waiting_get_is_woken(make):
    q = make()
    got = []
    thread = threading.Thread(target=lambda: got.append(q.get(timeout=FOREVER)))
    thread.start()
    q.put("wake up")
    thread.join()
    assert got == ["wake up"]


def test_a_waiting_put_is_woken(make):
    q = make(1)
    q.put(1)
    thread = threading.Thread(target=lambda: q.put(2, timeout=FOREVER))
    thread.start()
    assert q.get(timeout=FOREVER) == 1
    thread.join()
    assert q.get(timeout=FOREVER) == 2


@pytest.mark.parametrize("maxsize", [0, 3])
def test_many_threads(make, maxsize):
    q = make(maxsize)
    producers, consumers, count = 3, 3, 300
    received = [[] for _ in range(consumers)]

    def produce(who):
        for i in range(count):
            q.put((who, i, os.urandom(i)))

    def consume(mine):
        while (message := q.get(timeout=FOREVER)) is not None:
            mine.append(message[:2])

    threads = [threading.Thread(target=produce, args=(who,)) for who in range(producers)]
    others = [threading.Thread(target=consume, args=(mine,)) for mine in received]
    for thread in threads + others:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in others:
        q.put(None)
    for thread in others:
        thread.join()
    assert sorted(sum(received, [])) == [(who, i) for who in range(producers) for i in range(count)]
    for mine in received:
        for who in range(producers):
            numbers = [i for which, i in mine if which == who]
            assert numbers == sorted(numbers)


def test_a_signal_does_not_end_a_wait(make):
    q = make()
    handled = []

    def handler(number, frame):
        handled.append(number)
        if len(handled) == 3:
            signal.setitimer(signal.ITIMER_REAL, 0)
            q.put("from the handler")

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        assert q.get() == "from the handler"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(handled) == 3


class Impatience(Exception):
    """Raised by a signal handler, as KeyboardInterrupt is."""


@pytest.mark.parametrize("operation", ["get", "put"])
def test_a_signal_handler_may_raise_out_of_a_wait(make, operation):
    q = make(1)

    def handler(number, frame):
        raise Impatience

    before = signal.signal(signal.SIGALRM, handler)
    try:
        if operation == "put":
            q.put(1)
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(Impatience):
            q.get() if operation == "get" else q.put(2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    # Nothing is broken, and nothing was half put.
    if operation == "get":
        q.put(1)
    assert q.get(timeout=FOREVER) == 1
    with pytest.raises(queue.Empty):
        q.get(timeout=0.01)


# --- JoinableQueue -------------------------------------------------------------------------------


def test_task_done_too_often(makers):
    q = makers("fork")[1].JoinableQueue()
    with pytest.raises(ValueError, match=r"task_done\(\) called too many times"):
        q.task_done()
    q.put(1)
    q.get(timeout=FOREVER)
    q.task_done()
    with pytest.raises(ValueError, match=r"task_done\(\) called too many times"):
        q.task_done()


def test_join_of_an_untouched_queue_returns(makers):
    makers("fork")[1].JoinableQueue().join()


def test_join_waits_for_the_last_task_done(makers):
    q = makers("fork")[1].JoinableQueue()
    for i in range(3):
        q.put(i)
    joined = threading.Event()
    thread = threading.Thread(target=lambda: (q.join(), joined.set()))
    thread.start()
    for _ in range(3):
        q.get(timeout=FOREVER)
        assert not joined.wait(0.02)
    q.task_done()
    q.task_done()
    assert not joined.wait(0.05)
    q.task_done()
    thread.join()


def test_join_and_task_done_after_close(makers):
    q = makers("fork")[1].JoinableQueue()
    q.put(1)
    q.get(timeout=FOREVER)
    q.close()
    q.task_done()
    q.join()


# --- between processes ---------------------------------------------------------------------------


class Sign(enum.Enum):
    """By reference, so the same object on both sides."""

    STOP = 1
    ASK = 2


STOP, ASK = Sign


def echo(incoming, outgoing):
    while (message := incoming.get(timeout=FOREVER)) is not STOP:
        if message is ASK:
            try:
                incoming.get(timeout=0.01)
            except queue.Empty:
                outgoing.put("empty")
        else:
            outgoing.put((message, type(message) is Job))


def test_there_and_back(processes):
    ctx, maker = processes
    there, back = maker.Queue(), maker.Queue()
    process = ctx.Process(target=echo, args=(there, back))
    process.start()
    for each in OBJECTS[:-1]:
        there.put(each)
    for each in OBJECTS[:-1]:
        got, is_job = back.get(timeout=FOREVER)
        assert_same(got, each)
        assert is_job == (type(each) is Job)
    there.put(ASK)
    assert back.get(timeout=FOREVER) == "empty"
    there.put(STOP)
    process.join()
    assert process.exitcode == 0


def produce(q, who, count):
    for i in range(count):
        q.put((who, i, np.full(i * 10 % 4000, who)))


def consume(q, results):
    mine = []
    while (message := q.get(timeout=FOREVER)) is not None:
        who, i, array = message
        assert array.shape == (i * 10 % 4000,)
        assert (array == who).all()
        mine.append((who, i))
    results.put(mine)


@pytest.mark.parametrize("maxsize", [0, 4])
def test_many_processes(processes, maxsize):
    ctx, maker = processes
    q, results = maker.Queue(maxsize), maker.Queue()
    producers = [ctx.Process(target=produce, args=(q, who, 200)) for who in range(2)]
    consumers = [ctx.Process(target=consume, args=(q, results)) for _ in range(2)]
    for process in producers + consumers:
        process.start()
    for process in producers:
        process.join()
        assert process.exitcode == 0
    for _ in consumers:
        q.put(None)
    received = [results.get(timeout=FOREVER) for _ in consumers]
    for process in consumers:
        process.join()
        assert process.exitcode == 0
    assert sorted(sum(received, [])) == [(who, i) for who in range(2) for i in range(200)]
    for mine in received:
        for who in range(2):
            numbers = [i for which, i in mine if which == who]
            assert numbers == sorted(numbers)


def work(tasks, results):
    while True:
        task = tasks.get(timeout=FOREVER)
        if task is None:
            tasks.task_done()
            return
        results.put(task * task)
        tasks.task_done()


def test_joinable_queue_with_workers(processes):
    ctx, maker = processes
    tasks, results = maker.JoinableQueue(), maker.Queue()
    workers = [ctx.Process(target=work, args=(tasks, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for i in range(40):
        tasks.put(i)
    tasks.join()
    assert tasks.qsize() == 0
    assert sorted(results.get(timeout=FOREVER) for _ in range(40)) == [i * i for i in range(40)]
    for _ in workers:
        tasks.put(None)
    tasks.join()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0


def close_and_say(q, answers):
    q.put("before closing")
    q.close()
    try:
        q.put("after closing")
    except ValueError as error:
        answers.put("is closed" in str(error))
    q.join_thread()


def test_close_ends_only_this_process_part(processes):
    ctx, maker = processes
    q, answers = maker.Queue(), maker.Queue()
    process = ctx.Process(target=close_and_say, args=(q, answers))
    process.start()
    assert answers.get(timeout=FOREVER) is True
    process.join()
    assert q.get(timeout=FOREVER) == "before closing"
    q.put("goes on")
    assert q.get(timeout=FOREVER) == "goes on"


def fill_it(q, answers):
    q.put(1)
    for attempt in (lambda: q.put(2, timeout=0.01), lambda: q.put_nowait(2)):
        try:
            attempt()
        except queue.Full:
            answers.put("full")
    answers.put((q.qsize(), q.full()))


def test_full_in_a_child(processes):
    ctx, maker = processes
    q, answers = maker.Queue(1), maker.Queue()
    process = ctx.Process(target=fill_it, args=(q, answers))
    process.start()
    assert [answers.get(timeout=FOREVER) for _ in range(3)] == ["full", "full", (1, True)]
    process.join()
    assert process.exitcode == 0
    assert q.get(timeout=FOREVER) == 1


# --- descriptors ---------------------------------------------------------------------------------


def answer(inbox, outbox):
    """Use what comes, and send back an end of a pipe of our own."""
    for _ in range(2):
        end = inbox.get(timeout=FOREVER)
        if isinstance(end, socket.socket):
            end.sendall(b"by socket")
        else:
            end.send("by connection")
        end.close()
    here, there = multiprocessing.Pipe()
    outbox.put({"end": there})  # not closed here before it has gone: others pickle later
    here.send("by a connection of the child's")
    assert here.recv() == "done"
    resource_sharer.stop(timeout=FOREVER)


@pytest.mark.usefixtures("sharer")
def test_sockets_and_connections_arrive_as_themselves(processes):
    ctx, maker = processes
    there, back = maker.Queue(), maker.Queue()
    child = ctx.Process(target=answer, args=(there, back))
    child.start()
    left, right = socket.socketpair()
    here, end = ctx.Pipe()
    with left, here:
        there.put(right)
        there.put(end)
        assert left.recv(100) == b"by socket"
        assert here.recv() == "by connection"
        with back.get(timeout=FOREVER)["end"] as other:
            assert other.recv() == "by a connection of the child's"
            other.send("done")
        child.join()
        right.close()
        end.close()
    assert child.exitcode == 0
