"""The command line of ``shmengine bench``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, Final, TextIO

from shmengine.bench.plan import FULL, MODES, QUICK, Plan, parse_size

__all__ = ["add_arguments", "run"]

INTERRUPTED: Final = "interrupted"  # of the environment, if it was
INTERRUPTED_STATUS: Final = 130  # what shells say of Ctrl-C

EPILOG: Final = (
    "Targets are mechanism (the channels shm, pipe, mqueue and socket), ours (Ring, Queue), rival (whatever is"
    " installed of multiprocessing, faster-fifo, kickmsg, iceoryx2 and pyzmq), or single names of the table."
    " docs/benchmark.md tells how to read it."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--quick", action="store_true", help="five sizes, three repeats, in half a minute")
    add("--engine", action="store_true", help="measure the engine: arrays in blocks, tasks, the start")
    add(
        "--suite",
        nargs="?",
        const="",
        metavar="EXPRESSION",
        help="run the benches of the source tree, each with what it should reach (or those that pytest -k selects)",
    )
    add("--targets", type=_list, metavar="NAME,...", help="what to measure (default: all)")
    add("--sizes", type=_sizes, metavar="SIZE,...", help="of messages, such as 64,4KiB,16MiB")
    add("--modes", type=_modes, metavar="MODE,...", help="copy (an array is sent), block (filled in place)")
    add(
        "--repeats",
        type=_positive(int),
        metavar="N",
        help=f"interleaved rounds of each (default {FULL.repeats})",
    )
    add(
        "--seconds",
        type=_positive(float),
        metavar="S",
        help=f"for all of it (default {FULL.total_seconds:g})",
    )
    add("--no-pin", action="store_true", help="let the kernel choose the cores")
    add("--load", metavar="FILE", help="measure nothing: show results that --json has written")
    add(
        "--json", nargs="?", const="-", metavar="FILE", help="everything, for programs (- or nothing: stdout)"
    )
    add("--csv", nargs="?", const="-", metavar="FILE", help="the rows, for spreadsheets")
    add("--markdown", nargs="?", const="-", metavar="FILE", help="the tables, for documents")
    add(
        "--plot",
        metavar="FILE",
        type=_plot_file,
        help="throughput and round trip, as .png or .svg (needs matplotlib)",
    )
    add("--html", metavar="FILE", help="one page with all of it (with a plot if there is matplotlib)")


def run(options: argparse.Namespace) -> int:
    """Measure, or load, and show; return the exit status."""
    from shmengine.bench.results import Report

    # Before all that time.
    if options.plot and (trouble := _no_matplotlib()):
        return _fail(trouble)
    if trouble := _senseless(options) or _unwritable(options):
        return _fail(trouble)
    measure = _run_suite if options.suite is not None else _measure_engine if options.engine else _measure
    try:
        report = _load(options.load, Report) if options.load else measure(options)
    except (OSError, ValueError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED_STATUS)
    trouble = None
    to_stdout = False
    try:
        to_stdout = _write(options, report)
    except (OSError, ValueError) as error:  # not at the price of all that time
        trouble = str(error)
    if not to_stdout:
        _show(report)
    if trouble is None and options.suite is not None and report.missing:
        return _fail(
            "some benches failed, and are not in the results, or not wholly; what pytest says is above", 1
        )
    if trouble is None and INTERRUPTED in report.environment and not options.load:
        return _fail("interrupted: what was done by then is above", INTERRUPTED_STATUS)
    return 0 if trouble is None else _fail(trouble)


def _fail(text: str, status: int = 2) -> int:
    print(f"shmengine bench: {text}", file=sys.stderr)
    return status


def _plan(options: argparse.Namespace) -> Plan:
    plan = QUICK if options.quick else FULL
    chosen: dict[str, Any] = {
        "sizes": options.sizes,
        "modes": options.modes,
        "repeats": options.repeats,
        "total_seconds": options.seconds,
    }
    plan = replace(plan, **{name: value for name, value in chosen.items() if value is not None})
    return replace(plan, pinned=not options.no_pin)


def _measure(options: argparse.Namespace) -> Any:
    from shmengine.bench import environment, registry
    from shmengine.bench.measure import Interrupted, measure
    from shmengine.bench.recommend import recommend
    from shmengine.bench.results import Report

    plan = _plan(options)
    targets = registry.TARGETS if options.targets is None else registry.choose(options.targets)
    missing = {each.name: why for each in targets if (why := registry.missing(each)) is not None}
    load = environment.load_per_core()
    stamp = environment.stamp(pinned=plan.pinned)
    with _progress() as progress:
        try:
            rows = measure(plan, [each for each in targets if each.name not in missing], progress)
        except Interrupted as interrupted:
            rows = interrupted.rows
            stamp[INTERRUPTED] = f"after {interrupted.sizes} of {len(plan.sizes)} sizes"
    rounds = sorted({row.rounds for row in rows if row.error is None})
    stamp["rounds"] = " to ".join(map(str, dict.fromkeys(rounds[:1] + rounds[-1:]))) or "none"
    return Report(stamp, asdict(plan), missing, rows, recommend(rows, load))


def _measure_engine(options: argparse.Namespace) -> Any:
    from shmengine import config
    from shmengine.bench import environment
    from shmengine.bench.results import Report
    from shmengine.bench.work import FULL_WORK, QUICK_WORK, fitting, measure_work

    plan = fitting(QUICK_WORK if options.quick else FULL_WORK, config.memory_available())
    if options.repeats is not None:
        plan = replace(plan, repeats=options.repeats)
    stamp = environment.stamp(pinned=False)
    with _progress() as progress:
        work = measure_work(plan, progress)
    stamp["rounds"] = str(plan.repeats)
    return Report(stamp, asdict(plan), {}, [], [], work)


def _run_suite(options: argparse.Namespace) -> Any:
    """Let pytest run the benches, with its output on stderr."""
    import subprocess
    import tempfile
    from pathlib import Path

    from shmengine.bench.results import Report

    root = Path(__file__).resolve().parents[2]
    if not (root / "benches" / "conftest.py").exists():
        raise ValueError(f"--suite needs the source tree with its benches, and {root} is none")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "promises.json")
        command = [sys.executable, "-m", "pytest", "benches", "-q", "-p", "no:xdist"]
        command += ["-k", options.suite, "--save-promises", str(path)]
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        status = subprocess.run(command, cwd=root, env=env, stdout=2, check=False).returncode
        report = Report.from_json(path.read_text()) if path.exists() else None
        if report is None or (status and not report.promises):
            raise ValueError(f"pytest ended with status {status}; what it says is above")
        if status:  # not at the price of all the others
            report.missing["some benches"] = f"pytest ended with status {status}"
        return report


def _unwritable(options: argparse.Namespace) -> str | None:
    """Say which file cannot be written."""
    for path in (options.json, options.csv, options.markdown, options.plot, options.html):
        if path is None or path == "-":
            continue
        place = path if os.path.exists(path) else os.path.dirname(path) or "."
        if os.path.isdir(path) or not os.access(place, os.W_OK):
            why = "it is a directory" if os.path.isdir(path) else f"no access to {place!r}"
            return f"{path} cannot be written: {why}"
    return None


def _senseless(options: argparse.Namespace) -> str | None:
    """Say what makes no sense with ``--engine`` or ``--suite``."""
    ways = ("targets", "sizes", "modes", "seconds", "plot")
    for name, wanted, others in (
        ("engine", options.engine, ways),
        ("suite", options.suite is not None, (*ways, "repeats")),
    ):
        given = [f"--{other}" for other in others if getattr(options, other) is not None]
        if wanted and given:
            return f"--{name} takes no {given[0]}: that is for ways from one process to another"
    if options.suite is not None and (options.engine or options.quick):
        return f"--suite takes no --{'engine' if options.engine else 'quick'}: it measures what it measures"
    return None


def _load(path: str, kind: Any) -> Any:
    with open(path) as file:
        return kind.from_json(file.read())


def _write(options: argparse.Namespace, report: Any) -> bool:
    """Write the files that were asked for; tell whether one of them was stdout."""
    from shmengine.bench.table import markdown

    to_stdout = False
    texts: tuple[tuple[str | None, Callable[[], str]], ...] = (
        (options.json, report.to_json),
        (options.csv, report.to_csv),
        (options.markdown, lambda: markdown(report)),
        (options.html, lambda: _page(report)),
    )
    for path, make in texts:
        if path == "-":
            sys.stdout.write(make())
            to_stdout = True
        elif path is not None:
            text = make()
            with open(path, "w") as file:
                file.write(text)
    if options.plot:
        if not report.rows:
            raise ValueError("--plot shows ways from one process to another; this run measured none")
        from shmengine.bench.plot import save

        save(report, options.plot)
    return to_stdout


def _page(report: Any) -> str:
    from shmengine.bench.page import page

    return page(report, with_plot=bool(report.rows) and _no_matplotlib() is None)


def _no_matplotlib() -> str | None:
    if importlib.util.find_spec("matplotlib") is not None:
        return None
    return "--plot needs matplotlib: pip install 'shmengine[plot]'"


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    if _has_rich(sys.stderr):
        from shmengine.bench.screen import progress

        with progress() as update:
            yield update
    else:
        yield lambda *_: None


def _show(report: Any) -> None:
    if _has_rich(sys.stdout):
        from shmengine.bench.screen import show

        show(report)
    else:
        from shmengine.bench.table import plain

        print(plain(report), end="")


def _has_rich(stream: TextIO) -> bool:
    return stream.isatty() and importlib.util.find_spec("rich") is not None


# --- arguments ------------------------------------------------------------------------------------


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(sorted({parse_size(part) for part in _list(text)}))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not sizes:
        raise argparse.ArgumentTypeError("no size is given")
    return sizes


def _modes(text: str) -> tuple[str, ...]:
    wanted = _list(text)
    if not wanted or any(mode not in MODES for mode in wanted):
        raise argparse.ArgumentTypeError(f"modes are {' and '.join(MODES)}, not {text!r}")
    return tuple(mode for mode in MODES if mode in wanted)


def _positive(kind: type[Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be positive, not {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def _plot_file(path: str) -> str:
    if not path.endswith((".png", ".svg")):
        raise argparse.ArgumentTypeError(f"a plot is a .png or .svg file, not {path!r}")
    return path
