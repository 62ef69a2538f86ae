"""Results as tables of text: for terminals with and without rich, and in Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from shmengine.bench.compare import show_seconds
from shmengine.bench.plan import show_size
from shmengine.bench.results import Promise, Report, Row, Spread, Work

__all__ = ["Table", "failures", "markdown", "plain", "tables"]

NOTHING: Final = "-"


@dataclass(frozen=True)
class Table:
    """One quantity: a line for each target, a column for each size; or what the engine does.

    Attributes
    ----------
    title : str
    sizes : tuple of str
        The heads of the columns.
    lines : tuple of (str, tuple of str)
    best : frozenset of (int, int)
        Line and column of the best in each column.
    """

    title: str
    sizes: tuple[str, ...]
    lines: tuple[tuple[str, tuple[str, ...]], ...]
    best: frozenset[tuple[int, int]]

    def columns(self, width: int) -> list[range]:
        """Divide the columns among as many tables as `width` characters ask for."""
        first = max([len(name) for name, _ in self.lines], default=0) + 4
        each = self.column_width() + 3
        count = max(1, (width - first) // each)
        return [range(n, min(n + count, len(self.sizes))) for n in range(0, len(self.sizes), count)]

    def column_width(self) -> int:
        """Characters of the widest cell."""
        cells = [cell for _, cells in self.lines for cell in cells]
        return max(map(len, (*self.sizes, *cells)), default=0)


def tables(report: Report) -> list[Table]:
    """Return throughput, round trip and CPU time; or what the engine does; or what the benches have reached."""
    if report.promises:
        return [_promises(report.promises)]
    if report.work:
        return [_work(report.work)]
    return [
        _table(
            "Throughput, one way, MB/s (± half the distance of the quartiles)",
            report.rows,
            _throughput,
            _most_bytes,
        ),
        _table("Round trip, microseconds: median (99th percentile)", report.rows, _round_trip, _latency),
        _table("CPU time of both processes, microseconds a message", report.rows, _cpu_time, _cpu),
    ]


def _table(
    title: str, rows: Sequence[Row], cell: Callable[[Row], str], cost: Callable[[Row], float | None]
) -> Table:
    sizes = sorted({row.nbytes for row in rows})
    names = list(dict.fromkeys(row.name for row in rows))
    found = {(row.name, row.nbytes): row for row in rows}
    best = set()
    for column, size in enumerate(sizes):
        costs = [
            (value, line)
            for line, name in enumerate(names)
            if (name, size) in found and (value := cost(found[name, size])) is not None
        ]
        if costs:
            best.add((min(costs)[1], column))
    lines = tuple(
        (name, tuple(cell(found[name, size]) if (name, size) in found else NOTHING for size in sizes))
        for name in names
    )
    return Table(title, tuple(map(show_size, sizes)), lines, frozenset(best))


def _work(found: Sequence[Work]) -> Table:
    lines = tuple(
        (
            f"{work.what}; {work.rival}",
            (show_seconds(work.ours), show_seconds(work.theirs), _with_spread(work.ratio, 1)),
        )
        for work in found
    )
    title = "The engine beside another way to do the same (± half the distance of the quartiles)"
    return Table(title, ("shmengine", "the other", "times as fast"), lines, frozenset())


def _promises(found: Sequence[Promise]) -> Table:
    words = {True: "met", False: "missed", None: ""}
    lines = tuple((f"{p.bench}: {p.what}", (p.value, p.bound or NOTHING, words[p.met])) for p in found)
    return Table(
        "What is to be reached, beside rivals in the same run", ("measured", "target", ""), lines, frozenset()
    )


def _most_bytes(row: Row) -> float | None:
    return None if row.rate is None else -row.rate.median


def _latency(row: Row) -> float | None:
    return None if row.latency is None else row.latency.median


def _cpu(row: Row) -> float | None:
    return None if row.cpu is None else row.cpu.median


def _throughput(row: Row) -> str:
    return NOTHING if row.rate is None else _with_spread(row.rate, row.nbytes / 1e6)


def _round_trip(row: Row) -> str:
    if row.latency is None:
        return NOTHING
    text = _number(row.latency.median * 1e6)
    return text if row.p99 is None else f"{text} ({_number(row.p99 * 1e6)})"


def _cpu_time(row: Row) -> str:
    return NOTHING if row.cpu is None else _number(row.cpu.median * 1e6)


def _with_spread(values: Spread, factor: float) -> str:
    part = (values.high - values.low) / 2 / values.median
    return f"{_number(values.median * factor)} ±{part:.0%}"


def _number(value: float) -> str:
    """Three digits, as people read them."""
    if value >= 100:
        digits = 10 ** max(0, len(str(int(value))) - 3)
        return f"{round(value / digits) * digits:,}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def failures(report: Report) -> list[str]:
    """Say what was not measured, and why."""
    lines = [f"{name}: {why}" for name, why in report.missing.items()]
    seen: set[tuple[str, str]] = set()
    for row in report.rows:
        if row.error is not None and (row.target, row.error) not in seen:
            seen.add((row.target, row.error))
            lines.append(f"{row.name}, {show_size(row.nbytes)}: {row.error}")
    return lines


# --- ways to show them ----------------------------------------------------------------------------


def plain(report: Report, width: int = 100) -> str:
    """Write everything for a terminal, or a file; the best of each column has a star."""
    parts = []
    for table in tables(report):
        parts.append(table.title)
        first = max([len(name) for name, _ in table.lines], default=0)
        each = table.column_width() + 1
        for columns in table.columns(width):
            parts.append(" " * first + "".join(f"  {table.sizes[c]:>{each - 1}} " for c in columns))
            for number, (name, cells) in enumerate(table.lines):
                marked = (cells[c] + ("*" if (number, c) in table.best else " ") for c in columns)
                parts.append((f"{name:<{first}}" + "".join(f"  {cell:>{each}}" for cell in marked)).rstrip())
            parts.append("")
    for title, lines in (("Not measured", failures(report)), ("Recommendation", report.recommendation)):
        if lines:
            parts.append(title)
            for line in lines:
                parts += textwrap.wrap(line, width - 2, initial_indent="  ", subsequent_indent="    ")
            parts.append("")
    stamp = ", ".join(f"{name} {value}" for name, value in report.environment.items())
    parts += textwrap.wrap(f"Measured on: {stamp}.", width)
    return "\n".join(parts) + "\n"


def markdown(report: Report) -> str:
    """Write the tables for documents; the best of each column is bold."""
    parts = []
    for table in tables(report):
        parts += [f"**{table.title}**", ""]
        parts.append("| | " + " | ".join(table.sizes) + " |")
        parts.append("|---|" + "---:|" * len(table.sizes))
        for number, (name, cells) in enumerate(table.lines):
            marked = (f"**{cell}**" if (number, c) in table.best else cell for c, cell in enumerate(cells))
            parts.append(f"| {name} | " + " | ".join(marked) + " |")
        parts.append("")
    parts += [f"- {line}" for line in (*failures(report), *report.recommendation)]
    stamp = ", ".join(f"{name} {value}" for name, value in report.environment.items())
    parts += ["", f"Measured on: {stamp}."]
    return "\n".join(parts) + "\n"
