"""Weaken the memory orders of the core, and see whether the explorer notices.

    python tests/c/explore/orders.py [--runs N] [--write | --check]

Each ordered access is made one step weaker (seq_cst to acquire or acq_rel, acq_rel to one of its halves, the others to
relaxed): alone, and together with all others that bear the same label on the same side. What survives alone must cite,
in the comment with its labels, the argument why it may (W1, W2, ... of csrc/README.md), or the exit code is 1.
``--write`` puts the tables into docs/memory-orders.md; ``--check`` repeats what they call caught, where it was caught.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / "csrc"
EXPLORE = CSRC / "build/explore/explore"
DOCUMENT = ROOT / "docs/memory-orders.md"

CALL = re.compile(r"\bshmr_(load|store|cas|or|and|add|exchange)_(acquire|release|acq_rel|seq_cst)\(")
FUNCTION = re.compile(r"^\w[^;=]*?\b(\w+)\(")
COMMENT = re.compile(r"/\*(.*?)(\*/|$)")
LABEL_ROW = re.compile(r"^\| ([RAS]\d+) \| \d+ \| caught by `(\w+)` \|", re.MULTILINE)
ACCESS_ROW = re.compile(r"^\| `(shmr_\w+\.c)` \| `(\w+)` \| `(\w+)` \| ([^|]*) \| ([^|]*) \|", re.MULTILINE)

Changes = list[tuple["Site", str]]


class Site(NamedTuple):
    """An ordered access in the sources of the core."""

    file: str
    line: int
    function: str
    verb: str
    order: str
    labels: tuple[str, ...]
    cited: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, str, str, str]:
        """How the document names it: lines move."""
        return self.file, self.function, f"{self.verb}_{self.order}", " ".join(self.labels)


def comment_at(lines: list[str], line: int) -> str:
    """The first comment on the line of an access (from 0), or on those where its statement goes on."""
    for text in lines[line : line + 4]:
        comment = COMMENT.search(text)
        if comment:
            return comment[1]
    return ""


def sites_in(name: str, text: str) -> Iterator[Site]:
    lines, function = text.splitlines(), ""
    for number, line in enumerate(lines):
        head = FUNCTION.match(line)
        if head:
            function = head[1]
        for call in CALL.finditer(COMMENT.sub("", line)):
            comment = comment_at(lines, number)
            labels, cited = re.findall(r"\b[RAS]\d+\b", comment), re.findall(r"\bW\d+\b", comment)
            yield Site(name, number + 1, function, call[1], call[2], tuple(labels), tuple(cited))


def read_sites() -> list[Site]:
    """All ordered accesses, file by file, from top to bottom."""
    return [site for path in sorted(CSRC.glob("shmr_*.c")) for site in sites_in(path.name, path.read_text())]


def numbers_of(sites: Iterable[Site]) -> dict[Site, int]:
    """What the explorer calls them."""
    listed = subprocess.run([EXPLORE, "--sites"], capture_output=True, text=True, check=True).stdout
    number = {}
    for entry in listed.splitlines():
        at, file, line, _, verb, order = entry.split()
        if order != "relaxed":
            number[file, int(line), verb, order] = int(at)
    return {site: number[site.file, site.line, site.verb, site.order] for site in sites}


def one_step(site: Site) -> list[str]:
    if site.order == "seq_cst":
        return ["acquire" if site.verb == "load" else "acq_rel"]
    return {"acq_rel": ["acquire", "release"], "acquire": ["relaxed"], "release": ["relaxed"]}[site.order]


def without(site: Site, label: str) -> str | None:
    """The order of the access when it no longer does what the label is for."""
    load = site.verb == "load"
    if label[0] == "S":
        return "acquire" if load else "acq_rel"
    if label[0] == "R":
        return {"release": "relaxed", "acq_rel": "acquire", "seq_cst": "acquire"}.get(site.order)
    return {"acquire": "relaxed", "acq_rel": "release", "seq_cst": "relaxed" if load else "release"}.get(
        site.order
    )


def by_label(sites: list[Site]) -> dict[str, Changes]:
    mutants = defaultdict(list)
    for site in sites:
        for label in site.labels:
            order = without(site, label)
            if order:
                mutants[label].append((site, order))
    return {
        label: mutants[label]
        for label in sorted(mutants, key=lambda name: (int(name[1:]), name[0] == "A", name))
    }


def one_by_one(sites: list[Site]) -> dict[str, Changes]:
    """By "number of the site>order"."""
    return {f"{k}>{order}": [(site, order)] for k, site in enumerate(sites) for order in one_step(site)}


def run(mutants: dict[str, Changes], runs: int, *scenarios: str) -> dict[str, str]:
    """What became of each: "caught SCENARIO SEED WHAT", "survives" or "unmet"."""
    number = numbers_of(site for changes in mutants.values() for site, _ in changes)
    text = "".join(
        name + "".join(f" {number[site]}:{order}" for site, order in changes) + "\n"
        for name, changes in mutants.items()
    )
    done = subprocess.run(
        [EXPLORE, "--mutants", str(runs), *scenarios], input=text, capture_output=True, text=True, check=False
    )
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def run_where(caught_by: dict[str, str], mutants: dict[str, Changes], runs: int) -> list[str]:
    """Those that are not caught any more: first by what caught them last time, then by all scenarios."""
    missed = {}
    for scenario in sorted(set(caught_by.values())):
        some = {
            name: changes for name, changes in mutants.items() if caught_by.get(name) == scenario and changes
        }
        fates = run(some, runs, scenario)
        missed |= {name: some[name] for name, fate in fates.items() if not fate.startswith("caught")}
    fates = run(missed, runs) if missed else {}
    return [name for name, fate in fates.items() if not fate.startswith("caught")]


def outcome(fate: str, cited: Iterable[str] = ()) -> str:
    word, scenario, *_ = [*fate.split(), ""]
    return f"caught by `{scenario}`" if word == "caught" else " ".join(cited) or word


def label_table(sites: list[Site], labels: dict[str, str]) -> str:
    rows = ["| label | accesses | all weakened |", "|---|---|---|"]
    for label, fate in labels.items():
        rows.append(f"| {label} | {sum(label in site.labels for site in sites)} | {outcome(fate)} |")
    return "\n".join(rows)


def access_table(sites: list[Site], singles: dict[str, str]) -> str:
    rows = ["| file | function | access | labels | one step weaker |", "|---|---|---|---|---|"]
    for k, site in enumerate(sites):
        file, function, access, labels = site.columns
        fates = "; ".join(
            f"{order}: {outcome(singles[f'{k}>{order}'], site.cited)}" for order in one_step(site)
        )
        rows.append(f"| `{file}` | `{function}` | `{access}` | {labels} | {fates} |")
    return "\n".join(rows)


def complaints(sites: list[Site], singles: dict[str, str]) -> tuple[list[str], list[str]]:
    """Accesses that survive and cite no argument; such as cite one that they do not need."""
    unargued, needless = [], []
    for k, site in enumerate(sites):
        survivors = [order for order in one_step(site) if not singles[f"{k}>{order}"].startswith("caught")]
        place = f"{site.file}:{site.line} {site.function} {site.verb}_{site.order}"
        if survivors and not site.cited:
            unargued.append(f"{place}: {' and '.join(survivors)} would do, and no argument says so")
        if site.cited and not survivors:
            needless.append(f"{place}: {' '.join(site.cited)} is not needed, it is caught")
    return unargued, needless


def replaced(document: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, rest = document.split(begin)
    return f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def caught_in(document: str, sites: list[Site]) -> dict[str, str]:
    """Which scenario caught which label or access, by the document."""
    caught = dict(LABEL_ROW.findall(document))
    for k, row in enumerate(ACCESS_ROW.findall(document)):
        if k < len(sites) and row[:4] == sites[k].columns:
            caught |= {f"{k}>{order}": by for order, by in re.findall(r"(\w+): caught by `(\w+)`", row[4])}
    return caught


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1500, help="of each scenario, in four ways")
    parser.add_argument("--check", action="store_true", help="only what the document calls caught")
    parser.add_argument("--write", action="store_true", help="the tables in the document")
    options = parser.parse_args()
    sites, document = read_sites(), DOCUMENT.read_text()
    mutants, alone = by_label(sites), one_by_one(sites)
    if options.check:
        caught = caught_in(document, sites)
        missed = run_where(caught, mutants | alone, options.runs)
        for name in missed:
            where = [f"{site.file}:{site.line} {site.function}" for site, _ in (mutants | alone)[name]]
            print(f"{name} is not caught any more: {', '.join(where)}")
        print(f"{len(caught) - len(missed)} of {len(caught)} weaker orders are caught")
        return bool(missed)
    labels, singles = run(mutants, options.runs), run(alone, options.runs)
    for label, fate in labels.items():
        print(f"{label:4} {fate}")
    unargued, needless = complaints(sites, singles)
    print("\n".join([*unargued, *needless]))
    if options.write:
        document = replaced(document, "labels", label_table(sites, labels))
        DOCUMENT.write_text(replaced(document, "accesses", access_table(sites, singles)))
    return bool(unargued)


if __name__ == "__main__":
    sys.exit(main())
