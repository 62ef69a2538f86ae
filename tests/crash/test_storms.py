"""Kills, stops, signals and low limits at random moments, under load: nothing is lost, torn, doubled or stuck.

Some seconds each; all together as long as ``SHMENGINE_SOAK_MINUTES`` asks for. ``SHMENGINE_TEST_SEED`` repeats a run's
choices, as far as they are ours.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import resource
import signal
import textwrap
import threading
import time

import numpy as np
import pytest

from shmengine.errors import MemoryBudgetExceeded, PeerLost, WorkerDied
from shmengine.ring import Ring
from shmengine.workers import process
from tests.helpers import ROOT, descendants, mount_namespace_run, run_script, shm_names, start_script
from tests.helpers.fault_points import SEED, Victim
from tests.helpers.leftovers import stands_still
from tests.helpers.scripts import poll_until, soak_seconds

STORMS = 8  # tests here that take what time they are given
pytestmark = pytest.mark.watchdog(120 + 2 * soak_seconds(0))

FOREVER = 60
MIB = 1 << 20


# --- strangers around one ring ---------------------------------------------------------------------------


class Ledger:
    """What each of many processes has sent and received, in memory that outlives them."""

    def __init__(self, producers, most):
        self._memory = mmap.mmap(-1, 8 * (producers + producers * most))
        words = np.frombuffer(self._memory, "i8")
        self.begun = np.zeros(producers, int)  # by whom it is asked to send
        self.sent = words[:producers]
        self.received = words[producers:].reshape(producers, most)


def produce(ring, ledger, who):
    for number in range(ledger.received.shape[1]):
        ring.send(np.full(1 + number * 37 % 3000, who * 1_000_000 + number), timeout=FOREVER)
        ledger.sent[who] = number + 1
    signal.pause()


def consume(ring, ledger):
    while True:
        lease = ring.lease()
        with lease as frame:
            assert (frame == frame[0]).all(), "torn"
            who, number = divmod(int(frame[0]), 1_000_000)
            assert frame.size == 1 + number * 37 % 3000, "torn"
            # A second time only after a death, and then that is said.
            assert lease.attempts or not ledger.received[who, number], "doubled"
            ledger.received[who, number] = 1


@pytest.mark.slow
def test_strangers_are_killed_and_stopped():
    """What was sent is received, though everybody may die or stand still at any moment, two at once as well."""
    print("seed:", SEED)
    choices = random.Random(SEED)
    seconds = soak_seconds(2, STORMS)
    producers = int(seconds * 60) + 100
    ledger = Ledger(producers, 400)
    alive = {}
    born = 0
    with Ring(8, "16 MiB") as ring:

        def start(role):
            nonlocal born
            if role == "produce":
                who, born = born, born + 1
                alive[Victim(lambda say: produce(ring, ledger, who))] = role
            else:
                alive[Victim(lambda say: consume(ring, ledger))] = role

        for role in ("produce", "consume") * 2:
            start(role)
        end = time.monotonic() + seconds
        kills = stops = 0
        while time.monotonic() < end and born < producers - 2:
            time.sleep(choices.uniform(0, 0.04))  # the random moment is what is tested
            if choices.random() < 0.3:
                stopped = choices.choice(list(alive))
                os.kill(stopped.pid, signal.SIGSTOP)
                time.sleep(choices.uniform(0, 0.02))
                if choices.random() < 0.8:
                    os.kill(stopped.pid, signal.SIGCONT)
                    stops += 1
                    continue
                victims = [stopped]
            else:
                victims = choices.sample(list(alive), choices.choice([1, 1, 2]))
            for victim in victims:
                os.kill(victim.pid, signal.SIGKILL)
            for victim in victims:
                assert victim.end()[0]
                kills += 1
                start(alive.pop(victim))
        for victim in [victim for victim, role in alive.items() if role == "produce"]:
            os.kill(victim.pid, signal.SIGKILL)
            assert victim.end()[0]
            del alive[victim]
        poll_until(lambda: ring.approx_fill() == 0, what="consumers have taken all")
        for victim in alive:
            os.kill(victim.pid, signal.SIGKILL)
            assert victim.end()[0]
        with contextlib.suppress(PeerLost):
            consume(ring, ledger)  # what they had leased
        for who in range(born):
            sent = ledger.sent[who]
            assert ledger.received[who, :sent].all(), f"lost: a message of producer {who}"
            assert not ledger.received[who, sent + 1 :].any()
        messages = int(ledger.received.sum())
        print(f"{kills} kills, {stops} stops, {messages} messages, none lost, torn or doubled")
        assert min(kills, messages) > 10
        stats = ring.stats()
        assert (stats.approx_fill, stats.participants, stats.rescued_wakeups) == (0, 1, 0)
        c = ring._region.counters()
        assert (c.used, c.held, c.pins) == (0, 0, 0)
        ring.claim(14 * MIB, "u1", timeout=FOREVER).abort()


# --- an engine -----------------------------------------------------------------------------------------


def resident(pid):
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1])
    except OSError:
        return 0


def send(pid, number):
    """Send a signal to a worker, which may have ended meanwhile."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return 0
    return 1


class Load(threading.Thread):
    """Goes through one kind of call over and over, and remembers what went wrong."""

    def __init__(self, call, stop):
        super().__init__(name=call.__name__)
        self.call, self.stop = call, stop
        self.rounds = 0
        self.error = None
        self.start()

    def run(self):
        try:
            while not self.stop.is_set():
                self.call()
                self.rounds += 1
        except BaseException as error:
            self.error = error
            raise


@pytest.mark.slow
def test_workers_of_a_busy_engine_are_killed_and_stopped(make_engine):
    """Any of them, two at once, or the largest while it has a large task, as the kernel does when memory runs out."""
    print("seed:", SEED)
    choices = random.Random(SEED)
    engine = make_engine(2, memory="64 MiB", retries=1000)
    x = np.arange(300_000.0)
    large = np.ones(4 * MIB, "u1")

    def streams():
        for i, result in enumerate(engine.map(np.full, range(0, 60_000, 997), range(61))):
            assert result.size == i * 997
            assert (result == i).all()

    def blocks():
        assert np.array_equal(engine.map_blocks(lambda b: b + 1, x, block_bytes=200_000), x + 1)

    def futures():
        for future in [engine.submit(np.sum, large) for _ in range(3)]:
            assert future.result(FOREVER) == 4 * MIB

    stop = threading.Event()
    loads = [Load(call, stop) for call in (streams, blocks, futures)]
    end = time.monotonic() + soak_seconds(3, STORMS)
    kills = stops = 0
    while time.monotonic() < end and all(load.is_alive() for load in loads):
        time.sleep(choices.uniform(0.05, 0.3))  # the random moment is what is tested
        pids = engine._backend.pids
        busy = [pid for pid, *_ in engine._backend._core.pool.busy()]
        what = choices.choice(["one", "two", "largest", "stop"])
        if what == "stop" and pids:
            victim = choices.choice(pids)
            stops += send(victim, signal.SIGSTOP)
            time.sleep(choices.uniform(0, 0.1))
            send(victim, choices.choice([signal.SIGCONT, signal.SIGKILL]))
        elif what == "largest" and busy:
            kills += send(max(busy, key=resident), signal.SIGKILL)
        else:
            for victim in choices.sample(busy or pids, min(len(busy or pids), 1 + (what == "two"))):
                kills += send(victim, signal.SIGKILL)
        # Workers that are only ever killed get nothing done, and are given up in the end.
        rounds = sum(load.rounds for load in loads)
        while sum(load.rounds for load in loads) == rounds and all(load.is_alive() for load in loads):
            time.sleep(0.005)
    stop.set()
    for load in loads:
        load.join()
        assert load.error is None
    print(f"{kills} kills, {stops} stops, rounds:", {load.name: load.rounds for load in loads})
    assert engine.stats().tasks_failed == 0
    poll_until(lambda: len(engine._backend.pids) == 2, what="the dead are replaced")
    assert list(engine.map(abs, range(100))) == list(range(100))
    poll_until(lambda: engine.stats().tasks_in_flight == 0, what="nothing is on its way any more")
    poll_until(lambda: engine._backend._core.region.counters().used < MIB, what="main holds nothing more")
    assert engine.stats().rescued_wakeups == 0


BUSY_MAIN = """
    import threading, time
    import numpy as np, shmengine as shm
    engine = shm.Engine(2, memory="64 MiB")
    x = np.ones(500_000)
    def load():
        while True:
            engine.map_blocks(np.sqrt, x, block_bytes=200_000)
            kept = [engine.submit(np.ones, 100_000) for _ in range(10)]
            sum(array[0] for array in engine.map(np.zeros, [50_000] * 20))
    for _ in range(2):
        threading.Thread(target=load, daemon=True).start()
    engine.submit(abs, 1).result()
    print("ready", flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("with_it", ["nobody", "a worker", "a stopped worker"])
def test_a_busy_main_process_is_killed(with_it):
    """And at the same moment one of its workers, or one stands still. All end, and nothing stays."""
    choices = random.Random(SEED)
    names = shm_names()
    with start_script(BUSY_MAIN) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(choices.uniform(0, 0.1))  # the random moment is what is tested
        workers = descendants(process.pid)
        some = max(pid for pid in workers if b"workers.child" in command_of(pid))
        if with_it == "a worker":
            send(some, signal.SIGKILL)
        elif with_it == "a stopped worker":
            send(some, signal.SIGSTOP)
            # All of it: else the kernel does not wake it when it is orphaned.
            poll_until(lambda: stands_still(some), what="it stands still")
        process.kill()
        process.wait()
        assert process.stderr.read() == ""  # its end: nobody holds the pipe any more
    poll_until(lambda: not any(command_of(pid) for pid in workers), what="its workers have ended")
    poll_until(lambda: shm_names() <= names, what="its names are gone")


def command_of(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


# --- signals ---------------------------------------------------------------------------------------------

INTERRUPTED = """
    import atexit, multiprocessing, signal, sys, time
    import numpy as np, shmengine as shm
    from shmengine.errors import Timeout

    end = time.monotonic() + float(sys.argv[1])
    handled = 0
    ctx = multiprocessing.get_context("fork")

    def count(number, frame):
        global handled
        handled += 1

    def calm():
        signal.setitimer(signal.ITIMER_REAL, 0)

    def storm():
        atexit.register(calm)
        signal.signal(signal.SIGALRM, count)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)

    def partner(work):
        def run():
            storm()
            work()
            calm()
        process = ctx.Process(target=run)
        process.start()
        return process

    def finish(process):
        process.join()
        assert process.exitcode == 0
        assert handled > 10
        print("done", flush=True)
"""
TRAFFIC = {
    "ring": """
        ring, back = shm.Ring(2, "32 MiB"), shm.Ring(2, "32 MiB")
        def echo():
            while True:
                with ring.lease() as frame:
                    if frame.size == 1:
                        return
                    with back.claim(frame.shape, frame.dtype) as answer:
                        answer[:] = frame
        echoing = partner(echo)
        storm()
        number = 0
        while time.monotonic() < end or number < 100:
            number += 1
            for i in range(2):
                ring.send(np.full(1000_000 if number % 50 == 0 else 2 + number % 5000, 2 * number + i))
            for i in range(2):
                assert (back.receive() == 2 * number + i).all()
            if number % 20 == 0:
                start = time.monotonic()
                try:
                    back.lease(timeout=0.01)
                except Timeout:
                    assert time.monotonic() - start >= 0.01
        ring.send([0])
        assert ring.stats().rescued_wakeups == back.stats().rescued_wakeups == 0
        calm()
        finish(echoing)
    """,
    "queue": """
        q, back = shm.JoinableQueue(3), shm.Queue()
        def work():
            for item in iter(q.get, None):
                back.put(item)
                q.task_done()
            q.task_done()
        workers = [partner(work) for _ in range(2)]
        storm()
        number = 0
        while time.monotonic() < end or number < 100:
            for i in range(5):
                q.put((number + i, bytes(number % 3000)))
            q.join()
            got = sorted(back.get() for _ in range(5))
            assert got == [(number + i, bytes(number % 3000)) for i in range(5)]
            number += 5
        for _ in workers:
            q.put(None)
        q.join()
        calm()
        for worker in workers:
            finish(worker)
    """,
    "engine": """
        storm()
        with shm.Engine(2, memory="64 MiB", initializer=storm) as engine:
            x = np.arange(200_000.0)
            rounds = 0
            while time.monotonic() < end or rounds < 3:
                rounds += 1
                assert [len(a) for a in engine.map(np.ones, range(0, 60_000, 991))] == list(range(0, 60_000, 991))
                assert np.array_equal(engine.map_blocks(np.negative, x, block_bytes=100_000), -x)
                assert [f.result() for f in [engine.submit(abs, -i) for i in range(50)]] == list(range(50))
                assert engine.submit(time.sleep, 0.02).result() is None
            stats = engine.stats()
            assert (stats.worker_deaths, stats.tasks_failed, stats.rescued_wakeups) == (0, 0, 0), stats
        calm()
        assert handled > 10
        print("done")
    """,
}


@pytest.mark.slow
@pytest.mark.parametrize("what", TRAFFIC)
def test_a_thousand_signals_a_second(what):
    """Every system call may be interrupted, in everybody: no message is lost, and no error comes of it."""
    source = textwrap.dedent(INTERRUPTED) + textwrap.dedent(TRAFFIC[what])
    seconds = soak_seconds(1, STORMS)
    result = run_script(source, args=[str(seconds)], timeout=60 + 2 * seconds, check=True)
    assert set(result.stdout.split()) == {"done"}
    assert result.stderr == ""


# --- low limits ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_descriptors():
    """Within it this process can open no file."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("reaped", [True, False])
def test_who_has_no_descriptors_learns_of_deaths_too(reaped):
    """No pidfd can be opened; but the kernel tells whether there is such a process, and a parent, whether it ended."""
    with Ring(4, "8 MiB") as ring:
        ring.send([7])
        victims = [
            Victim(lambda say: (ring.lease(), say(1), signal.pause())),
            Victim(lambda say: (ring._handle(), say(1), signal.pause())),
        ]
        for victim in victims:
            assert victim.hear() == 1
        with no_descriptors():
            for victim in victims:
                victim.kill()
                if reaped:
                    victim.end()
            with ring.lease(timeout=FOREVER) as frame:
                assert frame[0] == 7
            del frame
            with pytest.raises(PeerLost):
                ring.lease(timeout=FOREVER)
        if not reaped:
            for victim in victims:
                victim.end()


def limit_address_space(more):
    """Let this process have so many bytes of address space more, and no others."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))


def test_who_cannot_map_a_ring_says_so_and_is_no_participant():
    with Ring(4, "64 MiB") as ring:

        def act(say):
            limit_address_space(32 * MIB)
            for _ in range(3):
                with pytest.raises(MemoryBudgetExceeded, match="RLIMIT_AS"):
                    ring.send([1])
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
            with pytest.raises(OSError, match="Too many open files"):
                ring.send([1])

        assert Victim(act).end() == (False, set())
        ring.send([2])
        assert ring.receive()[0] == 2
        assert (ring.stats().participants, ring.stats().deaths) == (1, 0)


def test_workers_with_low_limits_report_what_they_cannot_do(make_engine):
    def initializer():
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 32 * MIB, used + 32 * MIB))
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))

    engine = make_engine(2, memory="32 MiB", initializer=initializer)
    for _ in range(3):
        assert isinstance(engine.submit(np.ones, 16 * MIB).exception(FOREVER), MemoryError)
        assert isinstance(engine.submit(open, "/dev/null").exception(FOREVER), OSError)
        assert [len(a) for a in engine.map(np.ones, [100_000] * 20)] == [100_000] * 20
        x = np.arange(100_000.0)
        assert np.array_equal(engine.map_blocks(np.negative, x, block_bytes=80_000), -x)
    assert engine.stats().worker_deaths == 0


@pytest.mark.parametrize(
    ("limit", "value", "said"),
    [("RLIMIT_AS", 600 * MIB, "RLIMIT_AS"), ("RLIMIT_AS", 40 * MIB, ""), ("RLIMIT_NOFILE", 3, "")],
)
def test_workers_that_cannot_start_are_given_up(make_engine, monkeypatch, limit, value, said):
    """And the error says why, in their own last words."""
    setting = f"import resource; resource.setrlimit(resource.{limit}, ({value}, {value})); "
    monkeypatch.setattr(process, "BOOTSTRAP", setting + process.BOOTSTRAP)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    engine = make_engine(1, memory="1 GiB")
    error = engine.submit(abs, -1).exception(FOREVER)
    assert isinstance(error, WorkerDied)
    assert "its start and the initializer; tried" in str(error)
    assert error.stderr_tail
    assert said in error.stderr_tail


def test_workers_that_cannot_be_replaced(make_engine):
    """Who is left goes on, and the others come as soon as they can."""
    engine = make_engine(2, memory="32 MiB")
    assert engine.submit(abs, -1).result() == 1
    with no_descriptors():
        send(engine._backend.pids[0], signal.SIGKILL)
        poll_until(lambda: len(engine._backend.pids) == 1, what="one is left")
        assert list(engine.map(abs, range(100))) == list(range(100))
    poll_until(lambda: len(engine._backend.pids) == 2, what="there are two again")
    assert list(engine.map(abs, range(100))) == list(range(100))
    assert engine.stats().tasks_failed == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_an_engine_without_workers_is_given_up(make_engine, workers):
    engine = make_engine(workers, memory="32 MiB")
    assert engine.submit(abs, -1).result() == 1
    with no_descriptors():
        futures = [engine.submit(time.sleep, 1000) for _ in range(3)]
        for pid in engine._backend.pids:
            send(pid, signal.SIGKILL)
        for future in futures:
            error = future.exception(FOREVER)
            assert isinstance(error, WorkerDied)
    with pytest.raises(
        WorkerDied, match=r"no worker is left \(none can be started: .*Too many open files.*; tried"
    ):
        list(engine.map(abs, range(10)))


def test_deaths_while_the_file_system_is_full():
    """What the dead held comes back without a byte more."""
    result = mount_namespace_run(
        """
        import signal
        import shmengine as shm
        from shmengine._native import lib
        from shmengine.errors import *
        from tests.helpers.fault_points import Victim
        ring = shm.Ring(64, "64 MiB", name="full")
        sent = 0
        try:
            while True:
                with ring.claim(100_000, "u1", timeout=0.3) as frame:
                    frame[:] = sent
                sent += 1
        except (MemoryBudgetExceeded, Timeout) as error:
            print(type(error).__name__, sent, flush=True)
        for attempts in range(3):
            victim = Victim(lambda say: ([ring.lease() for _ in range(sent)], say(1), signal.pause()))
            assert victim.hear() == 1
            victim.kill()
            assert victim.end()[0]
            lib.shmr_check_deaths(ring._h)
            assert ring.stats().approx_fill == sent
        got = []
        for _ in range(sent):
            lease = ring.lease()
            got.append(int(lease.array[0]))
            assert lease.attempts == 3
            assert (lease.array == got[-1]).all()
            lease.release()
        assert sorted(got) == list(range(sent))
        assert ring.try_lease() is None
        ring.close()
        assert 5 <= sent < 64
        """,
        "8m",
        timeout=FOREVER,
        env={"PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert result.stderr == ""
