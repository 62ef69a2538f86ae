"""Bars for `progress=True`: on a terminal by rich, in a notebook by tqdm, or by a display of our own."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any

from shmengine.engine.progress import Count

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Cell", "Terminal", "Tqdm", "in_notebook", "on_terminal"]


def in_notebook() -> bool:
    """Tell whether a Jupyter kernel runs us."""
    ipython = sys.modules.get("IPython")  # never imported by us to find out
    get_shell = getattr(ipython, "get_ipython", None)
    return get_shell is not None and getattr(get_shell(), "kernel", None) is not None


def on_terminal(stream: Any) -> bool:
    """Tell whether a stream ends at a terminal that a bar can be drawn on."""
    try:
        return bool(stream.isatty()) and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
    except (AttributeError, ValueError):  # none, or closed
        return False


class Terminal:
    """A line of the one display that all bars of this process share: two would write over each other."""

    _lock = threading.RLock()
    _shared: Progress | None = None
    _count = 0
    _pid = 0

    def __init__(self, label: str, total: int | None) -> None:
        kind = Terminal
        self._owner = os.getpid()
        with kind._lock:
            if kind._shared is None or kind._pid != self._owner:
                shared = _new_display()
                shared.start()
                kind._shared, kind._count, kind._pid = shared, 0, self._owner
            self._display = kind._shared
            kind._count += 1
            self._task = self._display.add_task(label, total=total)

    def advance(self, count: int) -> None:
        """Draw it, and the others."""
        self._display.update(self._task, advance=count, refresh=True)

    def close(self) -> None:
        """Leave its line above the others; the last one ends the display."""
        kind = Terminal
        if self._owner != os.getpid():
            return
        with kind._lock:
            kind._count -= 1
            if kind._count:
                tasks = [task for task in self._display.tasks if task.id == self._task]
                self._display.console.print(self._display.make_tasks_table(tasks))
                self._display.remove_task(self._task)
                return
            kind._shared = None
            self._display.stop()


def _new_display() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        Remaining(),
        console=Console(stderr=True, force_terminal=True, force_jupyter=False),
        auto_refresh=False,  # a thread of its own would outlive the run a little, and meet forks
        # What is printed meanwhile comes out above the bar; but what goes to a file is to go there.
        redirect_stdout=on_terminal(sys.stdout),
    )


class Tqdm:
    """The widget of `tqdm.auto`, or its text where there are no widgets."""

    def __init__(self, label: str, total: int | None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are no widgets
            tqdm = importlib.import_module("tqdm.auto").tqdm
        bar: Any = type("Bar", (tqdm,), {"monitor_interval": 0})  # without its thread
        # Each word to it is drawn: they come in strides.
        self._bar = bar(desc=label, total=total, mininterval=0, miniters=1, file=sys.stdout)

    def advance(self, count: int) -> None:
        """Draw it."""
        if count:
            self._bar.update(count)
        else:
            self._bar.refresh()

    def close(self) -> None:
        """Leave it; in red, if it is not full."""
        self._bar.close()


class Cell:
    """A bar in the output of a notebook's cell, drawn over and over: as HTML, and as text where there is none."""

    def __init__(self, label: str, total: int | None) -> None:
        self._count = Count(label, total)
        self._handle = importlib.import_module("IPython.display").display(self, display_id=True)

    def advance(self, count: int) -> None:
        """Draw it again."""
        self._count.done += count
        self._handle.update(self)

    def close(self) -> None:
        """Draw it for the last time."""
        self._count.ended = True
        self._handle.update(self)

    def __repr__(self) -> str:
        return str(self._count)

    def _repr_html_(self) -> str:
        import html

        count = self._count
        value, most = count.done, max(count.total or 0, 1)
        if count.ended and not count.total:
            value = most = 1  # not known before, or none at all: it is full now
        known = count.total is not None or count.ended
        bar = f"<progress value='{value}' max='{most}'></progress>" if known else "<progress></progress>"
        name, _, state = str(count).partition(": ")
        return (
            "<div style='display:flex;gap:0.8em;align-items:center;font-variant-numeric:tabular-nums'>"
            f"<span>{html.escape(name)}</span>{bar}<span>{html.escape(state)}</span></div>"
        )
