"""Progress of a run: a bar in a terminal or notebook, plain lines elsewhere, or whatever the caller brings.

What is counted are completed tasks.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["Reporter", "check_progress", "reporter"]

REFRESH_SECONDS = 0.1
PLAIN_SECONDS = 1.0


class Reporter(Protocol):
    """Told of every completed task, and of the end."""

    def advance(self) -> None:
        """Count one more completed task."""
        ...

    def close(self) -> None:
        """Show the final state (also after an error)."""
        ...


def check_progress(progress: Any) -> None:
    """Raise TypeError unless `reporter` can make something of `progress`."""
    if (
        progress is not None
        and not isinstance(progress, bool)
        and not (hasattr(progress, "update") or callable(progress))
    ):
        raise TypeError(
            "progress must be True, False, an object with update(n) or a callable(done, total),"
            f" not {type(progress).__name__}"
        )


def reporter(progress: Any, label: str, total: int | None) -> Reporter | None:
    """Return what to tell about completed tasks; None if nobody wants to know.

    Parameters
    ----------
    progress : bool, object or callable
        True: a bar (rich) where it can be drawn, else a line a second on standard error. An object with
        ``update(n)`` (tqdm and its kind; a class is called with ``total=``, and closed at the end), a
        `rich.progress.Progress`, or a callable that gets ``(done, total)``.
    label : str
        What runs.
    total : int or None
        Number of tasks, if known.
    """
    check_progress(progress)
    if progress is None or progress is False:
        return None
    if progress is True:
        from rich.console import Console

        console = Console(stderr=True)
        if console.is_terminal or (console.is_jupyter and importlib.util.find_spec("ipywidgets")):
            return _Bar(_new_bar(console), label, total, own=True)
        return _Lines(label, total)
    if hasattr(progress, "add_task") and hasattr(progress, "advance"):
        return _Bar(progress, label, total, own=False)
    if hasattr(progress, "update"):
        return _Updates(progress, total)
    return _Calls(progress, total)


class _Calls:
    def __init__(self, function: Callable[[int, int | None], object], total: int | None) -> None:
        self._function, self._total, self._done = function, total, 0

    def advance(self) -> None:
        self._done += 1
        self._function(self._done, self._total)

    def close(self) -> None:
        pass


class _Updates:
    def __init__(self, target: Any, total: int | None) -> None:
        self._own = isinstance(target, type)
        self._target = target(total=total) if self._own else target

    def advance(self) -> None:
        self._target.update(1)

    def close(self) -> None:
        if self._own and hasattr(self._target, "close"):
            self._target.close()


class _Lines:
    """At most one line a second, and one at the end."""

    def __init__(self, label: str, total: int | None) -> None:
        self._label, self._total, self._done = label, total, 0
        self._started = time.monotonic()
        self._due = self._started + PLAIN_SECONDS

    def advance(self) -> None:
        self._done += 1
        now = time.monotonic()
        if now >= self._due:
            self._due = now + PLAIN_SECONDS
            self._show(now)

    def close(self) -> None:
        self._show(time.monotonic())

    def _show(self, now: float) -> None:
        done = str(self._done)
        if self._total is not None:
            done += f"/{self._total} ({100 * self._done // max(self._total, 1)} %)"
        print(f"{self._label}: {done}, {now - self._started:.1f} s", file=sys.stderr, flush=True)


def _new_bar(console: Any) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        Remaining(),
        console=console,
        auto_refresh=False,  # a thread of its own would outlive the run a little, and meet forks
    )


class _Bar:
    """A rich bar; told in strides of `REFRESH_SECONDS`, because telling it costs more than a small task."""

    def __init__(self, bar: Any, label: str, total: int | None, *, own: bool) -> None:
        self._bar, self._own, self._pending = bar, own, 0
        self._due = 0.0
        if own:
            bar.start()
        self._task = bar.add_task(label, total=total)

    def advance(self) -> None:
        self._pending += 1
        now = time.monotonic()
        if now >= self._due:
            self._due = now + REFRESH_SECONDS
            self._flush()

    def close(self) -> None:
        self._flush()
        if self._own:
            self._bar.stop()

    def _flush(self) -> None:
        self._bar.advance(self._task, self._pending)
        if self._own:
            self._bar.refresh()
        self._pending = 0
