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
from tests.helpers.channels import FOREVER
from tests.helpers.frames import mutated, seeds
from tests.helpers.partners import STARTS

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
def arrive(ends, request):
    """A function: messages of these numbers arrive, and what so many calls of receive say is returned."""
    left, right = ends
    size = 1 if request.param == "small" else 600

    def arrive(numbers, count):
        for number in numbers:
            put(left, frame(np.full(size, number), number))
        said = right.run(outcomes, count)
        return [int(each[-1]) if isinstance(each, np.ndarray) else each for each in said]

    return arrive


def test_in_order(ends, arrive):
    assert arrive(range(6), 6) == list(range(6))
    assert ends[1].stats().messages_received == 6


def test_a_gap(ends, arrive):
    said = arrive([0, 1, 4, 5], 5)
    assert said[:2] + said[3:] == [0, 1, 4, 5]
    assert "messages 2 to 3" in said[2]
    assert "missing" in said[2]
    stats = ends[1].stats()
    assert (stats.gaps, stats.duplicates, stats.corrupt, stats.messages_received) == (2, 0, 0, 4)


def test_a_repetition(ends, arrive):
    said = arrive([0, 1, 1, 2, 3], 5)
    assert said[:2] + said[3:] == [0, 1, 2, 3]
    assert "message 1 came again" in said[2]
    stats = ends[1].stats()
    assert (stats.gaps, stats.duplicates, stats.corrupt, stats.messages_received) == (0, 1, 0, 4)


def test_another_order(ends, arrive):
    said = arrive([0, 2, 1, 3], 5)
    assert [each for each in said if isinstance(each, int)] == [0, 2, 3]
    assert "missing" in said[1]
    assert "late" in said[3]
    assert (ends[1].stats().gaps, ends[1].stats().duplicates) == (1, 1)


def test_a_missing_first_one(arrive):
    said = arrive([1, 2], 3)
    assert "missing" in said[0]
    assert said[1:] == [1, 2]


def types_of_what_comes(end, count):
    """The types of so many messages, or `Corrupt`."""
    types = []
    for _ in range(count):
        try:
            types.append(type(end.receive(FOREVER)))
        except Corrupt as error:
            types.append(type(error))
    return types


@pytest.mark.parametrize("check", ["frame", "payload"])
@pytest.mark.parametrize("what", ["array", "object", "bytes", "large array"])
def test_a_damaged_byte_anywhere(make_channel, check, what):
    """Every byte that is checked, one after the other; with check="frame" the data of arrays is not."""
    left, right = make_channel(check=check)
    array = np.arange(40, dtype="u2")
    objects = {
        "array": array,
        "object": [array, "text", {"a": 1}],
        "bytes": b"x" * 50,
        "large array": np.arange(4000, dtype="u1"),
    }
    obj = objects[what]
    nbytes = len(frame(obj, 0))
    places = range(0, nbytes, 1 if nbytes < 1000 else 37)
    job = right.start(types_of_what_comes, len(places))
    for number, at in enumerate(places):
        put(left, damaged(frame(obj, number, checksum=check == "payload"), at))
    types = job.result()
    caught = types.count(Corrupt)
    for at, got in zip(places, types, strict=True):
        if got is not Corrupt:
            assert check == "frame"
            assert what != "bytes"
            assert at >= 64
            assert got is type(obj)
    assert caught >= (len(places) if check == "payload" else 2)
    stats = right.stats()
    assert (stats.corrupt, stats.gaps, stats.duplicates) == (caught, 0, 0)
    assert stats.messages_received == len(places) - caught
    put(left, frame("afterwards", len(places)))
    assert right.receive(FOREVER) == "afterwards"


def test_a_truncated_message(ends):
    left, right = ends
    whole = frame(np.arange(100.0), 0)
    for raw in (whole[:-1], whole[:63], whole[:1]):
        put(left, raw)
        with pytest.raises(Corrupt):
            right.receive(FOREVER)
    put(left, whole)
    assert same(right.receive(FOREVER), np.arange(100.0))
    assert right.stats().corrupt == 3


def test_damage_does_not_hide_the_end(ends):
    left, right = ends
    put(left, frame(1, 0))
    put(left, damaged(frame(2, 1), 5))
    left.close()
    assert right.receive(FOREVER) == 1
    with pytest.raises(Corrupt):
        right.receive(FOREVER)
    with pytest.raises(EndOfStream):
        right.receive(FOREVER)


SEEDS = seeds()


def receive_up_to(end, text):
    """Receive until this comes: before it there are values, and the errors that are documented."""
    got = None
    while type(got) is not str or got != text:
        try:
            got = end.receive(FOREVER)
        except (Corrupt, SerializationError):
            continue


def test_any_bytes_for_a_message(ends):
    """A value or one of the errors that are documented, and then the next message."""
    left, right = ends
    later = [LATER]

    @example(0, 0)
    @settings(max_examples=50, deadline=None)
    @given(st.integers(0, len(SEEDS) - 1), st.integers(0, 1 << 32))
    def one(number, seed):
        later[0] += 2
        job = right.start(receive_up_to, f"on {later[0]}")
        put(left, mutated(SEEDS[number], random.Random(seed)) or b"?")
        put(left, frame(f"on {later[0]}", later[0]))
        job.result()

    one()


def receive_up_to_the_end(end):
    with pytest.raises(EndOfStream):
        while True:
            try:
                end.receive(FOREVER)
            except (Corrupt, SerializationError):
                continue


def test_any_bytes_for_the_first_message(make_channel, how):
    starts = list(STARTS)
    for number, seed in enumerate(range(starts.index(how), 20, len(starts))):
        left, right = make_channel()
        put(left, mutated(SEEDS[number % len(SEEDS)], random.Random(seed)) or b"?")
        left.close()
        right.run(receive_up_to_the_end)
