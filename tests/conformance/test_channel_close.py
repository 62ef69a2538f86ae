"""Closing: the other end gets what was sent and then `EndOfStream`, whoever closes, whenever, and in whatever way."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import resource
import sys
import threading

import numpy as np
import pytest

from shmengine import Closed, EndOfStream, PeerLost, SerializationError, Timeout, UseAfterFork, WouldBlock
from tests.helpers import poll_until
from tests.helpers.channels import FOREVER, drain, fill, is_message, make_pair, message, number_of, trip
from tests.helpers.partners import Child, in_thread

BLOCK = (np.arange(20_000) % 251).astype("u1")


def assert_ended(end):
    """Nothing more comes, however often one asks, and nobody receives what would be sent."""
    for timeout in (FOREVER, 0, 0.01, None):
        with pytest.raises(EndOfStream):
            end.receive(timeout)
    with pytest.raises(EndOfStream):
        end.send("anybody there?", FOREVER)
    with pytest.raises(EndOfStream):
        end.try_send(b"")


def assert_closed(end):
    assert end.closed
    calls = [
        lambda: end.send(1),
        lambda: end.send(1, 0),
        lambda: end.try_send(1),
        lambda: end.send_many([1]),
        end.receive,
        lambda: end.receive(0),
        end.try_receive,
        lambda: next(iter(end)),
        lambda: end.asend(1).send(None),
        lambda: end.areceive().send(None),
        lambda: pickle.dumps(end),
    ]
    for call in calls:
        with pytest.raises(Closed):
            call()
    end.close()


# --- whoever closes, whenever ----------------------------------------------------------------------


def test_before_any_use(ends_here):
    left, right = ends_here
    left.close()
    assert_closed(left)
    assert_ended(right)


def test_after_sending(ends_here):
    left, right = ends_here
    for number in range(22):
        trip(left, right, message(number))
    left.send_many(message(number) for number in range(22, 25))
    left.close()
    for number in range(22, 25):
        obj = right.receive(FOREVER)
        assert is_message(obj)
        assert number_of(obj) == number
    assert_ended(right)
    assert_closed(left)


def test_when_the_other_end_was_never_used(ends_here):
    left, right = ends_here
    left.send_many([1, BLOCK, 2], FOREVER)
    left.close()
    assert right.receive(FOREVER) == 1
    assert np.array_equal(right.receive(FOREVER), BLOCK)
    assert right.receive(FOREVER) == 2
    assert_ended(right)


def test_with_messages_waiting_for_who_closes(ends_here):
    left, right = ends_here
    right.send_many([1, 2, 3])
    assert left.receive(FOREVER) == 1
    left.close()
    assert_closed(left)
    assert_ended(right)


def test_a_full_channel(ends_here):
    """A goodbye needs no room."""
    left, right = ends_here
    sent = fill(left, BLOCK)
    with pytest.raises(Timeout):
        left.send(np.ones(3_000_000, "u1"), 0.02)
    left.close()
    for _ in range(sent):
        assert np.array_equal(right.receive(FOREVER), BLOCK)
    assert_ended(right)


def test_both_ends(ends_here):
    left, right = ends_here
    left.send(1)
    right.send(2)
    left.close()
    right.close()
    assert_closed(left)
    assert_closed(right)


def test_the_end_is_seen_while_receiving(ends_here, partners):
    left, right = ends_here
    job = in_thread(list, right)
    left.send_many(range(10))
    poll_until(lambda: right.stats().messages_received == 10)
    left.close()
    assert job.result() == list(range(10))


def test_the_end_is_seen_while_sending(ends_here, partners):
    left, right = ends_here
    fill(left, BLOCK)
    job = in_thread(lambda end: end.send(BLOCK), left)
    right.close()
    with pytest.raises(EndOfStream, match="nobody would receive"):
        job.result()


@pytest.mark.parametrize("timeout", [None, FOREVER])
def test_while_another_thread_waits(ends_here, partners, timeout):
    left, right = ends_here
    sent = fill(left, BLOCK)
    jobs = [
        in_thread(lambda end: end.receive(timeout), left),
        in_thread(lambda end: end.send(BLOCK, timeout), left),
        in_thread(lambda end: end.receive(timeout), left),
    ]
    left.close()
    for job in jobs:
        with pytest.raises(Closed):
            job.result()
    assert_closed(left)
    assert len(list(right)) == sent
    assert_ended(right)


def test_leaving_a_with_block(ends_here):
    left, right = ends_here
    with left as same:
        assert same is left
        left.send(1)
    assert_closed(left)
    assert list(right) == [1]
    with pytest.raises(ZeroDivisionError), right:
        _ = 1 / 0
    assert right.closed


def test_an_end_that_nobody_has_any_more(mechanism):
    left, right = make_pair(mechanism)
    left.send_many([1, 2])
    del left
    gc.collect()
    assert list(right) == [1, 2]
    assert_ended(right)
    left, other = make_pair(mechanism)
    del left
    gc.collect()
    assert_ended(other)
    right.close()
    other.close()


# --- ends of processes -----------------------------------------------------------------------------


def collected(end):
    end.send_many([1, BLOCK])


def leave(end, way, count):
    """Use an end, keep it, and end the process in some way."""
    leave.kept = end
    for number in range(count):
        end.send(message(number), FOREVER)
    if way == "os._exit":
        os._exit(3)
    if way == "sys.exit":
        sys.exit(0)


@pytest.mark.parametrize("way", ["return", "sys.exit"])
def test_the_normal_end_of_a_process_closes(ends_here, way):
    left, right = ends_here
    child = Child(leave, right, way, 7)
    right.close()
    got = list(left)
    assert [number_of(obj) for obj in got] == list(range(7))
    assert_ended(left)
    child.end()


def test_os_exit_is_a_death(ends_here):
    left, right = ends_here
    child = Child(leave, right, "os._exit", 7)
    right.close()
    if left.capabilities.outlives_sender:
        assert [number_of(obj) for obj in drain(left, 7)] == list(range(7))
    else:
        with pytest.raises(PeerLost):
            drain(left, 8)
    for _ in range(2):
        with pytest.raises(PeerLost):
            left.receive(FOREVER)
        with pytest.raises(PeerLost):
            left.send(1, FOREVER)
    child.end()


@pytest.mark.parametrize("start", ["spawn", "worker"])
def test_a_process_that_lets_go_of_its_end(ends_here, partners, start):
    left, right = ends_here
    job = partners.start(start, collected, right)
    assert left.receive(FOREVER) == 1
    assert np.array_equal(left.receive(FOREVER), BLOCK)
    job.result()
    assert_ended(left)


# --- copies in forked children -----------------------------------------------------------------------


def try_out(end):
    """What a forked child sees that uses an end of its parent's."""
    said = []
    for call in (lambda: end.send(1), end.try_receive, lambda: end.send_many([1])):
        try:
            call()
        except UseAfterFork:
            said.append("not here")
    return said


def test_the_parents_end_in_a_forked_child(ends_here):
    left, right = ends_here
    left.send("first")
    child = Child(try_out, left)
    assert child.outcome() == (True, ["not here"] * 3)
    left.send("second")
    right.send("back")
    assert drain(right, 2) == ["first", "second"]
    assert left.receive(FOREVER) == "back"


def close_copies(*ends):
    for end in ends:
        end.close()
        end.close()
    with contextlib.suppress(Closed):
        ends[0].send("from a copy")


def collect_copies(holder):
    holder.clear()
    gc.collect()


def test_closing_copies_of_ends_in_use_harms_nobody(ends_here):
    left, right = ends_here
    left.send(1)
    right.send(2)
    for _ in range(2):
        assert Child(close_copies, left, right).outcome()[0]
    holder = [left, right]
    assert Child(collect_copies, holder).outcome()[0]
    assert right.receive(FOREVER) == 1
    assert left.receive(FOREVER) == 2
    assert Child(lambda: None).outcome()[0]  # and one that just ends
    left.send(3)
    assert right.receive(FOREVER) == 3
    with pytest.raises(WouldBlock):
        right.try_receive()


def test_closing_a_copy_of_an_unused_end_harms_nobody(ends_here):
    left, right = ends_here
    assert Child(close_copies, left, right).outcome()[0]
    left.send(1)
    assert right.receive(FOREVER) == 1
    right.close()
    assert_ended(left)


def test_a_child_that_outlives_an_end_of_its_parents(ends_here):
    """What the child has inherited keeps nothing open."""
    left, right = ends_here
    left.send(1)
    gate, opened = os.pipe()
    child = Child(lambda: os.read(gate, 1) and None)
    left.close()
    assert list(right) == [1]
    assert_ended(right)
    os.write(opened, b"x")
    assert child.outcome()[0]
    os.close(gate)
    os.close(opened)


def hold(end, ready, gate):
    end.send("mine")
    os.write(ready, b"x")
    os.read(gate, 1)
    end.send("still mine")


def test_two_processes_that_want_one_end(ends_here):
    left, right = ends_here
    gate, opened = os.pipe()
    heard, ready = os.pipe()
    child = Child(hold, right, ready, gate)
    assert os.read(heard, 1) == b"x"
    other = Child(try_out, right)
    assert other.outcome() == (True, ["not here"] * 3)
    with pytest.raises(UseAfterFork, match="another process"):
        right.send(1)
    os.write(opened, b"x")
    assert drain(left, 2) == ["mine", "still mine"]
    assert child.outcome()[0]
    assert_ended(left)
    for fd in (gate, opened, heard, ready):
        os.close(fd)


def test_an_end_in_use_is_not_passed_on(ends_here):
    left, right = ends_here
    left.send(1)
    with pytest.raises(SerializationError, match="before its first use"):
        pickle.dumps(left)
    copy = pickle.loads(pickle.dumps(right))
    right.close()
    assert copy.receive(FOREVER) == 1
    copy.close()
    assert_ended(left)


def test_threads_that_begin_at_the_same_time(make_channel_here):
    for _ in range(20):
        left, right = make_channel_here()
        barrier = threading.Barrier(4)
        errors = []

        def use(number, end=left, barrier=barrier, errors=errors):
            barrier.wait()
            try:
                end.send(number)
                with contextlib.suppress(WouldBlock):
                    end.try_receive()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert sorted(drain(right, 4)) == [0, 1, 2, 3]
        left.close()
        right.close()


def test_close_needs_no_free_descriptor(ends_here):
    left, right = ends_here
    trip(left, right, BLOCK)
    taken = []
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        left.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for fd in taken:
            os.close(fd)
    assert left.closed
    assert_ended(right)


def test_a_forked_child_closes_what_its_parent_is_just_closing(ends_here):
    left, right = ends_here
    trip(left, right, BLOCK)
    held, done = threading.Event(), threading.Event()

    def hold():
        with left._closing:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    pid = os.fork()
    if pid == 0:
        left.close()
        right.close()
        os._exit(0)
    done.set()
    thread.join()
    assert os.waitpid(pid, 0)[1] == 0
    trip(left, right, BLOCK)
