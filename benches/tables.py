"""The tables in documents, made of the results in docs/results: ``python -m benches.tables`` writes them anew.

<!-- bench NAME -->        everything from here
<!-- bench end -->         to here is the tables of docs/results/NAME.json
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from shmengine.bench.results import Report
from shmengine.bench.table import markdown

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^(<!-- bench (?!end)(\S+) -->\n)(.*?)^(<!-- bench end -->)$", re.DOTALL | re.MULTILINE)


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
        report = Report.from_json((results / f"{found[2]}.json").read_text())
        return f"{found[1]}\n{markdown(report)}\n{found[4]}"

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
