"""Weaken the memory orders of the core, and see whether the explorer notices.

    python tests/c/explore/orders.py [--runs N] [--labels-only] [--write]

Each ordered access is made one step weaker (seq_cst to acquire or acq_rel, acq_rel to one of its halves, the others to
relaxed): alone, and together with all others that bear the same label on the same side. ``--write`` puts the table
into docs/memory-orders.md; without it the program exits with 1 if a label that the table calls caught is no more.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / "csrc"
EXPLORE = CSRC / "build/explore/explore"
DOCUMENT = ROOT / "docs/memory-orders.md"
BEGIN, END = "<!-- orders:begin -->", "<!-- orders:end -->"


class Site(NamedTuple):
    number: int
    file: str
    line: int
    function: str
    verb: str
    order: str
    labels: list[str]

    @property
    def place(self) -> str:
        return f"`{self.function}`"  # lines move


def labels_at(lines: list[str], line: int) -> list[str]:
    """The labels in the first comment on the line of an access, or on those where its statement goes on."""
    for text in lines[line - 1 : line + 3]:
        comment = re.search(r"/\*(.*?)(\*/|$)", text)
        if comment:
            return re.findall(r"\b[RAS]\d+\b", comment[1])
    return []


def read_sites() -> list[Site]:
    listed = subprocess.run([EXPLORE, "--sites"], capture_output=True, text=True, check=True).stdout
    sites = []
    for entry in listed.splitlines():
        number, file, line, function, verb, order = entry.split()
        lines = (CSRC / file).read_text().splitlines()
        sites.append(Site(int(number), file, int(line), function, verb, order, labels_at(lines, int(line))))
    return [site for site in sites if site.order != "relaxed"]


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


def run(mutants: dict[str, list[tuple[Site, str]]], runs: int) -> dict[str, str]:
    """What became of each: "caught SCENARIO SEED WHAT", "survives" or "unmet"."""
    text = "".join(
        name + "".join(f" {site.number}:{order}" for site, order in changes) + "\n"
        for name, changes in mutants.items()
    )
    done = subprocess.run(
        [EXPLORE, "--mutants", str(runs)], input=text, capture_output=True, text=True, check=False
    )
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def by_label(sites: list[Site]) -> dict[str, list[tuple[Site, str]]]:
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


def one_by_one(sites: list[Site]) -> dict[str, list[tuple[Site, str]]]:
    return {f"{site.number}>{order}": [(site, order)] for site in sites for order in one_step(site)}


def table(sites: list[Site], labels: dict[str, str], singles: dict[str, str]) -> str:
    rows = ["| label | accesses | all weakened | one at a time |", "|---|---|---|---|"]
    of = {site.number: site for site in sites}
    for label, fate in labels.items():
        mine = {name: fate for name, fate in singles.items() if label in of[int(name.split(">")[0])].labels}
        caught = [
            of[int(name.split(">")[0])].place for name, fate in mine.items() if fate.startswith("caught")
        ]
        together = f"caught by `{fate.split()[1]}`" if fate.startswith("caught") else fate
        alone = f"{len(caught)} of {len(mine)} caught" + (
            f": {', '.join(dict.fromkeys(caught))}" if caught else ""
        )
        rows.append(f"| {label} | {sum(label in site.labels for site in sites)} | {together} | {alone} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1500, help="of each scenario, in four ways")
    parser.add_argument("--labels-only", action="store_true", help="not each access alone")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    sites = read_sites()
    document = DOCUMENT.read_text()
    before = re.findall(r"^\| (\w+) \| \d+ \| caught", document, re.MULTILINE)
    mutants = by_label(sites)
    if options.labels_only and not options.write:
        mutants = {label: changes for label, changes in mutants.items() if label in before}
    labels = run(mutants, options.runs)
    for label, fate in labels.items():
        print(f"{label:4} {fate}")
    if options.write:
        singles = run(one_by_one(sites), options.runs)
        head, rest = document.split(BEGIN)
        tail = rest.split(END)[1]
        DOCUMENT.write_text(f"{head}{BEGIN}\n{table(sites, labels, singles)}\n{END}{tail}")
    missed = [label for label in before if not labels.get(label, "").startswith("caught")]
    if missed:
        print(f"not caught any more: {', '.join(missed)}")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
