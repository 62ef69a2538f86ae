"""What does not arrive as it was sent is noticed and counted: gaps, repetitions, another order, damage; never silence.

What goes over the wire here is made by the test, below what numbers and checks it at the sender.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shmengine import Corrupt, EndOfStream, SerializationError
from shmengine._native.status import deadline_of
from shmengine.codec import encode
from tests.helpers.arrays import same
from tests.helpers.channels import FOREVER, make_pair
from tests.helpers.frames import mutated, seeds

FRAMED = ("pipe", "mqueue", "socket")  # shared memory has no wire
LATER = 1 << 40  # a number that nothing else has


def frame(obj, number, *, checksum=False):
    return b"".join(encode(obj).pieces(sequence=number, checksum=checksum))


def put(end, raw):
    """Let an end send these bytes as a message."""
    assert end._use(sending=True).write([raw], len(raw), 0, deadline_of(FOREVER))


def damaged(raw, at):
    raw = bytearray(raw)
    raw[at] ^= 1 << at % 8
    return bytes(raw)


def outcomes(end, count):
    """What so many calls return; of errors, what they say."""
    said = []
    for _ in range(count):
        try:
            said.append(end.receive(FOREVER))
        except Corrupt as error:
            said.append(str(error))
    return said


@pytest.fixture(params=FRAMED)
def mechanism(request):
    return request.param


@pytest.fixture(params=["small", "large"])
def arrive(ends_here, request):
    """A function: messages of these numbers arrive, and what so many calls of receive say is returned."""
    left, right = ends_here
    size = 1 if request.param == "small" else 600

    def arrive(numbers, count):
        for number in numbers:
            put(left, frame(np.full(size, number), number))
        return [int(each[-1]) if isinstance(each, np.ndarray) else each for each in outcomes(right, count)]

    return arrive


def test_in_order(ends_here, arrive):
    assert arrive(range(6), 6) == list(range(6))
    assert ends_here[1].stats().messages_received == 6


def test_a_gap(ends_here, arrive):
    said = arrive([0, 1, 4, 5], 5)
    assert said[:2] + said[3:] == [0, 1, 4, 5]
    assert "messages 2 to 3" in said[2]
    assert "missing" in said[2]
    stats = ends_here[1].stats()
    assert (stats.gaps, stats.duplicates, stats.corrupt, stats.messages_received) == (2, 0, 0, 4)


def test_a_repetition(ends_here, arrive):
    said = arrive([0, 1, 1, 2, 3], 5)
    assert said[:2] + said[3:] == [0, 1, 2, 3]
    assert "message 1 came again" in said[2]
    stats = ends_here[1].stats()
    assert (stats.gaps, stats.duplicates, stats.corrupt, stats.messages_received) == (0, 1, 0, 4)


def test_another_order(ends_here, arrive):
    said = arrive([0, 2, 1, 3], 5)
    assert [each for each in said if isinstance(each, int)] == [0, 2, 3]
    assert "missing" in said[1]
    assert "late" in said[3]
    assert (ends_here[1].stats().gaps, ends_here[1].stats().duplicates) == (1, 1)


def test_a_missing_first_one(arrive):
    said = arrive([1, 2], 3)
    assert "missing" in said[0]
    assert said[1:] == [1, 2]


@pytest.mark.parametrize("check", ["frame", "payload"])
@pytest.mark.parametrize("what", ["array", "object", "bytes", "large array"])
def test_a_damaged_byte_anywhere(make_channel_here, check, what):
    """Every byte that is checked, one after the other; with check="frame" the data of arrays is not."""
    left, right = make_channel_here(check=check)
    array = np.arange(40, dtype="u2")
    objects = {
        "array": array,
        "object": [array, "text", {"a": 1}],
        "bytes": b"x" * 50,
        "large array": np.arange(4000, dtype="u1"),
    }
    obj = objects[what]
    nbytes = len(frame(obj, 0))
    caught = number = 0
    for at in range(0, nbytes, 1 if nbytes < 1000 else 37):
        put(left, damaged(frame(obj, number, checksum=check == "payload"), at))
        try:
            got = right.receive(FOREVER)
        except Corrupt:
            caught += 1
            number += 1
            continue
        assert check == "frame"
        assert what != "bytes"
        assert at >= 64
        assert type(got) is type(obj)
        number += 1
    assert caught >= (number if check == "payload" else 2)
    stats = right.stats()
    assert (stats.corrupt, stats.gaps, stats.duplicates) == (caught, 0, 0)
    assert stats.messages_received == number - caught
    put(left, frame("afterwards", number))
    assert right.receive(FOREVER) == "afterwards"


def test_a_truncated_message(ends_here):
    left, right = ends_here
    whole = frame(np.arange(100.0), 0)
    for raw in (whole[:-1], whole[:63], whole[:1]):
        put(left, raw)
        with pytest.raises(Corrupt):
            right.receive(FOREVER)
    put(left, whole)
    assert same(right.receive(FOREVER), np.arange(100.0))
    assert right.stats().corrupt == 3


def test_damage_does_not_hide_the_end(ends_here):
    left, right = ends_here
    put(left, frame(1, 0))
    put(left, damaged(frame(2, 1), 5))
    left.close()
    assert right.receive(FOREVER) == 1
    with pytest.raises(Corrupt):
        right.receive(FOREVER)
    with pytest.raises(EndOfStream):
        right.receive(FOREVER)


SEEDS = seeds()


def test_any_bytes_for_a_message(ends_here):
    """A value or one of the errors that are documented, and then the next message."""
    left, right = ends_here
    later = [LATER]

    @example(0, 0)
    @settings(max_examples=150, deadline=None)
    @given(st.integers(0, len(SEEDS) - 1), st.integers(0, 1 << 32))
    def one(number, seed):
        later[0] += 2
        put(left, mutated(SEEDS[number], random.Random(seed)) or b"?")
        put(left, frame(f"on {later[0]}", later[0]))
        got = None
        while type(got) is not str or got != f"on {later[0]}":
            try:
                got = right.receive(FOREVER)
            except (Corrupt, SerializationError):
                continue

    one()


def test_any_bytes_for_the_first_message(mechanism):
    for number, seed in enumerate(range(20)):
        left, right = make_pair(mechanism)
        with left, right:
            put(left, mutated(SEEDS[number % len(SEEDS)], random.Random(seed)) or b"?")
            left.close()
            with pytest.raises(EndOfStream):
                while True:
                    try:
                        right.receive(FOREVER)
                    except (Corrupt, SerializationError):
                        continue
