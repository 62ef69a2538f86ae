"""A `Ring` among strangers who are killed and replaced: nobody is in charge of recovery but whoever comes by."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from functools import partial

from shmengine.errors import Timeout
from shmengine.ring import Ring
from tests.soak.leaks import arena_bytes_lost, counted_leaks
from tests.soak.ledger import WORDS, Ledger, read_message, write_message
from tests.soak.participants import Participants
from tests.soak.report import Report

PRODUCERS = CONSUMERS = 2
LIVES = 100_000
LOOK_SECONDS = 0.2
"""How often somebody who waits looks whether to end."""


@dataclass(frozen=True)
class Shape:
    """What a round is like."""

    capacity: int = 256
    arena: str = "16 MiB"
    largest: int = WORDS  # words of a message
    every: float = 0.05
    at_once: int = 1
    stops: bool = False


SHAPES = (
    Shape(),
    Shape(capacity=1),
    Shape(capacity=8, arena="32 MiB", largest=50_000),
    Shape(capacity=1000, at_once=2),
    Shape(capacity=16, stops=True, largest=500),
    Shape(every=0.005),
    Shape(at_once=4, every=0.02),
)


def produce(ring: Ring, ledger: Ledger, largest: int, life: int) -> None:
    """Send numbered messages until told to stop."""
    sizes = random.Random(life)
    flags, sent = ledger.flags, ledger.sent
    number, words = 0, WORDS
    while not flags[0]:
        if largest > WORDS:
            words = sizes.randint(WORDS, largest)
        try:
            claim = ring.claim(words, "u8", LOOK_SECONDS)
            write_message(claim.array, life, number)
            claim.commit()
        except Timeout:
            continue
        number += 1
        sent[life] = number
    ring.close()


def consume(ring: Ring, ledger: Ledger, role: int, life: int) -> None:
    """Receive and write down until told to stop."""
    flags, log, cursors = ledger.flags, ledger.logs[role], ledger.cursors
    cursor, end = cursors[role], len(ledger.logs[role])
    while not flags[1] and cursor < end:
        try:
            lease = ring.lease(LOOK_SECONDS)
        except Timeout:
            continue
        log[cursor] = read_message(lease.array, lease.attempts)
        cursor += 1
        cursors[role] = cursor
        lease.release()
    ring.close()


def play_round(shape: Shape, messages: int, seconds: float, rng: random.Random, report: Report) -> None:
    """Send so many messages, or for so long, through 2 producers x 2 consumers that die; then settle."""
    ledger = Ledger(CONSUMERS, LIVES, 2 * messages + 100_000)
    with Ring(shape.capacity, shape.arena) as ring:
        producers = [partial(produce, ring, ledger, shape.largest)] * PRODUCERS
        consumers = [partial(consume, ring, ledger, role) for role in range(CONSUMERS)]
        people = Participants([*producers, *consumers], report)
        end = time.monotonic() + seconds
        went_on = people.torment(
            rng,
            shape.every,
            lambda: ledger.total_sent < messages
            and time.monotonic() < end
            and people.births < LIVES - 10
            and not report.failures,
            lambda: ledger.total_sent + ledger.total_arrived,
            at_once=shape.at_once,
            stops=shape.stops,
        )
        ledger.stop_producing()
        if not went_on or not people.finish(range(PRODUCERS)):
            return
        ledger.stop_consuming()
        if not people.finish(range(PRODUCERS, len(people.roles))):
            return
        empty(ring, ledger)
        report.bytes_leaked += arena_bytes_lost(ring._region)
        empty(ring, ledger)  # what only an heir could put back
        ledger.settle(people.births, sum(people.deaths[PRODUCERS:]), report)
        stats = ring.stats()
        report.rescued_wakeups += stats.rescued_wakeups
        if (stats.approx_fill, stats.participants) != (0, 1):
            report.failures.append(f"the ring is not empty at the end: {stats}")


def empty(ring: Ring, ledger: Ledger) -> None:
    """Clear up after the last dead, and take what is left."""
    assert ring._region.is_abandoned()
    while (lease := ring.try_lease()) is not None:
        ledger.extra.append(read_message(lease.array, lease.attempts))
        lease.release()


def run(seconds: float, seed: int) -> Report:
    """Play rounds of all shapes, one after the other, until the time is over."""
    report = Report()
    rng = random.Random(seed)
    end = time.monotonic() + seconds
    with counted_leaks(report):
        while time.monotonic() < end and report.passed:
            for shape in rng.sample(SHAPES, len(SHAPES)):
                play_round(shape, 2_000_000, min(seconds / len(SHAPES), end - time.monotonic()), rng, report)
    return report
