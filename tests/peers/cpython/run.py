"""Run CPython's own tests of process pools in this interpreter; write what came of them as JSON.

python run.py REPORT [PATTERN]
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import pkgutil
import sys
import unittest

from test import support
from test.support import script_helper

SECONDS = 300  # for one test

NAMES = ("ProcessPool", "FailingInitializerResources")  # of the classes that test process pools

SKIPS = {
    "ProcessPoolForkFailingInitializerTest": (
        "its queue is made for children that are forked, and our workers are not (the constructor says so)"
    ),
    "test_python_finalization_error": "it makes the start of the standard's own second thread fail",
}
"""Tests (a part of their ids) that do not apply, and why."""


class Report(unittest.TextTestResult):
    """Counts, and watches each test."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.passed = 0

    def startTest(self, test: unittest.TestCase) -> None:
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        super().startTest(test)

    def stopTest(self, test: unittest.TestCase) -> None:
        faulthandler.cancel_dump_traceback_later()
        super().stopTest(test)

    def addSuccess(self, test: unittest.TestCase) -> None:
        self.passed += 1
        super().addSuccess(test)


def flat(suite: unittest.TestSuite) -> list[unittest.TestCase]:
    """All tests of a suite."""
    return [
        test for each in suite for test in (flat(each) if isinstance(each, unittest.TestSuite) else [each])
    ]


def modules() -> list[str]:
    """One module in Python 3.11, a package since."""
    root = importlib.import_module("test.test_concurrent_futures")
    if not hasattr(root, "__path__"):
        return [root.__name__]
    return [
        f"{root.__name__}.{info.name}"
        for info in pkgutil.iter_modules(root.__path__)
        if info.name.startswith("test")
    ]


def main(report: str, pattern: str = "") -> int:
    """Run the tests of process pools whose ids contain `pattern`."""
    script_helper.__dict__["__cached_interp_requires_environment"] = True  # scripts get PYTHONPATH
    support.use_resources = ["walltime", "cpu"]
    suite = unittest.TestSuite()
    for name in modules():
        of_module = unittest.TestSuite()
        for test in flat(unittest.defaultTestLoader.loadTestsFromName(name)):
            if not any(name in test.id() for name in NAMES) or pattern not in test.id():
                continue
            method = getattr(test, test._testMethodName)
            for part, reason in SKIPS.items():
                if part in test.id():
                    setattr(test, test._testMethodName, unittest.skip(reason)(method))
            of_module.addTest(test)
        suite.addTest(of_module)
    result = unittest.TextTestRunner(stream=sys.stderr, verbosity=2, resultclass=Report).run(suite)
    with open(report, "w") as file:
        json.dump(
            {
                "passed": result.passed,
                "skipped": [(test.id(), reason) for test, reason in result.skipped],
                "failed": [(test.id(), text) for test, text in result.failures + result.errors],
            },
            file,
        )
    return not result.wasSuccessful()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
