"""Many producers, many consumers, counters that wrap around: nothing lost, doubled, torn or out of order.

Some seconds each, or together as many minutes as ``SHMENGINE_SOAK_MINUTES`` says (`make soak` sets it).
"""

from __future__ import annotations

import collections
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest

from shmengine.errors import PeerLost
from shmengine.region import Region, RegionConfig
from shmengine.ring import Ring
from tests.helpers import ROOT, soak_seconds

pytestmark = [pytest.mark.slow, pytest.mark.watchdog(300 + soak_seconds(0))]

FOREVER = 120
SECONDS = soak_seconds(1.5, tests=25)  # as long as all tests here take, in these
STOP = -1

# Positions are 64 bits and their cycle 24: both wrap within a few messages of these.
STARTS = {
    "zero": lambda slots: 0,
    "top of the counters": lambda slots: 2**64 - 5,
    "cycle wraps": lambda slots: 2**24 * slots - 3,
    "cycle wraps in its middle": lambda slots: 2**24 * slots * 1000 - slots - 1,
}


def make_ring(capacity, memory="32 MiB", start=0, check="frame"):
    ring = Ring.__new__(Ring)
    ring._setup(Region.create(RegionConfig(int(memory.split()[0]) << 20, (capacity,), start=start)), check)
    return ring


def produce(ring, who, seconds, largest):
    """Send numbered messages with checksums until the time is over; returns how many."""
    rng = np.random.default_rng(who)
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        for _ in range(20):
            size = int(rng.integers(4, largest)) if number % 5 else 4
            with ring.claim(size, "u4", timeout=FOREVER) as frame:
                frame[3:] = (np.arange(size - 3) * (number + 1) + who).astype("u4")
                frame[0], frame[1] = who, number
                frame[2] = zlib.crc32(frame[3:])
            number += 1
    return number


def consume(ring):
    """Receive until told to stop; returns the numbers from each producer, in the order they came."""
    received = collections.defaultdict(list)
    kept = collections.deque(maxlen=5)  # views that live on for a while, released out of order
    while True:
        array = ring.receive(timeout=FOREVER)
        if array.shape == (1,):
            break
        assert zlib.crc32(array[3:]) == array[2], "torn"
        received[int(array[0])].append(int(array[1]))
        if len(array) % 3 == 0:
            kept.append(array)
    for array in kept:
        assert zlib.crc32(array[3:]) == array[2], "overwritten while a view lived"
    return dict(received)


def run(role, ring, who, seconds, largest):
    result = produce(ring, who, seconds, largest) if role == "produce" else consume(ring)
    assert ring.stats().rescued_wakeups == 0
    ring.close()
    return result


def forked(role, ring, outbox, *args):
    outbox.send((role, args[0], run(role, ring, *args)))


EXECED = """
import pickle, sys
from tests.stress import test_ring_stress
role, ring, *args = pickle.load(sys.stdin.buffer)
sys.stdout.buffer.write(pickle.dumps((role, args[0], test_ring_stress.run(role, ring, *args))))
"""


def start_forked(jobs):
    ctx = multiprocessing.get_context("fork")
    started = []
    for role, ring, *args in jobs:
        inbox, outbox = ctx.Pipe(duplex=False)
        process = ctx.Process(target=forked, args=(role, ring, outbox, *args))
        process.start()
        outbox.close()
        started.append((process, inbox))

    def finish(which):
        process, inbox = started[which]
        try:
            return inbox.recv()
        finally:
            inbox.close()
            process.join()

    return finish


def start_execed(jobs):
    started = []
    for job in jobs:
        process = subprocess.Popen(
            [sys.executable, "-c", EXECED], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        process.stdin.write(pickle.dumps(job))
        process.stdin.close()
        started.append(process)

    def finish(which):
        process = started[which]
        with process.stdout:
            said = process.stdout.read()
        assert process.wait() == 0
        return pickle.loads(said)

    return finish


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("how", [start_forked, start_execed], ids=["fork", "exec"])
@pytest.mark.parametrize(
    ("producers", "consumers", "capacity", "largest"),
    [(1, 1, 1, 50), (1, 1, 64, 20_000), (3, 1, 5, 500), (1, 3, 4, 500), (3, 3, 7, 2000)],
)
def test_nothing_is_lost(producers, consumers, capacity, largest, how, start):
    if how is start_execed and start is not STARTS["zero"] and (producers, consumers) != (3, 3):
        how = start_forked  # starting interpreters is most of the time
    slots = 1 << (capacity - 1).bit_length()
    with make_ring(capacity, start=start(slots) % 2**64) as ring:
        seconds = SECONDS if start is STARTS["zero"] else SECONDS / 3
        jobs = [("produce", ring, who, seconds, largest) for who in range(producers)]
        jobs += [("consume", ring, who, seconds, largest) for who in range(consumers)]
        finish = how(jobs)
        sent = {}
        for which in range(producers):
            _, who, count = finish(which)
            sent[who] = count
        for _ in range(consumers):
            ring.send([STOP], timeout=FOREVER)
        received = [finish(which)[2] for which in range(producers, producers + consumers)]

        for mine in received:
            for who, numbers in mine.items():
                assert numbers == sorted(numbers), f"out of order: messages of producer {who}"
        for who, count in sent.items():
            numbers = sorted(sum((mine.get(who, []) for mine in received), []))
            assert numbers == list(range(count)), f"lost or doubled: messages of producer {who}"
        assert min(sent.values()) > 0
        stats = ring.stats()
        assert stats.approx_fill == 0
        assert stats.rescued_wakeups == 0
        assert stats.deaths == 0
        # All memory can be had again in one piece.
        with ring.claim(30 << 20, "u1", timeout=FOREVER):
            pass


def ping(ring, back, count):
    for i in range(count):
        ring.send([i], timeout=FOREVER)
        assert back.receive(timeout=FOREVER)[0] == i


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_ping_pong_never_misses_a_wakeup(start):
    """Both sides sleep most of the time: each message depends on a wake-up."""
    ctx = multiprocessing.get_context("fork")
    count = int(2000 * max(1, SECONDS))
    with make_ring(1, start=start(1) % 2**64) as ring, make_ring(1, start=start(1) % 2**64) as back:
        process = ctx.Process(target=ping, args=(ring, back, count))
        process.start()
        for i in range(count):
            with ring.lease(timeout=FOREVER) as frame, back.claim(1, "i8", timeout=FOREVER) as answer:
                answer[0] = frame[0]
            if i % 100 == 0:
                os.sched_yield()
        process.join()
        assert process.exitcode == 0
        assert ring.stats().rescued_wakeups == back.stats().rescued_wakeups == 0


def test_processes_come_and_go():
    """Each producer lives for one message; their memory and places are used again."""
    ctx = multiprocessing.get_context("fork")
    end = time.monotonic() + SECONDS
    with make_ring(4, "8 MiB") as ring:
        born = 0
        while time.monotonic() < end or born < 100:
            process = ctx.Process(target=produce_one, args=(ring, born))
            process.start()
            while True:
                try:
                    frame = ring.receive(timeout=FOREVER)
                    break
                except PeerLost:  # the one before has died, and this one is not there yet
                    continue
            assert (frame == born).all()
            del frame
            process.join()
            assert process.exitcode == 0
            born += 1


def produce_one(ring, number):
    ring.send(np.full(1000, number), timeout=FOREVER)
    if number % 2:
        ring.close()  # orderly, or without a word
