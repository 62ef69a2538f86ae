"""A pytest plugin: all that dask's tests compute runs on one scheduler, and what came of it is written as JSON.

pytest -p on_scheduler --on=shmengine|private|processes --report=FILE
"""

from __future__ import annotations

import contextlib
import functools
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import dask
import dask.base
import dask.multiprocessing
import pytest

WORKERS = 2

counts: dict[str, list[tuple[str, str]]] = {"passed": [], "skipped": [], "failed": []}
ending = contextlib.ExitStack()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--on", default="shmengine", choices=["shmengine", "private", "processes"])
    parser.addoption("--report")


def pytest_configure(config: pytest.Config) -> None:
    """Make it the default, and what `assert_eq` asks for by the name "sync"."""
    on = config.getoption("--on")
    if on == "processes":
        pool = ending.enter_context(ProcessPoolExecutor(WORKERS, get_context("spawn")))
        get = functools.partial(dask.multiprocessing.get, pool=pool)
    else:
        import shmengine

        executor = ending.enter_context(shmengine.Executor(WORKERS, writable=on == "private"))
        get = dask.base.get_scheduler(scheduler=executor)
    dask.config.set(scheduler=get)
    dask.base.named_schedulers["sync"] = get
    for name in ("slow", "network", "gpu", "timeout"):
        config.addinivalue_line("markers", f"{name}: dask's own")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    name = item.nodeid.rpartition("/")[2]
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.wasxfail
        counts["skipped"].append((name, reason.removeprefix("Skipped: ")))
    elif report.failed:
        error = call.excinfo
        counts["failed"].append((name, error.exconly() if error else str(report.longrepr)))
    elif report.when == "call":
        counts["passed"].append((name, ""))
    return report


def pytest_unconfigure(config: pytest.Config) -> None:
    ending.close()
    with open(config.getoption("--report"), "w") as file:
        json.dump(counts, file)
