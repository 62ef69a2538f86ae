"""A participant dies at its nth access of shared memory, in each operation of a queue.

Needs the test build, so `test_kill_points.py` runs this file. See `points_ring.py`.
"""

from __future__ import annotations

import collections
import contextlib
import queue
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from shmengine._native import lib
from shmengine.queues import JoinableQueue, Queue
from tests.helpers.fault_points import SOAK, Partner, Victim, armed, until_asleep

FOREVER = 60
MAXSIZE = 4
pytestmark = pytest.mark.watchdog(3600 if SOAK else 120)


def message(number):
    return number, bytes([number]) * 5000


def number_of(got):
    number, content = got
    assert content == bytes([number]) * 5000, "torn"
    return number


class World:
    """The queue, and who lives on."""

    def __init__(self, kind):
        self.queue = kind(MAXSIZE, memory="8 MiB")
        self.joinable = kind is JoinableQueue
        self.partner = Partner(
            self.queue._handle,
            self.queue.close,
            put=lambda number: self.queue.put(message(number), timeout=FOREVER),
            get=lambda: self.get(timeout=FOREVER),
        )
        self.delivered = collections.Counter()

    def get(self, **how):
        number = number_of(self.queue.get(**how))
        if self.joinable:
            self.queue.task_done()
        return number

    def drain(self):
        lib.shmr_check_deaths(self.queue._h)
        with contextlib.suppress(queue.Empty):
            while True:
                self.delivered[self.get(block=False)] += 1

    def check(self):
        self.partner.ask("put", 101)
        assert self.get(timeout=FOREVER) == 101
        self.queue.put(message(102))
        assert self.partner.ask("get") == 102
        if self.joinable:
            self.queue.join()
        c = self.queue._region.counters()
        assert (c.used, c.held, c.pins, c.rescued_wakeups, c.participants) == (0, 0, 0, 0, 2)
        self.queue.put(bytes(3 << 20))  # what the dead had is there again
        self.queue.get()
        if self.joinable:
            self.queue.task_done()
        lib.shmr_trim(self.queue._h)

    def end(self):
        self.partner.end()
        self.queue.close()
        self.queue._region.close()


class Operation(NamedTuple):
    """What the victim does, and what may become of messages when it dies in between."""

    act: Callable[[Any, Any, Any], object]
    kind: type = Queue
    sends: tuple[int, ...] = ()
    takes: tuple[int, ...] = ()
    before: tuple[int, ...] = (1, 2)
    meanwhile: Callable[[World, Victim], None] | None = None
    least: int = 1


def put(world, at, say):
    world.queue._handle()
    with at:
        world.queue.put(message(10))
    say(10)


def put_into_a_full_one(world, at, say):
    world.queue._handle()
    with at, contextlib.suppress(queue.Full):
        world.queue.put(message(10), timeout=0.002)


def get(world, at, say):
    world.queue._handle()
    with at:
        assert number_of(world.queue.get()) == 1
    say(1)


def get_and_not_do(world, at, say):
    world.queue._handle()
    with at:
        assert number_of(world.queue.get()) == 1


def get_in_vain(world, at, say):
    world.queue._handle()
    with at, contextlib.suppress(queue.Empty):
        world.queue.get(timeout=0.002)


def task_done(world, at, say):
    assert number_of(world.queue.get()) == 1
    with at:
        world.queue.task_done()
    say(1)


def join(world, at, say):
    world.queue._handle()
    say(0)
    with at:
        world.queue.join()


def do_all_when_asleep(world, victim):
    assert victim.hear() == 0
    until_asleep(victim)
    world.drain()


OPERATIONS = {
    "put": Operation(put, sends=(10,), least=8),
    "put into a full one": Operation(put_into_a_full_one, sends=(10,), before=(1, 2, 3, 4), least=8),
    "get": Operation(get, takes=(1,), least=4),
    "get in vain": Operation(get_in_vain, before=(), least=4),
    "get, of a joinable one": Operation(get_and_not_do, JoinableQueue, least=2),
    "task_done": Operation(task_done, JoinableQueue, takes=(1,)),
    "join": Operation(join, JoinableQueue, meanwhile=do_all_when_asleep, least=4),
}


@pytest.mark.parametrize("what", OPERATIONS)
def test_death_at_each_point_of(what):
    operation = OPERATIONS[what]
    world = World(operation.kind)
    killed = True
    nth = 0
    while killed:
        nth += 1
        world.delivered.clear()
        for number in operation.before:
            world.queue.put(message(number))
        victim = Victim(lambda say, n=nth: operation.act(world, armed(n), say))
        if operation.meanwhile is not None:
            operation.meanwhile(world, victim)
        killed, said = victim.end()
        world.drain()
        for number in operation.before:
            done = number in operation.takes
            allowed = {1} if not done else {0} if number in said else {0, 1}
            assert world.delivered.pop(number, 0) in allowed, f"message {number} of ours at point {nth}"
        for number in operation.sends:
            allowed = {1} if number in said else {0, 1}
            assert world.delivered.pop(number, 0) in allowed, f"message {number} of the victim at point {nth}"
        assert not world.delivered
        world.check()
    print(nth - 1, "points")
    assert nth > operation.least
    world.end()
