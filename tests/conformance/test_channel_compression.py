"""Compression between two ends: what comes is what was sent, smaller on its way where that can be, whoever has them."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from shmengine import Timeout, WouldBlock, channel
from tests.helpers.arrays import DTYPES, same_bytes
from tests.helpers.channels import FOREVER, echo, is_message, message, number_of, there_and_back

METHODS = [None, "auto", "lz4", "zstd"]
SMOOTH = (np.arange(100_000) // 50).astype("<i4")
NOISE = np.frombuffer(np.random.default_rng(1).bytes(200_000), "u1")


@pytest.fixture(params=METHODS, ids=str)
def compression(request, mechanism):
    """Each of them; where a mechanism does not compress it refuses to be asked for it, and goes on without."""
    if mechanism == "shm" and request.param not in (None, "auto"):
        with pytest.raises(ValueError, match="compression"):
            channel(mechanism, compression=request.param)
        return None
    return request.param


@pytest.fixture
def ends(make_channel, compression):
    return make_channel(compression=compression, check="frame" if compression == "lz4" else "payload")


def test_what_comes_is_what_was_sent(ends):
    left, right = ends
    for dtype in DTYPES:
        array = np.zeros(2000, dtype)
        if dtype.itemsize:
            array.view("u1")[::7] = 1
        got = there_and_back(left, right, array)
        assert got.dtype == dtype
        assert same_bytes(got, array)
    for obj in ({"smooth": SMOOTH[::2], "noise": NOISE}, "text" * 10_000, bytes(50_000)):
        got = there_and_back(left, right, obj)
        if isinstance(obj, dict):
            assert np.array_equal(got["smooth"], obj["smooth"])
            assert np.array_equal(got["noise"], obj["noise"])
        else:
            assert got == obj
    for end in ends:
        stats = end.stats()
        assert stats.gaps == stats.corrupt == 0


def send_again(end, array, count):
    for _ in range(count):
        end.send(array, FOREVER)
    return end.stats()


def receive_again(end, array, count):
    for _ in range(count):
        assert np.array_equal(end.receive(FOREVER), array)
    return end.stats()


@pytest.mark.parametrize(
    ("array", "smaller"),
    [(SMOOTH, True), (SMOOTH[:1500], True), (NOISE, False)],
    ids=["smooth", "smooth and short", "noise"],
)
def test_how_much_goes_over_the_wire(ends, mechanism, compression, array, smaller):
    """In both directions; and both ends count the same."""
    left, right = ends
    job = right.start(receive_again, array, 8)
    there = send_again(left, array, 8), job.result()
    job = right.start(send_again, array, 8)
    answers = receive_again(left, array, 8)
    back = job.result(), answers
    for sent, received in (there, back):
        assert sent.bytes_sent == received.bytes_received >= 8 * array.nbytes
        if smaller and compression in ("lz4", "zstd"):
            assert sent.wire_bytes_sent < sent.bytes_sent / 5
        elif mechanism != "shm" and (compression != "auto" or mechanism == "socket"):
            assert sent.wire_bytes_sent >= sent.bytes_sent


def test_both_at_once(ends):
    left, right = ends
    job = right.start(echo, 40)

    async def main():
        async def receive():
            for number in range(40):
                obj = await left.areceive(FOREVER)
                assert number_of(obj) == number
                assert is_message(obj)

        async def send():
            for number in range(40):
                await left.asend(message(number), FOREVER)

        await asyncio.gather(send(), receive())

    asyncio.run(main())
    job.result()


def first_elements(end):
    """Those of all messages until the end."""
    seen = []
    for array in end:
        assert (array == array[0]).all()
        seen.append(int(array[0]))
    return seen


def test_of_what_was_given_up_nothing_arrives(ends):
    left, right = ends
    expected = []
    for number in range(40):
        try:
            left.send(np.full(1_000_000, number, "u1"), 0 if number % 2 else 0.002)
            expected.append(number)
        except (Timeout, WouldBlock):
            pass
    job = right.start(first_elements)
    left.send(np.full(1_000_000, 40, "u1"), FOREVER)
    left.close()
    assert job.result() == [*expected, 40]
