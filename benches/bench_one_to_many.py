"""One producer, three consumers: whoever is free takes the next message.

                                    ┌──► consumer
    producer ── 0 1 2 3 ... ──► [ ] ┼──► consumer
                                    └──► consumer

Four processes; where there are fewer cores the kernel lets them take turns. Expected: all consumers together get each
number once, and each of them gets rising numbers.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from typing import Any

import pytest

from benches.flows import STOP, Flow, contestants

CONSUMERS = 3


def parts(flow: Flow) -> list[Any]:
    def produce(count: int) -> int:
        for number in range(count):
            flow.send(number)
        for _ in range(CONSUMERS):
            flow.send(STOP)
        return count

    def consume(_: int) -> list[int]:
        got = []
        while (number := flow.receive()) != STOP:
            got.append(number)
        assert got == sorted(set(got)), "out of order, or double"
        return got

    return [produce, *[consume] * CONSUMERS]


def complete(count: int, replies: list[Any]) -> None:
    sent, *got = replies
    assert sent == count
    assert sorted(itertools.chain(*got)) == list(range(count)), "lost or double"


@pytest.mark.parametrize(("nbytes", "count"), [(4 << 10, 4_000), (1 << 20, 300)], ids=["4KiB", "1MiB"])
def test_one_to_many(nbytes: int, count: int, compare: Any, targets: Any) -> None:
    """Rings and queues of many consumers."""
    with ExitStack() as stack:
        result = compare(
            contestants(stack, 1, nbytes, parts, complete, count), unit="a message", bytes_each=nbytes
        )
    targets.note("Ring to multiprocessing.Queue", f"{result.ratio('Ring', 'multiprocessing.Queue'):.3g}x")
