"""The tables in documents, made of the results in docs/results: ``python -m benches.tables`` writes them anew.

<!-- bench NAME -->        everything from here
<!-- bench end -->         to here is the tables of docs/results/NAME.json

``<!-- bench NAME brief -->`` is what a first look needs of them: few sizes, and few rivals.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from shmengine.bench.plan import KIB, MIB
from shmengine.bench.recommend import SIMPLEST_FIRST
from shmengine.bench.results import Report
from shmengine.bench.table import markdown

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"^(<!-- bench (?!end)(\S+)( brief)? -->\n)(.*?)^(<!-- bench end -->)$", re.DOTALL | re.MULTILINE
)
BRIEF_SIZES = frozenset((64, 4 * KIB, 64 * KIB, MIB, 16 * MIB))
BRIEF_TARGETS = frozenset((*SIMPLEST_FIRST, "multiprocessing.Pipe", "multiprocessing.Queue"))


def documents(root: Path = ROOT) -> Iterator[Path]:
    """Yield every document that may have such tables."""
    yield root / "README.md"
    yield from sorted((root / "docs").rglob("*.md"))


def renewed(text: str, results: Path = ROOT / "docs" / "results") -> str:
    """Return a document with its tables made anew.

    Raises
    ------
    OSError
        There is no such result.
    ValueError
        It is none of `shmengine bench --json`.
    """

    def block(found: re.Match[str]) -> str:
        path = results / f"{found[2]}.json"
        report = Report.from_json(path.read_text())
        if found[3]:
            rows = [row for row in report.rows if row.nbytes in BRIEF_SIZES and row.target in BRIEF_TARGETS]
            report = replace(report, rows=rows, missing={})
        return f"{found[1]}\n{markdown(report)}\n{found[5]}"

    return BLOCK.sub(block, text)


def main() -> int:
    """Write them; say which documents have changed."""
    for path in documents():
        before = path.read_text()
        if (after := renewed(before)) != before:
            path.write_text(after)
            print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
