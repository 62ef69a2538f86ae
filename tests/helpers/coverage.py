"""Line and branch coverage of csrc/ by the C tests and the Python tests together: ``make coverage``.

The C tests are built and run by csrc/Makefile, the extension modules in a copy of the tree under build/coverage, so
that the developer's own stay as they are; gcovr adds the two up. What is not covered is listed, with its reason, in
docs/coverage.md; this ends with an error if something else is not covered, or less than 95 % is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build" / "coverage"
TREE = OUT / "tree"
LIST = ROOT / "docs" / "coverage.md"
AT_LEAST = 95.0
# Who spins looks billions of times: no count is too large to be true.
GCOVR = [sys.executable, "-m", "gcovr", "--gcov-suspicious-hits-threshold", "0"]

PYTHON_TESTS = [
    f"tests/unit/test_{name}.py"
    for name in ("handles", "directions", "ring", "channel_shm", "wire", "loans", "stack")
]
"""What only Python reaches: handles.c and its siblings. (Who ends by `os._exit` or a signal leaves no counts.)"""

ENTRY = re.compile(r"^- `(?P<file>[\w.]+)`, `(?P<function>\w+)`: `(?P<code>[^`]+)`$", re.MULTILINE)


def listed() -> list[tuple[str, str, str]]:
    """What docs/coverage.md says is not covered: file, function and line of code."""
    return [(entry["file"], entry["function"], entry["code"]) for entry in ENTRY.finditer(LIST.read_text())]


def code_of(line: str) -> str:
    """A line of C as the list quotes it: without indentation and the comment at its end."""
    return re.sub(r"\s*/\*.*", "", line).strip()


def function_lines(name: str, function: str) -> list[str]:
    """The lines of a function of csrc/`name`, as the list quotes them."""
    text = (ROOT / "csrc" / name).read_text()
    found = re.search(rf"^\w[^;\n]*\b{function}\((?:[^;{{]|\n)*{{.*?^}}$", text, re.MULTILINE | re.DOTALL)
    return [code_of(line) for line in found[0].splitlines()] if found else []


def run(*command: str, cwd: Path = ROOT, **environment: str) -> None:
    subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, check=True)


def measure_c() -> None:
    run("make", "--no-print-directory", "-C", "csrc", "covered")
    objects = [str(ROOT / "csrc" / "build" / name) for name in ("coverage", "coverage_raced")]
    run(*GCOVR, "--root", ".", "--filter", "csrc/", "--json", str(OUT / "c.json"), *objects)


def measure_python(tests: list[str]) -> None:
    shutil.rmtree(TREE, ignore_errors=True)
    skipped = shutil.ignore_patterns(".*", "build", "__pycache__", "*.so", "_core.c", "*.egg-info")
    shutil.copytree(ROOT, TREE, ignore=skipped)
    run(
        *(sys.executable, "setup.py", "-q", "build_ext", "--inplace"),
        cwd=TREE,
        SHMENGINE_COVERAGE="1",
    )
    run(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests),
        cwd=TREE,
        PYTHONPATH=str(TREE),
    )
    run(*GCOVR, "--root", ".", "--filter", "csrc/", "--json", str(OUT / "python.json"), ".", cwd=TREE)


def uncovered(report: Path) -> Iterator[tuple[str, int, str, str]]:
    """Lines that were not run, or of whose branches one was not taken: file, number, function, what is missing."""
    for file in json.loads(report.read_text())["files"]:
        for line in file["lines"]:
            branches = [branch["count"] for branch in line.get("branches", [])]
            place = Path(file["file"]).name, line["line_number"], line.get("function_name", "")
            if not line["count"]:
                yield *place, "not run"
            elif missing := branches.count(0):
                yield *place, f"{missing} of {len(branches)} branches"


def main() -> int:
    OUT.mkdir(parents=True, exist_ok=True)
    measure_c()
    measure_python([*PYTHON_TESTS, *sys.argv[1:]])
    both = [f"--add-tracefile={OUT / name}" for name in ("c.json", "python.json")]
    for metric in ("line", "branch"):
        run(*GCOVR, "--root", ".", *both, "--txt-metric", metric)
    run(
        *GCOVR,
        "--root",
        ".",
        *both,
        "--json",
        str(OUT / "both.json"),
        "--json-summary",
        str(OUT / "sum.json"),
    )
    known, unlisted = set(listed()), 0
    for name, number, function, what in uncovered(OUT / "both.json"):
        code = code_of((ROOT / "csrc" / name).read_text().splitlines()[number - 1])
        if (name, function, code) not in known:
            unlisted += 1
            print(f"csrc/{name}:{number}: {what}:\n- `{name}`, `{function}`: `{code}`")
    summary = json.loads((OUT / "sum.json").read_text())
    if unlisted:
        print(
            f"{unlisted} lines that are not covered, or not in each branch, are not listed in docs/coverage.md"
        )
    print(
        "csrc: {line_covered} of {line_total} lines ({line_percent} %), "
        "{branch_covered} of {branch_total} branches ({branch_percent} %)".format(**summary)
    )
    return int(bool(unlisted) or min(summary["line_percent"], summary["branch_percent"]) < AT_LEAST)


if __name__ == "__main__":
    sys.exit(main())
