"""Progress of a run: a bar in a terminal or notebook, plain lines elsewhere, or whatever the caller brings.

What is counted are completed tasks: also those that failed, that are left out, or whose results wait for their turn.
A task that is tried again counts once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import time
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, Protocol

__all__ = ["Reporter", "check_progress", "reporter"]

REFRESH_SECONDS = 0.1
LINE_SECONDS = 1.0


class Display(Protocol):
    """Where progress is shown."""

    def advance(self, count: int) -> None:
        """So many more have completed; 0: some time has passed."""
        ...

    def close(self) -> None:
        """Leave what is shown as it is."""
        ...


class Reporter:
    """Told how many tasks have completed; opens a display with the first word, and closes it with the last.

    Parameters
    ----------
    open_display : callable
        Returns the `Display`.
    stride : float
        Seconds between two words to it: to draw costs more than a small task. 0: it hears of each completion.
    """

    def __init__(self, open_display: Callable[[], Display], stride: float) -> None:
        self._open = open_display
        self._stride = stride
        self._display: Display | None = None
        self._told = self._done = 0
        self._due = 0.0

    def reach(self, done: int) -> None:
        """So many have completed by now."""
        self._done = max(done, self._done)
        if self._display is None:
            self._display = self._open()
        if self._stride:
            now = time.monotonic()
            if now >= self._due:
                self._due = now + self._stride
                self._tell()
        elif self._done > self._told:
            self._tell()

    def close(self) -> None:
        """Show the final state, also after an error."""
        if self._display is not None:
            self._tell()
            display, self._display = self._display, None
            display.close()

    def _tell(self) -> None:
        assert self._display is not None
        count, self._told = self._done - self._told, self._done
        try:
            self._display.advance(count)
        except BaseException:  # Ctrl-C, or the caller's own
            display, self._display = self._display, None
            self._open = _Nothing
            with contextlib.suppress(Exception):
                display.close()
            raise


def check_progress(progress: Any) -> None:
    """Raise TypeError unless `reporter` can make something of `progress`."""
    if progress is None or isinstance(progress, bool):
        return
    if isinstance(progress, type) and hasattr(progress, "add_task"):
        raise TypeError(f"progress must be an instance of {progress.__name__}, not the class")
    if isinstance(progress, (Mapping, AbstractSet)) or not (
        callable(progress) or callable(getattr(progress, "update", None))
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
        True: a bar, drawn by rich on a terminal, by tqdm or else by ourselves in a notebook; elsewhere lines on
        standard error. An object with ``update(n)`` (tqdm and its kind; a class, or a `functools.partial` of one, is
        called with ``total=``, and closed at the end), a `rich.progress.Progress`, or a callable that gets
        ``(done, total)``.
    label : str
        What runs.
    total : int or None
        Number of tasks, if known.
    """
    check_progress(progress)
    if progress is None or progress is False:
        return None
    if progress is True:
        return Reporter(functools.partial(_fitting, label, total), REFRESH_SECONDS)
    if hasattr(progress, "add_task") and hasattr(progress, "advance"):
        return Reporter(functools.partial(_Bar, progress, label, total), REFRESH_SECONDS)
    kind = progress.func if isinstance(progress, functools.partial) else progress
    if isinstance(kind, type) and hasattr(kind, "update"):
        return Reporter(lambda: _Updates(progress(total=total), own=True), 0)
    if hasattr(progress, "update"):
        return Reporter(functools.partial(_Updates, progress, own=False), 0)
    return Reporter(functools.partial(_Calls, progress, total), 0)


def _fitting(label: str, total: int | None) -> Display:
    """Return the display that suits the place where this process runs."""
    from shmengine.engine import bars

    if bars.in_notebook():
        return bars.Tqdm(label, total) if importlib.util.find_spec("tqdm") else bars.Cell(label, total)
    if bars.on_terminal(sys.stderr):
        return bars.Terminal(label, total)
    return _Lines(label, total)


class _Nothing:
    """After an error of a display."""

    def advance(self, count: int) -> None:
        pass

    def close(self) -> None:
        pass


class _Calls:
    def __init__(self, function: Callable[[int, int | None], object], total: int | None) -> None:
        self._function, self._total, self._done = function, total, 0

    def advance(self, count: int) -> None:
        for _ in range(count):
            self._done += 1
            self._function(self._done, self._total)

    def close(self) -> None:
        pass


class _Updates:
    def __init__(self, target: Any, *, own: bool) -> None:
        self._target, self._own = target, own

    def advance(self, count: int) -> None:
        if count:
            self._target.update(count)

    def close(self) -> None:
        if self._own and hasattr(self._target, "close"):
            self._target.close()


class _Bar:
    """A task in a `rich.progress.Progress` of the caller's."""

    def __init__(self, bar: Any, label: str, total: int | None) -> None:
        self._bar = bar
        self._task = bar.add_task(label, total=total)

    def advance(self, count: int) -> None:
        self._bar.advance(self._task, count)

    def close(self) -> None:
        pass


class Count:
    """How far something is, and since when."""

    def __init__(self, label: str, total: int | None) -> None:
        self.label, self.total, self.done = label, total, 0
        self.started = time.monotonic()
        self.ended = False

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self.started

    def __str__(self) -> str:
        done, left = str(self.done), ""
        if self.total is not None:
            done += f"/{self.total} ({100 * self.done // max(self.total, 1)} %)"
            if self.ended and self.done < self.total:
                left = ", stopped"
            elif 0 < self.done < self.total:
                left = f", about {duration(self.seconds / self.done * (self.total - self.done))} left"
        return f"{self.label}: {done}, {duration(self.seconds)}{left}"


def duration(seconds: float) -> str:
    """Return so many seconds in words: ``4.2 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class _Lines:
    """A line a second at first, then whenever a tenth of the time so far has passed, and one at the end."""

    def __init__(self, label: str, total: int | None) -> None:
        self._count = Count(label, total)
        self._due = LINE_SECONDS

    def advance(self, count: int) -> None:
        self._count.done += count
        seconds = self._count.seconds
        if seconds >= self._due:
            self._due = seconds + max(LINE_SECONDS, seconds / 10)
            self._show()

    def close(self) -> None:
        self._count.ended = True
        self._show()

    def _show(self) -> None:
        with contextlib.suppress(AttributeError, OSError, ValueError):  # there is none, or it is closed
            print(self._count, file=sys.stderr, flush=True)
