"""What does not arrive as it was sent is noticed and counted: gaps, repetitions, another order, damage; never silence.

The faults are put between what carries the bytes and what checks them, at the receiver.
"""

from __future__ import annotations

import random
from collections import deque

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shmengine import Corrupt, EndOfStream, SerializationError
from shmengine.channels.base import NOTHING
from shmengine.channels.frames import GOODBYE, aligned_empty
from tests.helpers.arrays import same
from tests.helpers.channels import FOREVER, make_pair
from tests.helpers.frames import mutated, seeds

FRAMED = ("pipe", "mqueue", "socket")
REFUSED = (Corrupt, SerializationError)


class Faulty:
    """Takes all that waits from a link's way to read, and puts something else in its place."""

    def __init__(self, link):
        self._link = link
        self._read, self._taken = link.read, link.taken
        self.waiting = deque()
        link.read, link.taken = self.read, self.taken

    def take_in(self, count):
        """Let so many messages come in, and return them."""
        while len(self.waiting) < count:
            wire = self._read(-1)
            assert wire is not NOTHING
            assert wire is not GOODBYE
            self.waiting.append(memory_of(wire))
            self._taken()
        return self.waiting

    def read(self, deadline):
        return self.waiting[0] if self.waiting else self._read(deadline)

    def taken(self):
        if self.waiting:
            self.waiting.popleft()
        else:
            self._taken()


def memory_of(data):
    memory = aligned_empty(len(data))
    memory[:] = np.frombuffer(data, "u1")
    return memory


@pytest.fixture(params=FRAMED)
def mechanism(request):
    return request.param


@pytest.fixture
def faulty(ends):
    left, right = ends
    left.send("start")
    assert right.receive(FOREVER) == "start"
    return Faulty(right._link)


def outcomes(end, count):
    """What so many calls return; of errors, their class."""
    said = []
    for _ in range(count):
        try:
            said.append(end.receive(FOREVER))
        except Corrupt as error:
            said.append(str(error))
    return said


def test_a_gap(ends, faulty):
    left, right = ends
    left.send_many(range(6))
    waiting = faulty.take_in(6)
    del waiting[2]
    del waiting[2]
    said = outcomes(right, 5)
    assert said[:2] + said[3:] == [0, 1, 4, 5]
    assert "3 to 4" in said[2]
    assert "missing" in said[2]
    assert (right.stats().gaps, right.stats().duplicates, right.stats().corrupt) == (2, 0, 0)


def test_a_repetition(ends, faulty):
    left, right = ends
    left.send_many(range(4))
    waiting = faulty.take_in(4)
    waiting.insert(2, waiting[1])
    said = outcomes(right, 5)
    assert said[:2] + said[3:] == [0, 1, 2, 3]
    assert "again" in said[2]
    assert (right.stats().gaps, right.stats().duplicates) == (0, 1)
    assert right.stats().messages_received == 5


def test_another_order(ends, faulty):
    left, right = ends
    left.send_many(range(4))
    waiting = faulty.take_in(4)
    waiting[1], waiting[2] = waiting[2], waiting[1]
    said = outcomes(right, 5)
    assert [each for each in said if isinstance(each, int)] == [0, 2, 3]
    assert "missing" in said[1]
    assert "late" in said[3]
    assert (right.stats().gaps, right.stats().duplicates) == (1, 1)


def test_a_missing_first_one(ends, faulty):
    left, right = ends
    left.send_many([1, 2])
    faulty.take_in(2).popleft()
    said = outcomes(right, 2)
    assert "missing" in said[0]
    assert said[1] == 2


@pytest.mark.parametrize("check", ["frame", "payload"])
@pytest.mark.parametrize("what", ["array", "object", "bytes"])
def test_a_damaged_byte_anywhere(make_channel, check, what):
    """Every byte that is checked, one after the other; with check="frame" the data of arrays is not."""
    left, right = make_channel(check=check)
    array = np.arange(40, dtype="u2")
    obj = {"array": array, "object": [array, "text", {"a": 1}], "bytes": b"x" * 50}[what]
    left.send(obj)
    faulty = Faulty(right._link)
    sound = faulty.take_in(1)[0].copy()
    assert same(right.receive(FOREVER), obj)
    caught = 0
    for at in range(len(sound)):
        left.send(obj)
        faulty.take_in(1)[0][at] ^= 1 << at % 8
        try:
            got = right.receive(FOREVER)
        except Corrupt:
            caught += 1
            continue
        assert check == "frame"
        assert what != "bytes"
        assert not same(got, obj) or at > 48
    assert caught >= (len(sound) if check == "payload" else 64)
    stats = right.stats()
    assert (stats.corrupt, stats.gaps, stats.duplicates) == (caught, 0, 0)
    assert stats.messages_received == 1 + len(sound) - caught
    left.send("afterwards")
    assert right.receive(FOREVER) == "afterwards"


def test_a_truncated_message(ends, faulty):
    left, right = ends
    left.send_many([np.arange(100.0), 2])
    waiting = faulty.take_in(2)
    waiting[0] = waiting[0][:-1]
    with pytest.raises(Corrupt):
        right.receive(FOREVER)
    assert right.receive(FOREVER) == 2


def test_damage_does_not_hide_the_end(ends, faulty):
    left, right = ends
    left.send_many([1, 2])
    left.close()
    faulty.take_in(2)[1][5] ^= 1
    assert right.receive(FOREVER) == 1
    with pytest.raises(Corrupt):
        right.receive(FOREVER)
    with pytest.raises(EndOfStream):
        right.receive(FOREVER)


SEEDS = seeds()


@example(0, 0)
@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(SEEDS) - 1), st.integers(0, 1 << 32))
def test_any_bytes_for_a_message(number, seed):
    left, right = make_pair("pipe")
    with left, right:
        left.send("start")
        right.receive(FOREVER)
        faulty = Faulty(right._link)
        left.send_many([1, 2])
        waiting = faulty.take_in(2)
        waiting[0] = memory_of(mutated(SEEDS[number], random.Random(seed)))
        left.send("on")
        got = None
        while type(got) is not str or got != "on":
            try:
                got = right.receive(FOREVER)
            except REFUSED:
                continue
