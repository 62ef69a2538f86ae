"""One producer, three consumers: whoever is free takes the next message; with channels, three of these, each his own.

                                    ┌──► consumer               ┌── 0 3 6 ... ──► [ ] ──► consumer
    producer ── 0 1 2 3 ... ──► [ ] ┼──► consumer     producer ─┼── 1 4 7 ... ──► [ ] ──► consumer
                                    └──► consumer               └── 2 5 8 ... ──► [ ] ──► consumer

Four processes; where there are fewer cores the kernel lets them take turns. Expected: all consumers together get each
number once, and each of them gets rising numbers.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

from benches.flows import STOP, Flow, contestants, note_ratios

CONSUMERS = 3


def parts(flow: Flow) -> list[Any]:
    def produce(count: int) -> int:
        send = flow.sender(0)
        for number in range(count):
            send(number)
        for _ in range(CONSUMERS):
            send(STOP)
        return count

    def consume(consumer: int, _: int) -> list[int]:
        receive, got = flow.receiver(consumer), []
        while (number := receive()) != STOP:
            got.append(number)
        assert got == sorted(set(got)), "out of order, or double"
        return got

    return [produce, *(partial(consume, consumer) for consumer in range(CONSUMERS))]


def complete(count: int, replies: list[Any]) -> None:
    sent, *got = replies
    assert sent == count
    assert sorted(itertools.chain(*got)) == list(range(count)), "lost or double"


@pytest.mark.parametrize(
    ("nbytes", "count", "rivals_count"),
    [(4 << 10, 4_000, 4_000), (1 << 20, 300, 60)],
    ids=["4KiB", "1MiB"],
)
def test_one_to_many(nbytes: int, count: int, rivals_count: int, compare: Any, targets: Any) -> None:
    """Rings and queues of many consumers, and the four channels."""
    with ExitStack() as stack:
        made = contestants(stack, [(1, CONSUMERS)], nbytes, parts, complete, count, rivals_count)
        result = compare(made, unit="a message", bytes_each=nbytes)
    note_ratios(result, targets)
