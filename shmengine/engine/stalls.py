"""Who is slow: the tasks that have been running for some time, and where each of them is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from shmengine.config import format_bytes
from shmengine.errors import ShmError
from shmengine.stats import as_table

if TYPE_CHECKING:
    from shmengine.engine.backend import Backend
    from shmengine.stats import EngineStats

__all__ = ["Observed", "Stall", "Stalls", "summary_of"]


@dataclass(frozen=True, slots=True)
class Stall:
    """A task that takes long, from `Engine.stalls`."""

    pid: int
    """Process that runs it."""
    worker: str
    """Name of the worker: ``worker 4711`` (its process id), or that of a thread."""
    function: str
    """What was called: ``map(detect)``; ``start`` for what comes before the first task, as the initializer."""
    task: int | None
    """Which of its tasks or blocks, from 0; None: none in particular, as while several are decoded together."""
    seconds: float
    """How long it has been running."""
    stack: str
    """Where it is, as in a traceback; in parentheses why that is not known, as of a stopped process."""
    waits_for_memory: int = 0
    """Bytes of shared memory that it waits for."""

    def __str__(self) -> str:
        what = self.function if self.task is None else f"task {self.task} of {self.function}"
        memory = (
            f", waits for {format_bytes(self.waits_for_memory)} of memory" if self.waits_for_memory else ""
        )
        stack = self.stack.replace("\n", "\n  ")
        return f"{self.worker}: {what} for {self.seconds:.1f} s{memory}\n  {stack}"


class Stalls(tuple[Stall, ...]):  # noqa: SLOT001  # a tuple takes no slots with names
    """What stalls, the longest first; as text a report for people, in which ``summary`` comes first.

    Attributes
    ----------
    summary : str
        How things stand: workers, tasks in flight, how full rings and memory are.
    """

    summary: str

    def __new__(cls, stalls: Iterable[Stall] = (), summary: str = "") -> Self:
        self = super().__new__(cls, stalls)
        self.summary = summary
        return self

    @property
    def report(self) -> str:
        """All of it as text."""
        return "\n".join([self.summary, *map(str, self)])

    def __str__(self) -> str:
        return self.report

    def _repr_html_(self) -> str:
        import html

        style = "white-space:pre;overflow-x:auto;font-family:monospace"
        return f"<pre style='{style}'>{html.escape(self.report)}</pre>"


class Observed:
    """What an engine says of itself: its part of `Engine`."""

    _backend: Backend
    _last_stats: EngineStats | None

    def _check_process(self) -> None:
        raise NotImplementedError

    def stats(self) -> EngineStats:
        """Return a snapshot of the engine's counters (after `close`: the last one)."""
        self._check_process()
        return self._last_stats or self._backend.stats()

    def stalls(self, after: float = 1.0) -> Stalls:
        """Return the tasks that have been running for some time, and where each of them is.

        For any thread: ``print(engine.stalls())`` while another one waits for results. A worker process says
        itself where it is, also while it sleeps or computes in C and holds the interpreter. To ask it interrupts
        system calls that are never restarted: C's ``sleep`` ends early, Python's does not.

        Parameters
        ----------
        after : float
            Seconds; 0: all that runs.

        Returns
        -------
        Stalls
            A tuple of `Stall`, empty if nothing takes so long; ``str`` of it is a report, which says as well how
            full the rings and the memory are. A serial engine has none.
        """
        self._check_process()
        return self._backend.stalls(after)

    def _repr_html_(self) -> str:
        stats = None
        with contextlib.suppress(ShmError):  # closed by another thread just now, or a forked child's copy
            stats = self.stats()
        return as_table(repr(self).strip("<>"), stats)


def summary_of(stats: EngineStats, stalled: int) -> str:
    """Say how things stand."""
    return (
        f"{stalled} of {stats.workers} workers ({stats.backend}) stalled, tasks in flight {stats.tasks_in_flight},"
        f" done {stats.tasks_done}, failed {stats.tasks_failed}"
    )
