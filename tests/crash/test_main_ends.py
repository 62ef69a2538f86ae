"""However the main process ends, its workers end too, and nothing stays behind.

Every test here also relies on the fixture that looks for processes and names left behind.
"""

from __future__ import annotations

import os
import random
import re
import signal
import textwrap
import time

import pytest

from tests.helpers import (
    descendants,
    mount_namespace_run,
    poll_until,
    run_in_pty,
    run_script,
    shm_names,
    start_script,
)

PRELUDE = """
import ctypes, os, signal, sys, threading, time
import numpy as np
import shmengine as shm

def ready():
    print("ready", flush=True)

def busy(path):
    "Tell that we run, then never end."
    open(path, "w").close()
    ctypes.PyDLL(None).sleep(1000)

def all_busy(engine, directory):
    "Keep all workers busy for ever; return when they are."
    paths = [os.path.join(directory, str(i)) for i in range(engine.workers)]
    futures = [engine.submit(busy, path) for path in paths]
    while not all(map(os.path.exists, paths)):
        time.sleep(0.001)
    return futures
"""
SECONDS = 20  # a watchdog; how fast it goes is measured elsewhere


def script(body):
    return PRELUDE + textwrap.dedent(body)


def workers_of(process):
    return {pid for pid in descendants(process.pid) if "workers.child" in command_of(pid)}


def command_of(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read()
    except OSError:
        return ""


def assert_gone(pids, names):
    poll_until(lambda: not any(command_of(pid) for pid in pids), SECONDS, f"the workers {pids} are gone")
    ours = {name for name in shm_names() - names if "shmengine" in name}
    poll_until(lambda: not ours & shm_names(), SECONDS, f"{ours} are gone")


# --- SIGKILL --------------------------------------------------------------------------------------

DOING = {
    "sleeping": "ready(); time.sleep(1000)",
    "holding the interpreter": "ready(); ctypes.PyDLL(None).sleep(1000)",
    "waiting for a future": "future = engine.submit(time.sleep, 1000); ready(); future.result()",
    "mapping": "ready(); [result for result in engine.map(abs, iter(int, 1))]",
    "mapping blocks": "x = np.ones(5_000_000); ready()\nwhile True: engine.map_blocks(np.sqrt, x)",
    "with busy workers": "all_busy(engine, sys.argv[1]); ready(); time.sleep(1000)",
    "closing": "all_busy(engine, sys.argv[1]); ready(); engine.close()",
}


@pytest.mark.parametrize("doing", DOING)
def test_workers_end_with_a_killed_main_process(doing, tmp_path):
    names = shm_names()
    source = script(f"engine = shm.Engine(2, memory='64 MiB')\n{DOING[doing]}")
    with start_script(source, args=[str(tmp_path)]) as process:
        assert process.stdout.readline() == "ready\n"
        workers = workers_of(process)
        assert len(workers) == 2
        process.kill()
        process.wait()
        assert_gone(workers, names)
        assert process.stderr.read() == ""  # its end: nobody holds the pipe any more


def test_a_main_process_that_is_killed_while_it_starts():
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)
    moments = random.Random(seed)
    source = script("""
        ready()
        while True:
            shm.Engine(3, memory="64 MiB").close(wait=False)
    """)
    for _ in range(5):
        names = shm_names()
        with start_script(source) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(moments.uniform(0, 0.4))  # the random moment is what is tested
            workers = descendants(process.pid)
            process.kill()
            process.wait()
            assert_gone(workers, names)


def test_an_engine_has_no_name_that_a_killed_main_process_could_leave():
    """From the moment on in which there is a file; and nobody has to keep track of it."""
    source = script("""
        opened, seen = os.open, []

        def open_and_look(*args, **kwargs):
            fd = opened(*args, **kwargs)
            if args[0] == "/dev/shm":
                seen.append(os.listdir("/dev/shm"))
            return fd

        before, os.open = os.listdir("/dev/shm"), open_and_look
        with shm.Engine(2, memory="64 MiB") as engine:
            assert engine.submit(abs, -1).result() == 1
            shm.Ring(4, "8 MiB").send(np.ones(5))
        assert seen and all(names == before for names in seen), seen
        from multiprocessing import resource_tracker
        assert resource_tracker._resource_tracker._pid is None, "a process that is not needed"
    """)
    result = mount_namespace_run(source, "128m", timeout=SECONDS)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_parent_thread_that_ends_takes_no_worker_along():
    """Workers live as long as the process, not as long as the thread that started them."""
    source = script("""
        made = []
        thread = threading.Thread(target=lambda: made.append(shm.Engine(2, memory="64 MiB")))
        thread.start()
        thread.join()
        with made[0] as engine:
            pids = set(engine.map(lambda i: os.getpid(), range(100)))
            time.sleep(0.3)
            assert pids <= set(engine._backend.pids)
            assert engine.stats().worker_deaths == 0
    """)
    result = run_script(source, check=True, timeout=SECONDS)
    assert result.stderr == ""


# --- Ctrl-C ---------------------------------------------------------------------------------------

INTERRUPTED = {
    "sleeping": "ready(); time.sleep(1000)",
    "waiting for a future": "future = engine.submit(time.sleep, 1000); ready(); future.result()",
    "mapping": "ready(); [result for result in engine.map(abs, iter(int, 1))]",
    "waiting in map": "ready(); list(engine.map(time.sleep, [1000] * 10))",
    "mapping blocks": "x = np.ones(5_000_000); ready()\nwhile True: engine.map_blocks(np.sqrt, x)",
    "reducing": "x = np.ones(5_000_000); ready()\nwhile True: engine.reduce(np.sum, x, combine=max)",
    "with busy workers": "all_busy(engine, sys.argv[1]); ready(); time.sleep(1000)",
    "closing": "all_busy(engine, sys.argv[1]); ready(); engine.close()",
}


@pytest.mark.parametrize("form", ["with", "plain"])
@pytest.mark.parametrize("doing", INTERRUPTED)
def test_ctrl_c_gives_one_traceback_and_leaves_nothing(doing, form, tmp_path):
    names = shm_names()
    body = textwrap.indent(INTERRUPTED[doing], "    ")
    opening = "with shm.Engine(2, memory='64 MiB') as engine:"
    if form == "plain":
        opening = "engine = shm.Engine(2, memory='64 MiB')\nif True:"
    source = script(f"{opening}\n{body}")
    result = run_in_pty(source, answers=[("ready", "\x03")], args=[str(tmp_path)], timeout=SECONDS)
    # It may have come while one of ours was handled, as a KeyError that only says that something is new.
    chained = result.output.count("During handling of the above exception")
    assert result.output.count("Traceback (most recent call last)") == 1 + chained, result.output
    assert len(re.findall(r"^KeyboardInterrupt$", result.output, re.MULTILINE)) == 1, result.output
    assert "Exception ignored" not in result.output
    assert result.returncode in (-signal.SIGINT, 130)
    assert_gone((), names)


def test_ctrl_c_can_be_caught_and_the_engine_used_on():
    source = script("""
        with shm.Engine(2, memory="64 MiB") as engine:
            for _ in range(3):
                try:
                    future = engine.submit(lambda: 5)
                    ready()
                    for _ in engine.map(lambda i: i, iter(int, 1)):
                        pass
                except KeyboardInterrupt:
                    assert list(engine.map(abs, range(100))) == list(range(100))
                    assert future.result() == 5
                    print("caught", flush=True)
        print("end")
    """)
    result = run_in_pty(source, answers=[("ready", "\x03")] * 3, timeout=SECONDS)
    assert result.returncode == 0, result.output
    assert result.output.count("caught") == 3
    assert "Traceback" not in result.output
    assert "Exception ignored" not in result.output


# --- the ordinary ends ----------------------------------------------------------------------------


def traceback_of(name):
    return rf"Traceback \(most recent call last\):\n(  .*\n)+{name}\n"


ENDS = {
    # what main does: (script, exit code, what stderr matches)
    "sys.exit, busy workers": ("all_busy(engine, sys.argv[1]); sys.exit(3)", 3, ""),
    "exception, busy workers": (
        "all_busy(engine, sys.argv[1]); raise KeyError(5)",
        1,
        traceback_of("KeyError: 5"),
    ),
    "os._exit, busy workers": ("all_busy(engine, sys.argv[1]); os._exit(4)", 4, ""),
    "SIGTERM, busy workers": (
        "all_busy(engine, sys.argv[1]); os.kill(os.getpid(), signal.SIGTERM); time.sleep(1000)",
        -signal.SIGTERM,
        "",
    ),
    "end of script, busy workers": ("futures = all_busy(engine, sys.argv[1])", 0, ""),
    "end of script, not closed": ("print(engine.submit(abs, -1).result())", 0, ""),
    "end of script, never used": ("", 0, ""),
    "half of a map consumed": ("results = engine.map(abs, range(10_000)); next(results)", 0, ""),
    "half of an endless map consumed": ("results = engine.map(abs, iter(int, 1)); next(results)", 0, ""),
    "half of a map of arrays consumed": (
        "results = engine.map_unordered(np.ones, [100_000] * 1000); first = next(results)",
        0,
        "",
    ),
    "many futures pending": ("futures = [engine.submit(time.sleep, 1000) for _ in range(500)]", 0, ""),
    "futures nobody keeps": ("for _ in range(500): engine.submit(abs, 1)", 0, ""),
    "results kept": ("kept = list(engine.map(np.ones, [50_000] * 50)); a = engine.zeros(1000)", 0, ""),
    "put objects kept": ("ref = engine.put(np.ones(100_000)); view = ref.get()", 0, ""),
    "a thread that iterates": (
        "t = threading.Thread(target=lambda: list(engine.map(time.sleep, [1000])), daemon=True); t.start()",
        0,
        r"(Exception in thread Thread-1 (.|\n)*)?",  # Closed, as far as it comes
    ),
    "closed without waiting": ("futures = all_busy(engine, sys.argv[1]); engine.close(wait=False)", 0, ""),
    "closed twice": ("engine.close(); engine.close()", 0, ""),
    "forgotten": ("engine.submit(abs, 1).result(); del engine", 0, ""),
    "left in a cycle": ("cycle = [engine]; cycle.append(cycle); del cycle, engine", 0, ""),
    "atexit uses it": (
        "import atexit; atexit.register(lambda: print(sum(engine.map(abs, range(10)))))",
        0,
        "",
    ),
    "the default engine": ("print(list(shm.map(abs, range(3))))", 0, ""),
    "the default engine, not consumed": ("results = shm.map(abs, range(3000)); next(results)", 0, ""),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_process_ends_and_says_nothing(end, tmp_path):
    body, code, errors = ENDS[end]
    names = shm_names()
    source = script(f"engine = shm.Engine(2, memory='64 MiB')\n{body}")
    result = run_script(source, args=[str(tmp_path)], timeout=SECONDS, flags=["-W", "error"])
    assert result.returncode == code, result.stderr
    assert re.fullmatch(errors, result.stderr), result.stderr
    assert_gone((), names)


@pytest.mark.parametrize("leaving", ["sys.exit(3)", "raise KeyboardInterrupt"])
def test_leaving_the_with_block_for_good_does_not_wait_for_busy_workers(leaving, tmp_path):
    source = script(f"""
        with shm.Engine(2, memory="64 MiB") as engine:
            all_busy(engine, sys.argv[1])
            {leaving}
    """)
    result = run_script(source, args=[str(tmp_path)], timeout=SECONDS)
    assert result.returncode in (3, -signal.SIGINT)
    assert result.returncode == 3 or re.fullmatch(traceback_of("KeyboardInterrupt"), result.stderr)


def test_a_forgotten_engine_ends_its_workers_at_once():
    source = script("""
        engine = shm.Engine(2, memory="64 MiB")
        assert engine.submit(abs, -1).result() == 1
        array = list(engine.map(np.ones, [100_000]))[0]
        pids = engine._backend.pids
        del engine
        for pid in pids:
            while os.path.exists(f"/proc/{pid}"):
                time.sleep(0.01)
        assert array.sum() == 100_000
    """)
    result = run_script(source, check=True, timeout=SECONDS)
    assert result.stderr == ""


def test_a_main_process_with_many_engines():
    source = script("""
        for _ in range(3):
            engines = [shm.Engine(1, memory="32 MiB") for _ in range(3)]
            for engine in engines:
                assert list(engine.map(abs, range(10))) == list(range(10))
        print(len(engines))
    """)
    result = run_script(source, check=True, timeout=SECONDS)
    assert (result.stdout, result.stderr) == ("3\n", "")


def test_standard_output_that_breaks_does_not_hold_the_engine_up():
    """Workers print into a pipe whose reader has gone, as in ``| head``."""
    source = script("""
        engine = shm.Engine(2, memory="64 MiB")
        for i in engine.map(lambda i: print("line", i) or i, range(20_000)):
            pass
        os.write(2, b"all done")
        os._exit(0)
    """)
    with start_script(source) as process:
        assert process.stdout.readline().startswith("line")
        process.stdout.close()
        assert process.stderr.read() == "all done"
        assert process.wait(SECONDS) == 0


def test_the_leak_check_would_notice():
    """The helper that finds workers finds them: the tests above are no vacuous ones."""
    with start_script(
        script("engine = shm.Engine(2, memory='64 MiB'); ready(); time.sleep(1000)")
    ) as process:
        assert process.stdout.readline() == "ready\n"
        assert len(workers_of(process)) == 2
        assert all(os.path.exists(f"/proc/{pid}") for pid in workers_of(process))
