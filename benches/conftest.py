"""What all benches share: the machine's stamp, interleaved comparisons, the table of targets.

Targets are reported in a table at the end; they fail a bench under ``--check-targets`` (``make bench`` passes
it). Wrong answers always fail.
"""

from __future__ import annotations

import os

# Before NumPy is loaded here or in any child: what this machine's owner set for BLAS is no part of a comparison.
for _name in [name for name in os.environ if name.startswith("OPENBLAS_")]:
    del os.environ[_name]

import faulthandler
import gc
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from shmengine.bench.compare import Comparison, Contestant
from shmengine.bench.environment import stamp
from shmengine.bench.results import Promise, Report

HANG_SECONDS = 900


TARGETS = pytest.StashKey[list[Promise]]()
STAMP = pytest.StashKey[dict[str, str]]()  # of before the run


# --- options, stamp, final table ----------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--check-targets",
        action="store_true",
        help="a bench that misses its target fails (quiet machines only)",
    )

    parser.addoption(
        "--save-promises",
        metavar="FILE",
        help="write the table of targets with the environment as `shmengine bench --suite --json` does",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TARGETS] = []
    config.stash[STAMP] = stamp()


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--save-promises")
    if path:
        report = Report(session.config.stash[STAMP], {}, {}, [], [], promises=session.config.stash[TARGETS])
        Path(path).write_text(report.to_json())


def machine() -> dict[str, str]:
    """What a number depends on."""
    return {name: value for name, value in stamp().items() if name not in ("date", "pinned")}


def pytest_report_header(config: pytest.Config) -> str:
    found = machine()
    warning = "" if float(found["load"].split()[0]) < 0.5 else "  <- NOT QUIET: do not quote these numbers"
    return "machine: " + ", ".join(f"{name} {value}" for name, value in found.items()) + warning


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(machine())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    targets = config.stash[TARGETS]
    if not targets:
        return
    where = ", ".join(f"{name} {value}" for name, value in machine().items())
    words = {True: "met", False: "**missed**", None: ""}
    rows = [("bench", "what", "measured", "target", "")]
    rows += [(t.bench, t.what, t.value, t.bound, words[t.met]) for t in targets]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    terminalreporter.section("targets")
    terminalreporter.write_line(f"Measured on: {where}.\n")
    for number, row in enumerate(rows):
        cells = " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line(f"| {cells} |")
        if number == 0:
            terminalreporter.write_line("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    missed = sum(target.met is False for target in targets)
    terminalreporter.write_line(f"\n{sum(t.met is True for t in targets)} targets met, {missed} missed.")


# --- fixtures -----------------------------------------------------------------------------------


class Targets:
    """Notes what a bench has shown, beside what it should."""

    def __init__(self, item: pytest.Item) -> None:
        self._item = item
        self._bench = item.name.removeprefix("bench_").removeprefix("test_")

    def at_least(self, what: str, value: float, bound: float, unit: str = "x") -> None:
        self._note(what, f"{value:.3g}{unit}", f">= {bound:g}{unit}", value >= bound)

    def at_most(self, what: str, value: float, bound: float, unit: str = " s") -> None:
        self._note(what, f"{value:.3g}{unit}", f"<= {bound:g}{unit}", value <= bound)

    def note(self, what: str, value: str) -> None:
        """For information."""
        self._note(what, value, "", None)

    def _note(self, what: str, value: str, bound: str, met: bool | None) -> None:
        target = Promise(self._bench, what, value, bound, met)
        self._item.config.stash[TARGETS].append(target)
        self._item.user_properties.append((what, f"{value} {bound}"))


@pytest.fixture
def targets(request: pytest.FixtureRequest) -> Targets:
    """``targets.at_least("what", value, bound)``, ``at_most``, ``note``."""
    return Targets(request.node)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    targets = item.config.stash[TARGETS]
    before = len(targets)
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=sys.__stderr__)
    try:
        result = yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    missed = [t for t in targets[before:] if t.met is False]
    if missed and item.config.getoption("--check-targets"):
        pytest.fail(
            "missed: " + "; ".join(f"{t.what}: {t.value}, not {t.bound}" for t in missed), pytrace=False
        )
    return result


@pytest.fixture
def compare(
    benchmark: Any, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Comparison]:
    """``compare({"ours": fn, "rival": fn, ...}, repeats=9) -> Comparison``, once in a bench.

    One warm-up round, then `repeats` rounds of all contestants, interleaved. A contestant checks its own
    answer and returns how much it did. The table is printed, and stored in the benchmark's ``extra_info``.
    """

    def run(
        contestants: Mapping[str, Contestant], repeats: int = 9, *, unit: str = "each", bytes_each: int = 0
    ) -> Comparison:
        comparison = Comparison(unit)
        (first, ours), *rivals = contestants.items()

        def others() -> None:  # untimed by pytest-benchmark, timed by us, in the same round
            gc.collect()
            for name, rival in rivals:
                comparison.run(name, rival)

        for name, contestant in contestants.items():
            comparison.run(name, contestant)
        comparison.forget()
        benchmark.pedantic(lambda: comparison.run(first, ours), setup=others, rounds=repeats)
        # In the order of the table, ours first.
        comparison.seconds = {name: comparison.seconds[name] for name in contestants}
        benchmark.extra_info.update(comparison.summary())
        with capsys.disabled():
            print(f"\n{request.node.name}, median of {repeats} interleaved rounds:")
            print("\n".join("  " + line for line in comparison.lines(bytes_each)))
        return comparison

    return run


@pytest.fixture(autouse=True)
def quiet_collector() -> Iterator[None]:
    """What pytest has allocated is not walked again and again while something is measured."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def spawn() -> Any:
    """Children that inherit nothing but what they are given."""
    return multiprocessing.get_context("spawn")
