"""In a notebook: cells in a real kernel, what they print and show, and what their workers print."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.helpers import run_script

CELLS = {
    "start": """
        import ctypes, os, signal, sys, tempfile, threading, time
        import numpy as np
        import shmengine as shm
        from shmengine.engine import bars
        engine = shm.Engine(2, memory="64 MiB")
        directory = tempfile.mkdtemp()
        def wait_for(name):
            while not os.path.exists(os.path.join(directory, name)):
                time.sleep(0.005)
        def make(name):
            open(os.path.join(directory, name), "w").close()
    """,
    "classes": """
        class Point:
            def __init__(self, x): self.x = x
        def shift(p):
            return Point(p.x + 1)
        [p.x for p in engine.map(shift, [Point(1), Point(2)])]
    """,
    "defined again": """
        def shift(p): return Point(p.x + 10)
        [p.x for p in engine.map(shift, [Point(1)])]
    """,
    "blocks": "engine.map_blocks(lambda b: b * 2, np.ones(3)).tolist()",
    # --- what workers print
    "print": "_ = engine.submit(lambda: print('from a worker')).result()",
    "print to stderr": "_ = engine.submit(lambda: print('an error', file=sys.stderr)).result()",
    "no newline": "_ = engine.submit(lambda: print('half a line', end='')).result()",
    "from C": """
        def from_c():
            libc = ctypes.CDLL(None)
            libc.puts(b"a line of C's")
            libc.printf(b"half a line")
        engine.submit(from_c).result()
    """,
    "from a child": "engine.submit(os.system, 'echo from a child').result()",
    "many lines": """
        def talk(i):
            for part in range(20):
                print(os.getpid(), i, part)
        for _ in engine.map(talk, range(50)):
            pass
    """,
    "in blocks": """
        def talk_of(block):
            print("block of", len(block))
            return block
        _ = engine.map_blocks(talk_of, np.ones(1000), block_bytes=800)
    """,
    "from threads": """
        with shm.Engine(2, backend="thread") as threads:
            pass
        threads = shm.Engine(2, backend="thread")
    """,
    "from threads, later": """
        list(threads.map(print, ["from a thread"]))
        threads.close()
    """,
    "before a death": """
        def die():
            print("last words", end="")
            sys.stdout.flush()
            os._exit(3)
        try:
            engine.submit(die).result()
        except shm.WorkerDied:
            print("|died")
    """,
    "begun here": """
        def slow():
            wait_for("go")
            print("printed later")
        future = engine.submit(slow)
        print("submitted")
    """,
    "ended here": """
        make("go")
        future.result()
        print("result")
    """,
    "callback": """
        future = engine.submit(wait_for, "call")
        future.add_done_callback(lambda _: print("called back"))
    """,
    "called back here": """
        called = threading.Event()
        future.add_done_callback(lambda _: called.set())
        make("call")
        called.wait()
    """,
    # --- progress
    "bar without tqdm": """
        sys.modules["tqdm"] = None
        list(engine.map(abs, range(3), progress=True))
    """,
    "bar of an unknown total": "list(engine.map(abs, iter([1, 2]), progress=True))",
    "bar of nothing": "list(engine.map(abs, [], progress=True))",
    "bar with a name to be escaped": "list(engine.map(lambda x: x, range(3), progress=True))",
    "bar after an error": "list(engine.map(lambda x: 1 // x, [1, 0, 1], progress=True))",
    "bars in bars": """
        for i in engine.map(abs, range(2), progress=True):
            list(engine.map(float, range(3), progress=True))
    """,
    "bars in threads": """
        def run():
            return list(engine.map(abs, range(50), progress=True))
        found = [threading.Thread(target=run) for _ in range(2)]
        for thread in found: thread.start()
        for thread in found: thread.join()
    """,
    "bar after Ctrl-C": """
        def interrupt():
            main = threading.main_thread().ident
            while not counted or "shmengine" not in sys._current_frames()[main].f_code.co_filename:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
        def run(i):
            if i == 2:
                wait_for("never")
            return i
        with shm.Engine(1, memory="32 MiB") as alone:
            counted = []
            threading.Thread(target=interrupt).start()
            try:
                for i in alone.map(run, range(10), progress=True):
                    if i == 1: counted.append(i)  # there is no other result
            except KeyboardInterrupt:
                alone.close(wait=False)
                print("interrupted")
    """,
    "bar of tqdm without widgets": """
        import warnings
        del sys.modules["tqdm"]
        sys.modules["ipywidgets"] = None
        warnings.simplefilter("error")
        list(engine.map(abs, range(3), progress=True))
    """,
    "bar of tqdm": """
        for name in [name for name in sys.modules if name.partition(".")[0] in ("tqdm", "ipywidgets")]:
            del sys.modules[name]
        list(engine.map(abs, range(3), progress=True))
    """,
    "bar of tqdm after an error": "list(engine.map(lambda x: 1 // x, [1, 0, 1], progress=True))",
    "no thread of tqdm": "[kind for kind in map(type, threading.enumerate()) if 'Monitor' in kind.__name__]",
    "tqdm of the caller": """
        from tqdm import tqdm
        with tqdm(total=3, file=sys.stdout) as mine:
            list(engine.map(abs, range(3), progress=mine))
        mine.n
    """,
    # --- what objects show
    "engine": "engine",
    "stats": "engine.stats()",
    "ring": "ring = shm.Ring(4, '8 MiB'); ring",
    "closed ring": "ring.close(); ring",
    "end": """
        left, right = shm.channel("pipe")
        left.send(1), right.receive()
        left
    """,
    "closed engine": """
        left.close(), right.close()
        engine.close()
        engine
    """,
}

SCRIPT = """
import json, sys, textwrap
import nbclient, nbformat
cells = json.load(sys.stdin)
notebook = nbformat.v4.new_notebook(
    cells=[nbformat.v4.new_code_cell(textwrap.dedent(source)) for source in cells.values()]
)
client = nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3", allow_errors=True)
client.execute()
found = {name: cell.outputs for name, cell in zip(cells, notebook.cells)}
widgets = notebook.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {})
print(json.dumps([found, widgets.get("state", {})]))
"""


@pytest.fixture(scope="module")
def notebook():
    """What each cell has put out, and the state of all widgets."""
    result = run_script(
        SCRIPT,
        input=json.dumps(CELLS),
        check=True,
        timeout=110,
        env={"IPYTHONDIR": None, "PYTHONUNBUFFERED": None},
    )
    return json.loads(result.stdout)


@pytest.fixture
def outputs(notebook):
    return notebook[0]


def printed(outputs, stream="stdout"):
    return "".join(output["text"] for output in outputs if output.get("name") == stream)


def value(outputs):
    """What the last expression of a cell shows as text."""
    (found,) = [output for output in outputs if output["output_type"] == "execute_result"]
    return found["data"]["text/plain"]


def shown(outputs, kind="text/plain"):
    """What bars and the like show, in order."""
    return [output["data"][kind] for output in outputs if output["output_type"] == "display_data"]


def error(outputs):
    return [output["ename"] for output in outputs if output["output_type"] == "error"]


def test_cells_fail_only_where_they_should(outputs):
    failed = {name: error(found) for name, found in outputs.items() if error(found)}
    assert failed == {
        "bar after an error": ["ZeroDivisionError"],
        "bar of tqdm after an error": ["ZeroDivisionError"],
    }


def test_functions_and_classes_of_cells(outputs):
    assert value(outputs["classes"]) == "[2, 3]"
    assert value(outputs["defined again"]) == "[11]"
    assert value(outputs["blocks"]) == "[2.0, 2.0, 2.0]"


# --- what workers print -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("print", "from a worker\n"),
        ("no newline", "half a line"),
        ("from C", "a line of C's\nhalf a line"),
        ("from a child", "from a child\n"),
        ("in blocks", "block of 100\n" * 10),
        ("from threads, later", "from a thread\n"),
        ("before a death", "last words" * 2 + "|died\n"),  # it is tried again
        ("begun here", "submitted\n"),
        ("ended here", "printed later\nresult\n"),
        ("callback", ""),
        ("called back here", "called back\n"),
    ],
)
def test_what_workers_print_comes_out_in_the_cell_that_runs(outputs, cell, text):
    assert printed(outputs[cell]) == text
    assert printed(outputs[cell], "stderr") == ""


def test_standard_error_too(outputs):
    assert printed(outputs["print to stderr"], "stderr") == "an error\n"


def test_lines_of_a_worker_are_in_order(outputs):
    lines = [tuple(map(int, line.split())) for line in printed(outputs["many lines"]).splitlines()]
    assert sorted((i, part) for _, i, part in lines) == [(i, part) for i in range(50) for part in range(20)]
    for pid in {pid for pid, _, _ in lines}:
        tasks = [i for found, i, _ in lines if found == pid]
        parts = [part for found, _, part in lines if found == pid]
        assert parts == list(range(20)) * (len(parts) // 20)
        assert len({*tasks}) == sum(a != b for a, b in zip(tasks, [None, *tasks], strict=False))


# --- progress -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "texts"),
    [
        ("bar without tqdm", [r"map\(abs\): 3/3 \(100 %\), [\d.]+ s"]),
        ("bar of an unknown total", [r"map\(abs\): 2, [\d.]+ s"]),
        ("bar of nothing", [r"map\(abs\): 0/0 \(0 %\), [\d.]+ s"]),
        ("bar with a name to be escaped", [r"map\(<lambda>\): 3/3 \(100 %\), [\d.]+ s"]),
        ("bar after an error", [r"map\(<lambda>\): [23]/3 \(\d+ %\), [\d.]+ s(, stopped)?"]),
        ("bars in bars", [r"map\(abs\): 2/2 .*", r"map\(float\): 3/3 .*", r"map\(float\): 3/3 .*"]),
        ("bars in threads", [r"map\(abs\): 50/50 .*"] * 2),
        ("bar after Ctrl-C", [r"map\(run\): 2/10 \(20 %\), [\d.]+ s, stopped"]),
    ],
)
def test_a_bar_of_our_own(outputs, cell, texts):
    found = shown(outputs[cell])
    assert len(found) == len(texts)
    for text, pattern in zip(found, texts, strict=True):
        assert re.fullmatch(pattern, text)


def test_a_bar_of_our_own_is_html(outputs):
    (html,) = shown(outputs["bar with a name to be escaped"], "text/html")
    assert "<progress value='3' max='3'></progress>" in html
    assert "map(&lt;lambda&gt;)" in html
    assert "color" not in html
    (html,) = shown(outputs["bar of an unknown total"], "text/html")
    assert "<progress value='1' max='1'></progress>" in html


def test_ctrl_c_ends_the_call(outputs):
    assert printed(outputs["bar after Ctrl-C"]) == "interrupted\n"


def test_tqdm_without_widgets(outputs):
    assert "3/3" in printed(outputs["bar of tqdm without widgets"])
    assert printed(outputs["bar of tqdm without widgets"], "stderr") == ""


def bar_of(outputs, widgets):
    """The final state of the bar in a widget of tqdm."""
    (view,) = shown(outputs, "application/vnd.jupyter.widget-view+json")
    children = widgets[view["model_id"]]["state"]["children"]
    states = [widgets[child.removeprefix("IPY_MODEL_")]["state"] for child in children]
    return next(state for state in states if "max" in state), " ".join(
        str(state["value"]) for state in states
    )


def test_the_widget_of_tqdm(notebook):
    outputs, widgets = notebook
    bar, text = bar_of(outputs["bar of tqdm"], widgets)
    assert (bar["value"], bar["max"], bar["bar_style"]) == (3, 3, "success")
    assert "map(abs)" in text
    assert "3/3" in text
    bar, text = bar_of(outputs["bar of tqdm after an error"], widgets)
    assert bar["bar_style"] == "danger" or bar["value"] == 3
    assert value(outputs["no thread of tqdm"]) == "[]"


def test_a_bar_of_the_callers(outputs):
    assert value(outputs["tqdm of the caller"]) == "3"
    assert "3/3" in printed(outputs["tqdm of the caller"])


# --- what objects show --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "caption", "row"),
    [
        ("engine", "Engine backend=&#x27;process&#x27; workers=2", "tasks done"),
        ("stats", "EngineStats", "tasks done"),
        ("ring", "shmengine.Ring capacity=4 arena=8 MiB", "leases held"),
        ("closed ring", "shmengine.Ring closed", None),
        ("end", "shmengine channel end: pipe", "messages sent"),
        ("closed engine", "Engine backend=&#x27;process&#x27; workers=2 closed", "tasks done"),
    ],
)
def test_tables(outputs, cell, caption, row):
    (found,) = [output["data"] for output in outputs[cell] if output["output_type"] == "execute_result"]
    html = found["text/html"]
    assert f">{caption}</caption>" in html
    assert (f">{row}</th>" in html) if row else ("<tr>" not in html)
    assert len(html) < 5000
    assert not re.search(r"<script|https?:|#[0-9a-f]{3,6};|background", html)
    assert found["text/plain"]  # for those who show no HTML


def test_nothing_of_notebooks_is_imported():
    source = "import shmengine as shm, sys\nengine = shm.Engine(backend='serial')\n"
    source += "list(engine.map(abs, [1], progress=lambda *_: None)), engine._repr_html_()\n"
    source += "print([n for n in ('IPython', 'tqdm', 'ipywidgets', 'rich') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
