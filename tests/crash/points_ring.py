"""A participant dies at its nth access of shared memory, for n = 1, 2, ... until it survives, in each operation.

Needs the test build, so `test_kill_points.py` runs this file. One ring lives through all deaths in an operation, with
two partners: this process, and one that does what it is told.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from shmengine._native import lib
from shmengine.arena import Arena
from shmengine.errors import Timeout, WouldBlock
from shmengine.ring import Ring
from tests.helpers.fault_points import SOAK, Partner, Victim, armed, until_asleep

FOREVER = 60
MIB = 1 << 20
CAPACITY = 4
BEFORE = (1, 2)  # messages that wait for the victim


def message(number, count=1000):
    return np.full(count, number)


def number_of(array):
    assert (array == array[0]).all(), "torn"
    return int(array[0])


class World:
    """The ring, and who lives on."""

    def __init__(self):
        self.ring = Ring(CAPACITY, "8 MiB")
        self.partner = Partner(
            self.ring._handle,
            self.ring.close,
            send=lambda number: self.ring.send(message(number), timeout=FOREVER),
            receive=lambda: number_of(self.ring.receive(timeout=FOREVER)),
        )
        self.arena = Arena(self.ring._region)
        self.delivered = collections.Counter()
        self.kept = None
        self.check_partners()  # now, so that the partner's memory lies before all other

    def bury(self):
        lib.shmr_check_deaths(self.ring._h)

    def drain(self):
        while (lease := self.ring.try_lease()) is not None:
            with lease as frame:
                self.delivered[number_of(frame)] += 1

    def check_partners(self):
        self.partner.ask("send", 101)
        assert number_of(self.ring.receive(timeout=FOREVER)) == 101
        self.partner.start("receive")
        self.ring.send(message(102))
        assert self.partner.finish() == 102

    def check_whole(self):
        self.kept = None
        c = self.ring._region.counters()
        assert (c.used, c.held, c.pins, c.rescued_wakeups) == (0, 0, 0, 0)
        assert self.ring.stats().participants == 2
        # All memory but what the partner may keep, in one piece.
        self.ring.claim(5 * MIB, "u1", timeout=FOREVER).abort()
        lib.shmr_trim(self.ring._h)  # the next victim wants some

    def end(self):
        self.arena = self.kept = None
        self.partner.end()
        self.ring.close()


@pytest.fixture
def world():
    world = World()
    yield world
    world.end()


pytestmark = pytest.mark.watchdog(3600 if SOAK else 120)


# --- operations ------------------------------------------------------------------------------------


class Operation(NamedTuple):
    """What the victim does, and what may become of messages when it dies in between."""

    act: Callable[[Any, Any, Any], object]
    """``act(world, at, say)``: dies within ``with at:``; says the number of each message that it is done with."""
    sends: tuple[int, ...] = ()
    takes: tuple[int, ...] = ()
    before: tuple[int, ...] = BEFORE
    prepare: Callable[[World], None] | None = None
    meanwhile: Callable[[World, Victim], None] | None = None
    after: Callable[[World, set[int]], None] | None = None
    ours: tuple[int, ...] = ()
    """Messages that others send meanwhile or after."""
    least: int = 1
    """Points that there are at least."""


def claim(world, at, say):
    world.ring._handle()
    with at:
        return world.ring.claim(1000, "i8")


def commit(world, at, say):
    claimed = world.ring.claim(1000, "i8")
    claimed.array[:] = 10
    with at:
        claimed.commit()
    say(10)


def abort(world, at, say):
    claimed = world.ring.claim(1000, "i8")
    with at:
        claimed.abort()


def send(world, at, say):
    world.ring._handle()
    for number in (10, 11):
        with at:
            world.ring.send(message(number))
        say(number)
        at = contextlib.nullcontext()


def send_with_growth(world, at, say):
    world.ring._handle()
    with at:
        world.ring.send(message(10, 400_000))
    say(10)


def lease(world, at, say):
    world.ring._handle()
    with at:
        kept = world.ring.lease()
    assert number_of(kept.array) == 1
    return kept


def release(world, at, say):
    leased = world.ring.lease()
    with at:
        leased.release()
    say(1)


def receive(world, at, say):
    world.ring._handle()
    with at:
        array = world.ring.receive()
        view = array[::2]
        assert number_of(view) == 1
        del array, view
    say(1)


def wait_for_an_item(world, at, say):
    world.ring._handle()
    with at, contextlib.suppress(Timeout):
        world.ring.lease(timeout=0.002)


def wait_for_a_slot(world, at, say):
    world.ring._handle()
    with at, contextlib.suppress(Timeout, WouldBlock):
        world.ring.send(message(10), timeout=0.002)


def wait_for_memory(world, at, say):
    world.ring._handle()
    with at, contextlib.suppress(Timeout):
        world.ring.claim(7 * MIB, "u1", timeout=0.002)


def be_woken_by_an_item(world, at, say):
    world.ring._handle()
    say(0)
    with at:
        world.ring.lease(timeout=FOREVER).release()
    say(1)


def send_when_asleep(world, victim):
    assert victim.hear() == 0
    until_asleep(victim)
    world.ring.send(message(1))


def be_woken_by_a_slot(world, at, say):
    world.ring._handle()
    say(0)
    with at:
        world.ring.send(message(10), timeout=FOREVER)
    say(10)


def take_when_asleep(world, victim):
    assert victim.hear() == 0
    until_asleep(victim)
    with world.ring.lease(timeout=FOREVER) as frame:
        world.delivered[number_of(frame)] += 1


def let_partner_sleep(world):
    world.partner.start("receive")
    until_asleep(world.partner)


def partner_wakes(world, said):
    """By the victim's message alone, if that was sent, or else by one of ours."""
    if 10 not in said and world.ring.approx_fill() == 0:
        world.ring.send(message(3))
        world.delivered[world.partner.finish()] += 1
    else:
        world.delivered[world.partner.finish()] += 1
        world.ring.send(message(3))


def attach(world, at, say):
    with at:
        world.ring._handle()


def leave(world, at, say):
    world.ring.send(message(10))
    say(10)
    with at:
        world.ring.close()


def die_with_everything(world):
    """Leave a lease, a claim, a message and a reference to be recovered."""

    def act(say):
        kept = [world.ring.lease(), world.ring.claim(300_000, "u1")]
        world.ring.send(message(10))
        assert kept
        os.kill(os.getpid(), signal.SIGKILL)

    assert Victim(act).end()[0]


def recover(world, at, say):
    world.ring._handle()
    with at:
        lib.shmr_check_deaths(world.ring._region.handle)


def lend_an_array(world):
    array = world.arena.empty(50_000, "u1")
    array[:] = 7
    world.kept = array
    world.reference = tuple(world.arena.share(array))


def hold_and_drop(world, at, say):
    world.ring._handle()
    arena = Arena(world.ring._region)
    with at:
        root = arena.resolve(world.reference)
        assert (root[:100] == 7).all()
        del root


def share_and_drop(world, at, say):
    world.ring._handle()
    arena = Arena(world.ring._region)
    with at:
        array = arena.empty(400_000, "i8")  # one extent will not do
        array[:] = 3
        reference = arena.share(array)
        assert arena.hold(reference)
        del array
        assert (arena.resolve(reference)[:3_200_000:8] == 3).all()
        arena.drop(reference)


OPERATIONS = {
    "claim": Operation(claim),
    "commit": Operation(commit, sends=(10,)),
    "abort": Operation(abort),
    "send": Operation(send, sends=(10, 11), least=8),
    "send with growth": Operation(send_with_growth, sends=(10,), least=8),
    "lease": Operation(lease),
    "release": Operation(release, takes=(1,)),
    "receive": Operation(receive, takes=(1,), least=4),
    "wait for an item": Operation(wait_for_an_item, before=(), least=4),
    "wait for a slot": Operation(wait_for_a_slot, before=(1, 2, 3, 4), sends=(10,), least=8),
    "wait for memory": Operation(wait_for_memory, least=6),
    "woken by an item": Operation(
        be_woken_by_an_item, before=(), takes=(1,), ours=(1,), meanwhile=send_when_asleep, least=8
    ),
    "woken by a slot": Operation(
        be_woken_by_a_slot, before=(1, 2, 3, 4), sends=(10,), meanwhile=take_when_asleep, least=8
    ),
    "wake": Operation(
        commit, before=(), sends=(10,), prepare=let_partner_sleep, after=partner_wakes, ours=(3,), least=4
    ),
    "attach": Operation(attach, least=8),
    "leave": Operation(leave, sends=(10,)),  # how many bells it rings depends on who has ever waited
    "recover": Operation(recover, ours=(10,), prepare=die_with_everything, least=8),
    "hold and drop": Operation(hold_and_drop, prepare=lend_an_array, least=2),
    "share and drop": Operation(share_and_drop, least=8),
}


@pytest.mark.parametrize("what", OPERATIONS)
def test_death_at_each_point_of(what, world):
    operation = OPERATIONS[what]
    killed = True
    nth = 0
    while killed:
        nth += 1
        world.delivered.clear()
        for number in operation.before:
            world.ring.send(message(number))
        if operation.prepare is not None:
            operation.prepare(world)
        victim = Victim(lambda say, n=nth: operation.act(world, armed(n), say))
        if operation.meanwhile is not None:
            operation.meanwhile(world, victim)
        killed, said = victim.end()
        world.bury()
        if operation.after is not None:
            operation.after(world, said)
        world.drain()
        check_messages(world.delivered, operation, said, nth)
        world.check_partners()
        world.check_whole()
    print(nth - 1, "points")
    assert nth > operation.least


def check_messages(delivered, operation, said, nth):
    for number in operation.before + operation.ours:
        done = number in operation.takes
        allowed = {1} if not done else {0} if number in said else {0, 1}
        assert delivered.pop(number, 0) in allowed, f"message {number} of ours at point {nth}"
    for number in operation.sends:
        allowed = {1} if number in said else {0, 1}
        assert delivered.pop(number, 0) in allowed, f"message {number} of the victim at point {nth}"
    assert not delivered, f"nobody sent these: point {nth}"
