"""The soak's quick form: a participant killed and replaced every 50 ms, and an account that adds up (tests/soak)."""

from __future__ import annotations

import random

import pytest

from tests.soak.leaks import counted_leaks
from tests.soak.queues import JoinableChannel, QueueChannel
from tests.soak.report import Report
from tests.soak.ring import RingChannel
from tests.soak.rounds import Shape, play

pytestmark = [pytest.mark.slow, pytest.mark.watchdog(300)]

FOREVER = float("inf")


@pytest.mark.parametrize(
    ("make", "messages"), [(RingChannel, 1_000_000), (QueueChannel, 50_000), (JoinableChannel, 50_000)]
)
def test_2_producers_x_2_consumers_one_killed_every_50_ms(make, messages):
    """Nothing lost, nothing delivered twice, nobody hangs, nothing stays behind.

    Exactly: each message whose commit returned is received (written down by its consumer while it has it leased).
    None is received twice as if for the first time, and not more often with ``attempts`` > 0 than consumers
    died. At most the one message that a dead producer was committing is received although its commit never
    returned. At the end the whole arena can be claimed as one block, and /dev/shm and the descriptors are as
    they were. None of this is "reported" as lost: recovery has no reason to give up any of it.
    """
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)
    report = Report()
    shape = Shape(messages=messages)
    with counted_leaks(report):
        play(make(shape), shape, FOREVER, random.Random(seed), report)
    print(report)
    assert report.passed, report
    assert report.messages >= messages
    assert report.kills > 0
