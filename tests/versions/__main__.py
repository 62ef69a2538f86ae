"""The tests on each supported Python, and on the oldest libraries that pyproject.toml allows.

    python -m tests.versions [--lowest] [--jobs N] [3.12 ...] [-- arguments for pytest]

Each runs in a copy of the tree with an environment of its own, under build/versions: the C core is built there, with
that Python, and the developer's own build stays as it is. All tests but those that are marked slow run on each Python;
with `--lowest`, on the oldest Python, those which touch other libraries. Whatever is missing is an error, said first.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from tests.helpers.interpreters import interpreter

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "versions"
COPIED = ".copied.json"
SUPPORTED = ("3.11", "3.12", "3.13")
LOWEST_TESTS = (
    "tests/unit",
    "tests/conformance",
    "tests/examples",
    "tests/bench",
    "tests/system",
    "tests/lifetime/test_crossings.py",
    "tests/lint/test_wire_constants.py",
)
# What old libraries use, newer ones of others have deprecated: matplotlib's names of pyparsing.
LOWEST_OPTIONS = ("-W", "ignore::pyparsing.warnings.PyparsingDeprecationWarning")


def project() -> dict[str, Any]:
    """Return the table `project` of pyproject.toml."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        table: dict[str, Any] = tomllib.load(file)["project"]
    return table


def requirements(table: Mapping[str, Any], extras: Sequence[str] = ("all",)) -> Iterator[Requirement]:
    """Return what the package needs, and what these extras of it do, through extras that name others."""
    pending = [*table["dependencies"]]
    for extra in extras:
        pending += table["optional-dependencies"][extra]
    while pending:
        requirement = Requirement(pending.pop(0))
        if requirement.name == table["name"]:
            for extra in sorted(requirement.extras):
                pending += table["optional-dependencies"][extra]
        else:
            yield requirement


def lower_bound(requirement: Requirement) -> str:
    """Return the requirement of exactly the lowest version that this one allows."""
    bounds = [each.version for each in requirement.specifier if each.operator == ">="]
    if len(bounds) != 1:
        raise ValueError(f"{requirement} in pyproject.toml has no lower bound: give it one that is tested")
    return f"{requirement.name}=={bounds[0]}"


def lower_bounds(table: Mapping[str, Any]) -> list[str]:
    """Return pip's constraints for the lowest version of everything that users may have."""
    return sorted({lower_bound(requirement) for requirement in requirements(table)})


def tree() -> list[str]:
    """Return the names of all files of this tree, which may be a copy itself: git knows nothing of those."""
    if (ROOT / COPIED).exists():
        names: list[str] = json.loads((ROOT / COPIED).read_text())
        return names
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [name for name in listed.split("\0") if name]


def copy_tree(target: Path) -> None:
    """Bring a copy of what git has, or would add, up to date; what was built there stays."""
    names = {name for name in tree() if (ROOT / name).is_file()}
    list_of_names = target / COPIED
    before = set(json.loads(list_of_names.read_text())) if list_of_names.exists() else set()
    for name in before - names:
        (target / name).unlink(missing_ok=True)
    for name in names:
        source, copy = ROOT / name, target / name
        if not copy.exists() or copy.stat().st_mtime_ns != source.stat().st_mtime_ns:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)  # with its time: only what has changed is compiled again
    list_of_names.write_text(json.dumps(sorted(names)))


def run(name: str, python: str, arguments: Sequence[str], constraints: Sequence[str] = ()) -> int:
    """Set up the environment of this name, run pytest in it, and return its exit code."""
    directory = BUILD / name
    copy_tree(directory)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    if constraints:
        file = directory / "build" / "constraints.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join([*constraints, ""]))
        variables["PIP_CONSTRAINT"] = str(file)
    print(f"=== {name}: {python}", flush=True)
    setup = subprocess.run(
        ["make", "--no-print-directory", "setup", f"PYTHON={python}"],
        cwd=directory,
        env=variables,
        check=False,
    )
    if setup.returncode != 0:
        return setup.returncode
    ours = str(directory / ".venv" / "bin" / "python")
    return subprocess.run([ours, "-m", "pytest", *arguments], cwd=directory, check=False).returncode


def main() -> int:
    """Run what was asked for, say what became of each, and return 0 if all has passed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.versions", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("versions", nargs="*", metavar="3.12", help=f"by default {', '.join(SUPPORTED)}")
    parser.add_argument(
        "--lowest", action="store_true", help="the oldest Python and libraries that are allowed"
    )
    parser.add_argument("--jobs", default="0", help="processes that run tests; 0: none but pytest's own")
    own, pytest_arguments = sys.argv[1:], []
    if "--" in own:
        own, pytest_arguments = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    versions = options.versions or (SUPPORTED[:1] if options.lowest else SUPPORTED)
    pythons = {version: interpreter(version) for version in versions}
    if missing := [version for version, python in pythons.items() if python is None]:
        print(
            f"no interpreter for Python {', '.join(missing)}: shmengine is tested on {', '.join(SUPPORTED)}."
            f"\nInstall it (pyenv install {missing[0]}, uv python install {missing[0]}, or the system's"
            f" python{missing[0]} with its venv and headers), or put python{missing[0]} on the path."
            "\nTo leave it out: make test-all VERSIONS=...",
            file=sys.stderr,
        )
        return 2
    # As `make test` does.
    arguments = ["-q", "-m", "not slow", "-n", options.jobs, "--dist", "loadfile"]
    arguments += ["--no-loadscope-reorder", "--max-worker-restart", "0"]
    constraints: list[str] = []
    if options.lowest:
        constraints = lower_bounds(project())
        arguments += LOWEST_OPTIONS
        pytest_arguments = pytest_arguments or list(LOWEST_TESTS)
    codes = {}
    for version, python in pythons.items():
        assert python is not None
        name = "lowest" if options.lowest else version
        codes[version] = run(name, python, [*arguments, *pytest_arguments], constraints)
    for version, code in codes.items():
        what = f"Python {version}" + (" with the oldest libraries" if options.lowest else "")
        print(f"{what}: {'passed' if code == 0 else f'FAILED (exit code {code})'}")
    return any(codes.values())


if __name__ == "__main__":
    sys.exit(main())
