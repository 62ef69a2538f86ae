"""Our own ways: the four channels, and the ring and the queue by themselves."""

from __future__ import annotations

from typing import Any

from shmengine.bench.plan import Mode
from shmengine.bench.target import (
    PRIME,
    Array,
    End,
    Link,
    OneWay,
    Put,
    Side,
    Take,
    TwoWays,
    checks,
    putting_copies,
    taking,
)
from shmengine.queues import Queue
from shmengine.ring import Ring

__all__ = ["QueueLink", "RingLink", "RingWay", "filling", "memory_for", "reading"]

SPARE_BLOCKS = 4  # claimed, leased, or kept by a view, beyond those that wait
MIN_BLOCK = 64 << 10


def memory_for(nbytes: int, slots: int) -> int:
    """How much a ring needs, so that its slots are what limits it."""
    return (slots + SPARE_BLOCKS) * max(nbytes, MIN_BLOCK)


def filling(end: Any, nbytes: int) -> Put:
    """Fill messages in place; each claim is ended by a call."""
    shape = (nbytes,)

    def put(number: int) -> None:
        frame = end.claim(shape, "u1")
        frame.array.fill(number % PRIME)
        frame.commit()

    return put


def reading(end: Any, nbytes: int) -> Take:
    """Read messages in place; each lease is ended by a call."""
    where, expected = checks(nbytes)

    def take(number: int) -> bool:
        frame = end.lease()
        # No name for the array: while it lived its block would not be free again.
        right: bool = frame.array[where].tobytes() == expected[number % PRIME]
        frame.release()
        return right

    return take


class RingWay(OneWay):
    """`shmengine.Ring`."""

    def __init__(self, nbytes: int, slots: int) -> None:
        super().__init__(nbytes, slots)
        self.ring = Ring(capacity=slots, arena_bytes=memory_for(nbytes, slots))

    def sender(self) -> dict[Mode, Put]:
        return {
            "copy": putting_copies(self.nbytes, self.ring.send),
            "block": filling(self.ring, self.nbytes),
        }

    def receiver(self) -> dict[Mode, Take]:
        take = reading(self.ring, self.nbytes)
        return {"copy": take, "block": take}

    def leave(self) -> None:
        self.ring.close()

    def close(self) -> None:
        self.ring.close()


class RingLink(TwoWays):
    """Two rings."""

    way = RingWay
    modes = ("copy", "block")
    shares_memory = True


class QueueWay(OneWay):
    """`shmengine.Queue`."""

    def __init__(self, nbytes: int, slots: int) -> None:
        super().__init__(nbytes, slots)
        self.queue: Queue[Array] = Queue(slots, memory=memory_for(nbytes, slots))

    def sender(self) -> dict[Mode, Put]:
        return {"copy": putting_copies(self.nbytes, self.queue.put)}

    def receiver(self) -> dict[Mode, Take]:
        return {"copy": taking(self.nbytes, self.queue.get)}

    def leave(self) -> None:
        self.queue.close()

    def close(self) -> None:
        self.queue.close()


class QueueLink(TwoWays):
    """Two queues."""

    way = QueueWay
    shares_memory = True


class ChannelLink(Link):
    """A duplex `shmengine.channel`."""

    def __init__(self, nbytes: int, slots: int, *, mechanism: str) -> None:
        from shmengine.channels import channel

        super().__init__(nbytes, slots)
        self.ends = dict(
            zip(("left", "right"), channel(mechanism, buffer_bytes=memory_for(nbytes, slots)), strict=True)
        )
        end = self.ends["left"]
        self.shares_memory = end.capabilities.in_place
        self.modes = ("copy", "block") if end.capabilities.in_place else ("copy",)

    def open(self, side: Side) -> End:
        self.ends["right" if side == "left" else "left"].close()
        end: Any = self.ends[side]
        opened = End(
            {"copy": putting_copies(self.nbytes, end.send)},
            {"copy": taking(self.nbytes, end.receive)},
            end.close,
        )
        if "block" in self.modes:
            opened.put["block"] = filling(end, self.nbytes)
            opened.take["block"] = reading(end, self.nbytes)
        return opened

    def close(self) -> None:
        for end in self.ends.values():
            end.close()
