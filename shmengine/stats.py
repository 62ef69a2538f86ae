"""What an engine or a ring has done so far: frozen dataclasses, read by people and by programs alike."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from shmengine.config import format_bytes

__all__ = ["ChannelStats", "EngineStats", "RingStats", "as_table"]


class _Table:
    """Mixin: a plain dict, and a small table in notebooks (no I/O, nothing waits)."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dict (ready for JSON)."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]

    def _repr_html_(self) -> str:
        return as_table(type(self).__name__, self)


def as_table(caption: str, stats: Any = None) -> str:
    """Return a table for notebooks: a caption, and the fields of a dataclass.

    Without colours of its own, so that it can be read on a light ground and on a dark one.
    """
    import html

    rows = ""
    for field in () if stats is None else fields(stats):
        name, text = field.name.replace("_", " "), _shown(field.name, getattr(stats, field.name))
        rows += (
            f"<tr><th style='text-align:left;font-weight:normal'>{name}</th>"
            f"<td style='text-align:right;font-variant-numeric:tabular-nums'>{html.escape(text)}</td></tr>"
        )
    style = "text-align:left;font-weight:bold;white-space:nowrap;color:inherit"
    return f"<table><caption style='{style}'>{html.escape(caption)}</caption>{rows}</table>"


# Fields that count bytes and are shown with a unit.
_BYTES = frozenset(
    {
        "bytes_committed",
        "bytes_copied",
        "bytes_received",
        "bytes_sent",
        "bytes_shared",
        "memory_budget",
        "memory_used",
        "wire_bytes_received",
        "wire_bytes_sent",
    }
)


def _shown(name: str, value: Any) -> str:
    if name in _BYTES:
        return format_bytes(value)
    if name == "leases_held":
        return ", ".join(f"process {pid}: {count:,}" for pid, count in value) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


@dataclass(frozen=True, slots=True)
class EngineStats(_Table):
    """A snapshot of one engine's counters, from `Engine.stats`.

    Counters start at zero with the engine and only grow; the others say how things stand now. Backends
    without shared memory (``"thread"``, ``"serial"``) leave what they do not have at zero.
    """

    backend: str
    """Name of the backend: ``"process"``, ``"thread"`` or ``"serial"``."""
    workers: int
    """Number of workers that the engine keeps (a worker that died is replaced, not subtracted)."""
    tasks_done: int = 0
    """Tasks that returned a value."""
    tasks_failed: int = 0
    """Tasks that ended with an error, after all retries."""
    retries: int = 0
    """Times a task was started again because its worker died."""
    worker_deaths: int = 0
    """Worker processes that ended without being asked to (those killed for a timeout included)."""
    bytes_copied: int = 0
    """Bytes of arrays and buffers copied between private and shared memory, both ways."""
    bytes_shared: int = 0
    """Bytes of arrays and buffers that crossed by reference, without a copy."""
    memory_budget: int = 0
    """Bytes of shared memory that the engine may use."""
    memory_used: int = 0
    """Bytes of shared memory reserved now."""
    ring_fill: int = 0
    """Messages in the task and result rings now (approximate while others work)."""
    ring_capacity: int = 0
    """Messages that fit into these rings."""
    tasks_in_flight: int = 0
    """Tasks handed to workers whose outcome has not come back yet."""
    rescued_wakeups: int = 0
    """Waits that ended by the periodic second look instead of a wake-up (0 is normal)."""
    late_releases: int = 0
    """Leases that lasted longer than their ``with`` block because a view escaped."""


@dataclass(frozen=True, slots=True)
class RingStats(_Table):
    """A snapshot of one ring's counters, from `Ring.stats`; they are shared by all its participants."""

    capacity: int
    """Committed messages that fit at most."""
    approx_fill: int = 0
    """Messages committed and not yet leased (approximate while others work)."""
    committed: int = 0
    """Messages committed since the ring was made."""
    leased: int = 0
    """Messages leased since the ring was made."""
    aborted: int = 0
    """Claims given up by an exception or by `abort`."""
    late_releases: int = 0
    """Leases that lasted longer than their ``with`` block because a view escaped."""
    rescued_wakeups: int = 0
    """Waits that ended by the periodic second look instead of a wake-up (0 is normal)."""
    participants: int = 0
    """Processes attached now."""
    deaths: int = 0
    """Participants found dead, whose blocks were recovered."""
    memory_budget: int = 0
    """Bytes of shared memory that the ring may use."""
    memory_used: int = 0
    """Bytes of shared memory reserved now."""
    bytes_committed: int = 0
    """Bytes of payload committed since the ring was made."""
    leases_held: tuple[tuple[int, int], ...] = ()
    """(process id, messages that it has leased and not yet released) of each participant that has any now."""


@dataclass(frozen=True, slots=True)
class ChannelStats(_Table):
    """A snapshot of what one end of a channel has done, from its ``stats()``; counted in this process."""

    mechanism: str
    """``"pipe"``, ``"mqueue"``, ``"shm"`` or ``"socket"``."""
    messages_sent: int = 0
    """Messages that were wholly sent."""
    messages_received: int = 0
    """Messages that were handed out."""
    bytes_sent: int = 0
    """Bytes of their frames, before compression."""
    bytes_received: int = 0
    """The same of those received."""
    wire_bytes_sent: int = 0
    """Bytes that really went out, after compression; 0 over shared memory, where none do."""
    wire_bytes_received: int = 0
    """The same of those received."""
    gaps: int = 0
    """Messages found to be missing; each gap was an error of `receive`, too."""
    duplicates: int = 0
    """Messages that came again or late, and were dropped."""
    corrupt: int = 0
    """Messages that failed a check, and were dropped with an error."""
    resent: int = 0
    """Messages that were sent once more, because their connection broke before they were acknowledged."""
    reconnects: int = 0
    """Times that a connection was made anew."""
