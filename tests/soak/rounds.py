"""A round: 2 producers x 2 consumers over one channel, killed and replaced until enough has moved; then the account."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from shmengine.region import Region
from tests.soak.leaks import arena_bytes_lost, counted_leaks
from tests.soak.ledger import WORDS, Ledger
from tests.soak.participants import Participants
from tests.soak.report import Report

PRODUCERS = CONSUMERS = 2
LIVES = 100_000  # of one round, at most
MESSAGES = 2_000_000  # of one round, at most; a ledger keeps them all
LOOK_SECONDS = 0.2
"""How often somebody who waits looks whether to end."""


class Channel(Protocol):
    """What messages go through. The one who makes it forks all others, and does nothing before the end."""

    region: Region

    def produce(self, ledger: Ledger, life: int) -> None:
        """Send numbered messages until told to stop."""

    def consume(self, ledger: Ledger, role: int, life: int) -> None:
        """Receive messages, and write them down before they are released, until told to stop."""

    def take_rest(self, ledger: Ledger) -> None:
        """Receive what is left; nobody else is there."""

    def close(self) -> None:
        """End it."""


@dataclass(frozen=True)
class Shape:
    """What a round is like."""

    capacity: int = 256
    memory: str = "16 MiB"
    largest: int = WORDS  # words of a message
    every: float = 0.05  # seconds between kills
    at_once: int = 1
    stops: bool = False
    messages: int = MESSAGES


SHAPES = (
    Shape(),
    Shape(capacity=1),
    Shape(capacity=8, memory="32 MiB", largest=50_000),
    Shape(capacity=1000, at_once=2),
    Shape(capacity=16, stops=True, largest=500),
    Shape(every=0.005),
    Shape(at_once=4, every=0.02),
)


def play(channel: Channel, shape: Shape, seconds: float, rng: random.Random, report: Report) -> None:
    """Send so many messages, or for so long, and add the account to the report; closes the channel."""
    ledger = Ledger(CONSUMERS, LIVES, 2 * shape.messages + 100_000)
    people = Participants(
        [
            *[partial(channel.produce, ledger)] * PRODUCERS,
            *(partial(channel.consume, ledger, role) for role in range(CONSUMERS)),
        ],
        report,
    )
    end = time.monotonic() + seconds

    def goes_on() -> bool:
        enough = ledger.total_sent >= shape.messages or people.births > LIVES - 10
        return not enough and not report.failures and time.monotonic() < end

    def moved() -> int:
        return ledger.total_sent + ledger.total_arrived

    went_on = people.torment(rng, shape.every, goes_on, moved, at_once=shape.at_once, stops=shape.stops)
    ledger.stop_producing()
    went_on = went_on and people.finish(range(PRODUCERS))
    ledger.stop_consuming()
    went_on = went_on and people.finish(range(PRODUCERS, PRODUCERS + CONSUMERS))
    if went_on:
        _empty(channel, ledger, report)
        report.bytes_leaked += arena_bytes_lost(channel.region)  # this adopts what others left
        _empty(channel, ledger, report)
        ledger.settle(people.births, sum(people.deaths[PRODUCERS:]), report)
        report.rescued_wakeups += channel.region.counters().rescued_wakeups
    channel.close()


def _empty(channel: Channel, ledger: Ledger, report: Report) -> None:
    if not channel.region.is_abandoned():  # clears up after the last dead
        report.failures.append("somebody is still there")
    channel.take_rest(ledger)


def play_all(
    channels: Sequence[Callable[[Shape], Channel]], shapes: Sequence[Shape], seconds: float, seed: int
) -> Report:
    """Play rounds of all shapes over all channels until the time is over or something is wrong."""
    report = Report()
    rng = random.Random(seed)
    end = time.monotonic() + seconds
    kinds = list(itertools.product(shapes, channels))
    with counted_leaks(report):
        while time.monotonic() < end and report.passed:
            for shape, make in rng.sample(kinds, len(kinds)):
                limit = min(seconds / len(kinds), end - time.monotonic())
                if limit > 0 and report.passed:
                    play(make(shape), shape, limit, rng, report)
    return report
