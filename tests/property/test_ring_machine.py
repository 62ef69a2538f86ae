"""Any sequence of operations gives what a deque would give."""

from __future__ import annotations

import gc
from collections import deque

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from shmengine.errors import LeaseError, Timeout, WouldBlock
from shmengine.region import Region, RegionConfig
from shmengine.ring import Ring
from tests.helpers.scripts import soak_seconds

SIZES = st.sampled_from([0, 1, 7, 8, 100, 4096, 5000, 70_000])
DTYPES = st.sampled_from(["u1", "<i4", ">f8", "c16", "M8[s]"])
STARTS = st.sampled_from([0, 5, 2**64 - 5, 2**32 - 2, 2**24 * 4 - 3, 2**24 * 8 - 3])


def content(number, size, dtype):
    return (np.arange(size) + number).astype("u1").astype("i4").astype(dtype)


class RingMachine(RuleBasedStateMachine):
    """A ring, and a deque of (number, size, dtype) that says what is in it."""

    claims = Bundle("claims")
    leases = Bundle("leases")
    views = Bundle("views")

    def __init__(self):
        super().__init__()
        self.ring = None
        self.model = deque()
        self.number = 0
        self.open = 0  # claims, leases and received arrays
        self.committed = self.aborted = 0

    @initialize(capacity=st.integers(1, 6), start=STARTS)
    def make(self, capacity, start):
        self.capacity = capacity
        self.ring = Ring.__new__(Ring)
        region = Region.create(RegionConfig(8 << 20, (capacity,), start=start % 2**64))
        self.ring._setup(region, "payload")

    @property
    def is_full(self):
        return len(self.model) == self.capacity

    def expect(self, array, message):
        number, size, dtype = message
        assert array.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(array, content(number, size, dtype))

    # --- producing

    @precondition(lambda self: self.open < 12)
    @rule(target=claims, size=SIZES, dtype=DTYPES)
    def claim(self, size, dtype):
        claim = self.ring.claim(size, dtype, timeout=0)
        self.number += 1
        claim.array[...] = content(self.number, size, dtype)
        self.open += 1
        return [claim], (self.number, size, dtype)

    @precondition(lambda self: self.open < 12)
    @rule(target=claims, size=SIZES, dtype=DTYPES)
    def try_claim(self, size, dtype):
        claim = self.ring.try_claim(size, dtype)
        assert (claim is None) == self.is_full
        if claim is None:
            claim = self.ring.claim(size, dtype, timeout=0)
        self.number += 1
        claim.array[...] = content(self.number, size, dtype)
        self.open += 1
        return [claim], (self.number, size, dtype)

    @rule(taken=consumes(claims))
    def commit(self, taken):
        (claim,), message = taken
        self.open -= 1
        if self.is_full:
            with pytest.raises(WouldBlock):
                claim.commit()
            self.aborted += 1
        else:
            claim.commit()
            self.model.append(message)
            self.committed += 1
        with pytest.raises(LeaseError):
            claim.commit()

    @rule(taken=consumes(claims), how=st.sampled_from(["abort", "exception", "forget"]))
    def abort(self, taken, how):
        box, _ = taken
        if how == "abort":
            box[0].abort()
        elif how == "exception":
            with pytest.raises(KeyError), box[0]:
                raise KeyError
        else:
            box.clear()  # hypothesis itself may keep the box
        self.open -= 1
        self.aborted += 1

    @rule(size=SIZES, dtype=DTYPES)
    def send(self, size, dtype):
        self.number += 1
        array = content(self.number, size, dtype)[::-1][::-1]
        if self.is_full:
            with pytest.raises((WouldBlock, Timeout)):
                self.ring.send(array, timeout=0)
            self.aborted += 1
        else:
            self.ring.send(array, timeout=0)
            self.model.append((self.number, size, dtype))
            self.committed += 1

    # --- consuming

    @precondition(lambda self: self.open < 12)
    @rule(target=leases)
    def lease(self):
        lease = self.ring.try_lease()
        if not self.model:
            assert lease is None
            with pytest.raises((WouldBlock, Timeout)):
                self.ring.lease(timeout=0.0001)
            return None
        message = self.model.popleft()
        self.expect(lease.array, message)
        assert lease.attempts == 0
        self.open += 1
        return lease, message

    @rule(taken=consumes(leases))
    def release(self, taken):
        if taken is None:
            return
        lease, message = taken
        self.expect(lease.array, message)
        lease.release()
        self.open -= 1
        with pytest.raises(LeaseError):
            lease.release()

    @rule(target=views, taken=consumes(leases), step=st.sampled_from([1, 2, -1]))
    def escape(self, taken, step):
        if taken is None:
            return None
        lease, message = taken
        with lease as frame:
            view = frame[::step]
        return [view[::step] if step == -1 else view], message, step

    @precondition(lambda self: self.open < 12)
    @rule(target=views)
    def receive(self):
        if not self.model:
            with pytest.raises(Timeout):
                self.ring.receive(timeout=0.0001)
            return None
        message = self.model.popleft()
        self.open += 1
        return [self.ring.receive(timeout=0)], message, 1

    @rule(taken=consumes(views))
    def drop(self, taken):
        if taken is None:
            return
        box, message, step = taken
        number, size, dtype = message
        expected = content(number, size, dtype)
        np.testing.assert_array_equal(box[0], expected if step == -1 else expected[::step])
        assert not box[0].flags.writeable
        box.clear()
        self.open -= 1

    # --- always

    @invariant()
    def counts_agree(self):
        if self.ring is None:
            return
        assert self.ring.approx_fill() == len(self.model)
        counters = self.ring._region.counters()
        assert counters.pins == self.open
        assert (counters.committed, counters.aborted) == (self.committed, self.aborted)

    def teardown(self):
        if self.ring is None:
            return
        while self.model:
            message = self.model.popleft()
            with self.ring.lease(timeout=0) as frame:
                self.expect(frame, message)
        assert self.ring.try_lease() is None
        self.ring.close()
        self.ring = None
        gc.collect()


TestRing = RingMachine.TestCase
TestRing.settings = settings(
    max_examples=int(5 * soak_seconds(10)),  # about so many a second
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
