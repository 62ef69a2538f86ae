"""What holds for every test: nothing may be left behind, and nothing may hang."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import resource
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import pytest

from shmengine.interrupts import SIGNALS
from tests.helpers import mount_namespace_prefix
from tests.helpers.leftovers import Inventory, adopt_orphans, orphan_zombies, take_inventory
from tests.helpers.watchdog import DEFAULT_SECONDS, REPORT, Watchdog

# Suites of other projects, and what runs them: `make peers`.
collect_ignore = ["peers"]

GRACE_SECONDS = float(os.environ.get("SHMENGINE_TEST_GRACE", "5"))
"""What is on its way out may take so long; this is no bound on speed (benches measure that)."""

WATCHDOG = pytest.StashKey[Watchdog]()
REPORT_FILE = pytest.StashKey[Any]()


def pytest_configure(config: pytest.Config) -> None:
    # Here, because output is captured only from the next step on: the watchdog must reach the terminal.
    config.stash[WATCHDOG] = Watchdog(stderr=2)
    # Where others run the tests: what they print is far above the end.
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        config.stash[REPORT_FILE] = report_file = tempfile.NamedTemporaryFile(prefix="shmengine-tests-")  # noqa: SIM115
        os.environ[REPORT] = report_file.name
    # In each of thousands of interpreters a thread of OpenBLAS would spin for as long as NumPy's import takes.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    # Whoever first uses multiprocessing's shared memory starts this process; let it not be a test.
    multiprocessing.resource_tracker.ensure_running()
    adopt_orphans()


def pytest_sessionstart(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput") and (report := os.environ.get(REPORT)):
        faulthandler.enable(open(report, "ab"))  # noqa: SIM115  for as long as this process lives


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: list[Any]) -> None:
    # With `-n`: each process that runs tests has a /dev/shm of its own, or it would take others' names for leaks.
    for spec in specs:
        spec.python = shlex.join([*mount_namespace_prefix("50%"), sys.executable])
    # The queues of all of them count as one user's: where that may be raised, each has what one alone would have.
    least, most = (len(specs) * limit for limit in resource.getrlimit(resource.RLIMIT_MSGQUEUE))
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, (least, most))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    file = config.stash.get(REPORT_FILE, None)
    if file is not None and (text := file.read().decode(errors="replace")):
        terminalreporter.section("processes that hung or crashed")
        terminalreporter.write_line(text)


def pytest_unconfigure(config: pytest.Config) -> None:
    if (file := config.stash.get(REPORT_FILE, None)) is not None:
        file.close()
    if (watchdog := config.stash.get(WATCHDOG, None)) is not None:
        watchdog.close()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    marker = item.get_closest_marker("watchdog")
    watchdog = item.config.stash[WATCHDOG]
    watchdog.start(marker.args[0] if marker else DEFAULT_SECONDS, item.nodeid)
    try:
        return (yield)
    finally:
        watchdog.stop()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No test leaves a name in /dev/shm, a process, a descriptor, a semaphore or a thread."""
    before = take_inventory()
    yield
    _fail_if_leaked(before, "the test")


@pytest.fixture(autouse=True)
def handlers_as_before() -> Iterator[None]:
    """No test, and nothing that it called, leaves another signal's handler: what comes later would be a riddle."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    after = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


@pytest.fixture(autouse=True, scope="module")
def nothing_left_behind_by_module() -> Iterator[None]:
    """The same for what tests of a module share; an engine that they share may start threads at any time."""
    # Thousands of tests, and all that was imported: not to be looked through by each collection of garbage.
    gc.collect()
    gc.freeze()
    before = take_inventory(daemons=True)
    yield
    _fail_if_leaked(before, "the module", daemons=True)


def _fail_if_leaked(before: Inventory, who: str, *, daemons: bool = False) -> None:
    if not (leaked := _leaked_since(before, daemons=daemons)):
        return
    text = str(leaked)
    for pid in leaked.processes:  # all are descendants of ours: the next test starts clean
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    pytest.fail(f"{who} left behind:\n{text}", pytrace=False)


def _leaked_since(before: Inventory, *, daemons: bool) -> Inventory:
    deadline = time.monotonic() + GRACE_SECONDS
    leaked = take_inventory(daemons=daemons).new_since(before)
    if leaked:
        # The standard library keeps its server of forks for ever: not ours, but it must not hide others.
        multiprocessing.forkserver._forkserver._stop()
    while leaked and time.monotonic() < deadline:
        gc.collect()
        for pid in orphan_zombies():
            os.waitpid(pid, 0)
        leaked = take_inventory(daemons=daemons).new_since(before)
        if leaked:
            time.sleep(0.01)
    return leaked
