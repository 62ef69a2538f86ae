"""Run other projects' own tests on our implementations of their interfaces, and write docs/peers.md.

    python -m tests.peers [--suite NAME] [--only WORD]

Nothing of theirs is in this tree: the suites run from where they are installed.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.interpreters import interpreter

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "peers"
TABLE = ROOT / "docs" / "peers.md"
DEBIAN_TESTS = Path("/usr/lib/python3.11/test")
HOUR = 3600
SKIPPED = "Skipped of "

HEAD = """# The tests of others

Made by `make peers`: the test suites of the interfaces that we implement, run from where they are installed, on our
implementations. Nothing of theirs is in this tree; the adapters are in `tests/peers`.
"""


@dataclasses.dataclass
class Outcome:
    """What came of a suite."""

    name: str
    passed: int = 0
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    failed: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    missing: str = ""
    """Why it did not run."""


def environment(version: str) -> str | None:
    """Return the interpreter of a virtual environment with this package; the running one if it has the version."""
    if sys.version.startswith(f"{version}."):
        return sys.executable
    base = interpreter(version)
    if base is None:
        return None
    directory = BUILD / version
    python = str(directory / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([base, "-m", "venv", "--clear", str(directory)], check=True)
    subprocess.run([*pip, "setuptools>=77", "cffi>=2", "numpy>=2"], check=True)
    subprocess.run([*pip, "--no-build-isolation", str(ROOT)], check=True)
    return python


def cpython(version: str, only: str) -> Outcome:
    """Run CPython's tests of process pools on `Executor`."""
    python = environment(version)
    if python is None:
        return Outcome(f"CPython {version}", missing=f"no interpreter python{version}")
    exact = subprocess.run(
        [python, "-c", "import platform; print(platform.python_version())"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    outcome = Outcome(f"CPython {exact}, `test_concurrent_futures`, process pools")
    variables = {**os.environ, "PYTHONPATH": str(HERE / "cpython")}
    found = subprocess.run(
        [python, "-c", "import test.test_concurrent_futures"], check=False, capture_output=True
    ).returncode
    if found != 0:
        if version != "3.11" or not (DEBIAN_TESTS / "test_concurrent_futures.py").exists():
            outcome.missing = f"not installed (Debian: libpython{version}-testsuite)"
            return outcome
        variables["SHMENGINE_PEERS_TESTS"] = str(DEBIAN_TESTS)
    return run(outcome, [python, str(HERE / "cpython" / "run.py")], variables, BUILD, only)


def joblib(only: str) -> Outcome:
    """Run joblib's tests of `joblib.Parallel` on our backend, in this environment (the extra ``test`` has joblib)."""
    outcome = Outcome(f"joblib {importlib.metadata.version('joblib')}, `test_parallel.py`, our backend")
    directory = BUILD / "joblib"
    variables = {**os.environ, "PYTHONPATH": str(HERE / "joblib")}
    return run(outcome, [sys.executable, str(HERE / "joblib" / "run.py")], variables, directory, only)


def run(
    outcome: Outcome, command: list[str], variables: dict[str, str], directory: Path, only: str
) -> Outcome:
    """Run a program that writes its counts into a file, and take them over."""
    directory.mkdir(parents=True, exist_ok=True)
    report = directory / f"{outcome.name.split(',')[0].replace(' ', '-').lower()}.json"
    report.unlink(missing_ok=True)
    subprocess.run([*command, str(report), only], env=variables, cwd=directory, check=False, timeout=HOUR)
    if not report.exists():
        outcome.failed = [("the run itself", "it did not end in order")]
        return outcome
    counts = json.loads(report.read_text())
    outcome.passed, outcome.skipped, outcome.failed = counts["passed"], counts["skipped"], counts["failed"]
    return outcome


DASK_MODULES = ("test_get.py", "--pyargs", "dask.array.tests")


def on_dask(scheduler: str, tests: list[str], only: str) -> dict[str, list[list[str]]]:
    """Run tests of dask with all that they compute on a scheduler (see dask/on_scheduler.py)."""
    BUILD.mkdir(parents=True, exist_ok=True)
    report = BUILD / f"dask-{scheduler}.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "on_scheduler"]
    command += ["-c", os.devnull, f"--confcutdir={HERE / 'dask'}", "-k", only, "--tb=no", "-rN"]
    command += [f"--on={scheduler}", f"--report={report}", *tests]
    subprocess.run(
        command, env={**os.environ, "PYTHONPATH": "."}, cwd=HERE / "dask", check=False, timeout=HOUR
    )
    found: dict[str, list[list[str]]] = json.loads(report.read_text())
    return found


def dask(only: str) -> Outcome:
    """Run dask's tests of `get` functions and of arrays on `Executor`; what fails, on its own processes as well."""
    try:
        import dask
    except ImportError:
        return Outcome("dask", missing="not installed (`pip install -e '.[dask]'`)")
    outcome = Outcome(f"dask {dask.__version__}, `GetFunctionTestMixin` and `dask/array/tests`")
    ours = on_dask("shmengine", list(DASK_MODULES), only)
    outcome.passed = len(ours["passed"])
    outcome.skipped = [
        (name.partition("[")[0].rpartition(":")[2], reason) for name, reason in ours["skipped"]
    ]
    failed = dict(ours["failed"])
    if not failed:
        return outcome
    home = Path(dask.__file__).parent / "array" / "tests"
    again = [name if name.startswith("test_get.py") else str(home / name) for name in failed]
    theirs = dict(on_dask("processes", again, only)["failed"])
    private = {name for name, _ in on_dask("private", again, only)["passed"]}
    for name, error in failed.items():
        test = name.partition("[")[0].rpartition(":")[2]
        if name in theirs:
            outcome.skipped.append((test, f"fails on dask's own processes, too: {brief(theirs[name])}"))
        elif name in private:
            outcome.skipped.append((test, "writes to its arrays; passes on `Executor(writable='private')`"))
        else:
            outcome.failed.append((name, error))
    return outcome


def brief(error: str) -> str:
    """The first line of an error, if it is not a long one."""
    line = error.partition("\n")[0]
    return line if len(line) < 80 else line.partition(":")[0]


def row(outcome: Outcome) -> str:
    """Return its line of the table."""
    counts = [str(outcome.passed), str(len(outcome.skipped)), str(len(outcome.failed))]
    return f"| {outcome.name} | " + (outcome.missing or " | ".join(counts)) + " |"


def reasons(outcome: Outcome) -> Iterator[str]:
    """Return why tests of it were skipped."""
    found = collections.defaultdict(list)
    for test, reason in outcome.skipped:
        found[reason].append(test.partition("[")[0].rpartition(".")[2])
    if found:
        yield f"{SKIPPED}{outcome.name}:\n"
    for reason, tests in sorted(found.items()):
        yield f"- {', '.join(f'`{test}`' for test in sorted(set(tests)))} ({len(tests)}): {reason}"


def page(outcomes: list[Outcome], before: str = "") -> str:
    """Return the page, with what it said before of suites that have not been run now."""
    ran = tuple(outcome.name.split(" ")[0] for outcome in outcomes)
    rows = [line for line in before.splitlines() if line.startswith("| ") and not line.startswith("| suite")]
    rows = [line for line in rows if not line.startswith(tuple(f"| {name}" for name in ran))]
    parts = [f"{SKIPPED}{part.strip()}" for part in before.split(SKIPPED)[1:]]
    parts = [part for part in parts if not part.startswith(tuple(f"{SKIPPED}{name}" for name in ran))]
    rows = sorted([*rows, *map(row, outcomes)], key=str.lower)
    parts = sorted([*parts, *filter(None, ("\n".join(reasons(each)) for each in outcomes))], key=str.lower)
    table = "\n".join(["| suite | passed | skipped | failed |", "|---|---|---|---|", *rows])
    return "\n\n".join([HEAD.strip(), table, *parts]) + "\n"


SUITES = {
    "cpython": [functools.partial(cpython, "3.11"), functools.partial(cpython, "3.13")],
    "dask": [dask],
    "joblib": [joblib],
}


def main() -> int:
    """Run the suites, write the table, and return 0 if nothing has failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__)
    parser.add_argument(
        "--only", default="", metavar="WORD", help="tests whose name contains it; writes no table"
    )
    parser.add_argument(
        "--suite", choices=SUITES, help="only this one; the table keeps what it says of others"
    )
    arguments = parser.parse_args()
    only = arguments.only
    outcomes = [suite(only) for name in SUITES if arguments.suite in (None, name) for suite in SUITES[name]]
    text = page(outcomes, TABLE.read_text() if arguments.suite else "")
    print(text)
    for outcome in outcomes:
        for test, reason in outcome.failed:
            print(f"FAILED {test}\n{reason}")
    if not only:
        TABLE.write_text(text)
    return any(outcome.failed or outcome.missing for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
