"""SIGKILL at random moments of either end of a channel over shared memory, in whatever it is doing."""

from __future__ import annotations

import mmap
import os
import random
import signal
import threading

import numpy as np
import pytest

from shmengine.channels import channel
from shmengine.errors import PeerLost
from tests.helpers.fault_points import SEED

pytestmark = pytest.mark.watchdog(120)

ROUNDS = 40
FOREVER = 30


def send(end, i):
    """Send number `i`, in one way or another."""
    kind = i % 4
    if kind == 0:
        end.send(b"%d" % i)
    elif kind == 1:
        end.send(np.full(i % 5000, i))
    elif kind == 2:
        end.send({"number": i, "array": np.full(300, i)})
    else:
        with end.claim(i % 3000 + 1, int) as frame:
            frame[:] = i


def check(got, i):
    kind = i % 4
    if kind == 0:
        assert got == b"%d" % i
    elif kind == 2:
        assert got["number"] == i
        assert (got["array"] == i).all()
    else:
        assert got.size == (i % 5000 if kind == 1 else i % 3000 + 1)
        assert (got == i).all()


def start(work, end):
    """Fork; the child works at this end until it is killed."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    end.close()  # before the kill: whoever closes the last copy of an end that was never used ends it in good order
    return pid


def kill_after(seconds, pid):
    """Return a function that waits until that has come about."""
    timer = threading.Timer(seconds, os.kill, (pid, signal.SIGKILL))
    timer.start()

    def wait():
        timer.join()
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL

    return wait


def test_a_sender_is_killed():
    chance = random.Random(SEED)
    for round_ in range(ROUNDS):
        left, right = channel("shm", buffer_bytes="2 MiB")
        sent = np.frombuffer(mmap.mmap(-1, 8), np.uint64)

        def work(end=right, count=sent):
            i = 0
            while True:
                send(end, i)
                i += 1
                count[0] = i  # in one store, which no death tears

        wait = kill_after(chance.uniform(0, 0.05), start(work, right))
        kept, got, message = [], 0, None
        with pytest.raises(PeerLost):
            while True:
                message = left.receive(FOREVER)
                check(message, got)
                if got % 7 == 0:
                    kept = [message]
                got += 1
        wait()
        surely = int(sent[0])
        assert surely <= got <= surely + 1, f"round {round_} of seed {SEED}"
        with pytest.raises(PeerLost):
            left.receive(0)
        del kept, message
        assert left._link.receiver._region.counters().held == 0
        left.close()


def test_a_receiver_is_killed():
    chance = random.Random(SEED)
    for _ in range(ROUNDS):
        left, right = channel("shm", buffer_bytes="2 MiB")

        def work(end=right):
            i, kept = 0, []
            while True:
                message = end.receive()
                check(message, i)
                kept = [*kept[-3:], message]
                i += 1

        wait = kill_after(chance.uniform(0, 0.05), start(work, right))
        i = 0
        with pytest.raises(PeerLost):
            while True:
                send(left, i)
                i += 1
        wait()
        with pytest.raises(PeerLost):
            left.send(1)
        left.close()
