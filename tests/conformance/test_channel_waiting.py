"""Waiting for the other end: timeouts, a full channel, threads; what was not sent in time was not sent at all."""

from __future__ import annotations

import collections
import threading
import time

import numpy as np
import pytest

from shmengine import MemoryBudgetExceeded, Timeout, WouldBlock
from tests.helpers import poll_until
from tests.helpers.channels import FOREVER, drain, fill, is_message, message, number_of
from tests.helpers.partners import in_thread

BLOCK = (np.arange(20_000) % 251).astype("u1")
BUFFERS_BYTES = 64 << 20  # more than any channel here may hold


def run(*calls):
    """Call each in a thread of its own; return what they returned."""
    results = [None] * len(calls)

    def keep(place, call):
        try:
            results[place] = call()
        except BaseException as error:
            results[place] = error

    threads = [threading.Thread(target=keep, args=each) for each in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# --- timeouts ------------------------------------------------------------------------------------


def test_receive_with_nothing_there(ends_here):
    _, right = ends_here
    for call in (right.try_receive, lambda: right.receive(0)):
        with pytest.raises(WouldBlock):
            call()
    for seconds in (0.01, 0.12):
        start = time.monotonic()
        with pytest.raises(Timeout) as caught:
            right.receive(seconds)
        assert time.monotonic() - start >= seconds
        assert caught.value.seconds == seconds
        assert isinstance(caught.value, TimeoutError)


def test_send_when_full(ends_here):
    """Then nothing was sent, and the channel is as good as before."""
    left, right = ends_here
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
    for _ in range(sent):
        assert np.array_equal(right.receive(FOREVER), BLOCK)
    with pytest.raises(WouldBlock):
        right.try_receive()
    left.send("afterwards", FOREVER)
    assert right.receive(FOREVER) == "afterwards"
    assert right.stats().gaps == 0


def test_small_messages_fill_a_channel_too(make_channel_here):
    left, right = make_channel_here(buffer_bytes="1 MiB")
    sent = fill(left, b"x" * 500, limit=200_000)
    assert drain(right, sent) == [b"x" * 500] * sent
    with pytest.raises(WouldBlock):
        right.try_receive()


def test_of_what_was_given_up_nothing_arrives(ends_here):
    """Also when a part of it had already gone, again and again, between others."""
    left, right = ends_here
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
                got.append(int(right.receive(0)[0]))
            except WouldBlock:
                pass
    assert given_up

    def receive():
        while (array := right.receive(FOREVER)).size:
            assert (array == array[0]).all()
            got.append(int(array[0]))

    # What is left of the last one that was given up may still be in the way.
    assert run(lambda: left.send(np.empty(0), FOREVER), receive) == [None, None]
    assert got == expected
    assert right.stats().gaps == right.stats().corrupt == 0


def test_larger_than_all_buffers(make_channel_here):
    """Goes through in parts; where it has to lie in one piece, the error comes at once, and says how much there is."""
    left, right = make_channel_here(buffer_bytes="4 MiB")
    big = (np.arange(24 << 20) % 251).astype("u1")
    if left.capabilities.in_place:
        with pytest.raises(MemoryBudgetExceeded):
            left.send(big)
        left.send(1)
        assert right.receive(FOREVER) == 1
        return
    _, got = run(lambda: left.send(big, FOREVER), lambda: right.receive(FOREVER))
    assert np.array_equal(got, big)


# --- waking --------------------------------------------------------------------------------------


def receive_and_answer(end):
    end.send(end.receive(FOREVER), FOREVER)


def test_a_waiting_receiver_is_woken(ends_here, partners, how):
    left, right = ends_here
    job = partners.start(how, receive_and_answer, right)
    time.sleep(0.02)  # it is likely to wait by now; right in any case
    left.send("wake up")
    assert left.receive(FOREVER) == "wake up"
    job.result()


def test_a_waiting_sender_is_woken(ends_here, partners, how):
    left, right = ends_here
    sent = fill(left, BLOCK)
    job = in_thread(lambda end: end.send(BLOCK, FOREVER), left)
    other = partners.start(how, drain_all, right, sent + 1)
    job.result()
    assert other.result() == sent + 1


def drain_all(end, count):
    for _ in range(count):
        assert np.array_equal(end.receive(FOREVER), BLOCK)
    return count


def test_who_waits_uses_no_cpu(ends_here):
    left, right = ends_here
    sent = fill(left, BLOCK)

    def wait(call):
        start = time.thread_time()
        with pytest.raises(Timeout):
            call(0.5)
        return time.thread_time() - start

    for seconds in run(
        lambda: wait(left.receive),
        lambda: wait(lambda timeout: left.send(BLOCK, timeout)),
    ):
        assert seconds < 0.1
    drain(right, sent)


# --- threads -------------------------------------------------------------------------------------


def test_threads_share_the_ends(make_channel_here):
    left, right = make_channel_here(
        buffer_bytes="32 MiB"
    )  # each receiver keeps what it has until the next one comes
    senders, receivers, count = 3, 3, 60
    received = [[] for _ in range(receivers)]

    def receive(mine):
        while (obj := right.receive(FOREVER)) is not None:
            assert is_message(obj)
            mine.append(number_of(obj))

    def send(who):
        for number in range(count):
            left.send(message(who * 1000 + number), FOREVER)

    def send_all():
        run(*(lambda who=who: send(who) for who in range(senders)))
        for _ in range(receivers):
            left.send(None)

    errors = run(send_all, *(lambda mine=mine: receive(mine) for mine in received))
    assert errors == [None] * (1 + receivers)
    assert sorted(sum(received, [])) == [
        who * 1000 + number for who in range(senders) for number in range(count)
    ]
    for mine in received:
        for who in range(senders):
            numbers = [number for number in mine if number // 1000 == who]
            assert numbers == sorted(numbers)


def test_a_timeout_holds_while_another_thread_waits(ends_here):
    left, right = ends_here
    job = threading.Thread(target=left.receive)
    job.start()
    poll_until(lambda: not left._receiving.take_idle() or left._receiving.leave(), what="it waits")
    with pytest.raises(WouldBlock):
        left.try_receive()
    with pytest.raises(Timeout):
        left.receive(0.06)
    left.send("the other direction is free")
    assert right.receive(FOREVER) == "the other direction is free"
    right.send("enough")
    job.join()


# --- both send more than the buffers hold ----------------------------------------------------------


def send_until_full(end, limit=10_000):
    for sent in range(limit):
        try:
            end.send(BLOCK, 0.05)
        except Timeout:
            return sent
    raise AssertionError("never full")


def test_a_way_out_timeouts(ends_here):
    """Both get `Timeout`, of what they could not send nothing arrives, and after receiving they go on."""
    left, right = ends_here
    to_right, to_left = run(lambda: send_until_full(left), lambda: send_until_full(right))
    for end, count in ((right, to_right), (left, to_left)):
        for _ in range(count):
            assert np.array_equal(end.receive(FOREVER), BLOCK)
        with pytest.raises(WouldBlock):
            end.try_receive()
    for sender, receiver in ((left, right), (right, left)):
        sender.send("on", FOREVER)
        assert receiver.receive(FOREVER) == "on"


def test_a_way_out_a_thread_for_each_direction(ends_here):
    left, right = ends_here
    count = collections.Counter()

    def send(end):
        for _ in range(600):
            end.send(BLOCK, FOREVER)

    def receive(end):
        for _ in range(600):
            assert np.array_equal(end.receive(FOREVER), BLOCK)
            count[end] += 1

    results = run(lambda: send(left), lambda: send(right), lambda: receive(left), lambda: receive(right))
    assert results == [None] * 4
    assert count == {left: 600, right: 600}


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


def test_a_way_out_between_processes(ends_here, partners):
    left, right = ends_here
    job = partners.start("fork", talk_at_once, right)
    assert talk_at_once(left) == (600, 600)
    assert job.result() == (600, 600)
