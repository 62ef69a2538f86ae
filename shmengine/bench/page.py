# ruff: noqa: E501 - CSS
"""Results as one self-contained page: nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Final

from shmengine.bench.results import Report
from shmengine.bench.table import Table, failures, tables

__all__ = ["page"]

STYLE: Final = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --faint: #666; --line: #ddd; --best: #d7ecdf; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #161616; --faint: #999; --line: #333; --best: #174a2c; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.2rem; font-size: 1.15rem; }
.lead { border-left: 4px solid #0072B2; padding: .2rem 1rem; margin: 1rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\2191"; } th[aria-sort=descending] button::after { content: " \\2193"; }
td.best { background: var(--best); font-weight: 600; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .86rem; } dt { color: var(--faint); } dd { margin: 0; }
"""

# A click on a column's name sorts by it, a second one the other way round.
SCRIPT: Final = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  const value = cell => { const n = parseFloat(cell.textContent.replace(/,/g, "")); return isNaN(n) ? Infinity : n; };
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => {
      const [x, y] = [a.cells[column], b.cells[column]];
      const order = column === 0 ? x.textContent.localeCompare(y.textContent) : value(x) - value(y);
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows);
  }));
}
document.documentElement.dataset.ready = "yes";
"""


def page(report: Report, *, with_plot: bool) -> str:
    """Return the page.

    Parameters
    ----------
    report : Report
    with_plot : bool
        Needs matplotlib.
    """
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>shmengine bench</title><style>{STYLE}</style></head><body>",
        f"<h1>{_heading(report)}</h1>",
    ]
    if report.recommendation:
        sentences = "".join(f"<p>{escape(line)}</p>" for line in report.recommendation)
        parts.append(f'<section class="lead" id="recommendation">{sentences}</section>')
    if with_plot:
        parts.append(f'<p><img alt="Throughput and round trip by message size" src="{_picture(report)}"></p>')
    parts += map(_table, tables(report))
    if lines := failures(report):
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        parts.append(f"<h2>Not measured</h2><ul>{items}</ul>")
    stamp = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in report.environment.items()
    )
    parts.append(f"<h2>Measured on</h2><dl>{stamp}</dl><script>{SCRIPT}</script></body></html>")
    return "\n".join(parts) + "\n"


def _heading(report: Report) -> str:
    if report.promises:
        return "What is to be reached"
    return "The engine at work" if report.work else "From one process to another"


def _picture(report: Report) -> str:
    from shmengine.bench.plot import save

    out = io.BytesIO()
    save(report, out, "svg")
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


def _table(table: Table) -> str:
    heads = "".join(f"<th><button>{escape(text)}</button></th>" for text in ("target", *table.sizes))
    rows = []
    for number, (name, cells) in enumerate(table.lines):
        marked = (
            f'<td class="best">{escape(cell)}</td>'
            if (number, c) in table.best
            else f"<td>{escape(cell)}</td>"
            for c, cell in enumerate(cells)
        )
        rows.append(f"<tr><td>{escape(name)}</td>{''.join(marked)}</tr>")
    body = "\n".join(rows)
    return (
        f'<h2>{escape(table.title)}</h2><div class="wide"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
