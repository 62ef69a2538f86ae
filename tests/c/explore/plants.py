"""Build the core with one bug after the other planted in it (plants.txt), and see whether the explorer finds each.

    python3 plants.py            all of them; exit status 1 if one is not found, or does not apply any more
    python3 plants.py NAME ...   some; with --show, every access of the run that fails
    python3 plants.py --table    all, and write the table of docs/explorer.md anew

Run by `make -C csrc plants`, which says in the environment how to compile.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CSRC = ROOT / "csrc"
BUILT = CSRC / "build" / "explore"
PAGE = ROOT / "docs" / "explorer.md"
MARKED = re.compile(r"(<!-- plants:begin -->\n)(.*?)(<!-- plants:end -->)", re.DOTALL)
PLANT = re.compile(
    r"^plant +(?P<name>\S+)\nbreaks +(?P<rule>\S+)\nwhat +(?P<what>[^\n]+)\n"
    r"finds it +(?P<scenario>\S+) ?(?P<limits>\S+)? ?(?P<runs>\S+)?\n(?P<changes>(?:@@ .*?\n@@\n)+)",
    re.MULTILINE | re.DOTALL,
)
CHANGE = re.compile(
    r"^@@ (?P<file>\S+)\n(?P<before>.*?)^@@ instead\n(?P<after>.*?)^@@\n", re.MULTILINE | re.DOTALL
)
SAID = re.compile(
    r"^FAILED \S+ +preemptions (\d+), kills (\d+), stale (\d+), interrupts (\d+), late (\d+):"
    r".*? (\d+) schedules.*\n(.*)",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Plant:
    """One bug: what it is, how it is found, and pairs of whole lines of one source, before and after."""

    name: str
    rule: str
    what: str
    scenario: str
    limits: str
    runs: str
    file: str
    changes: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a plant: how it was found, or why not."""

    found: bool
    text: str
    limits: str = ""
    schedules: int = 0
    output: str = ""


def read() -> list[Plant]:
    """All plants."""
    plants = []
    for found in PLANT.finditer((HERE / "plants.txt").read_text()):
        fields = {key: value or "" for key, value in found.groupdict().items()}
        changes = list(CHANGE.finditer(fields.pop("changes")))
        pairs = tuple((change["before"], change["after"]) for change in changes)
        plants.append(Plant(**fields, file=changes[0]["file"], changes=pairs))
    return plants


def planted(plant: Plant) -> str:
    """The changed source; ValueError if it is not what the plant expects."""
    source = (CSRC / plant.file).read_text()
    for before, after in plant.changes:
        if source.count(before) != 1:
            raise ValueError(f"stands {source.count(before)} times in {plant.file}: {before.strip()!r}")
        source = source.replace(before, after)
    return source


def build(plant: Plant) -> Path:
    """Compile the changed source and link it with the objects of the explorer."""
    folder = CSRC / "build" / "plants" / plant.name
    folder.mkdir(parents=True, exist_ok=True)
    source, program, text = folder / plant.file, folder / "explore", planted(plant)
    target = source.with_suffix(".o")
    others = [path for path in sorted(BUILT.glob("*.o")) if path.name != target.name]
    newest = max(path.stat().st_mtime for path in others)
    if (
        source.exists()
        and source.read_text() == text
        and program.exists()
        and program.stat().st_mtime > newest
    ):
        return program
    source.write_text(text)
    compiler = os.environ.get("CC", "cc")
    flags = [flag for flag in os.environ["EXPLORE_FLAGS"].split() if flag not in {"-MMD", "-MP"}]
    subprocess.run([compiler, *flags, "-O1", "-g0", "-c", source, "-o", target], check=True, cwd=CSRC)
    subprocess.run([compiler, "-pthread", target, *others, "-o", program], check=True, cwd=CSRC)
    return program


def look(plant: Plant, *, show: bool = False) -> Outcome:
    """Build it and run the scenario that must fail."""
    try:
        program = build(plant)
    except ValueError as error:
        return Outcome(False, f"does not apply: {error}")
    command = [str(program)]
    if plant.limits:
        command += ["--limits", plant.limits]
    if plant.runs:
        command += ["--random", plant.runs]
    if show:
        command += ["--show"]
    done = subprocess.run([*command, plant.scenario], check=False, capture_output=True, text=True, cwd=CSRC)
    output = done.stderr + done.stdout
    if done.returncode == 0 or plant.scenario not in done.stdout:
        return Outcome(False, "not found", output=output)
    said = SAID.search(done.stdout)
    if not said:
        broken = re.search(r"invariant (\w+) broken", done.stderr)
        return Outcome(True, f"invariant {broken[1]} is broken" if broken else "a crash", output=output)
    *counts, schedules, reason = said.groups()
    reason = re.sub(r" \(seed \d+\)$", "", reason.strip())
    if reason.startswith("a check failed"):
        first = re.search(r"\.[ch]:\d+: (.*)", done.stderr)
        reason = f"check: `{first[1]}`" if first else reason
    limits = " ".join(
        f"{count}{letter}" for count, letter in zip(counts, "pdsil", strict=True) if count != "0"
    )
    return Outcome(True, reason, limits, int(schedules), output)


def table(outcomes: dict[Plant, Outcome]) -> str:
    """Markdown."""
    heads = [
        "plant",
        "breaks",
        "what is done wrong",
        "scenario",
        "limits",
        "schedules",
        "what the explorer says",
    ]
    rows = [heads, ["---"] * len(heads)]
    for plant, outcome in outcomes.items():
        limits = outcome.limits.replace("99p", "any p") + (", random" if plant.runs else "")
        schedules = f"{outcome.schedules:,}" if outcome.schedules else ""
        says = outcome.text.replace("|", "\\|")
        rows.append([plant.name, plant.rule, plant.what, plant.scenario, limits, schedules, says])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(arguments: list[str]) -> int:
    """The exit status."""
    names = {word for word in arguments if not word.startswith("--")}
    chosen = [plant for plant in read() if not names or plant.name in names]
    if unknown := names - {plant.name for plant in chosen}:
        print(f"no such plant: {', '.join(sorted(unknown))}")
        return 2
    show, begun = "--show" in arguments, time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        outcomes = dict(zip(chosen, pool.map(lambda plant: look(plant, show=show), chosen), strict=True))
    for plant, outcome in outcomes.items():
        mark = "caught" if outcome.found else "MISSED"
        where = f"{plant.name:<26} {plant.rule:<8} {plant.scenario:<12}"
        print(f"{mark} {where} {outcome.schedules:>6} schedules  {outcome.text}")
        if show or not outcome.found:
            print(outcome.output)
    missed = [plant for plant, outcome in outcomes.items() if not outcome.found]
    print(
        f"{len(chosen) - len(missed)} of {len(chosen)} planted bugs caught, {time.monotonic() - begun:.0f} s"
    )
    if "--table" in arguments and not names and not missed:
        PAGE.write_text(MARKED.sub(lambda marked: marked[1] + table(outcomes) + marked[3], PAGE.read_text()))
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
