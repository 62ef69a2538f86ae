"""Three stages, each a process of its own.

    source ── n ──► [ ] ──► double ── 2n ──► [ ] ──► sink

Where there are fewer cores than stages the kernel lets them take turns. Expected: 0, 2, 4, ... in this order.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

from benches.flows import Flow, contestants, note_ratios


def parts(first: Flow, second: Flow) -> list[Any]:
    def source(count: int) -> int:
        send = first.sender(0)
        for number in range(count):
            send(number)
        return count

    def double(count: int) -> int:
        receive, send = first.receiver(0), second.sender(0)
        for _ in range(count):
            send(2 * receive())
        return count

    def sink(count: int) -> list[int]:
        receive = second.receiver(0)
        return [receive() for _ in range(count)]

    return [source, double, sink]


def complete(count: int, replies: list[Any]) -> None:
    assert replies == [count, count, list(range(0, 2 * count, 2))], "lost, double, or out of order"


@pytest.mark.parametrize(
    ("nbytes", "count", "rivals_count"),
    [(4 << 10, 4_000, 4_000), (1 << 20, 300, 60)],
    ids=["4KiB", "1MiB"],
)
def test_pipeline(nbytes: int, count: int, rivals_count: int, compare: Any, targets: Any) -> None:
    """Two rings, two queues, or two channels."""
    with ExitStack() as stack:
        made = contestants(stack, [(1, 1), (1, 1)], nbytes, parts, complete, count, rivals_count)
        result = compare(made, unit="a message", bytes_each=nbytes)
    note_ratios(result, targets)
