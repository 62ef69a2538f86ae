"""A signal's handler raises in the middle of a call, again and again: nothing is lost, and nothing stays claimed."""

from __future__ import annotations

import os
import random
import signal
import threading

import numpy as np
import pytest

from shmengine import Engine, JoinableQueue, Queue, Ring
from shmengine._native import lib
from shmengine._native.status import OK
from shmengine.leases import new_block
from tests.helpers.scripts import poll_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.watchdog(120),
    # Python itself swallows what is raised in a callback of the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
MESSAGES = 1500


class Interrupted(BaseException):
    """What an alarm that ends a call raises: like KeyboardInterrupt, nothing that a failed message raises."""


class Alarm:
    """Raises at a random moment of a call."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.random = random.Random(7)
        self.armed = False
        self.hits = 0

    def attempt(self, call):
        """Return what a call returns, None if it was interrupted."""
        result = None
        self.armed = True
        try:
            signal.setitimer(signal.ITIMER_REAL, self.random.uniform(self.seconds / 20, self.seconds))
            result = call()
            self.armed = False
        except Interrupted:
            self.hits += 1
        except BaseException:
            self.armed = False
            raise
        return result

    def handle(self, number, frame):
        # Not between the return of the call and where its result is kept: that is ours to lose.
        if self.armed and frame.f_code is not Alarm.attempt.__code__:
            self.armed = False
            raise Interrupted


@pytest.fixture
def alarm():
    alarm = Alarm(0.0006)
    before = signal.signal(signal.SIGALRM, alarm.handle)
    yield alarm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def in_child(work):
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


@pytest.mark.parametrize("way", ["lease", "receive"])
def test_what_a_ring_delivers(alarm, way):
    with Ring(64, "16 MiB") as ring:

        def send():
            for i in range(MESSAGES):
                with ring.claim((4,), int) as array:
                    array[:] = i
                if i % 8 == 0:
                    os.sched_yield()

        def lease():
            lease = ring.lease()  # may be dropped by an exception on its way here
            return lease  # noqa: RET504

        child, got = in_child(send), []
        while len(got) < MESSAGES:
            message = alarm.attempt(lease if way == "lease" else ring.receive)
            if message is not None:
                got.append(int((message.array if way == "lease" else message)[0]))
            del message
        os.waitpid(child, 0)
        assert got == list(range(MESSAGES))
        assert not ring.stats().leases_held
        assert alarm.hits


def test_what_is_kept_is_put_back_by_a_close():
    """Whoever is interrupted and then leaves takes nothing along."""
    with Ring(8, "4 MiB") as ring:
        ring.send(np.arange(3))

        def be_interrupted_and_leave():
            block = new_block()
            assert lib.shmr_lease(ring._handle(), 0, 0, 0, block) == OK
            ring._keep(block)  # as when a handler raises between the core and the return
            ring.close()

        child = in_child(be_interrupted_and_leave)
        assert os.waitpid(child, 0)[1] == 0
        assert ring.receive(0).tolist() == [0, 1, 2]


def test_what_a_ring_claims(alarm):
    with Ring(64, "2 MiB") as ring:  # three fit

        def take():
            for _ in range(MESSAGES // 3):
                with ring.lease():
                    pass

        child, sent = in_child(take), 0
        while sent < MESSAGES // 3:
            claim = alarm.attempt(lambda: ring.claim((80_000,)))
            if claim is not None:
                claim.commit()
                sent += 1
            del claim
        os.waitpid(child, 0)
        assert ring._region.counters().pins == 0


@pytest.mark.parametrize("make", [Queue, JoinableQueue])
def test_what_a_queue_delivers(alarm, make):
    queue, got = make(memory="16 MiB"), []

    def put():
        for i in range(MESSAGES):
            queue.put(i)

    child = in_child(put)
    while len(got) < MESSAGES:
        message = alarm.attempt(queue.get)
        if message is not None:
            got.append(message)
    os.waitpid(child, 0)
    assert got == list(range(MESSAGES))
    if make is JoinableQueue:
        for _ in got:
            queue.task_done()
        queue.join()
    queue.close()


def test_what_an_engine_puts(alarm):
    alarm.seconds = 0.0015
    with Engine(1, memory="256 MiB") as engine:
        value = {"a": np.ones(300_000), "b": [np.ones(1000)] * 20}
        for _ in range(300):
            alarm.attempt(lambda: engine.put(value))
        assert engine.submit(abs, -1).result(60) == 1
        poll_until(
            lambda: engine._backend._core.region.counters().pins == 0, what="nothing is claimed or held"
        )


def test_an_engine_that_other_threads_use(alarm):
    """The thread that takes results for all is interrupted: others go on."""
    alarm.seconds = 0.004
    with Engine(2, memory="64 MiB") as engine:
        arrays = [np.ones(3000)] * 100
        stop, answers, failures = threading.Event(), [], []

        def other():
            try:
                while not stop.is_set():
                    answers.append(engine.submit(abs, -3).result(60))
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        for _ in range(150):
            alarm.attempt(lambda: list(engine.map(np.sum, arrays)))
        stop.set()
        thread.join()
        assert not failures
        assert set(answers) == {3}
        assert list(engine.map(np.sum, arrays)) == [3000.0] * 100
        assert alarm.hits
