"""The nets under all other tests must hold themselves: leaks are found and named, hanging ends."""

from __future__ import annotations

import os
import textwrap
import time

import pytest

from tests.helpers import (
    ROOT,
    children,
    memory_cgroup,
    mount_namespace_run,
    poll_until,
    run_in_pty,
    run_script,
    start_script,
)
from tests.helpers.watchdog import REPORT

RUN_PYTEST = """
import sys
sys.path.insert(0, sys.argv[1])
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "tests.conftest", "--rootdir", sys.argv[2],
                      "-c", sys.argv[2] + "/pytest.ini", sys.argv[2]]))
"""


@pytest.fixture
def run_tests(tmp_path):
    """Run the text of a test module under this project's conftest."""

    def run(text):
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = watchdog(seconds)\n")
        (tmp_path / "test_it.py").write_text(textwrap.dedent(text))
        return run_script(
            RUN_PYTEST, args=[str(ROOT), str(tmp_path)], env={"SHMENGINE_TEST_GRACE": "1", REPORT: None}
        )

    return run


def test_clean_tests_pass(run_tests):
    result = run_tests("""
        import subprocess, threading
        from multiprocessing.shared_memory import SharedMemory

        def test_all_put_away():
            memory = SharedMemory(create=True, size=100)
            memory.close()
            memory.unlink()
            subprocess.run(["true"], check=True)
            thread = threading.Thread(target=int)
            thread.start()
            thread.join()
    """)
    assert result.returncode == 0, result.stdout


def test_each_kind_of_leftover_is_found_and_named(run_tests):
    result = run_tests("""
        import os, subprocess, threading
        from multiprocessing.shared_memory import SharedMemory
        import posix_ipc
        kept = []

        def test_name():
            kept.append(SharedMemory("shmengine-left-name", create=True, size=100))
            kept[0].close()
        def test_after_that_is_clean(): pass
        def test_descriptor(): kept.append(os.open("/dev/full", os.O_RDONLY))
        def test_process(): kept.append(subprocess.Popen(["sleep", "54321"]))
        def test_orphan():
            subprocess.run(["sh", "-c", "sleep 54322 & exit"])
        def test_semaphore(): kept.append(posix_ipc.Semaphore("/shmengine-left-semaphore", posix_ipc.O_CREX))
        def test_thread():
            event = threading.Event()
            kept.append(event)
            threading.Thread(target=event.wait, name="left-thread").start()
        def test_release():
            kept[0].unlink()
            kept[3].unlink()
            kept[-1].set()
            kept[2].wait()
    """)
    for line in (
        "/dev/shm/shmengine-left-name",
        "-> /dev/full",
        "sleep 54321",
        "sleep 54322",
        "/dev/shm/sem.shmengine-left-semaphore",
        "'left-thread'",
    ):
        assert line in result.stdout, result.stdout
    assert "the module left behind:" in result.stdout, "the descriptor is still open at its end"
    assert "8 passed, 7 errors" in result.stdout


def test_what_a_module_shares_is_put_away_at_its_end(run_tests):
    result = run_tests("""
        import subprocess, threading, pytest
        event = threading.Event()

        @pytest.fixture(scope="module")
        def shared():
            process = subprocess.Popen(["sleep", "54326"])
            yield
            process.kill()
            process.wait()

        def test_uses(shared):
            threading.Thread(target=event.wait, name="shmengine-left", daemon=True).start()
        def test_last(shared): pass
    """)
    assert "the module left behind:\nthread 'shmengine-left', daemon=True" in result.stdout
    assert "2 passed, 1 error" in result.stdout


def test_cycles_are_collected_before_anything_is_blamed(run_tests):
    result = run_tests("""
        import gc

        def test_cycle():
            gc.disable()
            holder = {"file": open("/dev/zero", "rb", buffering=0)}
            holder["self"] = holder
            holder["file"].close()
            class Guard:
                def __init__(self): self.fd = __import__("os").open("/dev/zero", 0)
                def __del__(self): __import__("os").close(self.fd)
            guard = Guard()
            guard.self = guard
    """)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    "hang",
    ["threading.Event().wait()", "ctypes.PyDLL(None).sleep(1000)"],
    ids=["python", "holding-the-interpreter-lock"],
)
def test_the_watchdog_ends_a_hanging_test_with_stacks_and_children(run_tests, hang):
    result = run_tests(f"""
        import ctypes, subprocess, threading, pytest

        def stuck_here():
            {hang}

        @pytest.mark.watchdog(1)
        def test_hangs():
            subprocess.Popen(["sleep", "54323"])
            stuck_here()
    """)
    assert result.returncode < 0
    assert "watchdog: " in result.stderr
    assert "test_hangs" in result.stderr
    assert "sleep 54323" in result.stderr
    assert "in stuck_here" in result.stderr
    assert not [pid for pid in children() if "54323" in _cmdline(pid)]


def _cmdline(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read()
    except OSError:
        return ""


class TestRunScript:
    def test_result(self):
        result = run_script(
            "import os, sys; print(sys.argv[1], os.environ['X'], sys.flags.optimize, input()); sys.exit(3)",
            args=["a"],
            env={"X": "x"},
            flags=["-O"],
            input="line",
        )
        assert (result.returncode, result.stdout) == (3, "a x 1 line\n")

    def test_check(self):
        with pytest.raises(AssertionError, match="to-stderr"):
            run_script("import sys; sys.exit('to-stderr')", check=True)

    def test_a_hanging_script_is_killed_with_its_children_and_shows_its_stack(self):
        with pytest.raises(AssertionError, match=r"(?s)sleep 54324.*said.*in hanging") as caught:
            run_script(
                """
                import subprocess, time
                def hanging():
                    time.sleep(1000)
                print("said", flush=True)
                subprocess.Popen(["sleep", "54324"])
                hanging()
                """,
                timeout=2,
            )
        assert "ran longer than 2 s" in str(caught.value)

    def test_start_script_kills_what_is_left(self):
        source = "import subprocess; print(subprocess.Popen(['sleep', '54325']).pid, flush=True); input()"
        with start_script(source) as process:
            assert process.stdout is not None
            pid = int(process.stdout.readline())
        assert process.returncode == -9
        poll_until(lambda: not os.path.exists(f"/proc/{pid}") or _state(pid) == "Z")


def _state(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_a_terminal_answers_and_interrupts():
    result = run_in_pty(
        """
        import sys, time
        print("terminal", sys.stdout.isatty())
        print("got", input("name? "))
        try:
            print("ready")
            time.sleep(100)
        except KeyboardInterrupt:
            print("interrupted")
            sys.exit(4)
        """,
        answers=[("name? ", "me\n"), ("ready", "\x03")],
    )
    assert result.returncode == 4
    assert "terminal True" in result.output
    assert "got me" in result.output
    assert result.output.endswith("interrupted\n")


def test_a_small_dev_shm():
    source = "import os; s = os.statvfs('/dev/shm'); print(s.f_blocks * s.f_frsize, os.listdir('/dev/shm'))"
    result = mount_namespace_run(source, "1m", check=True)
    assert result.stdout == "1048576 []\n"
    before = os.statvfs("/dev/shm").f_blocks
    assert mount_namespace_run(source, 64 << 20, check=True).stdout == "67108864 []\n"
    assert os.statvfs("/dev/shm").f_blocks == before


def test_a_memory_cgroup_kills_what_exceeds_it():
    with memory_cgroup(64 << 20) as group:
        result = run_script("x = bytearray(256 << 20); print('alive')", prefix=group.prefix)
        assert result.returncode == -9
        assert group.oom_kills == 1
        assert 32 << 20 < group.peak <= 64 << 20
    assert not os.path.exists(group.path)


def test_poll_until_names_what_never_came():
    start = time.monotonic()
    with pytest.raises(AssertionError, match="the tide"):
        poll_until(lambda: False, timeout=0.05, what="the tide")
    assert time.monotonic() - start >= 0.05
