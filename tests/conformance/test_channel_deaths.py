"""SIGKILL of either end at any moment: what was wholly sent arrives, then `PeerLost`, and nothing is left."""

from __future__ import annotations

import mmap
import os
import random
import signal
import time

import numpy as np
import pytest

from shmengine import PeerLost, Timeout
from tests.helpers import poll_until
from tests.helpers.channels import FOREVER, drain, fill, is_message, make_pair, message, number_of
from tests.helpers.fault_points import SEED
from tests.helpers.leftovers import state_of
from tests.helpers.partners import Child, in_thread
from tests.helpers.scripts import soak_seconds

BLOCK = (np.arange(20_000) % 251).astype("u1")
ROUNDS = int(5 * max(1.0, soak_seconds(1, 24)))  # 24: those of test_channel_signals.py get their part


def assert_lost(end):
    for timeout in (FOREVER, 0, None):
        with pytest.raises(PeerLost):
            end.receive(timeout)
    with pytest.raises(PeerLost):
        end.send("anybody there?", FOREVER)
    with pytest.raises(PeerLost):
        end.try_send(b"")


class Note:
    """A number that another process writes down, and that its death does not take along."""

    def __init__(self):
        self._number = np.frombuffer(mmap.mmap(-1, 8), np.int64)

    def write(self, number):
        self._number[0] = number  # in one store: `struct` would make it zero before

    def read(self):
        return int(self._number[0])


def test_before_its_first_use(ends_here):
    left, right = ends_here
    child = Child(signal.pause)
    right.close()
    left.send("unread")
    with pytest.raises(Timeout):
        left.receive(0.06)
    child.kill()
    child.end()
    assert_lost(left)


def test_while_it_waits_for_a_message(ends_here):
    left, right = ends_here
    child = Child(lambda end: end.receive(), right)
    right.close()
    poll_until(lambda: state_of(child.pid) == "S", what="it waits")
    child.kill()
    child.end()
    assert_lost(left)


def send_and_wait(end, block, note):
    for number in range(1000):
        end.send(block)
        note.write(number + 1)


def test_while_it_waits_for_room(ends_here):
    """What it had sent is there; of what it was sending nothing."""
    left, right = ends_here
    note = Note()
    child = Child(send_and_wait, right, BLOCK, note)
    right.close()
    poll_until(lambda: note.read() > 0 and state_of(child.pid) == "S", what="it waits")
    count = note.read()
    child.kill()
    child.end()
    got = 0
    with pytest.raises(PeerLost):
        while True:
            assert np.array_equal(left.receive(FOREVER), BLOCK)
            got += 1
    assert got == count or not left.capabilities.outlives_sender
    assert_lost(left)


def test_the_receiver_dies_while_one_waits_for_room(ends_here, partners):
    left, right = ends_here
    fill(left, BLOCK)
    child = Child(lambda end: (end.receive(), signal.pause()), right)
    right.close()
    job = in_thread(lambda end: send_and_wait(end, BLOCK, Note()), left)
    poll_until(lambda: state_of(child.pid) == "S", what="it sleeps")
    child.kill()
    child.end()
    with pytest.raises(PeerLost, match="nobody would receive"):
        job.result()
    assert_lost(left)


def pour(end, note):
    """Send one message after the other, and write down how many went wholly."""
    number = 0
    while True:
        end.send(message(number))
        number += 1
        note.write(number)


@pytest.mark.parametrize("when", ["while receiving", "before receiving"])
def test_a_sender_dies_at_any_moment(mechanism, when):
    choices = random.Random(SEED)
    print("seed:", SEED)
    for _ in range(ROUNDS):
        left, right = make_pair(mechanism)
        note = Note()
        child = Child(pour, right, note)
        right.close()
        got = 0
        if when == "while receiving":
            for got in range(choices.randrange(1, 60)):
                assert number_of(left.receive(FOREVER)) == got
            got += 1
        else:
            poll_until(lambda note=note: note.read() > 0)
            time.sleep(choices.uniform(0, 0.02))  # the random moment is what is tested
        child.kill()
        child.end()
        with pytest.raises(PeerLost):
            while True:
                obj = left.receive(FOREVER)
                assert number_of(obj) == got
                assert is_message(obj)
                got += 1
        assert got >= note.read() or not left.capabilities.outlives_sender
        assert_lost(left)
        assert left.stats().gaps == left.stats().corrupt == left.stats().duplicates == 0
        left.close()


def swallow(end):
    while True:
        end.receive()


def test_a_receiver_dies_at_any_moment(mechanism):
    choices = random.Random(SEED)
    print("seed:", SEED)
    for _ in range(ROUNDS):
        left, right = make_pair(mechanism)
        child = Child(swallow, right)
        right.close()
        number = 0
        for number in range(choices.randrange(1, 60)):
            left.send(message(number), FOREVER)
        child.kill()
        child.end()
        with pytest.raises(PeerLost):
            while True:
                left.send(message(number), FOREVER)
        assert_lost(left)
        left.close()


def count_up_for_ever(end):
    number = 0
    while True:
        end.send(number)
        number += 1


@pytest.mark.parametrize("how", ["spawn", "worker"])
def test_other_processes_that_die(mechanism, how):
    """Ends that came as tokens."""
    from tests.helpers.partners import Partners

    partners = Partners()
    try:
        left, right = make_pair(mechanism)
        job = partners.start(how, count_up_for_ever, right)
        assert drain(left, 100) == list(range(100))
        os.kill(job.pid, signal.SIGKILL)
        number = 100
        with pytest.raises(PeerLost):
            while True:
                assert left.receive(FOREVER) == number
                number += 1
        assert_lost(left)
        left.close()
        right.close()
    finally:
        partners.close()


def test_both_die_at_once(mechanism):
    """Nothing is left, and nobody else is disturbed."""
    left, right = make_pair(mechanism)
    one, other = Child(pour, left, Note()), Child(swallow, right)
    left.close()
    right.close()
    poll_until(lambda: state_of(other.pid) in "SR")
    for child in (one, other):
        os.kill(child.pid, signal.SIGKILL)
    for child in (one, other):
        assert child.end() == -signal.SIGKILL
