"""``python -m tests.soak``: all parts one after the other, each in a process of its own, and one report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.helpers.leftovers import adopt_orphans
from tests.helpers.scripts import ROOT, kill_tree
from tests.soak.parts import PARTS, Part
from tests.soak.report import Report

OUTPUT = ROOT / "build" / "soak.json"
PATIENCE_SECONDS = 180.0
"""What a part may take beyond its time: for building, for settling its last round."""


def main() -> int:
    """Return the exit code: 0 if everything that must be zero is."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5, help="for all parts together")
    parser.add_argument("--seed", type=int, help="of all random choices; by default a random one")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the report as JSON")
    parser.add_argument(
        "--part", action="append", choices=[part.name for part in PARTS], help="only this one"
    )
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # a part, in its process
    args = parser.parse_args()
    parts = [part for part in PARTS if not args.part or part.name in args.part]
    if args.alone:
        (part,) = parts
        args.output.write_text(json.dumps(part.run(args.minutes * 60, args.seed).as_dict()))
        return 0
    seed = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    return soak(parts, args.minutes, seed, args.output)


def soak(parts: list[Part], minutes: float, seed: int, output: Path) -> int:
    """Run the parts, print what they found, and write it down."""
    print(f"soak: {minutes:g} minutes, seed {seed}, on {machine()}", flush=True)
    adopt_orphans()  # so that no process hides from `kill_tree`
    start = time.monotonic()
    total = Report()
    reports: dict[str, dict[str, Any]] = {}
    for number, part in enumerate(parts):
        left = max(minutes * 60 - (time.monotonic() - start), 0)  # what a part did not need the others get
        seconds = left * part.share / sum(each.share for each in parts[number:])
        print(f"--- {part.name}: {seconds:.0f} s", flush=True)
        report = run_apart(part, seconds, seed)
        print(report, flush=True)
        reports[part.name] = report.as_dict()
        total += report
    counts = total.as_dict()
    result = {
        "seed": seed,
        "machine": machine(),
        "minutes": round((time.monotonic() - start) / 60, 2),
        **counts,
    }
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps({**result, "parts": reports}, indent=2) + "\n")
    print("=== soak")
    for name, value in result.items():
        if name != "failures":
            print(f"{name.replace('_', ' '):18}{value:,}" if isinstance(value, int) else f"{name:18}{value}")
    for failure in total.failures:
        print(f"failure: {failure}")
    print(f"{'passed' if total.passed else 'FAILED'} with SEED={seed}; {output}", flush=True)
    return 0 if total.passed else 1


def run_apart(part: Part, seconds: float, seed: int) -> Report:
    """Run a part in a process of its own, whose end, however it comes, is not ours."""
    own_seed = random.Random(f"{seed} {part.name}").getrandbits(32)  # the same whatever other parts there are
    with tempfile.TemporaryDirectory(prefix="shmengine-soak-") as directory:
        path = Path(directory, "report.json")
        options = ["--alone", "--part", part.name, "--minutes", str(seconds / 60), "--seed", str(own_seed)]
        command = [sys.executable, "-X", "faulthandler", "-m", "tests.soak", *options, "--output", str(path)]
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            code = process.wait(seconds + PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            description = kill_tree(process.pid, stacks=True)
            process.wait()
            return Report(hung=1, failures=[f"{part.name} does not end:\n{description}"])
        except BaseException:
            kill_tree(process.pid)
            process.wait()
            raise
        if code or not path.exists():
            return Report(failures=[f"{part.name} ended with code {code}"])
        return Report.from_dict(json.loads(path.read_text()))


def machine() -> str:
    """Return what this ran on, in a line."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{len(os.sched_getaffinity(0))} x {model}, Linux {platform.release()}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
