"""Handlers raise in the middle of calls, again and again, while both directions of a channel are busy: nothing is lost.

    left ── numbers ──►  ◄── numbers ── right        an alarm in each process, at random moments

A message whose `send` was interrupted may have been sent, or not; it comes at most once, and in order. One whose `send`
has returned comes.
"""

from __future__ import annotations

import multiprocessing
import random
import signal

import numpy as np
import pytest

from shmengine.channels import channel
from shmengine.errors import Timeout, WouldBlock

pytestmark = [pytest.mark.slow, pytest.mark.watchdog(240)]

MESSAGES = 2000
PATIENCE = 60
LAST = b"last"
DONE = object()


class Interrupted(BaseException):
    """What an alarm that ends a call raises."""


class Alarm:
    """Raises at a random moment of a call."""

    def __init__(self, seconds, seed):
        self.seconds = seconds
        self.random = random.Random(seed)
        self.armed = False
        self.hits = 0
        signal.signal(signal.SIGALRM, self.handle)

    def attempt(self, call, *args):
        """Return what a call returns (`DONE` for None); None if it was interrupted."""
        result = None
        self.armed = True
        try:
            signal.setitimer(signal.ITIMER_REAL, self.random.uniform(self.seconds / 50, self.seconds))
            result = call(*args)
            self.armed = False
            if result is None:
                result = DONE
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


def message(i):
    return [
        lambda: b"%d:" % i,
        lambda: np.full(100, i),
        lambda: {"number": i, "array": np.full(200, i)},
        lambda: i,
        lambda: np.full((20, 20), i).T,
    ][i % 5]()


def number_in(got):
    if isinstance(got, bytes):
        return int(got.split(b":")[0])
    if isinstance(got, dict):
        assert (got["array"] == got["number"]).all()
        return got["number"]
    if isinstance(got, np.ndarray):
        assert (got == got.flat[0]).all()
        return int(got.flat[0])
    return got


def exchange(end, seconds, seed, report, both_done):
    alarm = Alarm(seconds, seed)
    sent, surely_sent, got, done = 0, [], [], False
    while sent <= MESSAGES or not done:
        if sent < MESSAGES:
            array = message(sent)
            try:
                if alarm.attempt(end.send, array, 0.01) is DONE:
                    surely_sent.append(sent)
            except (Timeout, WouldBlock):
                pass
            sent += 1
        elif sent == MESSAGES:
            signal.setitimer(signal.ITIMER_REAL, 0)
            try:
                end.send(LAST, 0.01)
                sent += 1
            except Timeout:
                pass
        while not done:
            try:
                received = alarm.attempt(end.receive, 0 if sent <= MESSAGES else 1)
            except (Timeout, WouldBlock):
                break
            if isinstance(received, bytes) and received == LAST:
                done = True
            elif received is not None:
                got.append(number_in(received))
            del received
    signal.setitimer(signal.ITIMER_REAL, 0)
    stats = end.stats()
    report.put((seed, surely_sent, got, alarm.hits, stats.messages_sent, stats.messages_received))
    both_done.wait(PATIENCE)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("seconds", [0.0001, 0.0005])
def test_both_directions(method, seconds):
    ctx = multiprocessing.get_context(method)
    report, both_done = ctx.Queue(), ctx.Event()
    left, right = channel("shm", buffer_bytes="2 MiB")
    children = [
        ctx.Process(target=exchange, args=(end, seconds, seed, report, both_done))
        for seed, end in enumerate((left, right))
    ]
    for child in children:
        child.start()
    left.close()
    right.close()
    reports = sorted(report.get(timeout=PATIENCE) for _ in children)
    both_done.set()
    for child in children:
        child.join()
        assert child.exitcode == 0
    one, other = reports
    for (_, surely_sent, _, _, messages_sent, _), (_, _, got, hits, _, messages_received) in (
        (one, other),
        (other, one),
    ):
        assert got == sorted(set(got))  # in order, and once
        assert set(surely_sent) <= set(got)
        assert messages_sent == messages_received == len(got) + 1
        assert hits
    report.close()
    report.join_thread()


def fill(end):
    for i in range(MESSAGES):
        with end.claim(4, int, PATIENCE) as array:
            array[:] = i


def test_leases(before_alarm):
    """One that was dropped by an exception on its way to its caller comes again."""
    left, right = channel("shm", buffer_bytes="2 MiB")
    child = multiprocessing.get_context("fork").Process(target=fill, args=(left,))
    child.start()
    left.close()
    alarm, got = Alarm(0.0005, 1), []
    while len(got) < MESSAGES:
        lease = alarm.attempt(right.lease, PATIENCE)
        if lease is not None:
            got.append(int(lease.array[0]))
            lease.release()
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert got == list(range(MESSAGES))
    assert alarm.hits
    child.join()
    right.close()


@pytest.fixture
def before_alarm():
    before = signal.getsignal(signal.SIGALRM)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
