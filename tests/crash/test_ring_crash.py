"""A SIGKILL at the worst moment costs what its victim was doing, and nothing else."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from shmengine.errors import PeerLost, WouldBlock
from shmengine.region import remove_name
from shmengine.ring import Ring
from tests.helpers import poll_until
from tests.helpers.memory import assert_memory_is_whole

FOREVER = 60
ctx = multiprocessing.get_context("fork")


@pytest.fixture
def ring():
    with Ring(4, "8 MiB") as made:
        yield made


@contextlib.contextmanager
def victim(function, *args):
    """A child that calls the function and then waits for its death; the parent gets a way to bring it."""
    ready, said = ctx.Pipe(duplex=False)

    def run():
        ready.close()
        held = function(*args)
        said.send("ready")
        signal.pause()
        del held

    process = ctx.Process(target=run)
    process.start()
    said.close()
    assert ready.recv() == "ready"
    ready.close()

    def kill():
        process.kill()
        process.join()

    try:
        yield kill
    finally:
        kill()


def lease_one(ring):
    lease = ring.lease(timeout=FOREVER)
    lease.array.sum()
    return lease


def test_a_consumer_killed_with_a_lease(ring):
    ring.send(np.full(1000, 1))
    ring.send(np.full(1000, 2))
    with victim(lease_one, ring) as kill:
        with ring.lease(timeout=FOREVER) as frame:
            assert (frame == 2).all()
        assert ring.try_lease() is None
        kill()
        lease = ring.lease(timeout=FOREVER)
        assert lease.attempts == 1
        with lease as frame:
            assert (frame == 1).all()
    assert ring.stats().deaths == 1
    assert_memory_is_whole(ring)


def test_a_message_that_kills_everybody_counts_its_attempts(ring):
    ring.send([1])
    for _ in range(3):
        with victim(lease_one, ring) as kill:
            kill()
    lease = ring.lease(timeout=FOREVER)
    assert lease.attempts == 3
    lease.release()


def test_a_consumer_killed_with_views_of_what_it_received(ring):
    for i in range(3):
        ring.send(np.full(1000, i))
    with victim(lambda: [ring.receive(timeout=FOREVER)[::2] for _ in range(3)]) as kill:
        kill()
        got = sorted(int(ring.receive(timeout=FOREVER)[0]) for _ in range(3))
    assert got == [0, 1, 2]


def claim_one(ring):
    claim = ring.claim(100_000)
    claim.array[:] = 1
    return claim


def test_a_producer_killed_in_a_claim(ring):
    with victim(claim_one, ring) as kill:
        assert ring.approx_fill() == 0
        kill()
        with pytest.raises(PeerLost):
            ring.lease()
    assert ring.approx_fill() == 0
    # All memory is there again: one block of nearly everything.
    ring.send(np.ones(1_000_000))
    with ring.lease() as frame:
        assert frame.sum() == 1_000_000
    del frame
    assert_memory_is_whole(ring)


def commit_some(ring):
    for i in range(3):
        with ring.claim(1000, timeout=FOREVER) as frame:
            frame[:] = i


def test_a_producer_killed_after_commit(ring):
    with victim(commit_some, ring) as kill:
        kill()
        assert ring.approx_fill() == 3
        for i in range(3):
            lease = ring.lease(timeout=FOREVER)
            assert lease.attempts == 0
            with lease as frame:
                assert (frame == i).all()
            del frame
    with pytest.raises(PeerLost):
        ring.receive()
    assert_memory_is_whole(ring)


def claim_and_lease(ring):
    return claim_one(ring), lease_one(ring)


def test_two_at_once(ring):
    ring.send([1])
    ring.send([2])
    with victim(claim_and_lease, ring) as kill_one, victim(claim_and_lease, ring) as kill_other:
        assert ring.stats().participants == 3
        kill_one()
        kill_other()
        leases = [ring.lease(timeout=FOREVER) for _ in range(2)]
        assert sorted(int(lease.array[0]) for lease in leases) == [1, 2]
        assert [lease.attempts for lease in leases] == [1, 1]
        for lease in leases:
            lease.release()
    assert ring.stats().deaths == 2
    assert ring.stats().participants == 1
    with pytest.raises(PeerLost):
        ring.lease()
    assert_memory_is_whole(ring)


def test_what_goes_back_into_a_full_ring_is_not_lost(ring):
    for i in range(4):
        ring.send([i])
    with victim(lambda: [lease_one(ring) for _ in range(4)]) as kill:
        for i in range(4, 8):
            ring.send([i])
        kill()
        got = []
        for _ in range(8):
            with ring.lease(timeout=FOREVER) as frame:
                got.append(int(frame[0]))
    assert sorted(got) == list(range(8))
    assert [number for number in got if number >= 4] == [4, 5, 6, 7]
    assert_memory_is_whole(ring)


# --- those who wait ------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", ["lease", "receive", "lease with a timeout"])
def test_who_waits_for_the_last_other_one_is_told_of_its_death(ring, wait):
    with victim(ring.approx_fill) as kill:
        caught = []

        def run():
            try:
                if wait == "receive":
                    ring.receive()
                else:
                    ring.lease(timeout=FOREVER if "timeout" in wait else None)
            except PeerLost as error:
                caught.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        kill()
        thread.join()
    assert "the last other participant died" in str(caught[0])
    # The ring is as good as before.
    ring.send([1])
    assert ring.receive()[0] == 1


def test_who_waits_for_a_slot_is_told_too(ring):
    for i in range(4):
        ring.send([i])
    with victim(ring.approx_fill) as kill:
        caught = []

        def run():
            try:
                ring.send([4])
            except PeerLost as error:
                caught.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        kill()
        thread.join()
    assert len(caught) == 1
    assert [int(ring.receive()[0]) for _ in range(4)] == [0, 1, 2, 3]


def test_who_only_polls_gets_what_the_dead_had_leased(ring):
    ring.send([1])
    with victim(lease_one, ring) as kill:
        assert ring.try_lease() is None
        kill()
        got = []
        poll_until(lambda: got.append(ring.try_lease()) or got[-1], what="the message is there again")
        assert got[-1].attempts == 1
        got[-1].release()


def test_who_only_polls_gets_the_memory_of_the_dead():
    with Ring(16, "8 MiB") as ring, victim(fill_memory, ring) as kill:
        assert ring.try_claim(5_000_000, "u1") is None
        kill()
        got = []
        poll_until(
            lambda: got.append(ring.try_claim(5_000_000, "u1")) or got[-1], what="the memory is there again"
        )
        got[-1].abort()


def fill_memory(ring):
    return [ring.claim(900_000, "u1") for _ in range(6)]


def test_who_waits_for_memory_gets_that_of_the_dead():
    with Ring(16, "8 MiB") as ring, victim(fill_memory, ring) as kill:
        thread = threading.Thread(target=lambda: ring.send(np.ones(5_000_000, "u1"), timeout=FOREVER))
        thread.start()
        kill()
        thread.join()
        assert ring.receive(timeout=FOREVER).sum() == 5_000_000


def test_while_others_live_a_wait_goes_on(ring):
    with victim(ring.approx_fill) as kill, victim(ring.approx_fill):
        kill()
        got = []
        thread = threading.Thread(target=lambda: got.append(int(ring.receive(timeout=FOREVER)[0])))
        thread.start()
        other = ctx.Process(target=ring.send, args=([7],))
        other.start()
        other.join()
        thread.join()
        assert got == [7]


def test_an_orderly_end_is_no_loss(ring):
    """PeerLost is for deaths; one who closed may come back, or another one."""

    def work():
        ring.send([1])
        ring.close()

    process = ctx.Process(target=work)
    process.start()
    process.join()
    assert ring.receive(timeout=FOREVER)[0] == 1
    assert ring.try_lease() is None
    got = []
    thread = threading.Thread(target=lambda: got.append(int(ring.receive(timeout=FOREVER)[0])))
    thread.start()
    second = ctx.Process(target=work)
    second.start()
    second.join()
    thread.join()
    assert got == [1]
    assert ring.stats().deaths == 0


def wait_in_lease(ring, started):
    started.set()
    ring.lease()


def test_a_consumer_killed_in_its_sleep_takes_no_wakeup_with_it(ring):
    with victim(ring.approx_fill):  # so that nobody is ever alone
        for _ in range(10):
            started = ctx.Event()
            process = ctx.Process(target=wait_in_lease, args=(ring, started))
            process.start()
            started.wait()
            got = []
            thread = threading.Thread(target=lambda: got.append(int(ring.receive(timeout=FOREVER)[0])))
            thread.start()
            process.kill()
            ring.send([3])  # may wake the dead
            process.join()
            thread.join()
            assert got == [3]


# --- strangers ------------------------------------------------------------------------------------

STRANGER = """
import signal, sys
import shmengine
ring = shmengine.Ring(4, "8 MiB", name=sys.argv[1])
held = eval(sys.argv[2])
print("ready", flush=True)
signal.pause()
"""


def test_what_strangers_leave_is_found_by_the_last_one():
    """All others who know a name are killed, its creator among them."""
    name = f"test-{secrets.token_hex(8)}"
    acts = [
        "[ring.send([i] * 1000) for i in range(3)]",
        "ring.lease(timeout=60)",
        "[ring.lease(timeout=60), ring.claim(100_000), ring.send([3])]",
    ]
    processes = []
    try:
        for act in acts:
            command = [sys.executable, "-c", STRANGER, name, act]
            processes.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
            )
            assert processes[-1].stdout.readline() == "ready\n"
        with Ring(4, "8 MiB", name=name) as ring:
            for process in processes:
                process.kill()
                process.wait()
            got = {}
            for _ in range(4):
                lease = ring.lease(timeout=FOREVER)
                got[int(lease.array[0])] = lease.attempts
                lease.release()
            assert got == {0: 1, 1: 1, 2: 0, 3: 0}
            assert (ring.stats().participants, ring.stats().deaths) == (1, 3)
            ring.send(np.ones(900_000))
            assert ring.receive(timeout=FOREVER).sum() == 900_000
            assert_memory_is_whole(ring)
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
        remove_name(name)


# --- at random moments ---------------------------------------------------------------------------


def churn(ring, back):
    while True:
        with ring.lease() as frame, back.claim(frame.shape, frame.dtype) as answer:
            answer[...] = frame


def test_kills_at_random_moments():
    """Nothing is torn or lost; what was answered just before the death may be answered twice."""
    rng = np.random.default_rng(1)
    total = 1500
    with Ring(8, "16 MiB") as ring, Ring(8, "16 MiB") as back:
        workers = [ctx.Process(target=churn, args=(ring, back)) for _ in range(2)]
        for worker in workers:
            worker.start()
        seen = np.zeros(total, int)
        sent = deaths = 0
        while not seen.all():
            while sent < total and (claim := ring.try_claim(200, "i8")) is not None:
                try:
                    with claim as frame:
                        frame[:] = np.arange(200) * sent
                        frame[0] = sent
                except WouldBlock:  # a message of a dead worker has taken the slot meanwhile
                    break
                sent += 1
            with contextlib.suppress(PeerLost), back.lease(timeout=FOREVER) as frame:
                number = int(frame[0])
                np.testing.assert_array_equal(frame[1:], np.arange(1, 200) * number)
                seen[number] += 1
            if rng.random() < 0.02 and deaths < 25:
                which = int(rng.integers(2))
                workers[which].kill()
                workers[which].join()
                deaths += 1
                workers[which] = ctx.Process(target=churn, args=(ring, back))
                workers[which].start()
        assert deaths > 5
        for worker in workers:
            worker.kill()
            worker.join()
        while True:  # answers given twice
            try:
                with back.lease() as frame:
                    seen[int(frame[0])] += 1
            except PeerLost:
                break
        again = 0
        with pytest.raises(PeerLost):
            while True:  # what was answered by those who died before they released it
                with ring.lease() as frame:
                    again += 1
        assert again <= 2
        assert seen.min() == 1
        assert seen.sum() <= total + deaths + 2
        del frame
        for each in (ring, back):
            assert each.approx_fill() == 0
            assert_memory_is_whole(each)
            each.send(np.zeros(1_500_000))
            assert each.receive().size == 1_500_000


def test_the_region_of_a_killed_creator_lives_on_in_others(ring):
    receiver, sender = ctx.Pipe(duplex=False)
    receive_go, send_go = ctx.Pipe(duplex=False)

    def create():
        made = Ring(4, "8 MiB")
        made.send([5])
        sender.send(made)
        receive_go.recv()
        os.kill(os.getpid(), signal.SIGKILL)

    process = ctx.Process(target=create)
    process.start()
    found = receiver.recv()
    send_go.send("go")
    process.join()
    assert found.receive(timeout=FOREVER)[0] == 5
    found.send([6])
    assert found.receive(timeout=FOREVER)[0] == 6
    with pytest.raises(PeerLost):
        found.lease()
    found.close()
    for pipe in (receiver, sender, receive_go, send_go):
        pipe.close()
