"""Channels over shared memory: what only this mechanism has. The contract of all is in tests/conformance."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import threading
from contextlib import contextmanager

import numpy as np
import pytest

from shmengine._native import lib
from shmengine.channels import channel
from shmengine.errors import (
    ArrayError,
    Closed,
    Corrupt,
    EndOfStream,
    MemoryBudgetExceeded,
    PeerLost,
    SerializationError,
    Timeout,
    UseAfterFork,
    WouldBlock,
)
from tests.helpers.arrays import LAYOUTS, filled, same_bytes
from tests.helpers.scripts import poll_until

FOREVER = 30
METHODS = ["fork", "spawn", "forkserver"]


@contextmanager
def ends(**options):
    left, right = channel("shm", **{"buffer_bytes": "4 MiB", **options})
    try:
        yield left, right
    finally:
        left.close()
        right.close()


@pytest.fixture
def pair():
    with ends() as made:
        yield made


def in_child(work):
    """Fork, work, and be killed."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    return pid


def assert_memory_is_whole(end):
    """What this end has sent is released, and nothing is leased from it."""
    counters = end._link.sender._region.counters()
    assert (counters.used, counters.held, counters.pins) == (0, 0, 0)


# --- what arrives ----------------------------------------------------------------------------------


def test_an_array_is_a_view_and_its_memory_goes_with_the_last_one(pair):
    left, right = pair
    left.send(np.arange(10_000))
    array = right.receive(FOREVER)
    assert array.tolist() == list(range(10_000))
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.flags.writeable = True
    part = array[5:]
    del array
    held = left._link.sender._region.leases()
    assert held == {os.getpid(): 1}
    assert part[0] == 5
    del part
    assert_memory_is_whole(left)


def test_arrays_in_an_object_are_views(pair):
    left, right = pair
    left.send({"a": np.arange(1000), "b": [np.ones((3, 4)).T], "c": "text"})
    got = right.receive(FOREVER)
    assert got["a"].tolist() == list(range(1000))
    assert not got["a"].flags.writeable
    kept = got["b"][0]
    del got
    assert left._link.sender._region.leases()
    assert kept.tolist() == np.ones((4, 3)).tolist()
    del kept
    assert_memory_is_whole(left)


@pytest.mark.parametrize(
    "obj", [b"", b"abc", bytes(200_000), "text", 3, None, (1, [2.5, {"k": b"v"}]), bytearray(b"x")]
)
def test_what_has_no_arrays_is_released_at_once(pair, obj):
    left, right = pair
    left.send(obj)
    got = right.receive(FOREVER)
    assert type(got) is type(obj)
    assert got == obj
    assert_memory_is_whole(left)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["<f8", ">i2", "M8[ns]", [("a", "<i4"), ("b", "S3")]])
def test_layouts(pair, layout, dtype):
    left, right = pair
    array = LAYOUTS[layout](np.dtype(dtype))
    left.send(array)
    got = right.receive(FOREVER)
    assert same_bytes(got, array)
    assert got.flags.f_contiguous == array.flags.f_contiguous or 0 in array.strides or not array.flags.forc


def test_a_dtype_that_takes_much_to_say(pair):
    left, right = pair
    array = filled((3,), [(f"a_long_name_of_a_field_{i}", "<f4") for i in range(20)])
    left.send(array)
    assert same_bytes(right.receive(FOREVER), array)
    with left.claim(array.shape, array.dtype) as frame:
        frame[...] = array
    with right.lease(FOREVER) as frame:
        assert same_bytes(frame, array)


def test_pickles_are_refused_where_they_are_not_allowed():
    with ends(allow_pickle=False) as (left, right):
        with pytest.raises(SerializationError):
            left.send({1, 2})
        for obj in (b"bytes", {"a": np.ones(3)}, np.asfortranarray(np.ones((2, 3)))):
            left.send(obj)
        assert right.receive(FOREVER) == b"bytes"
        assert right.receive(FOREVER)["a"].tolist() == [1, 1, 1]
        assert right.receive(FOREVER).shape == (2, 3)


# --- in place --------------------------------------------------------------------------------------


def test_filled_and_read_in_place(pair):
    left, right = pair
    with left.claim((3, 4), "f4", timeout=FOREVER) as frame:
        frame[...] = np.arange(12).reshape(3, 4)
    with right.lease(timeout=FOREVER) as frame:
        assert frame.tolist() == np.arange(12).reshape(3, 4).tolist()
        assert frame.dtype == "f4"
    with right.claim(2, timeout=FOREVER) as frame:
        frame[:] = 7
    assert left.receive(FOREVER).tolist() == [7, 7]
    left.send(np.ones(3))
    left.send(np.asfortranarray(np.ones((2, 3))))
    with right.lease(FOREVER) as frame:
        assert frame.tolist() == [1, 1, 1]
    with right.lease(FOREVER) as frame:
        assert frame.flags.f_contiguous
    assert_memory_is_whole(left)
    sent, received = left.stats(), right.stats()
    assert (sent.messages_sent, sent.messages_received) == (3, 1)
    assert (received.messages_sent, received.messages_received) == (1, 3)
    assert sent.bytes_sent == received.bytes_received
    assert sent.bytes_received == received.bytes_sent == 16


def test_an_aborted_claim_is_not_sent(pair):
    left, right = pair
    with pytest.raises(ZeroDivisionError), left.claim(3):
        raise ZeroDivisionError
    assert right.try_lease() is None
    assert_memory_is_whole(left)


def test_a_lease_of_what_is_no_array_leaves_it_to_receive(pair):
    left, right = pair
    for obj in (b"first", {"second": np.ones(3)}, np.arange(3)):
        left.send(obj)
    for lease in (right.lease, right.try_lease, right.lease):
        with pytest.raises(ArrayError, match="no array"):
            lease()
    assert right.receive(FOREVER) == b"first"
    with pytest.raises(ArrayError, match="no array"):
        right.lease(0)
    assert right.receive(FOREVER)["second"].tolist() == [1, 1, 1]
    with right.lease(FOREVER) as frame:
        assert frame.tolist() == [0, 1, 2]
    assert_memory_is_whole(left)
    assert right.stats().messages_received == 3


def test_nothing_to_lease_and_no_room_to_claim():
    with ends(buffer_bytes="2 MiB") as (left, right):
        assert right.try_lease() is None
        with pytest.raises(WouldBlock):
            right.lease(0)
        with pytest.raises(Timeout):
            right.lease(0.01)
        with pytest.raises(ValueError, match="timeout"):
            right.lease(-1)
        claims = []
        while (claim := left.try_claim((512 << 10,), "u1")) is not None:
            claims.append(claim)
        with pytest.raises(WouldBlock):
            left.claim((512 << 10,), "u1", 0)
        with pytest.raises(Timeout):
            left.claim((512 << 10,), "u1", 0.01)
        del claims, claim
        for _ in range(1000):
            if (claim := left.try_claim(1)) is None:
                break
            claim.commit()
        claim = left.claim(1, timeout=0)
        with pytest.raises(WouldBlock):
            claim.commit()
        with pytest.raises(Timeout, match="messages wait"):
            left.claim(1, timeout=0.01).commit()


def test_larger_than_everything(pair):
    left, right = pair
    for send in (
        lambda: left.send(bytes(5 << 20)),
        lambda: left.send(np.zeros(5 << 20, "u1")),
        lambda: left.send({"a": np.zeros(5 << 20, "u1")}),
        lambda: left.claim((5 << 20,), "u1"),
    ):
        with pytest.raises(MemoryBudgetExceeded, match=r"5 MiB.* 4 MiB: raise buffer_bytes="):
            send()
    left.send(1)
    assert right.receive(FOREVER) == 1
    assert_memory_is_whole(left)


def test_a_timeout_says_who_keeps_the_memory(pair):
    left, right = pair
    left.send(np.zeros(3 << 20, "u1"))
    kept = right.receive(FOREVER)
    with pytest.raises(Timeout, match=rf"process {os.getpid()} has not yet let go of 1"):
        left.send(np.zeros(3 << 20, "u1"), 0.01)
    with pytest.raises(Timeout, match=rf"process {os.getpid()} has not yet let go of 1"):
        left.claim(3 << 20, "u1", 0.01)
    del kept
    left.send(np.zeros(3 << 20, "u1"), FOREVER)


def test_one_that_was_given_up_is_not_sent(pair):
    left, right = pair
    sent = 0
    with pytest.raises(WouldBlock):
        while True:
            left.try_send(sent)
            sent += 1
    link = left._link
    message = link.encode(b"given up")
    assert not link.send(message, 0, 0)
    # Its sender was interrupted before it could take it back.
    assert right.receive(FOREVER) == 0
    left.send(b"next")
    assert [right.receive(FOREVER) for _ in range(sent - 1)] == list(range(1, sent))
    assert right.receive(FOREVER) == b"next"
    assert_memory_is_whole(left)


# --- checks ----------------------------------------------------------------------------------------


def damage_last(end):
    """Change a byte of the only message on its way."""
    region = end._link.sender._region
    at = bytes(region.memory).rindex(b"MARK")
    region.memory[at] ^= 0xFF


@pytest.mark.parametrize(
    ("check", "obj"),
    [
        ("frame", b"MARK"),
        ("frame", ["MARK"]),
        ("payload", b"MARK" * 50_000),
        ("payload", np.frombuffer(b"MARK", "u1")),
        ("payload", {"a": np.frombuffer(b"MARK" * 1000, "u1")}),
    ],
)
def test_a_changed_byte(check, obj):
    with ends(check=check) as (left, right):
        left.send(obj)
        damage_last(left)
        with pytest.raises(Corrupt):
            right.receive(FOREVER)
        left.send(5)
        assert right.receive(FOREVER) == 5
        assert right.stats().corrupt == 1
        assert_memory_is_whole(left)


def test_a_changed_byte_is_seen_in_place():
    with ends(check="payload") as (left, right):
        left.send(np.frombuffer(b"MARK", "u1"))
        damage_last(left)
        with pytest.raises(Corrupt):
            right.lease(FOREVER)
        assert right.stats().corrupt == 1


def test_a_message_of_no_kind(pair):
    left, right = pair
    sender = left._link
    left.send(1)
    assert right.receive(FOREVER) == 1
    block = sender.sender._block
    block.kind, block.length, block.spec_bytes = 77, 3, 0
    assert lib.shmr_send(sender.sender._h, 0, 0, 0, b"abc", block) == 0
    with pytest.raises(Corrupt, match="kind 77"):
        right.receive(FOREVER)
    assert_memory_is_whole(left)


def test_what_cannot_be_compressed():
    for compression in ("lz4", "zstd"):
        with pytest.raises(ValueError, match="shared memory"):
            channel("shm", compression=compression)
    with ends(compression="auto") as (left, right):
        left.send(1)
        assert right.receive(FOREVER) == 1


# --- the end, and deaths ---------------------------------------------------------------------------


def test_claims_and_leases_after_a_close(pair):
    left, right = pair
    left.send(np.ones(3))
    claim, lease = left.claim, right.lease
    claim(3).abort()
    claim, lease = left.claim, right.lease  # now those of the handles
    left.close()
    for call in (left.claim, claim):
        with pytest.raises(Closed):
            call(3)
    with lease(FOREVER) as frame:
        assert frame.tolist() == [1, 1, 1]
    for call in (right.lease, lambda: lease(FOREVER), right.try_lease, right.receive):
        with pytest.raises(EndOfStream):
            call()
    with pytest.raises(EndOfStream):
        right.claim(3).commit()
    with pytest.raises(EndOfStream):
        right.send(b"x")
    right.close()
    with pytest.raises(Closed):
        lease()


def test_a_close_wakes_who_waits_in_place(pair):
    left, right = pair
    left.claim(1).abort()  # it is in use: else nobody has anything to close
    outcome = []

    def wait():
        with pytest.raises(EndOfStream):
            right.lease()
        outcome.append("it ended")

    thread = threading.Thread(target=wait)
    thread.start()
    poll_until(lambda: right._pid, what="it has begun")
    left.close()
    thread.join()
    assert outcome


def test_arrays_outlive_both_ends(pair):
    left, right = pair
    left.send(np.arange(1000))
    left.send({"a": np.arange(1000)})
    array, other = right.receive(FOREVER), right.receive(FOREVER)["a"]
    left.close()
    right.close()
    gc.collect()
    assert array.tolist() == other.tolist() == list(range(1000))


def send_and_die(end, kind):
    for i in range(20):
        if kind == "claim":
            with end.claim(100, "i8", FOREVER) as frame:
                frame[:] = i
        else:
            end.send(np.full(100, i), FOREVER)
    if kind == "claim":
        end.claim(1000, "i8", FOREVER)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["claim", "send"])
def test_what_the_dead_have_sent_arrives(pair, method, kind):
    left, right = pair
    child = multiprocessing.get_context(method).Process(target=send_and_die, args=(right, kind))
    child.start()
    right.close()
    for i in range(20):
        with left.lease(FOREVER) as frame:
            assert (frame == i).all()
    for call in (left.lease, left.try_lease, left.receive):
        with pytest.raises(PeerLost):
            call()
    child.join()
    with pytest.raises(PeerLost):
        while True:
            left.claim(1000, "i8", FOREVER).commit()
    with pytest.raises(PeerLost):
        left.send(1)


def test_a_receiver_dies_that_holds_the_memory():
    with ends(buffer_bytes="2 MiB") as (left, right):

        def hold():
            right.receive(FOREVER)
            kept.append(right.receive(FOREVER))

        kept = []
        left.send(np.zeros(900 << 10, "u1"))
        left.send(np.zeros(900 << 10, "u1"))
        child = in_child(hold)
        right.close()
        with pytest.raises(PeerLost):
            while True:
                left.send(np.zeros(900 << 10, "u1"), FOREVER)
        os.waitpid(child, 0)


def test_whoever_waits_for_one_who_has_not_begun_goes_on(pair):
    """Alone in the region, as after the death of all others: that says nothing about the other end."""
    left, right = pair
    with pytest.raises(Timeout):
        left.lease(0.3)  # longer than the core sleeps without a look
    right.send(np.ones(1))
    with left.lease(FOREVER):
        pass


def test_the_child_of_its_user_cannot_use_it(pair):
    left, right = pair
    left.claim(3).abort()
    claim = left.claim
    left.send(np.ones(3))
    right.lease(FOREVER).release()

    def use():
        for call in (lambda: left.claim(3), lambda: claim(3), lambda: left.send(1), lambda: right.lease(0)):
            with pytest.raises(UseAfterFork):
                call()
        left.close()
        right.close()
        os._exit(0)

    pid = os.fork()
    if pid == 0:
        try:
            use()
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    left.send(b"still")
    assert right.receive(FOREVER) == b"still"


def test_one_way():
    with ends(duplex=False) as (left, right):
        with left.claim(3) as frame:
            frame[:] = 1
        with right.lease(FOREVER) as frame:
            assert frame.tolist() == [1, 1, 1]
        for call in (left.lease, lambda: right.claim(3), left.try_lease, lambda: right.try_claim(3)):
            with pytest.raises(OSError, match="duplex"):
                call()


def echo(left, right):
    """Both ends in one child."""
    left.send(1)
    right.send(left_of := right.receive(FOREVER))
    assert left.receive(FOREVER) == left_of


@pytest.mark.parametrize("method", METHODS)
def test_both_ends_go_to_one_child(method):
    left, right = channel("shm")
    child = multiprocessing.get_context(method).Process(target=echo, args=(left, right))
    child.start()
    child.join()
    assert child.exitcode == 0
    left.close()
    right.close()


def test_an_end_in_use_is_not_passed_on(pair):
    left, right = pair
    again = pickle.loads(pickle.dumps(right))
    left.claim(3).abort()
    with pytest.raises(SerializationError):
        pickle.dumps(left)
    left.send(b"x")
    assert again.receive(FOREVER) == b"x"
    with pytest.raises(UseAfterFork):
        right.receive(0)
    again.close()


def test_threads_share_an_end(pair):
    left, right = pair
    got = [[] for _ in range(3)]

    def take(into):
        for array in right:
            into.append(int(array[0]))

    def give(number):
        for i in range(300):
            if i % 2:
                left.send(np.array([number * 1000 + i]))
            else:
                with left.claim(1, int, FOREVER) as frame:
                    frame[0] = number * 1000 + i

    takers = [threading.Thread(target=take, args=(into,)) for into in got]
    givers = [threading.Thread(target=give, args=(number,)) for number in range(3)]
    for thread in (*takers, *givers):
        thread.start()
    for thread in givers:
        thread.join()
    left.close()
    for thread in takers:
        thread.join()
    assert sorted(sum(got, [])) == [number * 1000 + i for number in range(3) for i in range(300)]
    for each in got:
        for number in range(3):
            mine = [value for value in each if value // 1000 == number]
            assert mine == sorted(mine)


@pytest.mark.parametrize("shape", [1 << 62, 1 << 63, 1 << 70, (1 << 32, 1 << 32), (1 << 62, 0)])
def test_an_array_that_no_memory_could_hold_is_too_large(shape):
    with ends() as (left, _):
        for claim in (left.claim, left.try_claim):
            with pytest.raises(MemoryBudgetExceeded, match="buffer_bytes"):
                claim(shape, "f8")


@pytest.mark.parametrize("shape", [1.5, (2, 1.5), "3", None, float("inf")])
def test_a_shape_is_made_of_whole_numbers(shape):
    with ends() as (left, _), pytest.raises(ArrayError, match="no array has shape"):
        left.claim(shape)
