"""Progress: it counts what has completed, says when it will be done, and is closed however the call ends."""

from __future__ import annotations

import functools
import io
import os
import re
import signal
import sys
import time

import numpy as np
import pytest
from rich.progress import Progress

from shmengine.engine import Engine
from shmengine.engine.bars import on_terminal
from shmengine.engine.progress import Count, _Lines, duration
from tests.helpers.scripts import run_in_pty, run_script


class Bar:
    """Anything with update(n)."""

    made: list[Bar] = []

    def __init__(self, total=None):
        self.total, self.done, self.closed, self.words = total, 0, 0, []
        self.made.append(self)

    def update(self, n):
        assert n > 0
        self.words.append(n)
        self.done += n

    def close(self):
        self.closed += 1


@pytest.fixture(autouse=True)
def forget_bars():
    Bar.made.clear()


def one_fails(i):
    if i == 3:
        raise ValueError(i)
    return i


# --- what is counted ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["map", "map_unordered"])
def test_each_completion_is_told_once(engine, method):
    told = []
    results = getattr(engine, method)(abs, range(300), progress=lambda *word: told.append(word))
    assert told == []  # nothing runs yet
    assert sorted(results) == list(range(300))
    assert told == [(i, 300) for i in range(1, 301)]


def test_a_total_that_nobody_knows(engine):
    told = []
    list(engine.map(max, iter([1, 2]), range(5), progress=lambda *word: told.append(word)))
    assert told == [(1, 5), (2, 5)]  # at most so many
    list(engine.map(abs, iter([1, 2]), progress=lambda *word: told.append(word)))
    assert told[2:] == [(1, None), (2, None)]


def test_blocks(engine):
    x = np.arange(1000.0)
    for call in (
        lambda bar: engine.map_blocks(np.sqrt, x, block_bytes=800, progress=bar),
        lambda bar: engine.map_overlap(np.sqrt, x, 1, block_bytes=800, progress=bar),
        lambda bar: engine.reduce(np.sum, x, combine=max, block_bytes=800, progress=bar),
    ):
        call(Bar)
        bar = Bar.made[-1]
        assert bar.done == bar.total > 5
        assert bar.closed == 1


@pytest.mark.parametrize("on_error", ["skip", "return"])
def test_tasks_that_fail_count(engine, on_error):
    list(engine.map(one_fails, range(10), on_error=on_error, progress=(bar := Bar())))
    assert (bar.done, bar.closed) == (10, 0)


def test_tasks_that_are_tried_again_count_once(tmp_path):
    def die_once(i):
        if i == 3 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return i

    with Engine(2, memory="64 MiB") as engine:
        assert list(engine.map(die_once, range(20), progress=(bar := Bar()))) == list(range(20))
        assert engine.stats().retries >= 1
    assert bar.done == 20


@pytest.mark.parametrize("backend", ["thread", "process"])
def test_what_waits_for_its_turn_has_completed(tmp_path, backend):
    """The first task ends when all others have been told of: what counts is not what the caller has got."""

    def run(i):
        while i == 0 and not (tmp_path / "go").exists():
            time.sleep(0.005)
        return i

    def told(done, total):
        if done == total - 1:
            (tmp_path / "go").touch()

    with Engine(2, backend=backend, memory="64 MiB") as engine:
        assert list(engine.map(run, range(20), window=20, progress=told)) == list(range(20))
        (tmp_path / "go").unlink()
        blocks = engine.map(run, range(20), window=20, on_error="skip", progress=told)
        assert next(blocks) == 0


# --- how it ends --------------------------------------------------------------------------------


def test_after_an_error(engine):
    with pytest.raises(ValueError, match="3"):
        list(engine.map(one_fails, range(10), progress=Bar))
    (bar,) = Bar.made
    assert 4 <= bar.done <= 10
    assert bar.closed == 1


def test_after_ctrl_c():
    def interrupt(i):
        if i == 2:
            raise KeyboardInterrupt
        return i

    with Engine(backend="serial") as engine, pytest.raises(KeyboardInterrupt):
        list(engine.map(interrupt, range(10), progress=Bar))
    (bar,) = Bar.made
    assert (bar.done, bar.closed) == (2, 1)


def test_after_leaving_the_loop(engine):
    for i in engine.map(abs, range(100), progress=Bar):
        if i == 3:
            break
    (bar,) = Bar.made
    assert bar.done >= 4
    assert bar.closed == 1


def test_of_what_was_never_begun(engine):
    engine.map(abs, range(100), progress=Bar).close()
    assert Bar.made == []


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_of_the_bar_is_the_callers(engine, error):
    class Bad(Bar):
        def update(self, n):
            super().update(n)
            if self.done >= 3:
                raise error

    with pytest.raises(error):
        list(engine.map(abs, range(1000), progress=Bad))
    (bar,) = Bar.made
    assert (bar.done < 1000, bar.closed) == (True, 1)
    with pytest.raises(error):
        engine.map_blocks(np.sqrt, np.ones(1000), block_bytes=800, progress=Bad)
    assert list(engine.map(abs, range(3))) == [0, 1, 2]


def test_a_bar_that_cannot_be_made(engine):
    class Bad(Bar):
        def __init__(self, total):
            raise RuntimeError("no bar")

    with pytest.raises(RuntimeError, match="no bar"):
        next(engine.map(abs, range(3), progress=Bad))
    assert list(engine.map(abs, range(3))) == [0, 1, 2]


# --- what it may be -----------------------------------------------------------------------------


def test_a_partial_of_a_class(engine):
    class Named(Bar):
        def __init__(self, name, total):
            super().__init__(total)
            self.name = name

    list(engine.map(abs, range(3), progress=functools.partial(Named, "mine")))
    (bar,) = Bar.made
    assert (bar.name, bar.total, bar.done, bar.closed) == ("mine", 3, 3, 1)


@pytest.mark.parametrize("bad", [3, "bar", {}, {1}, object(), Progress, np.ones(3)])
def test_what_it_cannot_be(bad):
    with Engine(backend="serial") as engine:
        for call in (
            lambda: engine.map(abs, [1], progress=bad),
            lambda: engine.reduce(np.sum, np.ones(3), combine=max, progress=bad),
        ):
            with pytest.raises(TypeError, match=r"progress must be"):
                call()


# --- lines --------------------------------------------------------------------------------------


def test_text():
    count = Count("map(f)", 200)
    count.started -= 100
    count.done = 50
    assert re.fullmatch(r"map\(f\): 50/200 \(25 %\), 1 min 40 s, about 5 min 0 s left", str(count))
    count.ended = True
    assert str(count) == "map(f): 50/200 (25 %), 1 min 40 s, stopped"
    count.done = 200
    assert str(count) == "map(f): 200/200 (100 %), 1 min 40 s"
    count.total = None
    assert str(count) == "map(f): 200, 1 min 40 s"
    assert [duration(s) for s in (0, 59.94, 60, 3599, 3661)] == [
        "0.0 s",
        "59.9 s",
        "1 min 0 s",
        "59 min 59 s",
        "1 h 1 min",
    ]


def test_lines_become_rare(capsys):
    lines = _Lines("map(f)", 10**6)
    for _ in range(36_000):
        lines._count.started -= 1
        lines.advance(1)
    lines.close()
    assert 20 < len(capsys.readouterr().err.splitlines()) < 120


def test_no_control_codes_in_a_pipe():
    source = """
        import shmengine as shm
        with shm.Engine(backend="serial") as engine:
            list(engine.map(abs, range(5), progress=True))
    """
    result = run_script(source, check=True, env={"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "TERM": "xterm"})
    assert re.fullmatch(r"map\(abs\): 5/5 \(100 %\), [\d.]+ s\n", result.stderr)


def test_nobody_to_show_it_to(monkeypatch):
    with Engine(backend="serial") as engine:
        monkeypatch.setattr(sys, "stderr", None)
        assert list(engine.map(abs, range(5), progress=True)) == [0, 1, 2, 3, 4]
        closed = io.StringIO()
        closed.close()
        monkeypatch.setattr(sys, "stderr", closed)
        assert list(engine.map(abs, range(5), progress=True)) == [0, 1, 2, 3, 4]
        assert not on_terminal(closed)


# --- terminals ----------------------------------------------------------------------------------

PROGRAM = """
    import sys, threading, time
    import shmengine as shm
    def slow(i):
        time.sleep(0.02)
        return i
    engine = shm.Engine(2, backend="thread")
"""


def in_terminal(source, **options):
    result = run_in_pty(PROGRAM + source, **options)
    assert result.returncode == 0, result.output
    return result.output


def plain(output):
    return re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", output)


def test_a_terminal():
    output = in_terminal("""
    for i in engine.map(slow, range(40), progress=True):
        if i == 20: print("printed meanwhile")
    print({type(stream).__name__ for stream in (sys.stdout, sys.stderr)})
    print([thread.name for thread in threading.enumerate() if "worker" not in thread.name])
    """)
    assert "map(slow)" in output
    assert "40/40" in output
    assert re.search(r"\d+/40 \d:\d\d:\d\d 0:00:0\d", plain(output))  # elapsed, and left
    assert "printed meanwhile" in plain(output).splitlines()
    assert "{'TextIOWrapper'}\n['MainThread']" in output
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l") >= 0  # the cursor is back


def test_a_terminal_after_an_error():
    output = in_terminal("""
    try:
        list(engine.map(lambda i: 1 // (10 - slow(i)), range(40), progress=True))
    except ZeroDivisionError:
        print("failed", type(sys.stdout).__name__)
    """)
    assert "failed TextIOWrapper" in output
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l")


def test_a_terminal_after_ctrl_c():
    output = in_terminal(
        """
    try:
        for i in engine.map(slow, range(10_000), progress=True):
            if i == 10: print("running")
    except KeyboardInterrupt:
        print("interrupted", type(sys.stdout).__name__)
    """,
        answers=[("running", "\x03")],
    )
    assert "interrupted TextIOWrapper" in output
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l")


def test_bars_in_bars_and_beside_bars():
    output = in_terminal("""
    for i in engine.map(slow, range(2), progress=True):
        list(engine.map(abs, range(3), progress=True))
    found = [threading.Thread(target=lambda: list(engine.map(slow, range(30), progress=True))) for _ in range(3)]
    for thread in found: thread.start()
    for thread in found: thread.join()
    print("end")
    """)
    lines = plain(output).replace("\r", "\n").splitlines()
    assert sum("map(abs)" in line and "3/3" in line for line in lines) >= 2
    assert sum("map(slow)" in line and "30/30" in line for line in lines) >= 3
    assert lines[-1] == "end"


def test_output_that_goes_to_a_file_goes_there(tmp_path):
    output = in_terminal(f"""
    sys.stdout = open({str(tmp_path / "out")!r}, "w")
    for i in engine.map(slow, range(20), progress=True):
        print(i)
    sys.stdout.close()
    """)
    assert "20/20" in output
    assert (tmp_path / "out").read_text().split() == [str(i) for i in range(20)]


def test_a_dumb_terminal():
    output = in_terminal("""
    import os
    os.environ["TERM"] = "dumb"
    list(engine.map(slow, range(20), progress=True))
    """)
    assert "\x1b" not in output
    assert "map(slow): 20/20 (100 %)" in output
