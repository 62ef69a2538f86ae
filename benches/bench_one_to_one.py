"""One producer process, one consumer process, one direction.

    producer ── fill in place ──► [ 16 slots ] ──► read one element a page ── consumer
    producer ── fill in place ──► [ 16 slots ] ──► read all ──────────────── consumer
    producer ── send an array ──► [ 16 slots ] ──►

Needs 2 cores; each process is pinned to one. The ring wraps at least ten times in a round. Expected: every message,
once, in order, with its number in each byte that is looked at.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

from benches.rivals import (
    SLOTS,
    CRing,
    HandReadWhole,
    HandWritten,
    HandWrittenPosix,
    PipeOfBytes,
    RingByWith,
    RingReadWhole,
    known,
    one_way,
)

KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize(
    ("nbytes", "count", "bound", "best_slots"),
    [
        pytest.param(4 * KIB, 40_000, 0.8, 16, id="4KiB"),
        pytest.param(64 * KIB, 20_000, 0.9, 16, id="64KiB"),
        pytest.param(1 * MIB, 3_000, 0.9, 8, id="1MiB"),
        pytest.param(16 * MIB, 200, 0.9, 2, id="16MiB"),
    ],
)
def test_in_place(nbytes: int, count: int, bound: float, best_slots: int, compare: Any, targets: Any) -> None:
    """Against the hand-written loop, with whichever semaphores are faster, and against the peers.

    That loop takes its slots in turn, and depends on how many of them fit the caches. So it is also there with the
    number of slots with which it is fastest.
    """
    peers = known("kickmsg", "kickmsg (spinning)", "iceoryx2", "iceoryx2 (polling)")
    links = {
        **known("shm", "Ring"),
        "Ring, by with": RingByWith,
        "by hand, posix_ipc": HandWrittenPosix,
        "by hand, multiprocessing": HandWritten,
        **peers,
    }
    with ExitStack() as stack:
        contestants = {name: one_way(stack, link, nbytes, "block", count) for name, link in links.items()}
        if best_slots != SLOTS:
            name = f"by hand, {best_slots} slots"
            contestants[name] = one_way(stack, HandWritten, nbytes, "block", count, best_slots)
        result = compare(contestants, unit="a message", bytes_each=nbytes if nbytes > 4 * KIB else 0)
    by_hand = [name for name in contestants if name.startswith("by hand")]
    targets.at_least("Ring to a hand-written SharedMemory loop", result.ratio("Ring", *by_hand), bound)
    by_with = result.ratio("Ring, by with", *by_hand)
    targets.note("the same, claims and leases as context managers", f"{by_with:.3g}x")
    if nbytes > 4 * KIB:
        targets.at_least(
            "shm in place to the best of all others", result.ratio("shm", *by_hand, *peers), 0.95
        )
    elif rivals := [name for name in peers if name.startswith("kickmsg")]:
        targets.at_least("shm in place to kickmsg, the better one", result.ratio("shm", *rivals), 0.95)


@pytest.mark.parametrize(
    ("nbytes", "count"),
    [pytest.param(256 * KIB, 6_000, id="256KiB"), pytest.param(1 * MIB, 2_000, id="1MiB")],
)
def test_read_whole(nbytes: int, count: int, compare: Any, targets: Any) -> None:
    """A consumer that reads every byte: all of a block that it has just read is in its core's cache.

    Whoever writes there next has to fetch it, so it matters which block is next.
    """
    with ExitStack() as stack:
        result = compare(
            {
                "Ring": one_way(stack, RingReadWhole, nbytes, "block", count),
                "by hand": one_way(stack, HandReadWhole, nbytes, "block", count),
                "by hand, 8 slots": one_way(stack, HandReadWhole, nbytes, "block", count, 8),
            },
            unit="a message",
            bytes_each=nbytes,
        )
    ratio = result.ratio("Ring", "by hand", "by hand, 8 slots")
    targets.at_least("Ring, read whole, to a hand-written SharedMemory loop", ratio, 0.8)


@pytest.mark.parametrize(
    ("nbytes", "count"), [pytest.param(1 * MIB, 2_000, id="1MiB"), pytest.param(16 * MIB, 100, id="16MiB")]
)
def test_copied_in(nbytes: int, count: int, compare: Any, targets: Any) -> None:
    """An array that exists, against a plain ring in C."""
    links = {**known("shm", "Ring"), "memcpy ring in C": CRing, **known("kickmsg", "iceoryx2")}
    with ExitStack() as stack:
        result = compare(
            {name: one_way(stack, link, nbytes, "copy", count) for name, link in links.items()},
            unit="a message",
            bytes_each=nbytes,
        )
    targets.at_least("shm, copied in, to a memcpy ring in C", result.ratio("shm", "memcpy ring in C"), 0.9)


def test_standard_library(compare: Any, targets: Any) -> None:
    """Against the standard library, at 1 MiB."""
    nbytes = 1 * MIB
    with ExitStack() as stack:
        result = compare(
            {
                "Ring": one_way(stack, known("Ring")["Ring"], nbytes, "block", 3_000),
                "multiprocessing.Queue": one_way(
                    stack, known("multiprocessing.Queue")["multiprocessing.Queue"], nbytes, "copy", 160
                ),
                "multiprocessing.Pipe": one_way(stack, PipeOfBytes, nbytes, "copy", 320),
            },
            repeats=7,
            unit="a message",
            bytes_each=nbytes,
        )
    targets.at_least(
        "Ring to multiprocessing.Queue, 1 MiB", result.ratio("Ring", "multiprocessing.Queue"), 50
    )
    ratio = result.ratio("Ring", "multiprocessing.Pipe")
    targets.note("Ring to multiprocessing.Pipe (bytes into a buffer), 1 MiB", f"{ratio:.3g}x")
