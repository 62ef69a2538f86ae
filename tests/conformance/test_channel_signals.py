"""Signals: handlers that run, and handlers that raise at any moment; no message is lost, doubled or torn."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time

import numpy as np
import pytest

from shmengine import Timeout, WouldBlock
from tests.helpers.channels import FOREVER, drain, echo, fill, is_message, message, number_of
from tests.helpers.partners import STARTS
from tests.helpers.scripts import soak_seconds

pytestmark = [
    # Python itself swallows what is raised in a callback of the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
BLOCK = (np.arange(20_000) % 251).astype("u1")
MESSAGES = int(300 * max(1.0, soak_seconds(1, 96)))
PROCESSES = [how for how, start in STARTS.items() if start.own_process]


class Interrupted(BaseException):
    """As KeyboardInterrupt."""


class Alarm:
    """Raises at a random moment of a call."""

    def __init__(self):
        self.random = random.Random(7)
        self.armed = False
        self.hits = 0

    def attempt(self, call, *args):
        """Return whether a call returned, and what."""
        self.armed = True
        try:
            signal.setitimer(signal.ITIMER_REAL, self.random.uniform(0.00003, 0.0015))
            result = call(*args)
            self.armed = False
        except Interrupted:
            self.hits += 1
            return False, None
        finally:
            self.armed = False
        return True, result

    def handle(self, number, frame):
        # Not between the return of the call and where its result is kept: that is ours to lose.
        if self.armed and frame.f_code is not Alarm.attempt.__code__:
            self.armed = False
            raise Interrupted


@contextlib.contextmanager
def alarms():
    alarm = Alarm()
    before = signal.signal(signal.SIGALRM, alarm.handle)
    try:
        yield alarm
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def alarm():
    with alarms() as alarm:
        yield alarm


def assert_sound(end):
    """Nothing was missing or damaged; and nothing came twice, unless it may be sent again."""
    stats = end.stats()
    assert stats.gaps == stats.corrupt == 0
    assert stats.duplicates == 0 or end.capabilities.reconnects


def send_all(end, count):
    for number in range(count):
        end.send(message(number), FOREVER)


def receive_all(end):
    numbers = []
    for obj in end:
        assert is_message(obj)
        numbers.append(number_of(obj))
    assert_sound(end)
    return numbers


def receive_interrupted(end, alarm, count):
    for number in range(count):
        done = False
        while not done:
            done, obj = alarm.attempt(end.receive)
        assert number_of(obj) == number
        assert is_message(obj)
        del obj
    assert alarm.hits
    assert_sound(end)


def send_interrupted(end, alarm, count):
    """Return which messages have been sent for sure."""
    sure = [number for number in range(count) if alarm.attempt(end.send, message(number))[0]]
    end.close()
    assert alarm.hits
    return sure


def with_alarms(end, function, count):
    with alarms() as alarm:
        return function(end, alarm, count)


def test_receive_is_interrupted(ends, alarm):
    left, right = ends
    job = right.start(send_all, MESSAGES)
    receive_interrupted(left, alarm, MESSAGES)
    job.result()


@pytest.mark.parametrize("how", PROCESSES)
def test_a_partners_receive_is_interrupted(ends):
    left, right = ends
    job = right.start(with_alarms, receive_interrupted, MESSAGES)
    send_all(left, MESSAGES)
    job.result()


def test_send_is_interrupted(ends, alarm):
    """What was interrupted has been sent or not, but never in part or twice; what was not, has."""
    left, right = ends
    job = right.start(receive_all)
    sure = send_interrupted(left, alarm, MESSAGES)
    numbers = job.result()
    assert numbers == sorted(set(numbers))
    assert set(sure) <= set(numbers)


@pytest.mark.parametrize("how", PROCESSES)
def test_a_partners_send_is_interrupted(ends):
    left, right = ends
    job = right.start(with_alarms, send_interrupted, MESSAGES)
    numbers = receive_all(left)
    assert numbers == sorted(set(numbers))
    assert set(job.result()) <= set(numbers)


def test_what_an_interrupt_left_in_the_last_step_does_not_keep_an_end_open(ends):
    left, right = ends
    left.send(1, FOREVER)
    left._sending.take(0)  # as of a handler that has raised when the call was just about to give up its turn
    left._receiving.take(0)
    left.close()
    assert list(right) == [1]


def test_a_handler_may_close_what_it_has_interrupted(ends):
    left, right = ends
    left.send(1, FOREVER)
    turn = left._receiving
    assert turn.take(0)
    left.close()
    assert right.receive(FOREVER) == 1
    with pytest.raises(WouldBlock):
        right.receive(0)  # a call is still at work there
    left._leave(turn)  # it goes on, and ends
    assert list(right) == []


def test_both_are_interrupted(ends, alarm):
    left, right = ends
    job = right.start(echo)
    got = []
    for number in range(MESSAGES // 4):
        sent, _ = alarm.attempt(left.send, message(number))
        with contextlib.suppress(Timeout):
            while number not in got:  # if it was interrupted it may have been sent or not
                received, obj = alarm.attempt(left.receive) if sent else (True, left.receive(0.01))
                if received:
                    assert is_message(obj)
                    got.append(number_of(obj))
    assert got == sorted(set(got))
    assert alarm.hits
    left.close()
    job.result()


@pytest.fixture
def ctrl_c():
    """Raises KeyboardInterrupt in the main thread, as Ctrl-C does, a moment later."""
    before = [(number, signal.signal(number, signal.default_int_handler)) for number in (signal.SIGALRM,)]
    yield lambda: signal.setitimer(signal.ITIMER_REAL, 0.03)
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before:
        signal.signal(number, handler)


def test_ctrl_c_ends_a_wait(ends, ctrl_c):
    """And the channel goes on."""
    left, right = ends
    for timeout in (None, FOREVER):
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            left.receive(timeout)
    sent = fill(left, BLOCK)
    for timeout in (None, FOREVER):
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            left.send(BLOCK, timeout)
    for obj in right.run(drain, sent):
        assert np.array_equal(obj, BLOCK)
    left.send("on", FOREVER)
    assert right.receive(FOREVER) == "on"
    right.send("and on")
    assert left.receive(FOREVER) == "and on"


@contextlib.contextmanager
def storms(every=0.001):
    """Signals come all the time, and are counted; those of a process reach whoever has its main thread."""
    handled = []
    if threading.current_thread() is not threading.main_thread():
        yield handled
        return
    before = signal.signal(signal.SIGALRM, lambda number, frame: handled.append(number))
    signal.setitimer(signal.ITIMER_REAL, every, every)
    try:
        yield handled
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def storm(end, count, begins):
    """Under a thousand signals a second: send and receive; return the numbers that came, and of how many signals."""
    with storms() as handled:
        got = []
        for number in range(count):
            if begins:
                end.send(message(number))
            obj = end.receive()
            assert is_message(obj)
            got.append(number_of(obj))
            del obj  # over shared memory, messages that are kept fill the channel
            if not begins:
                end.send(message(number))
    return got, len(handled)


def test_a_thousand_signals_a_second(ends, how):
    """Every system call may be interrupted, at both ends: nothing comes of it."""
    left, right = ends
    job = right.start(storm, MESSAGES, False)
    numbers, handled = storm(left, MESSAGES, begins=True)
    others, others_handled = job.result()
    assert numbers == others == list(range(MESSAGES))
    assert handled > 10
    assert others_handled > 10 or not STARTS[how].own_process


def wait_in_a_storm(end):
    fill(end, BLOCK)
    with storms():
        for call in (end.receive, lambda timeout: end.send(BLOCK, timeout)):
            start = time.monotonic()
            with pytest.raises(Timeout):
                call(0.1)
            assert time.monotonic() - start >= 0.1


def test_signals_shorten_no_timeout(ends):
    wait_in_a_storm(ends[0])


def test_signals_shorten_no_timeout_of_a_partner(ends, how):
    with storms() if not STARTS[how].own_process else contextlib.nullcontext():
        ends[1].run(wait_in_a_storm)


def begin_in_a_storm(end):
    """Use an end for the first time while signals come as fast as they can."""
    with storms(0.0001):
        end.send("begun")


def test_ends_begin_in_a_storm(make_channel):
    for _ in range(6):
        left, right = make_channel()
        job = right.start(begin_in_a_storm)
        begin_in_a_storm(left)
        job.result()
        assert left.receive(FOREVER) == right.receive(FOREVER) == "begun"
        left.close()
