"""One producer process, one consumer process, one direction.

    producer ── fill in place ──► [ 16 slots ] ──► read one element a page ── consumer

Needs 2 cores; each process is pinned to one. The ring wraps at least ten times in a round. Every message is
checked: what was read, and in which order.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

from benches.measure import two_cpus
from benches.rivals import HandWrittenLoop, Link, Pair, PipeLink, QueueLink, RingLink, RingWithLink

KIB, MIB = 1 << 10, 1 << 20


def rounds_of(stack: ExitStack, link: Link, count: int) -> Any:
    pair = stack.enter_context(Pair(link, two_cpus()))
    return lambda: pair.run(count)


@pytest.mark.parametrize(
    ("nbytes", "count", "bound"),
    [
        pytest.param(4 * KIB, 40_000, 0.8, id="4KiB"),
        pytest.param(64 * KIB, 20_000, 0.9, id="64KiB"),
        pytest.param(1 * MIB, 3_000, 0.9, id="1MiB"),
        pytest.param(16 * MIB, 200, 0.9, id="16MiB"),
    ],
)
def test_one_to_one(nbytes: int, count: int, bound: float, compare: Any, targets: Any) -> None:
    """Against the hand-written loop, with whichever semaphores are faster."""
    with ExitStack() as stack:
        result = compare(
            {
                "shmengine.Ring": rounds_of(stack, RingLink(nbytes), count),
                "shmengine.Ring, by with": rounds_of(stack, RingWithLink(nbytes), count),
                "by hand, posix_ipc": rounds_of(stack, HandWrittenLoop(nbytes, "posix_ipc"), count),
                "by hand, multiprocessing": rounds_of(
                    stack, HandWrittenLoop(nbytes, "multiprocessing"), count
                ),
            },
            unit="a message",
            bytes_each=nbytes if nbytes > 4 * KIB else 0,
        )
    ratio = result.ratio("shmengine.Ring", "by hand, posix_ipc", "by hand, multiprocessing")
    targets.at_least("Ring to a hand-written SharedMemory loop", ratio, bound)
    by_with = result.ratio("shmengine.Ring, by with", "by hand, posix_ipc", "by hand, multiprocessing")
    targets.note("the same, claims and leases as context managers", f"{by_with:.3g}x")


def test_one_to_one_queue(compare: Any, targets: Any) -> None:
    """Against the standard library, at 1 MiB."""
    nbytes = 1 * MIB
    with ExitStack() as stack:
        result = compare(
            {
                "shmengine.Ring": rounds_of(stack, RingLink(nbytes), 3_000),
                "multiprocessing.Queue": rounds_of(stack, QueueLink(nbytes), 160),
                "multiprocessing.Pipe": rounds_of(stack, PipeLink(nbytes), 320),
            },
            repeats=7,
            unit="a message",
            bytes_each=nbytes,
        )
    targets.at_least(
        "Ring to multiprocessing.Queue, 1 MiB", result.ratio("shmengine.Ring", "multiprocessing.Queue"), 50
    )
    ratio = result.ratio("shmengine.Ring", "multiprocessing.Pipe")
    targets.note("Ring to multiprocessing.Pipe (bytes into a buffer), 1 MiB", f"{ratio:.3g}x")
