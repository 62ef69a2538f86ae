"""Three stages, each a process of its own.

    source ── n ──► [ ] ──► double ── 2n ──► [ ] ──► sink

Where there are fewer cores than stages the kernel lets them take turns. Expected: 0, 2, 4, ... in this order.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

from benches.flows import Flow, contestants


def parts(first: Flow, second: Flow) -> list[Any]:
    def source(count: int) -> int:
        for number in range(count):
            first.send(number)
        return count

    def double(count: int) -> int:
        for _ in range(count):
            second.send(2 * first.receive())
        return count

    def sink(count: int) -> list[int]:
        return [second.receive() for _ in range(count)]

    return [source, double, sink]


def complete(count: int, replies: list[Any]) -> None:
    assert replies == [count, count, list(range(0, 2 * count, 2))], "lost, double, or out of order"


@pytest.mark.parametrize(("nbytes", "count"), [(4 << 10, 4_000), (1 << 20, 300)], ids=["4KiB", "1MiB"])
def test_pipeline(nbytes: int, count: int, compare: Any, targets: Any) -> None:
    """Two rings, or two queues."""
    with ExitStack() as stack:
        result = compare(
            contestants(stack, 2, nbytes, parts, complete, count), unit="a message", bytes_each=nbytes
        )
    targets.note("Ring to multiprocessing.Queue", f"{result.ratio('Ring', 'multiprocessing.Queue'):.3g}x")
