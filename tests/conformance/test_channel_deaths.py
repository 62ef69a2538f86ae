"""SIGKILL of either end at any moment: what was wholly sent arrives, then `PeerLost`, and nothing is left.

A thread cannot be killed: it loses its end, which is an orderly end.
"""

from __future__ import annotations

import mmap
import random
import time

import numpy as np
import pytest

from shmengine import Timeout
from tests.helpers import poll_until
from tests.helpers.channels import FOREVER, fill, is_message, make_pair, message, number_of
from tests.helpers.fault_points import SEED
from tests.helpers.leftovers import state_of
from tests.helpers.partners import STARTS, Child, Partners, in_thread
from tests.helpers.scripts import soak_seconds

BLOCK = (np.arange(20_000) % 251).astype("u1")
ROUNDS = int(5 * max(1.0, soak_seconds(1, 96)))  # 96: those of test_channel_signals.py get their part
SLOWER = {"spawn": 3, "worker": 3}  # so many times fewer of those who have to start an interpreter


@pytest.fixture
def lost(how):
    """What an end raises whose other end's holder has died."""
    return STARTS[how].lost


@pytest.fixture
def take(how):
    """Gives ends to those who may be killed."""
    partners, taken = Partners(), []

    def take(end):
        taken.append(partners.take(how, end))
        return taken[-1]

    yield take
    for end in taken:
        end.leave()
    partners.close()


@pytest.fixture
def note(tmp_path):
    note = Note(str(tmp_path / "note"))
    yield note
    note.close()


@pytest.fixture
def rounds(how):
    return max(1, ROUNDS // SLOWER.get(how, 1))


def assert_lost(end, error):
    for timeout in (FOREVER, 0, None):
        with pytest.raises(error):
            end.receive(timeout)
    with pytest.raises(error):
        end.send("anybody there?", FOREVER)
    with pytest.raises(error):
        end.try_send(b"")


class Note:
    """A number that another process writes down, and that its death does not take along."""

    def __init__(self, path):
        self._path = path
        with open(path, "ab+") as file:
            file.truncate(8)
            self._number = np.frombuffer(mmap.mmap(file.fileno(), 8), np.int64)

    def __reduce__(self):
        return Note, (self._path,)

    def write(self, number):
        self._number[0] = number  # in one store: `struct` would make it zero before

    def read(self):
        return int(self._number[0])

    def close(self):
        del self._number


def wait_until_it_waits(remote, note):
    poll_until(lambda: note.read() > 0 and state_of(remote.tid) == "S", what="it waits")


def test_before_its_first_use(ends, lost):
    left, right = ends
    left.send("unread")
    with pytest.raises(Timeout):
        left.receive(0.06)
    right.kill()
    assert_lost(left, lost)


def note_and_receive(end, note):
    note.write(1)
    end.receive()


def test_while_it_waits_for_a_message(ends, note, lost):
    left, right = ends
    right.start(note_and_receive, note)
    wait_until_it_waits(right, note)
    right.kill()
    assert_lost(left, lost)


def send_and_wait(end, note=None):
    for number in range(1000):
        end.send(BLOCK)
        if note is not None:
            note.write(number + 1)


def test_while_it_waits_for_room(ends, note, lost):
    """What it had sent is there; of what it was sending nothing."""
    left, right = ends
    right.start(send_and_wait, note)
    wait_until_it_waits(right, note)
    right.kill()
    count = note.read()
    got = 0
    with pytest.raises(lost):
        while True:
            assert np.array_equal(left.receive(FOREVER), BLOCK)
            got += 1
    assert got == count or not left.capabilities.outlives_sender
    assert_lost(left, lost)


def test_the_receiver_dies_while_one_waits_for_room(ends, lost):
    left, right = ends
    fill(left, BLOCK)
    job = in_thread(send_and_wait, left)
    assert np.array_equal(right.receive(FOREVER), BLOCK)
    right.kill()
    with pytest.raises(lost, match="nobody would receive"):
        job.result()
    assert_lost(left, lost)


def pour(end, note):
    """Send one message after the other, and write down how many went wholly."""
    number = 0
    while True:
        end.send(message(number))
        number += 1
        note.write(number)


@pytest.mark.parametrize("when", ["while receiving", "before receiving"])
def test_a_sender_dies_at_any_moment(make_channel, note, lost, rounds, when):
    choices = random.Random(SEED)
    print("seed:", SEED)
    for _ in range(rounds):
        left, right = make_channel()
        note.write(0)
        right.start(pour, note)
        got = 0
        if when == "while receiving":
            for got in range(choices.randrange(1, 60)):
                assert number_of(left.receive(FOREVER)) == got
            got += 1
        else:
            poll_until(lambda: note.read() > 0)
            time.sleep(choices.uniform(0, 0.02))  # the random moment is what is tested
        right.kill()
        with pytest.raises(lost):
            while True:
                obj = left.receive(FOREVER)
                assert number_of(obj) == got
                assert is_message(obj)
                got += 1
        assert got >= note.read() or not left.capabilities.outlives_sender
        assert_lost(left, lost)
        assert left.stats().gaps == left.stats().corrupt == left.stats().duplicates == 0
        left.close()


def swallow(end):
    while True:
        end.receive()


def test_a_receiver_dies_at_any_moment(make_channel, lost, rounds):
    choices = random.Random(SEED)
    print("seed:", SEED)
    for _ in range(rounds):
        left, right = make_channel()
        right.start(swallow)
        number = 0
        for number in range(choices.randrange(1, 60)):
            left.send(message(number), FOREVER)
        right.kill()
        with pytest.raises(lost):
            while True:
                left.send(message(number), FOREVER)
        assert_lost(left, lost)
        left.close()


def test_both_die_at_once(mechanism, take, note):
    """Nothing is left, and nobody else is disturbed."""
    left, right = make_pair(mechanism)
    one = Child(pour, left, note)
    left.close()
    other = take(right)
    other.start(swallow)
    poll_until(lambda: note.read() > 0)
    one.kill()
    other.kill()
    one.end()
