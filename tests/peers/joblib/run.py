"""Run joblib's own tests of `joblib.Parallel` with our backend in their lists; write what came of them as JSON.

python run.py REPORT [PATTERN]

The tests run from a copy beside REPORT, in which lists of backends are longer, and some tests of loky are of ours.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import joblib.test
import pytest

from shmengine.joblib import ShmengineBackend

SECONDS = 300  # for one test

LISTS = {
    'PROCESS_BACKENDS = ["multiprocessing", "loky"]': 'PROCESS_BACKENDS = ["multiprocessing", "loky", "shmengine"]',
    '("loky", "multiprocessing", True),': """
        ("shmengine", "shmengine", True),
        ("shmengine", "loky", False),
        ("loky", "shmengine", False),
        ("multiprocessing", "shmengine", True),
        ("threading", "shmengine", True),
        ("loky", "multiprocessing", True),""",
    '@parametrize("backend", ["loky", "multiprocessing", "threading"])': (
        '@parametrize("backend", ["loky", "multiprocessing", "threading", "shmengine"])'
    ),
    '[None, "loky", "threading"]': '[None, "loky", "threading", "shmengine"]',
    '("loky", True),': '("loky", True), ("shmengine", False),',
    '@parametrize("backend", ["loky", "threading"])': '@parametrize("backend", ["loky", "threading", "shmengine"])',
    '["threading", "loky", "multiprocessing", "back_compat_backend"]': (
        '["threading", "loky", "multiprocessing", "back_compat_backend", "shmengine"]'
    ),
    '([None, "loky"] if mp is not None else [None])': '[None, "loky", "shmengine"]',
    '(["threading"] if mp is None else ["loky", "threading"])': '["loky", "threading", "shmengine"]',
}
"""What is replaced in their source; each must be there."""

OF_LOKY = [
    "test_nested_loop_with_exception_with_loky",
    "test_parallel_pickling",
    "test_parallel_byteorder_corruption",
    "test_parallel_with_interactively_defined_functions_loky",
    "INTERACTIVE_DEFINED_FUNCTION_AND_CLASS_SCRIPT_CONTENT",
    "test_threadpool_limitation_in_child_loky",
    "test_threadpool_limitation_in_child_context",
    "test_initializer_reused",
    "test_initializer_not_reused",
    "test_invalid_backend_hinting_and_constraints",
]
"""Tests, and what belongs to them, that name loky and no other: here they name ours."""

SKIPS = {
    "test_auto_memmap_on_arrays_from_generator": "it wants instances of np.memmap",
    "test_memmapping_leaks": "it wants instances of np.memmap, in files of a temporary folder",
}
"""Tests that do not apply, and why."""


def with_ours(source: str) -> str:
    """Return their source with our backend in it."""
    for old, new in LISTS.items():
        if old not in source:
            raise SystemExit(f"joblib's tests have changed: no {old!r} in them")
        source = source.replace(old, new)
    lines = source.splitlines(keepends=True)
    found = set()
    for node in ast.parse(source).body:
        targets = getattr(node, "targets", [])
        name = getattr(node, "name", None) or next((t.id for t in targets if isinstance(t, ast.Name)), "")
        if name in OF_LOKY:
            found.add(name)
            for number in range(node.lineno - 1, node.end_lineno or 0):
                lines[number] = lines[number].replace('"loky"', '"shmengine"')
    if missing := set(OF_LOKY) - found:
        raise SystemExit(f"joblib's tests have changed: no {missing} in them")
    return "".join(lines)


class Report:
    """Chooses the tests of our backend, and counts."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.counts: dict[str, list] = {"passed": [], "skipped": [], "failed": []}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep what names our backend; skip what does not apply."""
        kept = []
        for item in items:
            values = item.callspec.params.values() if hasattr(item, "callspec") else ()
            ours = any(
                isinstance(value, ShmengineBackend) or (type(value) is str and value == "shmengine")
                for value in values
            )
            if (ours or item.originalname in OF_LOKY) and self.pattern in item.nodeid:
                kept.append(item)
                if item.originalname in SKIPS:
                    item.add_marker(pytest.mark.skip(reason=SKIPS[item.originalname]))
        items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one; an expected failure of theirs is a pass."""
        name = report.nodeid.partition("::")[2]
        if report.failed:
            self.counts["failed"].append((name, str(report.longrepr)))
        elif report.skipped and not hasattr(report, "wasxfail"):
            self.counts["skipped"].append((name, report.longrepr[2].removeprefix("Skipped: ")))
        elif report.when == "call":
            self.counts["passed"].append(name)


def main(path: str, pattern: str = "") -> int:
    """Run the tests whose names contain `pattern`."""
    directory = Path(path).parent
    copy = directory / "test_parallel.py"
    copy.write_text(with_ours(Path(joblib.test.__file__).with_name("test_parallel.py").read_text()))
    report = Report(pattern)
    options = ["-q", "-p", "no:cacheprovider", "--override-ini", f"faulthandler_timeout={SECONDS}"]
    options += ["--disable-warnings", "--rootdir", str(directory), "-c", "/dev/null"]
    code = pytest.main([*options, str(copy)], plugins=[report])
    counts = {**report.counts, "passed": len(report.counts["passed"])}
    Path(path).write_text(json.dumps(counts))
    return int(code)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
