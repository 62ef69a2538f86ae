"""Waiting for the other end: timeouts, a full channel, threads; what was not sent in time was not sent at all."""

from __future__ import annotations

import time

import numpy as np
import pytest

from shmengine import MemoryBudgetExceeded, Timeout, WouldBlock
from tests.helpers import poll_until
from tests.helpers.channels import FOREVER, drain, echo, fill, is_message, message, number_of
from tests.helpers.partners import in_thread

BLOCK = (np.arange(20_000) % 251).astype("u1")
BUFFERS_BYTES = 64 << 20  # more than any channel here may hold


def run(*calls):
    """Call each in a thread of its own; return what they returned."""
    jobs = [in_thread(call) for call in calls]
    return [job.result() for job in jobs]


def drain_all(end, count):
    for _ in range(count):
        assert np.array_equal(end.receive(FOREVER), BLOCK)
    return count


# --- timeouts ------------------------------------------------------------------------------------


def assert_nothing_there(end):
    for call in (end.try_receive, lambda: end.receive(0)):
        with pytest.raises(WouldBlock):
            call()
    for seconds in (0.01, 0.12):
        start = time.monotonic()
        with pytest.raises(Timeout) as caught:
            end.receive(seconds)
        assert time.monotonic() - start >= seconds
        assert caught.value.seconds == seconds
        assert isinstance(caught.value, TimeoutError)


def test_receive_with_nothing_there(ends):
    left, right = ends
    job = right.start(assert_nothing_there)
    assert_nothing_there(left)
    job.result()


def test_send_when_full(ends):
    """Then nothing was sent, and the channel is as good as before."""
    left, right = ends
    sent = fill(left, BLOCK)
    assert 0 < sent * BLOCK.nbytes < BUFFERS_BYTES
    for seconds in (0.01, 0.12):
        start = time.monotonic()
        with pytest.raises(Timeout) as caught:
            left.send(BLOCK, seconds)
        assert time.monotonic() - start >= seconds
        assert caught.value.seconds == seconds
    with pytest.raises(WouldBlock):
        left.try_send(BLOCK)
    assert left.stats().messages_sent == sent
    right.run(drain_all, sent)
    with pytest.raises(WouldBlock):
        right.try_receive()
    left.send("afterwards", FOREVER)
    assert right.receive(FOREVER) == "afterwards"
    assert right.stats().gaps == 0


def test_small_messages_fill_a_channel_too(make_channel):
    left, right = make_channel(buffer_bytes="1 MiB")
    sent = fill(left, b"x" * 500, limit=200_000)
    assert right.run(drain, sent) == [b"x" * 500] * sent
    with pytest.raises(WouldBlock):
        right.try_receive()


def number_there(end):
    """The number of a message that is there."""
    return int(end.receive(0)[0])


def numbers_until_empty(end):
    got = []
    while (array := end.receive(FOREVER)).size:
        assert (array == array[0]).all()
        got.append(int(array[0]))
    return got


def test_of_what_was_given_up_nothing_arrives(ends):
    """Also when a part of it had already gone, again and again, between others."""
    left, right = ends
    expected, got, given_up = [], [], 0
    for number in range(60):
        big = np.full(3_000_000, number, "u1")
        try:
            left.send(big, 0 if number % 2 else 0.002)
            expected.append(number)
        except (Timeout, WouldBlock):
            given_up += 1
        if number % 3 == 0:  # makes room for a part of the next one
            try:
                got.append(right.run(number_there))
            except WouldBlock:
                pass
    assert given_up
    # What is left of the last one that was given up may still be in the way.
    job = right.start(numbers_until_empty)
    left.send(np.empty(0), FOREVER)
    assert got + job.result() == expected
    stats = right.stats()
    assert stats.gaps == stats.corrupt == 0


def test_larger_than_all_buffers(make_channel):
    """Goes through in parts; where it has to lie in one piece, the error comes at once, and says how much there is."""
    left, right = make_channel(buffer_bytes="4 MiB")
    big = (np.arange(12 << 20) % 251).astype("u1")
    if left.capabilities.in_place:
        with pytest.raises(MemoryBudgetExceeded):
            left.send(big)
        left.send(1)
        assert right.receive(FOREVER) == 1
        return
    job = right.start(
        lambda end: np.array_equal(end.receive(FOREVER), (np.arange(12 << 20) % 251).astype("u1"))
    )
    left.send(big, FOREVER)
    assert job.result()


# --- waking --------------------------------------------------------------------------------------


def test_a_waiting_receiver_is_woken(ends):
    left, right = ends
    job = right.start(echo, 1)
    time.sleep(0.02)  # it is likely to wait by now; right in any case
    left.send("wake up")
    assert left.receive(FOREVER) == "wake up"
    job.result()


def test_a_waiting_sender_is_woken(ends):
    left, right = ends
    sent = fill(left, BLOCK)
    job = in_thread(left.send, BLOCK, FOREVER)
    assert right.run(drain_all, sent + 1) == sent + 1
    job.result()


def test_a_partner_who_waits_to_send_is_woken(ends):
    left, right = ends
    sent = right.run(fill, BLOCK)
    job = right.start(lambda end: end.send(BLOCK, FOREVER))
    assert drain_all(left, sent + 1) == sent + 1
    job.result()


def seconds_of_waiting(end, what):
    """The CPU time that a call needs for half a second of waiting."""
    call = end.receive if what == "receive" else lambda timeout: end.send(BLOCK, timeout)
    start = time.thread_time()
    with pytest.raises(Timeout):
        call(0.5)
    return time.thread_time() - start


def test_who_waits_uses_no_cpu(ends):
    left, right = ends
    sent = fill(left, BLOCK)
    there = right.run(fill, BLOCK)
    job = right.start(seconds_of_waiting, "send")
    assert seconds_of_waiting(left, "send") < 0.1
    assert job.result() < 0.1
    right.run(drain_all, sent)
    drain_all(left, there)
    job = right.start(seconds_of_waiting, "receive")
    assert seconds_of_waiting(left, "receive") < 0.1
    assert job.result() < 0.1


# --- threads -------------------------------------------------------------------------------------


def receive_in_threads(end, count):
    """Receive in so many threads until there is a None for each; return the numbers that each got."""

    def receive():
        mine = []
        while (obj := end.receive(FOREVER)) is not None:
            assert is_message(obj)
            mine.append(number_of(obj))
        return mine

    return run(*[receive] * count)


def test_threads_share_the_ends(make_channel):
    left, right = make_channel(
        buffer_bytes="32 MiB"
    )  # each receiver keeps what it has until the next one comes
    senders, receivers, count = 3, 3, 60

    def send(who):
        for number in range(count):
            left.send(message(who * 1000 + number), FOREVER)

    job = right.start(receive_in_threads, receivers)
    run(*(lambda who=who: send(who) for who in range(senders)))
    for _ in range(receivers):
        left.send(None)
    received = job.result()
    assert sorted(sum(received, [])) == [
        who * 1000 + number for who in range(senders) for number in range(count)
    ]
    for mine in received:
        for who in range(senders):
            numbers = [number for number in mine if number // 1000 == who]
            assert numbers == sorted(numbers)


def test_a_timeout_holds_while_another_thread_waits(ends):
    left, right = ends
    job = in_thread(left.receive)
    poll_until(lambda: not left._receiving.take_idle() or left._receiving.leave(), what="it waits")
    with pytest.raises(WouldBlock):
        left.try_receive()
    with pytest.raises(Timeout):
        left.receive(0.06)
    left.send("the other direction is free")
    assert right.receive(FOREVER) == "the other direction is free"
    right.send("enough")
    assert job.result() == "enough"


# --- both send more than the buffers hold ----------------------------------------------------------


def send_until_full(end, limit=10_000):
    for sent in range(limit):
        try:
            end.send(BLOCK, 0.05)
        except Timeout:
            return sent
    raise AssertionError("never full")


def test_a_way_out_timeouts(ends):
    """Both get `Timeout`, of what they could not send nothing arrives, and after receiving they go on."""
    left, right = ends
    job = right.start(send_until_full)
    to_right, to_left = send_until_full(left), job.result()
    right.run(drain_all, to_right)
    drain_all(left, to_left)
    for end in ends:
        with pytest.raises(WouldBlock):
            end.try_receive()
    for sender, receiver in ((left, right), (right, left)):
        sender.send("on", FOREVER)
        assert receiver.receive(FOREVER) == "on"


def a_thread_for_each_direction(end):
    def send():
        for _ in range(600):
            end.send(BLOCK, FOREVER)

    return run(send, lambda: drain_all(end, 600))


def test_a_way_out_a_thread_for_each_direction(ends):
    left, right = ends
    job = right.start(a_thread_for_each_direction)
    assert a_thread_for_each_direction(left) == [None, 600]
    assert job.result() == [None, 600]


def talk_at_once(end):
    """Send and receive 600 blocks, in turn, receiving whenever there is no room."""
    sent = received = 0
    while sent < 600 or received < 600:
        try:
            if sent < 600:
                end.send(BLOCK, 0.005 if received < 600 else FOREVER)
                sent += 1
                continue
        except Timeout:
            pass
        while received < 600:
            try:
                assert np.array_equal(end.receive(0 if sent < 600 else FOREVER), BLOCK)
            except WouldBlock:
                break
            received += 1
    return sent, received


def test_a_way_out_in_turn(ends):
    left, right = ends
    job = right.start(talk_at_once)
    assert talk_at_once(left) == (600, 600)
    assert job.result() == (600, 600)
