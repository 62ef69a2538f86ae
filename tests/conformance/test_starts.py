"""The ways in which people start programs and define functions: all just work, with processes too."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
import textwrap
import threading
import traceback

import numpy as np
import pytest

from shmengine.engine import Engine
from shmengine.errors import UseAfterFork
from tests.helpers import ROOT, run_script

SECONDS = 30  # a watchdog
FORKS = ("-W", "ignore:This process:DeprecationWarning")  # is multi-threaded, says Python 3.12


@pytest.fixture(scope="module")
def processes():
    with Engine(2, memory="64 MiB") as engine:
        yield engine


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


# --- programs -------------------------------------------------------------------------------------

PROGRAM = """
import dataclasses
import numpy as np
import shmengine as shm

print("main runs")  # once, not in each worker

SCALE = 3

@dataclasses.dataclass
class Point:
    x: float
    y: float = 0.0

    def doubled(self):
        return Point(self.x * 2, self.y * 2)

class Halver:
    def __call__(self, x):
        return x / 2

def scale(block):
    return block * SCALE

def shift(point, by):
    assert type(point).__name__ == "Point"
    return Point(point.x + by, point.y)

with shm.Engine(2, memory="64 MiB") as engine:
    assert engine.map_blocks(scale, np.ones(10)).tolist() == [3] * 10
    assert list(engine.map(lambda x: x + SCALE, range(3))) == [3, 4, 5]
    assert list(engine.map(shift, [Point(1), Point(2)], [10, 20])) == [Point(11), Point(22)]
    assert isinstance(engine.submit(shift, Point(1), by=2).result(), Point)
    assert engine.submit(Point(1, 2).doubled).result() == Point(2, 4)
    assert engine.submit(Point, 5).result() == Point(5)
    assert list(engine.map(Halver(), [1, 2])) == [0.5, 1]
    assert engine.put([Point(7)]).get() == [Point(7)]
    assert engine.submit(lambda ref: ref[0].x, engine.put([Point(7)])).result() == 7
    SCALE = 5  # a function sees the globals of the moment at which it is sent
    assert engine.map_blocks(scale, np.ones(10)).tolist() == [5] * 10
print("main ends")
"""


def test_a_script_without_a_guard():
    result = run_script(PROGRAM, check=True, timeout=SECONDS)
    assert (result.stdout, result.stderr) == ("main runs\nmain ends\n", "")


@pytest.mark.parametrize("how", ["command", "standard input", "interactive", "isolated"])
def test_programs_that_have_no_file(how):
    program = PROGRAM
    command = {
        "command": [sys.executable, "-c", PROGRAM],
        "standard input": [sys.executable, "-"],
        "interactive": [sys.executable, "-i", "-q"],
        "isolated": [
            *(sys.executable, "-I", "-c"),
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}",
        ],
    }[how]
    if how == "interactive":
        program = f"exec(compile({PROGRAM!r}, '<console>', 'exec'))\nexit()\n"
    result = subprocess.run(
        command,
        input=program,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=environment(),
        check=False,
        start_new_session=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "main runs\nmain ends\n"
    assert result.stderr.replace(">>> ", "").strip() == ""


def test_a_program_run_as_a_module(tmp_path):
    package = tmp_path / "project"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(f"from .parts import triple\n{PROGRAM}\nprint(triple(1))")
    (package / "parts.py").write_text("def triple(x): return 3 * x")
    result = subprocess.run(
        [sys.executable, "-m", "project"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=environment(),
        cwd=tmp_path,
        check=False,
        start_new_session=True,
    )
    assert (result.stdout, result.stderr) == ("main runs\nmain ends\n3\n", "")


def test_a_module_beside_the_script(tmp_path):
    """Workers find what the script finds, wherever either was started."""
    (tmp_path / "neighbour.py").write_text("class Neighbour:\n    def name(self):\n        return __file__")
    path = tmp_path / "script.py"
    path.write_text(
        textwrap.dedent("""
        import os, sys
        import neighbour, shmengine as shm
        with shm.Engine(2, memory="64 MiB") as engine:
            n = neighbour.Neighbour()
            assert engine.submit(n.name).result() == n.name()
            assert isinstance(engine.submit(neighbour.Neighbour).result(), neighbour.Neighbour)
            assert engine.submit(os.getcwd).result() == os.getcwd()
            assert engine.submit(lambda: sys.argv).result() == sys.argv
            assert engine.submit(lambda: sys.flags.optimize).result() == sys.flags.optimize == 1
            assert engine.submit(lambda: sys.warnoptions).result() == sys.warnoptions != []
        """)
    )
    run_script(path, check=True, timeout=SECONDS, cwd="/", args=["x", "y"], flags=["-O", "-W", "error"])


def test_files_in_the_working_directory_do_not_shadow_ours(tmp_path):
    """A user's ``numpy.py`` or ``cffi.py`` beside the data must not be imported by workers."""
    for name in ("numpy", "cffi", "cloudpickle", "shmengine"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong file')")
    script = tmp_path / "elsewhere" / "script.py"
    script.parent.mkdir()
    script.write_text(
        "import shmengine as shm\nwith shm.Engine(2, memory='64 MiB') as e: print(list(e.map(abs, [-1])))"
    )
    result = run_script(script, check=True, timeout=SECONDS, cwd=tmp_path)
    assert (result.stdout, result.stderr) == ("[1]\n", "")


def test_a_parent_with_threads_in_native_code():
    """Fork without exec would deadlock here: BLAS threads hold locks while the engine starts."""
    source = """
        import threading
        import numpy as np
        import shmengine as shm
        stop = threading.Event()
        def multiply():
            a = np.ones((300, 300))
            while not stop.is_set():
                a @ a
        threads = [threading.Thread(target=multiply) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(2):
            with shm.Engine(2, memory="64 MiB") as engine:
                result = engine.submit(lambda: float((np.ones((300, 300)) @ np.ones((300, 300)))[0, 0])).result()
                assert result == 300
        stop.set()
    """
    result = run_script(source, check=True, timeout=SECONDS)
    assert result.stderr == ""


# --- functions ------------------------------------------------------------------------------------


class Accumulator:
    """An object with state, of a class that workers may have to get by value."""

    rate = 2

    def __init__(self, offset=0):
        self.offset = offset
        self.seen = []

    def add(self, x):
        self.seen.append(x)
        return x + self.offset

    def __call__(self, x):
        return self.add(x) * self.rate

    @classmethod
    def of_class(cls, x):
        return x * cls.rate

    @staticmethod
    def of_nobody(x):
        return -x

    __hash__ = None

    def __eq__(self, other):
        return isinstance(other, Accumulator) and self.offset == other.offset


def power(x, exponent, *, scale=1):
    return scale * x**exponent


def make_counter(start):
    count = start

    def counter(x):
        nonlocal count
        count += 1
        return x + start

    return counter


class Slotted:
    __slots__ = ("__weakref__", "x")

    def __init__(self, x):
        self.x = x

    def plus(self, y):
        return self.x + y


def recursive(n):
    return 1 if n == 0 else n * recursive(n - 1)


FUNCTIONS = {
    "lambda": (lambda x: x + 1, lambda x: x + 1),
    "closure": (make_counter(5), lambda x: x + 5),
    "partial": (functools.partial(power, exponent=2, scale=3), lambda x: 3 * x**2),
    "partial of a lambda": (functools.partial(lambda a, b: a - b, 10), lambda x: 10 - x),
    "partial of a partial": (
        functools.partial(functools.partial(power, scale=2), exponent=2),
        lambda x: 2 * x * x,
    ),
    "bound method": (Accumulator(7).add, lambda x: x + 7),
    "class method": (Accumulator.of_class, lambda x: 2 * x),
    "static method": (Accumulator.of_nobody, lambda x: -x),
    "callable object": (Accumulator(1), lambda x: (x + 1) * 2),
    "method of a slotted object": (Slotted(4).plus, lambda x: x + 4),
    "builtin": (abs, abs),
    "method of a builtin object": ([10, 20, 30, 40, 50].__getitem__, lambda x: 10 * (x + 1)),
    "class": (complex, complex),
    "ufunc": (np.negative, lambda x: -x),
    "vectorize": (np.vectorize(lambda x: x * 2), lambda x: x * 2),
    "recursive": (recursive, recursive),
    "wrapped": (functools.wraps(abs)(lambda x: x * 5), lambda x: x * 5),
    "cached": (functools.lru_cache(lambda x: x * 6), lambda x: x * 6),
    "method caller": (__import__("operator").methodcaller("__add__", 2), lambda x: x + 2),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_any_callable_can_be_sent(processes, kind):
    fn, oracle = FUNCTIONS[kind]
    assert list(processes.map(fn, range(5))) == [oracle(x) for x in range(5)]
    assert processes.submit(fn, 3).result() == oracle(3)


def test_a_method_of_an_array(processes):
    assert processes.submit(np.arange(5).sum).result() == 10


def test_instances_go_both_ways(processes):
    (back,) = processes.map(lambda a: a, [Accumulator(3)])
    assert back == Accumulator(3)
    assert type(back) is Accumulator
    local = type("Local", (), {"value": 5})
    assert processes.submit(lambda x: x.value, local()).result() == 5


def test_block_functions_of_all_kinds(processes):
    x = np.arange(30.0)
    for fn in (np.sqrt, lambda b: b**2, functools.partial(np.power, 2.0), np.vectorize(lambda v: v + 1.0)):
        assert np.array_equal(processes.map_blocks(fn, x, block_bytes=80), fn(x))


def test_a_reloaded_module_is_sent_anew(processes, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    source = tmp_path / "changing_module.py"
    source.write_text("def version(): return 1")
    module = importlib.import_module("changing_module")
    local = lambda: module.version()  # noqa: PLW0108  by value, with the module by name
    with Engine(1, memory="32 MiB") as engine:  # it knows the path
        assert engine.submit(module.version).result() == 1
        assert engine.submit(local).result() == 1
    source.write_text("def version(): return 22222")
    importlib.reload(module)
    with Engine(1, memory="32 MiB") as engine:
        assert engine.submit(module.version).result() == 22222
    del sys.modules["changing_module"]


def test_a_module_made_by_hand(processes):
    module = type(sys)("made_by_hand")
    exec("def f(x): return x + g()\ndef g(): return 100", module.__dict__)
    assert processes.submit(module.f, 1).result() == 101


# --- where the engine is used ---------------------------------------------------------------------


def test_threads_use_one_engine_in_all_ways(processes):
    errors = []

    def work(seed):
        try:
            x = np.random.default_rng(seed).random(200_000)
            for _ in range(5):
                assert np.array_equal(processes.map_blocks(np.sqrt, x), np.sqrt(x))
                assert list(processes.map(lambda i: i + seed, range(50))) == [i + seed for i in range(50)]
                assert processes.submit(abs, -seed).result() == seed
                assert processes.reduce(np.max, x, combine=max) == x.max()
                ref = processes.put(x)
                assert processes.submit(np.sum, ref).result() == x.sum()
                shared = processes.asarray(x)
                assert processes.submit(np.sum, shared).result() == x.sum()
        except BaseException as error:
            traceback.print_exc()
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def run_in_fork(child, *, leave=os._exit):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            leave(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_forked_child_harms_nothing(processes):
    """It may drop everything of its parent's, and the parent's engine works on."""
    pids = processes._backend.pids
    array = processes.full(100_000, 3.0)
    results = processes.map(np.full, [100_000] * 20, range(20))
    first = next(results)
    ref = processes.put(np.ones(100_000))

    def child():
        nonlocal array, first, ref, results
        with pytest.raises(UseAfterFork):
            processes.submit(abs, 1)
        assert (array == 3).all()
        assert (first == 0).all()
        import gc

        del array, first, ref, results
        gc.collect()
        processes.close()

    assert run_in_fork(child) == 0
    assert (array == 3).all()
    assert (first == 0).all()
    for i, result in enumerate(results, start=1):
        assert (result == i).all()
    assert processes.submit(np.sum, array).result() == 300_000
    assert processes.submit(np.sum, ref).result() == 100_000
    assert processes._backend.pids == pids


def test_a_forked_child_that_exits_as_a_program_does():
    """With all of the interpreter's clean-up: the parent's workers and memory stay."""
    source = """
        import os, sys
        import numpy as np
        import shmengine as shm
        engine = shm.Engine(2, memory="64 MiB")
        array = engine.full(100_000, 3.0)
        results = list(engine.map(np.full, [100_000] * 5, range(5)))
        if (pid := os.fork()) == 0:
            with shm.Engine(1, memory="32 MiB") as own:  # a child may make its own
                assert list(own.map(abs, [-1])) == [1]
            sys.exit(5)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
        assert list(engine.map(abs, range(100))) == list(range(100))
        assert engine.submit(np.sum, array).result() == 300_000
        assert [r[-1] for r in results] == list(range(5))
        assert engine.stats().worker_deaths == 0
    """
    result = run_script(source, check=True, timeout=SECONDS, flags=FORKS)
    assert result.stderr == ""


def test_the_default_engine_cuts_and_folds():
    source = """
        import os
        import numpy as np
        import shmengine as shm
        x = np.arange(1_000_000.0)
        assert np.array_equal(shm.map_blocks(np.sqrt, x), np.sqrt(x))
        assert shm.reduce(np.sum, x, combine=np.add, block_bytes="1 MiB") == x.sum()
        assert os.getpid() not in set(shm.map(lambda _: os.getpid(), range(10)))
    """
    result = run_script(source, check=True, timeout=SECONDS)
    assert result.stderr == ""


def test_the_default_engine_after_a_fork():
    source = """
        import os
        import shmengine as shm
        assert list(shm.map(abs, range(3))) == [0, 1, 2]
        if (pid := os.fork()) == 0:
            assert list(shm.map(abs, range(3))) == [0, 1, 2]
            raise SystemExit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert list(shm.map(abs, range(3))) == [0, 1, 2]
    """
    result = run_script(source, check=True, timeout=SECONDS, flags=FORKS)
    assert result.stderr == ""


def test_children_of_multiprocessing_make_engines_of_their_own(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(
        textwrap.dedent("""
        import multiprocessing, sys
        import shmengine as shm

        def child():
            with shm.Engine(1, memory="32 MiB") as engine:
                sys.exit(engine.submit(abs, -7).result())

        if __name__ == "__main__":
            with shm.Engine(1, memory="32 MiB") as engine:
                for method in ("fork", "spawn", "forkserver"):
                    process = multiprocessing.get_context(method).Process(target=child)
                    process.start()
                    process.join()
                    assert process.exitcode == 7, (method, process.exitcode)
                    assert engine.submit(abs, -1).result() == 1
        """)
    )
    result = run_script(path, check=True, timeout=SECONDS)
    assert result.stderr == ""


def test_an_engine_inside_a_worker_runs_serially(processes):
    def nested(n):
        import warnings

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with Engine(2) as inner:
                return inner.backend, list(inner.map(lambda i: i * i, range(n))), len(caught)

    assert list(processes.map(nested, [2, 3])) == [("serial", [0, 1], 1), ("serial", [0, 1, 4], 1)]


def test_an_engine_cannot_be_sent(processes):
    with pytest.raises(TypeError, match="cannot be sent to another process"):
        processes.submit(lambda: processes).result()


# --- what workers see and say ---------------------------------------------------------------------


def test_what_workers_print_arrives():
    source = """
        import os, sys
        import shmengine as shm
        with shm.Engine(2, memory="64 MiB") as engine:
            def talk(i):
                print("out", i, flush=True)
                print("err", i, file=sys.stderr)
                if i == 5:
                    os.system("echo from a child")
            list(engine.map(talk, range(20)))
            engine.submit(sys.stdout.write, "no newline at the end").result()
    """
    result = run_script(source, check=True, timeout=SECONDS)
    lines = result.stdout.splitlines()
    assert sorted(line for line in lines if line.startswith("out")) == sorted(f"out {i}" for i in range(20))
    assert "from a child" in lines
    assert "no newline at the end" in result.stdout
    assert sorted(result.stderr.splitlines()) == sorted(f"err {i}" for i in range(20))


def test_workers_have_no_input(processes):
    def read():
        import sys

        return sys.stdin.read()

    assert processes.submit(read).result() == ""


def test_an_initializer_sets_globals():
    source = """
        import os
        import numpy as np
        import shmengine as shm
        MODEL = None
        def load(a, b):
            global MODEL
            MODEL = (a, b, os.getpid())
        def use(i):
            return MODEL[0] + MODEL[1] + i, MODEL[2] == os.getpid()
        class User:
            def __call__(self, i):
                return MODEL[0] * i
            def method(self, i):
                return MODEL[1] * i
        with shm.Engine(2, memory="64 MiB", initializer=load, initargs=(10, 20)) as engine:
            print(list(engine.map(use, range(3))), MODEL)
            print([engine.submit(f, 2).result() for f in (User(), User().method, lambda i: MODEL[0] - i)])
    """
    result = run_script(source, timeout=SECONDS, check=True)
    assert result.stdout == "[(30, True), (31, True), (32, True)] None\n[20, 40, 8]\n"


def test_an_initializer_sets_state_of_a_module(processes):
    def prepare(value):
        import decimal

        decimal.prepared_by_test = value

    with Engine(2, memory="32 MiB", initializer=prepare, initargs=[np.arange(5)]) as engine:
        assert set(engine.map(lambda i: int(__import__("decimal").prepared_by_test.sum()), range(9))) == {10}


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_of_numerical_libraries_are_limited(threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)

    def look():
        import os

        import threadpoolctl

        return os.environ["OMP_NUM_THREADS"], {p["num_threads"] for p in threadpoolctl.threadpool_info()}

    with Engine(2, memory="32 MiB", threads_per_worker=threads) as engine:
        variable, pools = engine.submit(look).result()
    assert variable == str(threads)
    assert max(pools, default=1) <= threads
    assert "OMP_NUM_THREADS" not in os.environ


def test_a_user_s_own_thread_limit_is_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    with Engine(1, memory="32 MiB") as engine:
        seen = engine.submit(lambda: dict(__import__("os").environ)).result()
    assert seen["OMP_NUM_THREADS"] == "5"
    assert "OPENBLAS_NUM_THREADS" in seen


def test_random_streams_do_not_depend_on_workers_or_backend():
    def draw(i, rng):
        return rng.random(3).tolist()

    def noise(block, rng):
        return block + rng.random(len(block))

    found = []
    for count, backend in [(1, "process"), (3, "process"), (2, "serial")]:
        with Engine(count, backend=backend, memory="32 MiB") as engine:
            found.append(
                (
                    list(engine.map(draw, range(40), rng=7)),
                    engine.map_blocks(noise, np.zeros(5000), rng=(1, 2), block_bytes=800).tolist(),
                )
            )
    assert found[0] == found[1] == found[2]
