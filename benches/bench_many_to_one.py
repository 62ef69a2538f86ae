"""Three producers, one consumer.

    producer ── 0 3 6 ... ──┐
    producer ── 1 4 7 ... ──┼──► [ ] ──► consumer
    producer ── 2 5 8 ... ──┘

Four processes; where there are fewer cores the kernel lets them take turns. Expected: each number once, those of one
producer in its order.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

from benches.flows import Flow, contestants

PRODUCERS = 3


def parts(flow: Flow) -> list[Any]:
    def produce(first: int, count: int) -> int:
        for number in range(first, count, PRODUCERS):
            flow.send(number)
        return first

    def consume(count: int) -> bool:
        got = [flow.receive() for _ in range(count)]
        return all(
            [n for n in got if n % PRODUCERS == p] == list(range(p, count, PRODUCERS))
            for p in range(PRODUCERS)
        )

    return [*(partial(produce, first) for first in range(PRODUCERS)), consume]


def complete(count: int, replies: list[Any]) -> None:
    assert replies == [*range(PRODUCERS), True], "lost, double, or out of order"


@pytest.mark.parametrize(("nbytes", "count"), [(4 << 10, 3_999), (1 << 20, 300)], ids=["4KiB", "1MiB"])
def test_many_to_one(nbytes: int, count: int, compare: Any, targets: Any) -> None:
    """Rings and queues of many producers."""
    with ExitStack() as stack:
        result = compare(
            contestants(stack, 1, nbytes, parts, complete, count), unit="a message", bytes_each=nbytes
        )
    targets.note("Ring to multiprocessing.Queue", f"{result.ratio('Ring', 'multiprocessing.Queue'):.3g}x")
