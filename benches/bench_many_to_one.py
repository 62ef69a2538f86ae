"""Three producers, one consumer; with channels, three of these.

    producer ── 0 3 6 ... ──┐                             producer ── 0 3 6 ... ──► [ ] ──┐
    producer ── 1 4 7 ... ──┼──► [ ] ──► consumer         producer ── 1 4 7 ... ──► [ ] ──┼──► consumer
    producer ── 2 5 8 ... ──┘                             producer ── 2 5 8 ... ──► [ ] ──┘

Four processes; where there are fewer cores the kernel lets them take turns. Expected: each number once, those of one
producer in its order.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

from benches.flows import Flow, contestants, note_ratios

PRODUCERS = 3


def parts(flow: Flow) -> list[Any]:
    def produce(first: int, count: int) -> int:
        send = flow.sender(first)
        for number in range(first, count, PRODUCERS):
            send(number)
        return first

    def consume(count: int) -> bool:
        receive = flow.receiver(0)
        got = [receive() for _ in range(count)]
        return all(
            [n for n in got if n % PRODUCERS == p] == list(range(p, count, PRODUCERS))
            for p in range(PRODUCERS)
        )

    return [*(partial(produce, first) for first in range(PRODUCERS)), consume]


def complete(count: int, replies: list[Any]) -> None:
    assert replies == [*range(PRODUCERS), True], "lost, double, or out of order"


@pytest.mark.parametrize(
    ("nbytes", "count", "rivals_count"),
    [(4 << 10, 3_999, 3_999), (1 << 20, 300, 60)],
    ids=["4KiB", "1MiB"],
)
def test_many_to_one(nbytes: int, count: int, rivals_count: int, compare: Any, targets: Any) -> None:
    """Rings and queues of many producers, and the four channels."""
    with ExitStack() as stack:
        made = contestants(stack, [(PRODUCERS, 1)], nbytes, parts, complete, count, rivals_count)
        result = compare(made, unit="a message", bytes_each=nbytes)
    note_ratios(result, targets)
