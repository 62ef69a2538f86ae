"""Everything that can be measured, by name, and what each needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

from shmengine.bench import ours, rivals
from shmengine.bench.target import Link

__all__ = ["MECHANISMS", "TARGETS", "Group", "Target", "choose", "missing"]

Group = Literal["mechanism", "ours", "rival"]

MECHANISMS: Final = ("shm", "pipe", "mqueue", "socket")


@dataclass(frozen=True)
class Target:
    """One row of the table.

    Attributes
    ----------
    name : str
    group : str
        ``"mechanism"``: a channel of ours, which can be recommended; ``"ours"``; ``"rival"``.
    link : callable
        ``link(nbytes, slots)``.
    needs : str or None
        A module that must be installed; `package` is what brings it.
    package : str or None
    """

    name: str
    group: Group
    link: Callable[[int, int], Link]
    needs: str | None = None
    package: str | None = None


TARGETS: Final = (
    *(
        Target(name, "mechanism", partial(ours.ChannelLink, mechanism=name), needs, package)
        for name, needs, package in (
            ("shm", None, None),
            ("pipe", None, None),
            ("mqueue", "posix_ipc", "posix-ipc"),
            ("socket", "zmq", "pyzmq"),
        )
    ),
    Target("Ring", "ours", ours.RingLink),
    Target("Queue", "ours", ours.QueueLink),
    Target("multiprocessing.Pipe", "rival", rivals.PipeLink),
    Target("multiprocessing.Queue", "rival", rivals.QueueLink),
    Target("faster-fifo", "rival", rivals.FasterQueueLink, "faster_fifo", "faster-fifo"),
    Target("kickmsg", "rival", rivals.KickmsgLink, "kickmsg", "kickmsg"),
    Target("kickmsg (spinning)", "rival", rivals.KickmsgSpinningLink, "kickmsg", "kickmsg"),
    Target("iceoryx2", "rival", rivals.Iceoryx2Link, "iceoryx2", "iceoryx2"),
    Target("iceoryx2 (polling)", "rival", rivals.Iceoryx2PollingLink, "iceoryx2", "iceoryx2"),
    Target("pyzmq", "rival", rivals.PyzmqLink, "zmq", "pyzmq"),
)


def missing(target: Target) -> str | None:
    """Say why a target cannot be measured here; None if it can."""
    if target.needs is not None and importlib.util.find_spec(target.needs) is None:
        return f"not installed: pip install {target.package}"
    return None


def choose(names: Iterable[str]) -> tuple[Target, ...]:
    """Return the targets of these names, or groups of them (``mechanism``, ``ours``, ``rival``).

    Raises
    ------
    ValueError
        There is none of that name.
    """
    wanted = list(names)
    known = {target.name for target in TARGETS} | {target.group for target in TARGETS}
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(
            f"there is no {unknown[0]!r} to measure: say {', '.join(sorted({t.group for t in TARGETS}))}, or some of "
            + "; ".join(target.name for target in TARGETS)
        )
    return tuple(target for target in TARGETS if target.name in wanted or target.group in wanted)
