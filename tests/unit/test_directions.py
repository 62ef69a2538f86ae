"""`Outbox` and `Inbox`: the short way of small messages, and what it leaves to Python."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from shmengine import Corrupt
from shmengine._native import lib
from shmengine.channels import channel
from shmengine.channels.link import NOTHING
from shmengine.leases import new_block
from tests.helpers.channels import FOREVER
from tests.helpers.memory import assert_memory_is_whole


@pytest.fixture
def pair():
    left, right = channel("shm", buffer_bytes="4 MiB")
    with left, right:
        left.send("begun")  # the first use of an end is Python's
        assert right.receive(FOREVER) == "begun"
        yield left, right


def kinds():
    return [
        b"",
        b"abc",
        bytes(64 << 10),
        bytes((64 << 10) + 1),
        np.arange(8),
        np.array(3.0),
        np.zeros((0, 3), "f4"),
        np.ones((1,) * 9),  # of more dimensions than are remembered
        np.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]),
        np.array(["2026-11-28"], "M8[D]"),
        np.arange(20_000.0),
        np.arange(6).reshape(2, 3).T,
    ]


@pytest.mark.parametrize("check", ["frame", "payload"])
def test_each_kind_comes_as_it_was_sent(check):
    left, right = channel("shm", check=check)
    with left, right:
        for _ in range(3):  # seen first, and then known
            for sent in kinds():
                left.send(sent)
                got = right.receive(FOREVER)
                assert type(got) is type(sent)
                if isinstance(sent, bytes):
                    assert got == sent
                else:
                    assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
                    assert np.array_equal(got, sent)
                    assert not got.flags.writeable
                    with pytest.raises(ValueError, match="WRITEABLE"):
                        got.flags.writeable = True
                del got
        assert left.stats().messages_sent == right.stats().messages_received == 3 * len(kinds())
        assert left.stats().bytes_sent == right.stats().bytes_received


def test_more_layouts_than_are_remembered(pair):
    left, right = pair
    for _ in range(2):
        for length in range(20):
            left.send(np.arange(length))
            assert right.receive(FOREVER).tolist() == list(range(length))


def test_a_known_array_goes_the_short_way(pair):
    left, right = pair
    for sent in (np.arange(8), np.arange(8.0)):
        assert not left._outbox.put(sent, 0)
        left.send(sent)
        assert right._inbox.take(0) is NOTHING  # Python makes the first one
        assert np.array_equal(right.receive(FOREVER), sent)
        assert left._outbox.put(sent, 0)
        assert np.array_equal(right._inbox.take(0), sent)
        right._inbox.taken = True


def test_a_message_that_was_not_taken_comes_again(pair):
    """As if a signal's handler had raised right after the call of C."""
    left, right = pair
    for sent in (b"abc", np.arange(8), np.arange(8)):
        left.send(sent)
        received = right.stats().messages_received
        if right._inbox.take(0) is not NOTHING:
            right._receiving.leave()
        assert right.stats().messages_received == received
        assert np.array_equal(right.receive(FOREVER), sent)
        assert right.stats().messages_received == received + 1
    assert right._inbox.take(0) is NOTHING


def test_who_waits_in_python_comes_first(pair):
    left, right = pair

    async def run():
        waiting = asyncio.ensure_future(right.areceive(FOREVER))
        await asyncio.sleep(0)
        left.send(b"1")
        assert right._inbox.take(0) is NOTHING  # a coroutine has the turn
        with pytest.raises(RuntimeError, match="coroutine"):
            right.receive(0)
        assert await waiting == b"1"

    asyncio.run(run())
    left.send(b"2")
    assert right.receive(FOREVER) == b"2"


def test_a_call_that_was_interrupted_goes_on_in_python(pair):
    left, right = pair
    assert left._sending.take(0)  # as a handler sees it, in a thread that is sending
    assert right._receiving.take(0)
    assert not left._outbox.put(b"1", 0)
    left.send(b"2")
    assert right.receive(FOREVER) == b"2"


def test_what_an_interrupted_call_has_left_comes_first(pair):
    left, right = pair
    for sent in (b"1", b"2", b"3"):
        left.send(sent)
    assert right._inbox.take(0) == b"1"
    assert right._inbox.current == b"1"
    right._inbox.taken = True
    assert right._inbox.current is NOTHING
    right._ready.append([b"1"])  # received, and not returned
    assert right._inbox.take(0) is NOTHING
    assert right.receive(FOREVER) == b"1"
    assert right.receive(FOREVER) == b"2"
    block = new_block()
    assert lib.shmr_lease(right._link.receiver._h, 0, 1, 0, block) == 0
    right._link.receiver._keep(block)  # leased, and not received
    assert right._inbox.take(0) is NOTHING
    assert right.receive(FOREVER) == b"3"


def test_settled_twice_and_dropped(pair):
    left, right = pair
    before = right.stats().messages_received
    right._inbox.settle()
    right._inbox.taken = True
    left.send(b"abc")
    assert right._inbox.take(0) == b"abc"
    right._inbox.drop()
    right._receiving.leave()
    del right._inbox.current
    assert right._inbox.take(0) is NOTHING
    assert right.stats().messages_received == before
    assert_memory_is_whole(left._link.sender)


def test_another_order_of_a_known_layout(pair):
    left, right = pair
    array = np.arange(6).reshape(2, 3)
    for sent in (array, array, np.asfortranarray(array)):
        left.send(sent)
        assert np.array_equal(right.receive(FOREVER), sent)


def test_what_does_not_fit_is_not_claimed(pair):
    left, right = pair
    sent = 0
    while left._outbox.put(b"abc", -1):
        sent += 1
    assert sent == left._link.sender.capacity
    assert left._link.sender._block.state == 0
    for _ in range(sent):
        assert right.receive(FOREVER) == b"abc"


@pytest.mark.parametrize("nbytes", [8, 1 << 20])
def test_a_changed_byte(nbytes):
    left, right = channel("shm", check="payload", buffer_bytes="8 MiB")
    with left, right:
        array = np.zeros(nbytes, "u1")
        for _ in range(2):
            left.send(array)
            assert right.receive(FOREVER).nbytes == nbytes
        array[-4:] = np.frombuffer(b"MARK", "u1")
        left.send(array)
        memory = left._link.sender._region.memory
        memory[bytes(memory).rindex(b"MARK")] ^= 1
        assert right._inbox.take(0) is NOTHING
        assert right._inbox.take(0) is NOTHING  # until Python has said so
        with pytest.raises(Corrupt):
            right.receive(FOREVER)
        assert right.stats().corrupt == 1
        left.send(array)
        assert right.receive(FOREVER).nbytes == nbytes


def test_after_a_close_nothing_goes(pair):
    left, right = pair
    outbox, inbox = left._outbox, right._inbox
    left.send(b"abc")
    left.close()
    right.close()
    assert not outbox.put(b"abc", 0)
    assert inbox.take(0) is NOTHING


@pytest.mark.parametrize(
    "call",
    [
        lambda left, right: left._outbox.put(b"abc"),
        lambda left, right: left._outbox.put(b"abc", "soon"),
        lambda left, right: left._outbox.remember(b"abc"),
        lambda left, right: right._inbox.take("soon"),
        lambda left, right: right._inbox.open(1),
        lambda left, right: type(right._inbox)(1, 2, 3),
        lambda left, right: type(left._outbox)(1),
    ],
)
def test_wrong_arguments(pair, call):
    with pytest.raises(TypeError):
        call(*pair)


def test_what_is_no_turn(pair):
    left, right = pair
    for attempt in (lambda: left._outbox.open(1), lambda: right._inbox.open(1, [])):
        with pytest.raises(AttributeError):
            attempt()
    left._outbox.shut()
    right._inbox.shut()
    left.send(b"abc")  # Python's way
    assert right.receive(FOREVER) == b"abc"
