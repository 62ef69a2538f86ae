"""`shmengine bench` as a user runs it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from shmengine.bench import measure, registry
from shmengine.bench.plan import MIB
from shmengine.bench.results import Report
from shmengine.bench.work import WorkPlan, fitting
from shmengine.cli import main
from tests.helpers.leftovers import descendants
from tests.helpers.scripts import poll_until

TINY = ("--quick", "--sizes", "64,4KiB", "--repeats", "2", "--targets", "Ring,multiprocessing.Pipe")


def bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "shmengine", "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        start_new_session=True,  # what outlives it is then known to be its own
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One real run, as files."""
    directory = tmp_path_factory.mktemp("results")
    names = {kind: directory / f"run.{kind}" for kind in ("json", "csv", "html", "svg", "md")}
    done = bench(
        *TINY,
        *("--json", names["json"], "--csv", names["csv"], "--html", names["html"]),
        *("--plot", names["svg"], "--markdown", names["md"]),
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout, {kind: path.read_text() for kind, path in names.items()}, names["json"]


def test_a_run_prints_tables_and_writes_files(results):
    printed, texts, _ = results
    assert "Throughput, one way, MB/s" in printed
    assert "Ring, in place" in printed
    assert "Measured on: date 20" in printed
    report = Report.from_json(texts["json"])
    assert [(row.name, row.nbytes) for row in report.rows] == [
        (name, size) for size in (64, 4096) for name in ("Ring", "Ring, in place", "multiprocessing.Pipe")
    ]
    assert [row.error for row in report.rows] == [None] * 6
    assert {
        "processor",
        "cores",
        "kernel",
        "python",
        "numpy",
        "shmengine",
        "load",
        "governor",
        "/dev/shm",
    } <= set(report.environment)
    assert report.plan["repeats"] == 2
    assert report.environment["rounds"] in ("1", "1 to 2", "2")  # as many as there was time for
    assert texts["csv"].count("\n") == 7
    assert texts["html"].startswith("<!doctype html>")
    assert "<svg" in texts["svg"]
    assert "| Ring |" in texts["md"]


def test_a_run_can_be_shown_again(results, capsys):
    printed, texts, path = results
    assert main(["bench", "--load", str(path)]) == 0
    assert capsys.readouterr().out == printed
    assert main(["bench", "--load", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(texts["json"])


def test_on_a_terminal_it_is_shown_by_rich(results, monkeypatch, capsys):
    monkeypatch.setattr("shmengine.bench.command._has_rich", lambda _: True)
    path = results[-1]
    assert main(["bench", "--load", str(path)]) == 0
    shown = capsys.readouterr().out
    for name in ("Ring, in place", "Round trip, microseconds", "Measured on: date"):
        assert name in shown
    assert "━" in shown


def test_a_file_that_cannot_be_written_costs_no_results(results, tmp_path, capsys):
    path = tmp_path / "out.md"
    assert main(["bench", "--load", str(results[-1]), "--csv", "/dev/full", "--markdown", str(path)]) == 2
    said = capsys.readouterr()
    assert "Ring, in place" in said.out
    assert "No space left on device" in said.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--sizes", "3"), "a message has from 8 B to 1 GiB, not 3"),
        (("--sizes", ","), "no size is given"),
        (("--modes", "fast"), "modes are copy and block, not 'fast'"),
        (("--repeats", "0"), "must be positive, not 0"),
        (("--repeats", "x"), "invalid int value: 'x'"),
        (("--seconds", "inf"), "must be positive, not inf"),
        (("--plot", "out.jpg"), "a plot is a .png or .svg file, not 'out.jpg'"),
        (("--targets", "carrier-pigeon"), "there is no 'carrier-pigeon' to measure"),
        (("--engine", "--sizes", "64"), "--engine takes no --sizes"),
        (("--engine", "--plot", "out.png"), "--engine takes no --plot"),
        (("--suite", "--sizes", "64"), "--suite takes no --sizes"),
        (("--suite", "--repeats", "9"), "--suite takes no --repeats"),
        (("--suite", "--engine"), "--suite takes no --engine"),
        (("--suite", "import", "--quick"), "--suite takes no --quick"),
        (("--quick", "--csv", "/no/such/directory/out.csv"), "/no/such/directory/out.csv cannot be written"),
        (("--quick", "--html", "/dev"), "/dev cannot be written: it is a directory"),
        (("--load", "/no/such/file"), "No such file"),
        (("--load", "/dev/null"), "these are no results of `shmengine bench --json`"),
    ],
)
def test_what_cannot_be_is_refused(arguments, says, capsys):
    try:
        status = main(["bench", *arguments])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert says in capsys.readouterr().err


def test_what_the_engine_does_is_measured_shown_and_written(monkeypatch, tmp_path, capsys):
    # In a process of its own nothing could be made smaller.
    monkeypatch.setattr("shmengine.bench.work.QUICK_WORK", WorkPlan(nbytes=8 * MIB, repeats=2, tasks=400))
    path = tmp_path / "work.json"
    assert main(["bench", "--engine", "--quick", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    for line in ("map_blocks, 8 MiB, fresh; plain NumPy", "reduce, 8 MiB; serial blocks", "times as fast"):
        assert line in printed
    report = Report.from_json(path.read_text())
    assert {work.what.split(",")[0] for work in report.work} == {
        "map_blocks",
        "reduce",
        "map",
        "Executor",
        "submit",
        "Engine(2)",
    }
    assert all(work.rounds == 2 and work.ours > 0 and work.ratio.median > 0 for work in report.work)
    assert main(["bench", "--load", str(path), "--plot", str(tmp_path / "out.svg")]) == 2
    assert "this run measured none" in capsys.readouterr().err


def test_the_benches_of_the_source_tree_are_run(tmp_path, capfd):
    path = tmp_path / "promises.json"
    assert main(["bench", "--suite", "first_result", "--json", str(path)]) == 0
    assert "first_result: engine start over two bare" in capfd.readouterr().out
    report = Report.from_json(path.read_text())
    (promise,) = report.promises
    assert promise.bench == "first_result"
    assert promise.value.endswith("x")
    assert promise.met in (True, False)
    assert {"processor", "load", "date"} <= set(report.environment)


def test_a_bench_that_fails_does_not_cost_the_results_of_the_others(tmp_path, capfd, monkeypatch):
    run = subprocess.run

    def fail_in_the_end(*args, **kwargs):
        done = run(*args, **kwargs)
        done.returncode = 1
        return done

    monkeypatch.setattr(subprocess, "run", fail_in_the_end)
    path = tmp_path / "promises.json"
    assert main(["bench", "--suite", "first_result", "--json", str(path)]) == 1
    out, err = capfd.readouterr()
    assert "some benches: pytest ended with status 1" in out
    assert "some benches failed, and are not in the results, or not wholly" in err
    assert Report.from_json(path.read_text()).promises


def test_a_suite_that_runs_nothing_says_so(capfd):
    assert main(["bench", "--suite", "no_such_bench"]) == 2
    assert "shmengine bench: pytest ended with status 5" in capfd.readouterr().err


def test_the_array_of_a_run_fits_the_memory():
    plan = WorkPlan(nbytes=1 << 30, repeats=9, tasks=100)
    assert fitting(plan, 8 << 30) == plan
    assert fitting(plan, (8 << 30) - 1).nbytes == 1 << 29
    assert fitting(plan, 0).nbytes == MIB


def test_without_matplotlib_a_plot_is_refused_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "--plot", "out.png"]) == 2
    assert "pip install 'shmengine[plot]'" in capsys.readouterr().err


def test_other_verbs_and_the_package_load_nothing_of_it():
    code = """
        import sys, shmengine, shmengine.ring
        from shmengine.cli import main
        main(["clean"])
        loaded = [name for name in sys.modules if name.startswith(("shmengine.bench", "matplotlib", "zmq"))]
        assert not loaded, loaded
    """
    subprocess.run([sys.executable, "-c", "if True:" + code], check=True, timeout=100, stdout=subprocess.PIPE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_when_it_is_ended_nothing_is_left(number):
    # Background jobs of a shell ignore SIGINT, and so would we.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code += "; from shmengine.cli import main; sys.exit(main())"
    targets = ("--targets", "Ring,multiprocessing.Queue")
    command = [sys.executable, "-c", code, "bench", "--sizes", "64", "--seconds", "600", *targets]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        poll_until(lambda: len(descendants(process.pid)) >= 4, what="two pairs are at work")
        children = descendants(process.pid)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        poll_until(lambda: not any(map(alive, children)), what="its processes are gone")
    if number == signal.SIGINT:
        assert (process.returncode, error) == (130, "shmengine bench: interrupted\n")


def test_what_was_done_before_control_c_is_shown_and_written(monkeypatch, tmp_path, capsys):
    def interrupted(plan, targets, progress):
        rows = measured(replace(plan, sizes=plan.sizes[:1]), targets, progress)
        raise measure.Interrupted(rows, 1)

    measured = measure.measure
    monkeypatch.setattr(measure, "measure", interrupted)
    path = tmp_path / "results.json"
    options = [
        "--targets",
        "multiprocessing.Pipe",
        "--sizes",
        "64,1KiB,1MiB",
        "--repeats",
        "1",
        "--seconds",
        "0.1",
    ]
    assert main(["bench", *options, "--json", str(path)]) == 130
    out, error = capsys.readouterr()
    assert "multiprocessing.Pipe" in out
    assert "interrupted: what was done by then is above" in error
    report = Report.from_json(path.read_text())
    assert report.environment["interrupted"] == "after 1 of 3 sizes"
    assert main(["bench", "--load", str(path)]) == 0


def test_sizes_without_rows_are_no_interruption(monkeypatch, capsys):
    monkeypatch.setattr(registry, "missing", lambda _target: "it is not installed")
    assert main(["bench", "--targets", "multiprocessing.Pipe", "--sizes", "64,1KiB", "--quick"]) == 0
    assert "interrupted" not in "".join(capsys.readouterr())


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
