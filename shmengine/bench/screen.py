"""Progress and tables on a terminal, by rich."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from shmengine.bench.results import Report
from shmengine.bench.table import failures, tables

__all__ = ["progress", "show"]

REFRESH_SECONDS: Final = 0.1


@contextmanager
def progress() -> Iterator[Callable[[int, int, str], None]]:
    """Show how far a run is, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    # Refreshed by us: rich's own thread would be alive while processes are forked.
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=1.0)
        shown = 0.0

        def update(done: int, total: int, text: str) -> None:
            nonlocal shown
            bar.update(task, completed=done / total, description=text)
            if (now := time.monotonic()) - shown > REFRESH_SECONDS:
                shown = now
                bar.refresh()

        yield update


def show(report: Report) -> None:
    """Print everything to stdout."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for table in tables(report):
        for columns in table.columns(console.width):
            console.print(table.title, style="bold", highlight=False)  # as a Table's own it would be folded
            shown = Table(row_styles=("", "dim"))
            shown.add_column("")
            for column in columns:
                shown.add_column(table.sizes[column], justify="right", no_wrap=True)
            for number, (name, cells) in enumerate(table.lines):
                marked: list[Any] = [
                    Text(cells[c], style="bold green not dim" if (number, c) in table.best else "")
                    for c in columns
                ]
                shown.add_row(name, *marked)
            console.print(shown)
    for title, lines in (("Not measured", failures(report)), ("Recommendation", report.recommendation)):
        if lines:
            console.print(title, style="bold")
        for line in lines:
            console.print(Padding(Text(line), (0, 0, 0, 2)))
    stamp = ", ".join(f"{name} {value}" for name, value in report.environment.items())
    console.print(f"\nMeasured on: {stamp}.", style="dim", markup=False, highlight=False)
