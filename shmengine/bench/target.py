"""A way from one process to another and back, as the bench sees it: a `Link` with two ends.

    main:   link = Link(nbytes, slots)  ── fork ──►  left, right: end = link.open(side)   ...   main: link.close()

    end.put[mode](number)          sends message `number`
    end.take[mode](number)         receives one, and tells whether it is message `number`

Every byte of a message, or with copies one byte of each page, is its number modulo a prime: a message that is stale,
torn, lost, doubled or early is not the expected one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal

import numpy as np

from shmengine.bench.plan import Mode

__all__ = [
    "PRIME",
    "Array",
    "End",
    "Link",
    "OneWay",
    "Put",
    "Side",
    "Take",
    "TwoWays",
    "checks",
    "putting_copies",
    "taking",
]

Array = np.ndarray[Any, np.dtype[np.uint8]]
Put = Callable[[int], None]
Take = Callable[[int], bool]
Side = Literal["left", "right"]

PRIME: Final = 251  # no number of slots divides it: what a slot held before is told from what it should hold
PAGE: Final = 4096
LINE: Final = 64  # messages up to a page: one byte of each cache line


def _nothing() -> None:
    pass


@dataclass
class End:
    """One end of a link, in the process that uses it."""

    put: dict[Mode, Put] = field(default_factory=dict)
    take: dict[Mode, Take] = field(default_factory=dict)
    close: Callable[[], None] = _nothing


class Link(ABC):
    """A way there and back, for messages of `nbytes` bytes, of which `slots` fit in each direction.

    Made in the main process, opened in two children that it forks, closed in the main process after they have ended,
    however they have ended.
    """

    modes: tuple[Mode, ...] = ("copy",)
    shares_memory: bool = False
    """Whether messages lie in memory of its own, which has to be warm, and is gone round."""

    def __init__(self, nbytes: int, slots: int) -> None:
        self.nbytes = nbytes
        self.slots = slots

    @abstractmethod
    def open(self, side: Side) -> End:
        """Become one of the two ends, in a child."""

    def close(self) -> None:  # noqa: B027 - most links leave nothing behind
        """Remove what is left of it, in the main process."""


class OneWay(ABC):
    """One direction, for a link that has two of them."""

    def __init__(self, nbytes: int, slots: int) -> None:
        self.nbytes = nbytes
        self.slots = slots

    @abstractmethod
    def sender(self) -> dict[Mode, Put]:
        """Become the one that sends, in a child."""

    @abstractmethod
    def receiver(self) -> dict[Mode, Take]:
        """Become the one that receives, in a child."""

    def leave(self) -> None:  # noqa: B027 - most have nothing to let go of
        """Let go of it, in a child."""

    def close(self) -> None:  # noqa: B027 - the same
        """Remove what is left of it, in the main process."""


class TwoWays(Link):
    """A link of one way there and one back."""

    way: ClassVar[type[OneWay]]

    def __init__(self, nbytes: int, slots: int) -> None:
        super().__init__(nbytes, slots)
        self.there = self.way(nbytes, slots)
        try:
            self.back = self.way(nbytes, slots)
        except BaseException:
            self.there.close()
            raise

    def open(self, side: Side) -> End:
        out, back = (self.there, self.back) if side == "left" else (self.back, self.there)

        def leave() -> None:
            out.leave()
            back.leave()

        # Receivers first: what is published before anybody subscribes is lost with some.
        take = back.receiver()
        return End(out.sender(), take, leave)

    def close(self) -> None:
        self.there.close()
        self.back.close()


# --- contents -----------------------------------------------------------------------------------


def checks(nbytes: int) -> tuple[slice, list[bytes]]:
    """Which bytes of a message are looked at, and what they must be, by the number modulo `PRIME`."""
    step = LINE if nbytes <= PAGE else PAGE
    looked_at = len(range(0, nbytes, step))
    return slice(None, None, step), [bytes([low]) * looked_at for low in range(PRIME)]


def taking(nbytes: int, receive: Callable[[], Array]) -> Take:
    """Look at what `receive` returns."""
    where, expected = checks(nbytes)

    def take(number: int) -> bool:
        array = receive()
        return array.nbytes == nbytes and array[where].tobytes() == expected[number % PRIME]

    return take


def putting_copies(nbytes: int, send: Callable[[Array], object], *, reuse: bool = True) -> Put:
    """Send an array that exists.

    Parameters
    ----------
    reuse : bool
        Whether the array may be changed as soon as `send` has returned. If not, each message is an array of its own.
    """
    if not reuse:
        return lambda number: void(send(np.full(nbytes, number % PRIME, np.uint8)))
    source = np.zeros(nbytes, np.uint8)
    marks = source[checks(nbytes)[0]]

    def put(number: int) -> None:
        marks.fill(number % PRIME)
        send(source)

    return put


def void(_: object) -> None:
    """Drop what a call returns."""
