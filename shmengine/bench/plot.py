"""Throughput and round trip over message size, both axes logarithmic, as one picture."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from shmengine.bench.plan import show_size
from shmengine.bench.results import Report, Row, Spread

__all__ = ["save"]

GREY: Final = "#8c8c8c"
INK: Final = "#222222"
LABEL_GAP: Final = 0.042  # between the names at the right, as a part of the axis


class Style(NamedTuple):
    """How a line looks: by colour (Okabe and Ito's, told apart by the colour-blind), marker and dashes."""

    colour: str
    marker: str
    dashes: str = "-"
    width: float = 2.2


STYLES: Final = {
    "shm": Style("#0072B2", "o"),
    "shm, in place": Style("#0072B2", "D", "--"),
    "pipe": Style("#D55E00", "s"),
    "mqueue": Style("#009E73", "^"),
    "socket": Style("#CC79A7", "v"),
    "Ring": Style("#56B4E9", "P", "-", 1.6),
    "Ring, in place": Style("#56B4E9", "X", "--", 1.6),
    "Queue": Style("#E69F00", "*", "-", 1.6),
}
RIVAL_MARKERS: Final = "<>hpXP*dHv^"


def save(report: Report, path: str | os.PathLike[str] | Any, kind: str | None = None) -> None:
    """Draw it into a file.

    Parameters
    ----------
    report : Report
    path : str or file
        Ends in ``.png`` or ``.svg``, unless `kind` says what it is.
    kind : {"png", "svg"}, optional

    Raises
    ------
    ModuleNotFoundError
        matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(
        {"svg.hashsalt": "shmengine", "font.size": 11, "axes.edgecolor": GREY, "text.color": INK}
    ):
        figure = Figure(figsize=(15, 7.2), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        _draw(left, report.rows, "Throughput, one way: more is better", _throughput, max, _bandwidth)
        _draw(
            right, report.rows, "Round trip, median: less is better", lambda row: row.latency, min, _duration
        )
        stamp = report.environment
        parts = [
            stamp.get("processor"),
            stamp.get("cores") and f"{stamp['cores']} cores",
            stamp.get("kernel"),
        ]
        parts += [stamp.get("python"), stamp.get("load") and f"load {stamp['load']}", stamp.get("date")]
        figure.suptitle("From one process to another, by message size", fontsize=15, fontweight="bold")
        figure.supxlabel(", ".join(part for part in parts if part), fontsize=8.5, color=GREY)
        figure.savefig(path, format=kind, dpi=120)


def _lines(rows: Sequence[Row]) -> dict[str, Style]:
    """Return what is drawn, by name: ours in colours; the best way of each rival, in grey."""
    names = list(dict.fromkeys(_line(row) for row in rows))
    if any(
        row.group == "mechanism" for row in rows
    ):  # the ring and the queue by themselves are in the tables
        names = [name for name in names if name not in ("Ring", "Ring, in place", "Queue")]
    rivals = [name for name in names if name not in STYLES]
    return {
        name: STYLES[name] if name in STYLES else Style(GREY, RIVAL_MARKERS[rivals.index(name)], ":", 1.1)
        for name in names
    }


def _line(row: Row) -> str:
    return row.name if row.name in STYLES else row.target.partition(" (")[0]


def _draw(
    axes: Any,
    rows: Sequence[Row],
    title: str,
    quantity: Callable[[Row], Spread | None],
    better: Callable[..., Spread],
    unit: Callable[[float, Any], str],
) -> None:
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ends: list[tuple[float, float, str, Style]] = []
    for name, style in _lines(rows).items():
        points: dict[int, list[Spread]] = {}
        for row in rows:
            if _line(row) == name and (values := quantity(row)) is not None:
                points.setdefault(row.nbytes, []).append(values)
        if not points:
            continue
        x = sorted(points)
        y = [better(points[nbytes], key=lambda values: values.median) for nbytes in x]
        ours = name in STYLES
        axes.plot(
            x,
            [values.median for values in y],
            color=style.colour,
            marker=style.marker,
            linestyle=style.dashes,
            linewidth=style.width,
            markersize=8 if ours else 5,
            zorder=3 if ours else 2,
        )
        if ours:
            lows, highs = [values.low for values in y], [values.high for values in y]
            axes.fill_between(x, lows, highs, color=style.colour, alpha=0.15, linewidth=0, zorder=1)
        ends.append((x[-1], y[-1].median, name, style))
    sizes = sorted({row.nbytes for row in rows})
    axes.set_xticks(sizes, labels=[show_size(size) for size in sizes], rotation=30, ha="right")
    axes.minorticks_off()
    axes.margins(x=0.02)
    axes.yaxis.set_major_formatter(unit)
    axes.grid(visible=True, color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
    _label(axes, ends)


def _label(axes: Any, ends: Sequence[tuple[float, float, str, Style]]) -> None:
    """Write each name beside the end of its line; moved apart where lines end close to each other."""
    to_axes = axes.transData + axes.transAxes.inverted()
    at = sorted((*to_axes.transform((x, y))[::-1], name, style) for x, y, name, style in ends)
    for (y, x, name, style), place in zip(at, _apart([each[0] for each in at]), strict=True):
        ours = name in STYLES
        colour = style.colour if ours else "#666666"
        inside = {"transform": axes.transAxes, "clip_on": False, "color": style.colour}
        axes.plot([x + 0.012, 1.04], [y, place], linewidth=0.7, zorder=1, **inside)
        axes.plot([1.055], [place], marker=style.marker, markersize=7 if ours else 5, **inside)
        axes.text(
            1.07,
            place,
            name,
            transform=axes.transAxes,
            color=colour,
            fontsize=11 if ours else 9,
            fontweight="bold" if ours else "normal",
            va="center",
        )


def _apart(wanted: Sequence[float]) -> list[float]:
    """Move sorted places as little as needed to be `LABEL_GAP` apart."""
    groups: list[list[float]] = []  # each is laid out around the mean of what its members want
    for place in wanted:
        groups.append([place])
        while len(groups) > 1 and _top(groups[-2]) + LABEL_GAP > _bottom(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_bottom(group) + LABEL_GAP * n for group in groups for n in range(len(group))]


def _bottom(group: Sequence[float]) -> float:
    return sum(group) / len(group) - LABEL_GAP * (len(group) - 1) / 2


def _top(group: Sequence[float]) -> float:
    return _bottom(group) + LABEL_GAP * (len(group) - 1)


# --- quantities and their units ---------------------------------------------------------------------


def _throughput(row: Row) -> Spread | None:
    if row.rate is None:
        return None
    return Spread(row.rate.median * row.nbytes, row.rate.low * row.nbytes, row.rate.high * row.nbytes)


def _bandwidth(value: float, _: Any = None) -> str:
    for unit, bytes_each in (("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3)):
        if value >= bytes_each:
            return f"{value / bytes_each:g} {unit}"
    return f"{value:g} B/s"


def _duration(value: float, _: Any = None) -> str:
    for unit, seconds in (("s", 1.0), ("ms", 1e-3)):
        if value >= seconds:
            return f"{value / seconds:g} {unit}"
    return f"{value * 1e6:g} µs"
