"""Small machines: containers with little /dev/shm, control groups with little memory, low limits.

What must come is an error with numbers, or the other way to get memory; never SIGBUS, never the OOM killer.
"""

from __future__ import annotations

import re
import textwrap

import pytest

from tests.helpers import memory_cgroup, mount_namespace_run, run_script

MIB = 1 << 20
SECONDS = 60  # a watchdog

PRELUDE = """
import os, queue, resource, sys
import numpy as np
import shmengine as shm
from shmengine.errors import *
MIB = 1 << 20

def free():
    status = os.statvfs("/dev/shm")
    return status.f_bavail * status.f_frsize

def with_numbers(error):
    text = str(error)
    assert any(unit in text for unit in ("KiB", "MiB", "GiB", "bytes")), text
    assert any(character.isdigit() for character in text), text
    print(type(error).__name__, text, flush=True)
"""

USE = {
    "ring": """
        with shm.Ring(8, arena_bytes={memory}) as ring:
            for i in range(50):
                with ring.claim((100_000,), "f8") as frame:
                    frame[:] = i
                with ring.lease() as frame:
                    assert (frame == i).all()
    """,
    "queue": """
        q = shm.Queue()
        for i in range(20):
            q.put(np.full(10_000, i))
        for i in range(20):
            assert (q.get() == i).all()
        q.close()
    """,
    "engine": """
        with shm.Engine(2, memory={memory}) as engine:
            x = np.arange(1_000_000.0)
            assert np.array_equal(engine.map_blocks(np.sqrt, x), np.sqrt(x))
            assert list(engine.map(abs, range(-100, 0))) == list(range(100, 0, -1))
            shared = engine.full(100_000, 3.0)
            assert engine.submit(np.sum, shared).result() == 300_000
    """,
}


def script(body):
    return PRELUDE + textwrap.dedent(body)


# --- /dev/shm -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shm_size", ["1m", "64m"])
@pytest.mark.parametrize("memory", ["'32 MiB'", "'512 MiB'", "None"])
@pytest.mark.parametrize("what", USE)
def test_little_dev_shm_is_no_obstacle(what, memory, shm_size):
    if what != "engine" and memory == "None":
        memory = "'2 GiB'"
    body = USE[what].format(memory=memory)
    result = mount_namespace_run(script(body), shm_size, timeout=SECONDS)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


@pytest.mark.parametrize("what", ["Engine", "Ring"])
def test_dev_shm_that_fills_up_later(what):
    """A sparse file promises more than there is: others may take it before we do."""
    use = {
        "Engine": """
            thing = shm.Engine(2, memory="48 MiB")
            take = lambda: thing.full(MIB, 7, "u1")
        """,
        "Ring": """
            thing = shm.Ring(100, "48 MiB")
            def take():
                claim = thing.claim((MIB,), "u1", timeout=0.5)
                frame = claim.__enter__()
                frame[:] = 7
                return claim, frame
        """,
    }[what]
    source = script(
        textwrap.dedent(use)
        + textwrap.dedent("""
        kept = [take()]
        with open("/dev/shm/filler", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, free() - 12 * MIB)
        try:
            for _ in range(60):
                kept.append(take())
            sys.exit("there was more than there is")
        except (MemoryBudgetExceeded, Timeout) as error:
            print(len(kept), error, flush=True)
        if isinstance(thing, shm.Engine):
            assert all((a == 7).all() for a in kept)
            for call in (
                lambda: thing.put(np.ones(8 * MIB, "u1")),
                lambda: thing.submit(np.sum, np.ones(8 * MIB, "u1")).result(),
                lambda: thing.submit(np.ones, 8 * MIB, "u1").result(),
            ):
                try:
                    call()
                    sys.exit("there was more than there is")
                except MemoryBudgetExceeded as error:
                    with_numbers(error)
        os.unlink("/dev/shm/filler")
        kept.append(take())
        print("again")
        if isinstance(thing, shm.Engine):
            assert thing.submit(np.sum, np.ones(8 * MIB, "u1")).result() == 8 * MIB
            thing.close()
        else:
            for entry in kept:
                entry[0].abort() if hasattr(entry[0], "abort") else entry[0].__exit__(KeyError, KeyError(), None)
            thing.close()
        """)
    )
    result = mount_namespace_run(source, "64m", timeout=SECONDS)
    assert result.returncode == 0, result.stdout + result.stderr
    assert 5 <= int(result.stdout.split()[0]) <= 20
    assert "again" in result.stdout


def test_a_queue_in_a_dev_shm_that_fills_up_later():
    source = script("""
        q = shm.Queue()
        q.put(b"x")
        with open("/dev/shm/filler", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(0, free() - 12 * MIB))
        count = 0
        try:
            while count < 1000:
                q.put(b"x" * MIB, timeout=0.5)
                count += 1
            print("memfd")  # the queue's budget did not fit: its memory is elsewhere
        except queue.Full as error:
            print(error)
        assert q.get() == b"x"
        for _ in range(count):
            assert q.get() == b"x" * MIB
        q.close()
    """)
    result = mount_namespace_run(source, "64m", timeout=SECONDS)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_named_ring_that_does_not_fit_says_so():
    source = script("""
        try:
            shm.Ring(8, "256 MiB", name="too-large-for-it")
        except MemoryBudgetExceeded as error:
            with_numbers(error)
        else:
            # It is sparse: then the error comes with the first message that has no room.
            ring = shm.Ring(100, "256 MiB", name="too-large-for-it-2")
            try:
                for i in range(100):
                    with ring.claim((MIB,), "u1", timeout=0.5) as frame:
                        frame[:] = 1
                sys.exit("there was more than there is")
            except (MemoryBudgetExceeded, Timeout) as error:
                print(error)
            assert i < 2
            ring.close()
    """)
    result = mount_namespace_run(source, "1m", timeout=SECONDS)
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_dev_shm_at_all():
    """The file system is there but has no room for even one page."""
    source = script(
        """
        with open("/dev/shm/filler", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, free())
        """
        + USE["engine"].format(memory="'64 MiB'")
    )
    result = mount_namespace_run(source, "1m", timeout=SECONDS)
    assert result.returncode == 0, result.stderr


# --- control groups -------------------------------------------------------------------------------


def run_in_group(source, limit):
    with memory_cgroup(limit) as group:
        result = run_script(source, prefix=group.prefix, timeout=SECONDS)
        assert group.oom_kills == 0, result.stdout + result.stderr
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.mark.parametrize("what", USE)
def test_a_memory_cgroup_of_ordinary_size(what):
    run_in_group(script(USE[what].format(memory="None" if what == "engine" else "'64 MiB'")), 400 * MIB)


def test_an_engine_takes_what_the_cgroup_leaves():
    result = run_in_group(
        script("""
        with shm.Engine(2, memory="1 GiB") as engine:
            assert list(engine.map(abs, range(10))) == list(range(10))
            array = np.ones(16 * MIB, "u1")
            kept = []
            try:
                for i in range(1000):
                    kept.append(engine.full(4 * MIB, i % 251, "u1"))
                sys.exit("there was more than there is")
            except MemoryBudgetExceeded as error:
                with_numbers(error)
            assert len(kept) > 5
            assert all((a == i % 251).all() for i, a in enumerate(kept))
            for call in (
                lambda: engine.submit(np.sum, array).result(),
                lambda: engine.put(array),
            ):
                try:
                    call()
                    print("had room")
                except MemoryBudgetExceeded as error:
                    with_numbers(error)
            del kept[1:]
            assert engine.submit(np.sum, array).result() == 16 * MIB
            assert (kept[0] == 0).all()
        """),
        400 * MIB,
    )
    assert "MemoryBudgetExceeded" in result.stdout


def test_results_larger_than_the_cgroup_leaves():
    result = run_in_group(
        script("""
        with shm.Engine(2, memory="2 GiB") as engine:
            def large(n):
                a = np.empty(n, "u1")  # born shared if there is room
                return len(a)
            assert engine.submit(large, 8 * MIB).result() == 8 * MIB
            x = np.broadcast_to(np.ones(MIB // 8), (600, MIB // 8))  # 600 MiB of blocks, one MiB of memory
            assert engine.reduce(np.sum, x, combine=lambda a, b: a + b) == x.size
            for array in engine.map(np.ones, [8 * MIB] * 20, ["u1"] * 20):
                assert array[-1] == 1
            assert engine.reduce(lambda b: b.sum(), np.ones(4 * MIB), combine=max) > 0
        """),
        400 * MIB,
    )
    assert result.stderr == ""


def test_a_ring_takes_what_the_cgroup_leaves():
    result = run_in_group(
        script("""
        with shm.Ring(1000, "1 GiB") as ring:
            count = 0
            try:
                while count < 1000:
                    with ring.claim((MIB,), "u1", timeout=0.5) as frame:
                        frame[:] = count % 251
                    count += 1
                sys.exit("there was more than there is")
            except (MemoryBudgetExceeded, Timeout) as error:
                print(count, error)
            for i in range(count):
                with ring.lease(timeout=1) as frame:
                    assert (frame == i % 251).all()
        """),
        200 * MIB,
    )
    assert 20 < int(result.stdout.split()[0]) < 200


def test_a_queue_takes_what_the_cgroup_leaves():
    result = run_in_group(
        script("""
        q = shm.Queue()
        piece = bytes(MIB)
        count = 0
        try:
            while count < 1000:
                q.put(piece)  # nobody reads: it must not wait for ever
                count += 1
            sys.exit("there was more than there is")
        except queue.Full as error:
            with_numbers(error)
            print(count)
        for _ in range(count):
            assert q.get() == piece
        q.close()
        """),
        200 * MIB,
    )
    assert 5 < int(result.stdout.split()[-1]) < 200


def test_the_default_budget_is_a_part_of_the_cgroup():
    result = run_in_group(
        script("""
        with shm.Engine(1) as engine:
            print(engine.stats().memory_budget)
        """),
        400 * MIB,
    )
    assert 16 * MIB <= int(result.stdout) <= 100 * MIB


# --- limits of a process --------------------------------------------------------------------------


def test_a_limit_of_address_space():
    """The whole budget is mapped, so a limit below it is refused at once, with numbers."""
    source = script("""
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        for make in (lambda: shm.Engine(2, memory="4 GiB"), lambda: shm.Ring(8, "4 GiB")):
            try:
                make()
                sys.exit("it fits")
            except MemoryBudgetExceeded as error:
                with_numbers(error)
                assert "RLIMIT_AS" in str(error) or "ulimit" in str(error), error
        assert os.listdir("/dev/shm") == before
        with shm.Ring(8, "8 MiB") as ring:
            ring.send(np.ones(1000))
            assert ring.receive().sum() == 1000
    """).replace("MIB = 1 << 20", "MIB = 1 << 20\nbefore = os.listdir('/dev/shm')", 1)
    result = mount_namespace_run(source, "64m", timeout=SECONDS, env={"OPENBLAS_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("limit", [8, 12, 16, 20, 24])
def test_a_limit_of_descriptors(limit):
    """Too few for the workers: the error says so, and what had started is gone."""
    source = script(f"""
        import subprocess
        shm.Ring(8, "8 MiB").close()  # all is imported
        before = sorted(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))
        try:
            shm.Engine(8, memory="32 MiB")
            sys.exit("there were enough")
        except OSError as error:
            print(error)
        import gc
        gc.collect()
        children = open(f"/proc/self/task/{{os.getpid()}}/children").read().split()
        commands = [open(f"/proc/{{pid}}/cmdline").read() for pid in children]
        assert not [c for c in commands if "workers.child" in c], commands
        after = sorted(os.listdir("/proc/self/fd"))
        assert after == before, (before, [(fd, os.path.exists(fd) and os.readlink(fd)) for fd in after])
    """)
    result = run_script(source, timeout=SECONDS)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Too many open files" in result.stdout


def test_a_limit_of_processes_is_an_error():
    """As root the kernel does not count processes; then there is nothing to see."""
    source = script("""
        import threading
        try:
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
            engine = shm.Engine(2, memory="32 MiB")
        except (OSError, RuntimeError) as error:
            print("refused", error)
        else:
            assert list(engine.map(abs, [-1])) == [1]
            engine.close()
            print("not counted")
    """)
    result = run_script(source, timeout=SECONDS, check=True)
    assert re.match("refused .*|not counted", result.stdout)
