"""What is measured: which sizes, how, how often, and for how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from shmengine.config import parse_bytes

__all__ = ["FULL", "KIB", "MIB", "MODES", "QUICK", "Mode", "Plan", "parse_size", "show_size", "slots_for"]

KIB: Final = 1 << 10
MIB: Final = 1 << 20

Mode = Literal["copy", "block"]
MODES: Final[tuple[Mode, ...]] = ("copy", "block")
"""``copy``: an array that exists is sent. ``block``: the message is filled where it lies, in shared memory."""

MIN_BYTES: Final = 8
MAX_BYTES: Final = 1 << 30
MAX_SLOTS: Final = 16
MEMORY_OF_SLOTS: Final = 64 * MIB


@dataclass(frozen=True)
class Plan:
    """One run.

    Attributes
    ----------
    sizes : tuple of int
        Bytes of a message.
    modes : tuple of str
        See `MODES`.
    repeats : int
        Rounds of each; all take turns within a repeat.
    round_seconds : float
        How long a round should last.
    total_seconds : float or None
        Shared among the sizes; when a size's share is over no further repeat is begun. None: no limit.
    patience : float
        Seconds without an answer after which processes are taken to hang, and killed.
    pinned : bool
        Whether the two processes of a pair are each kept on a core of their own.
    """

    sizes: tuple[int, ...]
    modes: tuple[Mode, ...] = MODES
    repeats: int = 9
    round_seconds: float = 0.1
    total_seconds: float | None = None
    patience: float = 20.0
    pinned: bool = True


FULL: Final = Plan(
    sizes=(64, KIB, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 128 * MIB),
    total_seconds=600.0,
)
QUICK: Final = Plan(
    sizes=(64, 4 * KIB, 64 * KIB, MIB, 16 * MIB),
    repeats=3,
    round_seconds=0.015,
    total_seconds=16.0,
    patience=3.0,
)


def slots_for(nbytes: int) -> int:
    """How many messages a ring holds: few enough that it wraps in each round, and that large ones fit memory."""
    return max(2, min(MAX_SLOTS, MEMORY_OF_SLOTS // nbytes))


def parse_size(text: str) -> int:
    """Read the size of a message: ``64``, ``"4 KiB"``, ``"16MiB"``.

    Raises
    ------
    ValueError
        It is no size, or none from 8 B to 1 GiB.
    """
    nbytes = parse_bytes(int(text) if text.strip().isdecimal() else text)
    if not MIN_BYTES <= nbytes <= MAX_BYTES:
        raise ValueError(f"a message has from {MIN_BYTES} B to {show_size(MAX_BYTES)}, not {text}")
    return nbytes


def show_size(nbytes: int) -> str:
    """Write a number of bytes as it is read: ``64 B``, ``4 KiB``, ``1.5 MiB``."""
    for unit, bytes_each in (("GiB", 1 << 30), ("MiB", MIB), ("KiB", KIB)):
        if nbytes >= bytes_each:
            return f"{nbytes / bytes_each:.4g} {unit}"
    return f"{nbytes} B"
