"""Every public method of the ring, and every error it can give."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import threading
import time

import numpy as np
import pytest

from shmengine._native import ffi, lib
from shmengine._native.status import OK, STALE
from shmengine.errors import (
    ArrayError,
    Closed,
    LeaseError,
    MemoryBudgetExceeded,
    Timeout,
    WouldBlock,
)
from shmengine.ring import Ring
from tests.helpers import shm_names
from tests.helpers.arrays import DTYPES, LAYOUTS, NO_DTYPES, filled, same_bytes
from tests.helpers.memory import assert_memory_is_whole

FOREVER = 30


@pytest.fixture
def ring():
    with Ring(4, "8 MiB") as made:
        yield made


# --- making --------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [0, -1, 2**20 + 1, 2.0, "4", None, True])
def test_capacity_out_of_range(capacity):
    with pytest.raises(ValueError, match="capacity"):
        Ring(capacity)


@pytest.mark.parametrize("arena", [0, "much", "1 XB", -5])
def test_arena_bytes_out_of_range(arena):
    with pytest.raises(ValueError, match=r"arena_bytes|size|negative|unit"):
        Ring(4, arena)


@pytest.mark.parametrize("wrong", ["", "a/b", "a\0b", "n" * 201])
def test_names_that_are_none(wrong):
    with pytest.raises(ValueError, match="name"):
        Ring(4, "2 MiB", wrong)


def test_check_is_one_of_two():
    with pytest.raises(ValueError, match="check"):
        Ring(4, "2 MiB", check="all")


def test_what_it_says_about_itself(ring):
    assert ring.capacity == 4
    assert ring.name is None
    assert not ring.closed
    assert repr(ring) == "<shmengine.Ring capacity=4 arena=8 MiB>"
    ring.close()
    assert ring.closed
    assert repr(ring) == "<shmengine.Ring closed>"


def test_an_unnamed_ring_has_no_name_in_dev_shm():
    before = shm_names()
    with Ring(4, "8 MiB") as ring:
        ring.send(np.arange(3))
        assert shm_names() == before
        assert ring.receive().tolist() == [0, 1, 2]


# --- claim, commit, lease, release -----------------------------------------------------------------


def test_one_message(ring):
    with ring.claim((2, 3), "i4") as frame:
        assert frame.shape == (2, 3)
        assert frame.dtype == np.int32
        assert frame.flags.writeable
        assert frame.flags.c_contiguous
        frame[...] = [[1, 2, 3], [4, 5, 6]]
        assert ring.approx_fill() == 0  # nobody sees it yet
    assert ring.approx_fill() == 1
    with ring.lease() as frame:
        assert frame.tolist() == [[1, 2, 3], [4, 5, 6]]
        assert not frame.flags.writeable
        assert ring.approx_fill() == 0
    assert_memory_is_whole(ring)


def test_float64_by_default_and_an_int_as_shape(ring):
    with ring.claim(3) as frame:
        assert (frame.shape, frame.dtype) == ((3,), np.float64)
        frame[:] = 1


def test_a_committed_array_can_no_longer_be_written(ring):
    claim = ring.claim(3)
    array = claim.array
    claim.commit()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(ring, dtype):
    source = filled((3, 2), dtype)
    ring.send(source)
    with ring.claim((3, 2), dtype) as frame:
        frame[...] = source
    for _ in range(2):
        with ring.lease() as frame:
            assert frame.dtype == source.dtype
            assert same_bytes(frame, source)


def test_a_spec_longer_than_a_descriptor_holds(ring):
    dtype = np.dtype([(f"a field with quite a long name {i}", "i4") for i in range(200)])
    source = filled((5,), dtype)
    for _ in range(10):
        ring.send(source)
        with ring.claim((5,), dtype) as frame:
            frame[...] = source
        with ring.lease() as frame:
            assert frame.dtype == dtype
            assert same_bytes(frame, source)
        assert same_bytes(ring.receive(), source)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_send_takes_every_layout(ring, layout):
    source = LAYOUTS[layout](np.dtype("f4"))
    ring.send(source)
    got = ring.receive()
    assert got.shape == source.shape
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, source)


def test_send_takes_what_asarray_takes(ring):
    ring.send([1, 2, 3])
    ring.send(5.5)
    assert ring.receive().tolist() == [1, 2, 3]
    assert ring.receive()[()] == 5.5


@pytest.mark.parametrize("dtype", NO_DTYPES, ids=str)
def test_objects_cannot_be_carried(ring, dtype):
    with pytest.raises(ArrayError):
        ring.claim(3, dtype)
    with pytest.raises(ArrayError):
        ring.send(np.zeros(3, dtype))
    assert_memory_is_whole(ring)


@pytest.mark.parametrize(("shape", "dtype"), [((-1,), "f8"), (("a",), "f8"), (3, "no dtype"), (None, "f8")])
def test_no_array_is_like_this(ring, shape, dtype):
    with pytest.raises((ArrayError, ValueError)):
        ring.claim(shape, dtype)


@pytest.mark.parametrize("shape", [[2, 3], np.array([2, 3]), (np.int64(2), np.int8(3))])
def test_other_spellings_of_a_shape(ring, shape):
    with ring.claim(shape, np.uint8) as frame:
        assert frame.shape == (2, 3)


def test_a_dtype_whose_fields_are_renamed(ring):
    """That is done in place: it is another one then, and the same object."""
    dtype = np.dtype([("x", "f8")])
    shape = (3,)
    for name in ("x", "x", "x", "y", "y", "y"):
        dtype.names = (name,)
        with ring.claim(shape, dtype):
            pass
        with ring.lease() as array:
            assert array.dtype.names == (name,)
            array.dtype.names = ("mine",)


def test_first_in_first_out(ring):
    for i in range(4):
        ring.send([i])
    assert [int(ring.receive()[0]) for _ in range(4)] == [0, 1, 2, 3]


def test_capacity_bounds_what_is_committed_and_nothing_else(ring):
    claims = [ring.claim(1) for _ in range(6)]
    for claim in claims[:4]:
        claim.commit()
    assert ring.approx_fill() == 4
    assert ring.try_claim(1) is None
    leases = [ring.lease() for _ in range(4)]
    for claim in claims[4:]:
        claim.commit()
    assert ring.approx_fill() == 2
    leases += [ring.lease() for _ in range(2)]
    for lease in leases:
        lease.release()
    assert_memory_is_whole(ring)


@pytest.mark.parametrize("capacity", [1, 2, 3, 5, 7])
def test_capacity_is_exact(capacity):
    with Ring(capacity, "2 MiB") as ring:
        for turn in range(3):
            for i in range(capacity):
                ring.send([turn * capacity + i], timeout=0)
            with pytest.raises((WouldBlock, Timeout)):
                ring.send([0], timeout=0)
            assert [int(ring.receive()[0]) for _ in range(capacity)] == [
                turn * capacity + i for i in range(capacity)
            ]


class Oops(Exception):
    pass


def test_an_exception_aborts_a_claim(ring):
    with pytest.raises(Oops), ring.claim(3) as frame:
        frame[:] = 1
        raise Oops
    assert ring.approx_fill() == 0
    assert ring.try_lease() is None
    assert ring.stats().aborted == 1
    assert_memory_is_whole(ring)


def test_an_exception_releases_a_lease(ring):
    ring.send([1])
    with pytest.raises(Oops), ring.lease():
        raise Oops
    assert ring.try_lease() is None
    assert_memory_is_whole(ring)


def test_a_claim_ends_once(ring):
    for end in ("commit", "abort"):
        claim = ring.claim(1)
        getattr(claim, end)()
        for again in ("commit", "abort"):
            with pytest.raises(LeaseError, match="has ended"):
                getattr(claim, again)()
        with pytest.raises(LeaseError, match="has ended"):
            _ = claim.array
        with pytest.raises(LeaseError, match="has ended"), claim:
            pass
    assert ring.approx_fill() == 1


def test_a_claim_may_be_ended_inside_its_with_block(ring):
    with pytest.raises(LeaseError), ring.claim(1):
        claim = ring.claim(1)
        with claim:
            claim.abort()
    with pytest.raises(Oops):
        claim = ring.claim(1)
        with claim:
            claim.commit()
            raise Oops
    assert ring.approx_fill() == 1


def test_a_lease_ends_once(ring):
    ring.send([1])
    lease = ring.lease()
    assert lease.array[0] == 1
    lease.release()
    with pytest.raises(LeaseError, match="was released"):
        lease.release()
    with pytest.raises(LeaseError, match="was released"):
        _ = lease.array
    with pytest.raises(LeaseError, match="was released"), lease:
        pass


def test_a_lease_may_be_released_inside_its_with_block(ring):
    ring.send([1])
    lease = ring.lease()
    with lease:
        lease.release()
    assert_memory_is_whole(ring)


def test_the_core_refuses_stale_and_foreign_blocks(ring):
    def new_block():
        return ffi.new("shmr_block *")

    handle, block = ring._region.handle, new_block()
    ring.send([1])
    assert lib.shmr_lease(handle, 0, 0, 0, block) == OK
    copy = ffi.new("shmr_block *", block[0])
    with Ring(4, "8 MiB") as other:
        assert lib.shmr_release(other._region.handle, copy) == STALE
        assert lib.shmr_commit(other._region.handle, 0, 0, -1, 0, copy) == STALE
    copy = ffi.new("shmr_block *", block[0])
    assert lib.shmr_release(handle, block) == OK
    assert lib.shmr_release(handle, block) == STALE
    ring.send([2])
    again = new_block()
    assert lib.shmr_lease(handle, 0, 0, 0, again) == OK
    assert again.block == copy.block  # the same memory, another lease
    assert lib.shmr_release(handle, copy) == STALE
    assert lib.shmr_abort(handle, copy) == STALE
    assert lib.shmr_commit(handle, 0, 0, -1, 0, copy) == STALE
    assert lib.shmr_release(handle, again) == OK
    assert_memory_is_whole(ring)


def test_forgotten_claims_and_leases_end_themselves(ring):
    ring.claim(3)
    ring.send([1])
    ring.lease()
    assert_memory_is_whole(ring)
    assert ring.try_lease() is None


def test_many_rounds_use_the_same_memory(ring):
    addresses = set()
    for i in range(200):
        with ring.claim((100_000,), "u1") as frame:
            addresses.add(frame.ctypes.data)
            frame[:] = i
        with ring.lease() as frame:
            assert (frame == i).all()
    assert len(addresses) == 1
    assert ring.stats().late_releases == 0


def test_names_that_outlive_the_with_block_cost_nothing_more_than_a_late_release(ring):
    for i in range(10):
        ring.send(np.full(10, i))
        with ring.lease() as frame:
            pass
        assert frame[0] == i  # still leased: the name holds it
    del frame
    assert_memory_is_whole(ring)


# --- not waiting, and waiting ----------------------------------------------------------------------


def test_try_lease_of_an_empty_ring(ring):
    assert ring.try_lease() is None
    ring.send([1])
    with ring.try_lease() as frame:
        assert frame[0] == 1
    assert ring.try_lease() is None


def test_try_claim(ring):
    for i in range(4):
        with ring.try_claim(1, int) as frame:
            frame[0] = i
    assert ring.try_claim(1) is None
    ring.receive()
    assert ring.try_claim(1) is not None


def test_try_claim_when_memory_is_used_up():
    with Ring(100, "4 MiB") as ring:
        held = []
        while (claim := ring.try_claim(300_000, "u1")) is not None:
            held.append(claim)
        assert 6 <= len(held) <= 13
        held.pop().abort()
        assert ring.try_claim(300_000, "u1") is not None


def test_timeouts_say_what_and_how_long(ring):
    start = time.monotonic()
    with pytest.raises(Timeout, match=r"lease from this ring.* within 0\.05 s") as caught:
        ring.lease(timeout=0.05)
    assert time.monotonic() - start >= 0.049
    assert caught.value.seconds == 0.05
    assert isinstance(caught.value, TimeoutError)
    with pytest.raises(Timeout):
        ring.receive(timeout=0.01)
    for i in range(4):
        ring.send([i])
    with pytest.raises(Timeout, match=r"commit to this ring.* within 0\.05 s"):
        ring.send([4], timeout=0.05)
    assert ring.stats().aborted == 1


def test_the_timeout_of_a_claim_covers_memory_and_slot():
    with Ring(2, "4 MiB") as ring:
        claims = [ring.claim(1_000_000, "u1") for _ in range(3)]
        with pytest.raises(Timeout, match=r"claim from this ring \(0 of 2 slots are full\).* within 0\.02 s"):
            ring.claim(2_000_000, "u1", timeout=0.02)
        for claim in claims:
            claim.abort()


@pytest.mark.parametrize("timeout", [-1, -0.001, float("nan"), -float("inf")])
def test_no_timeout_is_negative(ring, timeout):
    for call in (ring.lease, ring.receive, lambda timeout: ring.claim(1, timeout=timeout)):
        with pytest.raises(ValueError, match="timeout"):
            call(timeout=timeout)


def test_zero_is_not_waiting_and_infinity_is_a_long_time(ring):
    ring.send([1], timeout=0)
    assert ring.receive(timeout=0)[0] == 1
    ring.send([1], timeout=float("inf"))
    assert ring.receive(timeout=float("inf"))[0] == 1


def test_a_commit_that_may_not_wait_aborts(ring):
    claim = ring.claim(1, timeout=0)
    for i in range(4):
        ring.send([i])
    with pytest.raises(WouldBlock, match="full; the claim was aborted"):
        claim.commit()
    with pytest.raises(LeaseError):
        claim.commit()
    assert [int(ring.receive()[0]) for _ in range(4)] == [0, 1, 2, 3]
    assert_memory_is_whole(ring)


def test_larger_than_the_arena(ring):
    with pytest.raises(MemoryBudgetExceeded, match=r"76\.3 MiB of 8 MiB"):
        ring.claim(10_000_000)
    with pytest.raises(MemoryBudgetExceeded):
        ring.try_claim(10_000_000)
    with pytest.raises(MemoryBudgetExceeded):
        ring.send(np.zeros(10_000_000))


def test_a_waiting_lease_is_woken(ring):
    got = []
    thread = threading.Thread(target=lambda: got.append(ring.receive(timeout=FOREVER).tolist()))
    thread.start()
    ring.send([7])
    thread.join()
    assert got == [[7]]


def test_a_waiting_commit_is_woken(ring):
    for i in range(4):
        ring.send([i])
    thread = threading.Thread(target=lambda: ring.send([4], timeout=FOREVER))
    thread.start()
    assert [int(ring.receive(timeout=FOREVER)[0]) for _ in range(5)] == [0, 1, 2, 3, 4]
    thread.join()


def test_a_waiting_claim_is_woken_by_memory():
    with Ring(4, "4 MiB") as ring:
        ring.send(np.zeros(3_000_000, "u1"))
        thread = threading.Thread(target=lambda: ring.send(np.ones(3_000_000, "u1"), timeout=FOREVER))
        thread.start()
        assert ring.receive().sum() == 0
        assert ring.receive(timeout=FOREVER).sum() == 3_000_000
        thread.join()


def test_signals_do_not_end_a_wait_and_handlers_may_raise(ring):
    handled = []

    def handler(number, frame):
        handled.append(number)
        if len(handled) == 3:
            raise Oops

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        with pytest.raises(Oops):
            ring.lease()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(handled) == 3
    ring.send([1])
    assert ring.receive()[0] == 1


def test_many_threads(ring):
    producers, consumers, count = 4, 4, 400
    received = [[] for _ in range(consumers)]

    def produce(who):
        for i in range(count):
            with ring.claim((3,), "i8") as frame:
                frame[:] = who, i, who * i

    def consume(mine):
        while True:
            with ring.lease() as frame:
                who, i, product = frame.tolist()
            if who < 0:
                return
            assert product == who * i
            mine.append((who, i))

    threads = [threading.Thread(target=produce, args=(who,)) for who in range(producers)]
    others = [threading.Thread(target=consume, args=(mine,)) for mine in received]
    for thread in threads + others:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in others:
        ring.send([-1, 0, 0])
    for thread in others:
        thread.join()
    assert sorted(sum(received, [])) == [(who, i) for who in range(producers) for i in range(count)]
    for mine in received:
        assert all(
            [i for which, i in mine if which == who] == sorted(i for which, i in mine if which == who)
            for who in range(producers)
        )
    assert_memory_is_whole(ring)
    assert ring.stats().rescued_wakeups == 0


# --- statistics and closing ------------------------------------------------------------------------


def test_stats(ring):
    ring.send(np.zeros(100, "u1"))
    ring.send(np.zeros(100, "u1"))
    ring.receive()
    with pytest.raises(Oops), ring.claim(1):
        raise Oops
    stats = ring.stats()
    assert (stats.capacity, stats.approx_fill) == (4, 1)
    assert (stats.committed, stats.leased, stats.aborted) == (2, 1, 1)
    assert stats.bytes_committed == 200
    assert (stats.participants, stats.deaths) == (1, 0)
    assert stats.memory_budget == 8 << 20
    assert stats.leases_held == ()
    with ring.lease():
        assert ring.stats().leases_held == ((os.getpid(), 1),)
    assert stats.memory_used == 2 << 20
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.capacity = 5


def test_close_twice_and_use_after(ring):
    ring.send([1])
    ring.close()
    ring.close()
    for use in (
        lambda: ring.claim(1),
        lambda: ring.try_claim(1),
        ring.lease,
        ring.try_lease,
        lambda: ring.send([1]),
        ring.receive,
        ring.approx_fill,
        ring.stats,
        lambda: pickle.dumps(ring),
    ):
        with pytest.raises(Closed, match="this ring is closed"):
            use()


def test_claims_and_leases_that_are_open_at_close(ring):
    ring.send([1])
    lease, claim = ring.lease(), ring.claim(1)
    ring.close()
    assert lease.array[0] == 1
    lease.release()
    with pytest.raises((Closed, LeaseError)):
        claim.commit()


@pytest.mark.parametrize("what", ["lease", "commit", "claim"])
def test_close_ends_a_wait_in_another_thread(what):
    ring = Ring(1, "4 MiB")
    caught = []
    started = threading.Event()
    if what != "lease":
        ring.send(np.zeros(3_000_000, "u1"))

    def wait():
        started.set()
        try:
            if what == "lease":
                ring.lease()
            else:
                ring.send(np.zeros(3_000_000 if what == "claim" else 1, "u1"))
        except Closed as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    started.wait()
    ring.close()
    thread.join()
    assert len(caught) == 1


def test_a_capacity_of_numpy_is_one():
    with Ring(np.int64(4), 1 << 20) as ring:
        assert type(ring.capacity) is int
        assert ring.capacity == 4


@pytest.mark.parametrize("shape", [1 << 62, 1 << 63, 1 << 70, (1 << 32, 1 << 32), (1 << 62, 0)])
def test_an_array_that_no_memory_could_hold_is_too_large(ring, shape):
    with pytest.raises(MemoryBudgetExceeded, match="larger than the memory budget"):
        ring.claim(shape, "f8")


@pytest.mark.parametrize("shape", [1.5, (2, 1.5), "3", None, float("inf")])
def test_a_shape_is_made_of_whole_numbers(ring, shape):
    with pytest.raises(ArrayError, match="no array has shape"):
        ring.claim(shape)
