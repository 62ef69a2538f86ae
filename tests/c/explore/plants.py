"""Build the core with one bug after the other planted in it, and see whether the explorer finds each.

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

from plants_table import PLANTS, Plant

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CSRC = ROOT / "csrc"
BUILT = CSRC / "build" / "explore"
PAGE = ROOT / "docs" / "explorer.md"
MARKED = re.compile(r"(<!-- plants:begin -->\n).*?(<!-- plants:end -->)", re.DOTALL)
SAID = re.compile(r"^FAILED \S+ +preemptions (\d+), kills (\d+), stale (\d+), interrupts (\d+):.*? (\d+) schedules", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """What became of a plant: how it was found, or why not."""

    found: bool
    text: str
    limits: str = ""
    schedules: int = 0
    output: str = ""


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
    source = folder / plant.file
    text = planted(plant)
    program = folder / "explore"
    others = [path for path in sorted(BUILT.glob("*.o")) if path.stem != Path(plant.file).stem]
    newest = max(path.stat().st_mtime for path in others)
    if source.exists() and source.read_text() == text and program.exists() and program.stat().st_mtime > newest:
        return program
    source.write_text(text)
    compiler, flags = os.environ.get("CC", "cc"), os.environ["EXPLORE_FLAGS"].split()
    flags = [flag for flag in flags if flag not in ("-MMD", "-MP")]
    subprocess.run([compiler, *flags, "-O1", "-g0", "-c", source, "-o", source.with_suffix(".o")], check=True, cwd=CSRC)
    subprocess.run([compiler, "-pthread", source.with_suffix(".o"), *others, "-o", program], check=True, cwd=CSRC)
    return program


def look(plant: Plant, *, show: bool = False) -> Outcome:
    """Build it and run the scenario that must fail."""
    try:
        program = build(plant)
    except ValueError as error:
        return Outcome(False, f"does not apply: {error}")
    options = [f"--limits={plant.limits}".replace("=", " ")] if plant.limits else []
    words = " ".join([*options, *([f"--random {plant.runs}"] if plant.runs else [])]).split()
    done = subprocess.run(
        [program, *words, *(["--show"] if show else []), plant.scenario], capture_output=True, text=True, cwd=CSRC
    )
    output = done.stderr + done.stdout
    if done.returncode == 0:
        return Outcome(False, "not found", output=output)
    said = SAID.search(done.stdout)
    if not said:
        crash = re.search(r"invariant (\w+) broken", done.stderr)
        return Outcome(True, f"invariant {crash[1]}" if crash else "a crash", output=output)
    reason = done.stdout[said.end() :].splitlines()[1].strip()
    if reason.startswith("a check failed"):
        first = next(line for line in done.stderr.splitlines() if re.search(r"\.[ch]:\d+: ", line))
        reason = "check: " + first.split(": ", 1)[1]
    reason = re.sub(r" \(seed \d+\)$", "", reason)
    limits = " ".join(f"{count}{letter}" for count, letter in zip(said.groups()[:4], "pdsi", strict=True) if count != "0")
    return Outcome(True, reason, limits, int(said[5]), output)


def table(outcomes: dict[Plant, Outcome]) -> str:
    """Markdown."""
    lines = ["| plant | breaks | what is done wrong | scenario | limits | schedules | what the explorer says |", "|---|---|---|---|---|---|---|"]
    for plant, outcome in outcomes.items():
        how = outcome.limits.replace("99p", "any p") + (", random" if plant.runs else "")
        said = outcome.text.replace("|", "\\|")
        schedules = f"{outcome.schedules:,}" if outcome.schedules else ""
        lines.append(f"| {plant.name} | {plant.rule} | {plant.what} | {plant.scenario} | {how} | {schedules} | {said} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """The exit status."""
    names = {word for word in arguments if not word.startswith("--")}
    chosen = [plant for plant in PLANTS if not names or plant.name in names]
    if unknown := names - {plant.name for plant in chosen}:
        print(f"no such plant: {', '.join(sorted(unknown))}")
        return 2
    show, begun = "--show" in arguments, time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        outcomes = dict(zip(chosen, pool.map(lambda plant: look(plant, show=show), chosen), strict=True))
    for plant, outcome in outcomes.items():
        mark = "caught" if outcome.found else "MISSED"
        print(f"{mark} {plant.name:<26} {plant.rule:<4} {plant.scenario:<12} {outcome.schedules:>7} schedules  {outcome.text}")
        if show or not outcome.found:
            print(outcome.output)
    missed = [plant.name for plant, outcome in outcomes.items() if not outcome.found]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} planted bugs caught, {time.monotonic() - begun:.0f} s")
    if "--table" in arguments and not names and not missed:
        PAGE.write_text(MARKED.sub(lambda match: match[1] + table(outcomes) + match[2], PAGE.read_text()))
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
