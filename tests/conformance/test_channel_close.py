"""Closing: the other end gets what was sent and then `EndOfStream`, whoever closes, whenever, and in whatever way."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pickle
import resource
import sys
import threading

import numpy as np
import pytest

from shmengine import (
    Closed,
    EndOfStream,
    Engine,
    PeerLost,
    SerializationError,
    Timeout,
    UseAfterFork,
    WouldBlock,
)
from tests.helpers.channels import FOREVER, drain, fill, is_message, make_pair, message, number_of, trip
from tests.helpers.partners import STARTS, Child, in_thread

INHERITS = True
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


def test_before_any_use(ends):
    left, right = ends
    left.close()
    assert_closed(left)
    right.run(assert_ended)


def test_before_any_use_there(ends):
    left, right = ends
    right.close()
    right.run(assert_closed)
    assert_ended(left)


def test_after_sending(ends):
    left, right = ends
    for number in range(22):
        trip(left, right, message(number))
    left.send_many(message(number) for number in range(22, 25))
    left.close()
    for number in range(22, 25):
        obj = right.receive(FOREVER)
        assert is_message(obj)
        assert number_of(obj) == number
    right.run(assert_ended)
    assert_closed(left)


def send_and_close(end, count):
    for number in range(count):
        end.send(message(number), FOREVER)
    end.close()


def test_after_a_partner_has_sent(ends):
    left, right = ends
    job = right.start(send_and_close, 25)
    got = list(left)
    assert [number_of(obj) for obj in got] == list(range(25))
    assert all(map(is_message, got))
    job.result()
    assert_ended(left)
    right.run(assert_closed)


def test_when_the_other_end_was_never_used(ends):
    left, right = ends
    left.send_many([1, BLOCK, 2], FOREVER)
    left.close()
    assert right.receive(FOREVER) == 1
    assert np.array_equal(right.receive(FOREVER), BLOCK)
    assert right.receive(FOREVER) == 2
    right.run(assert_ended)


def test_with_messages_waiting_for_who_closes(ends):
    left, right = ends
    right.send_many([1, 2, 3])
    assert left.receive(FOREVER) == 1
    left.close()
    assert_closed(left)
    right.run(assert_ended)


def test_a_full_channel(ends):
    """A goodbye needs no room."""
    left, right = ends
    sent = fill(left, BLOCK)
    with pytest.raises(Timeout):
        left.send(np.ones(3_000_000, "u1"), 0.02)
    left.close()
    got = right.run(list)
    assert len(got) == sent
    assert all(np.array_equal(obj, BLOCK) for obj in got)
    right.run(assert_ended)


def test_both_ends(ends):
    left, right = ends
    left.send(1)
    right.send(2)
    left.close()
    right.close()
    assert_closed(left)
    right.run(assert_closed)


def receive_all(end):
    end.send("ready")
    return list(end)


def test_the_end_is_seen_while_receiving(ends):
    left, right = ends
    job = right.start(receive_all)
    assert left.receive(FOREVER) == "ready"
    left.send_many(range(10))
    left.close()
    assert job.result() == list(range(10))


def test_the_end_is_seen_while_sending(ends):
    left, right = ends
    fill(left, BLOCK)
    job = in_thread(lambda: left.send(BLOCK))
    right.close()
    with pytest.raises(EndOfStream, match="nobody would receive"):
        job.result()


def test_the_end_is_seen_while_a_partner_sends(ends):
    left, right = ends
    right.run(fill, BLOCK)
    job = right.start(lambda end: end.send(BLOCK))
    left.close()
    with pytest.raises(EndOfStream, match="nobody would receive"):
        job.result()


@pytest.mark.parametrize("timeout", [None, FOREVER])
def test_while_another_thread_waits(ends, timeout):
    left, right = ends
    sent = fill(left, BLOCK)
    jobs = [
        in_thread(left.receive, timeout),
        in_thread(left.send, BLOCK, timeout),
        in_thread(left.receive, timeout),
    ]
    left.close()
    for job in jobs:
        with pytest.raises(Closed):
            job.result()
    assert_closed(left)
    assert len(list(right)) == sent
    right.run(assert_ended)


def leave_a_block_by_an_error(end):
    with pytest.raises(ZeroDivisionError), end:
        _ = 1 / 0
    assert end.closed


def test_leaving_a_with_block(ends):
    left, right = ends
    with left as same:
        assert same is left
        left.send(1)
    assert_closed(left)
    assert list(right) == [1]
    right.run(leave_a_block_by_an_error)


def test_leaving_a_with_block_there(ends):
    left, right = ends
    right.run(leave_a_block_by_an_error)
    assert_ended(left)


def test_an_end_that_nobody_has_any_more(mechanism, take):
    for objs in ([1, 2], []):
        left, right = make_pair(mechanism)
        left.send_many(objs)
        right = take(right)
        del left
        gc.collect()
        assert list(right) == objs
        right.run(assert_ended)


def test_an_end_that_a_partner_has_no_more(mechanism, take):
    """One that was inherited by a fork is kept by whoever had it there."""
    for objs in ([1, 2], []):
        left, right = make_pair(mechanism)
        with left:
            right = take(right, pickled=True)
            right.send_many(objs)
            right.drop()
            assert list(left) == objs
            assert_ended(left)


# --- ends of processes -----------------------------------------------------------------------------


def leave(end, way, count, *, keep=True):
    """Use an end, keep it, and end the process in some way."""
    if keep:
        leave.kept = end
    for number in range(count):
        end.send(message(number), FOREVER)
    if way == "os._exit":
        os._exit(3)
    if way == "sys.exit":
        sys.exit(0)
    if way == "error":
        raise ArithmeticError


@contextlib.contextmanager
def leaving(how, end, way, count):
    """Whoever has an end leaves with it; a thread is the last who has it."""
    if how == "worker":
        with Engine(1, memory="64 MiB", retries=0) as engine:
            job = engine.submit(leave, end, way, count)
            job.exception(FOREVER)  # whatever a task raises, its worker goes on
            end.close()
            closing = in_thread(engine.close)
            yield
            closing.result()
    elif how == "thread":
        job = in_thread(leave_in_a_thread, [end], way, count)
        del end
        yield
        job.result()
    else:
        process = multiprocessing.get_context(how).Process(target=leave, args=(end, way, count))
        process.start()
        end.close()
        yield
        process.join()
        assert process.exitcode == {"os._exit": 3}.get(way, 0)
        process.close()


# To begin an interpreter for each would take long; whatever a task raises, its worker goes on.
WAYS = {
    "thread": ["return", "sys.exit"],
    "fork": ["return", "sys.exit"],
    "spawn": ["sys.exit"],
    "worker": ["return"],
}


def leave_in_a_thread(holder, way, count):
    with contextlib.suppress(SystemExit):
        leave(holder.pop(), way, count, keep=False)
    gc.collect()


def test_the_normal_end_of_a_process_closes(mechanism, how):
    """And that of a thread, if nothing else has its end."""
    for way in WAYS[how]:
        left, *right = make_pair(mechanism)
        with left, leaving(how, right.pop(), way, 7):
            assert [number_of(obj) for obj in left] == list(range(7))
            assert_ended(left)


@pytest.mark.parametrize("how", [how for how, start in STARTS.items() if start.own_process])
def test_os_exit_is_a_death(mechanism, how):
    left, right = make_pair(mechanism)
    with left, leaving(how, right, "os._exit", 7):
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


def test_the_parents_end_in_a_forked_child(ends):
    left, right = ends
    left.send("first")
    child = Child(try_out, left)
    assert child.outcome() == (True, ["not here"] * 3)
    left.send("second")
    right.send("back")
    assert right.run(drain, 2) == ["first", "second"]
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


def test_closing_copies_of_ends_in_use_harms_nobody(ends):
    """Neither in the child nor, where the other one is elsewhere, here."""
    left, right = ends
    left.send(1)
    right.send(2)
    for _ in range(2):
        assert Child(close_copies, left).outcome()[0]
    holder = [left]
    assert Child(collect_copies, holder).outcome()[0]
    assert right.receive(FOREVER) == 1
    assert left.receive(FOREVER) == 2
    assert Child(lambda: None).outcome()[0]  # and one that just ends
    left.send(3)
    assert right.receive(FOREVER) == 3
    with pytest.raises(WouldBlock):
        right.try_receive()


def test_closing_copies_of_both_ends_harms_nobody(mechanism, take):
    for used in (True, False):
        left, right = make_pair(mechanism)
        with left:
            if used:
                left.send(1)
            assert Child(close_copies, left, right).outcome()[0]
            assert Child(collect_copies, [left, right]).outcome()[0]
            right = take(right)
            if not used:
                left.send(1)
            assert right.receive(FOREVER) == 1
            right.close()
            assert_ended(left)


def test_a_child_that_outlives_an_end_of_its_parents(ends):
    """What the child has inherited keeps nothing open."""
    left, right = ends
    left.send(1)
    gate, opened = os.pipe()
    child = Child(lambda: os.read(gate, 1) and None)
    left.close()
    assert list(right) == [1]
    right.run(assert_ended)
    os.write(opened, b"x")
    assert child.outcome()[0]
    os.close(gate)
    os.close(opened)


def test_two_that_want_one_end(mechanism, take, how):
    """The second process gets an error; threads of one may both use it."""
    left, right = make_pair(mechanism)
    with left, right:
        first = take(pickle.loads(pickle.dumps(right))) if STARTS[how].own_process else take(right)
        first.send("mine")
        if STARTS[how].own_process:
            with pytest.raises(UseAfterFork, match="another process"):
                right.send(1)
        other = Child(try_out, right)
        assert other.outcome() == (True, ["not here"] * 3)
        first.send("still mine")
        assert drain(left, 2) == ["mine", "still mine"]
        first.close()
        assert_ended(left)


def test_an_end_in_use_is_not_passed_on(mechanism, take):
    left, right = make_pair(mechanism)
    with left, right:
        left.send(1)
        with pytest.raises(SerializationError, match="before its first use"):
            pickle.dumps(left)
        copy = take(pickle.loads(pickle.dumps(right)))
        right.close()
        assert copy.receive(FOREVER) == 1
        copy.close()
        assert_ended(left)


def begin_in_threads(end):
    """Four threads use an end for the first time, at the same moment."""
    barrier = threading.Barrier(4)

    def use(number):
        barrier.wait()
        end.send(number)
        with contextlib.suppress(WouldBlock):
            end.try_receive()

    for job in [in_thread(use, number) for number in range(4)]:
        job.result()


def test_threads_that_begin_at_the_same_time(make_channel):
    for _ in range(20):
        left, right = make_channel()
        right.run(begin_in_threads)
        assert sorted(drain(left, 4)) == [0, 1, 2, 3]
        begin_in_threads(left)
        assert sorted(right.run(drain, 4)) == [0, 1, 2, 3]
        left.close()
        right.leave()


def close_without_descriptors(end):
    taken = []
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        end.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for fd in taken:
            os.close(fd)
    assert end.closed


def test_close_needs_no_free_descriptor(ends):
    left, right = ends
    trip(left, right, BLOCK)
    close_without_descriptors(left)
    right.run(assert_ended)


def test_close_there_needs_no_free_descriptor(ends):
    left, right = ends
    trip(left, right, BLOCK)
    right.run(close_without_descriptors)
    assert_ended(left)


def test_a_forked_child_closes_what_its_parent_is_just_closing(ends):
    left, right = ends
    trip(left, right, BLOCK)
    held, done = threading.Event(), threading.Event()

    def hold():
        with left._closing:
            held.set()
            done.wait()

    job = in_thread(hold)
    held.wait()
    pid = os.fork()
    if pid == 0:
        left.close()
        os._exit(0)
    done.set()
    job.result()
    assert os.waitpid(pid, 0)[1] == 0
    trip(left, right, BLOCK)
