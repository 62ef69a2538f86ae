"""Parts of the soak that are programs: C tests, pytest on other tests, make.

A program may say what it counted in a line ``report {"kills": 3, "messages": 1000}`` with names of `Report`; it says
that all is well with exit code 0.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable

from tests.helpers.scripts import ROOT
from tests.soak.report import Report

Run = Callable[[float, int], Report]


def command(*words: str) -> Run:
    """Run a command; in its words ``{seconds}``, ``{half}`` of them, ``{minutes}`` and ``{seed}`` are filled in.

    They are in its environment, too: SHMENGINE_SOAK_MINUTES and SHMENGINE_SOAK_SEED.
    """

    def run(seconds: float, seed: int) -> Report:
        minutes = f"{seconds / 60:.3f}"
        filled = [
            word.format(seconds=math.ceil(seconds), half=math.ceil(seconds / 2), minutes=minutes, seed=seed)
            for word in words
        ]
        environment = {**os.environ, "SHMENGINE_SOAK_MINUTES": minutes, "SHMENGINE_SOAK_SEED": str(seed)}
        done = subprocess.run(
            filled,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        report = Report()
        for line in done.stdout.splitlines():
            if line.startswith("report {"):
                report += Report.from_dict(json.loads(line.removeprefix("report ")))
        if done.returncode:
            last = "\n".join(done.stdout.splitlines()[-40:])
            report.failures.append(f"{' '.join(filled)}: exit code {done.returncode}\n{last}")
        return report

    return run


def c_test(binary: str) -> Run:
    """Build and run a C test: ``plain/stress_kill``, ``asan/...``; it is called with a seed and seconds."""
    path = f"build/{binary}"

    def run(seconds: float, seed: int) -> Report:
        built = command("make", "--silent", "-C", "csrc", path)(seconds, seed)
        return built if built.failures else command(f"csrc/{path}", "{seed}", "{seconds}")(seconds, seed)

    return run


def python_tests(*paths: str) -> Run:
    """Run pytest; tests take their time from `tests.helpers.soak_seconds`."""
    return command(sys.executable, "-m", "pytest", "-q", "--no-header", *paths)
