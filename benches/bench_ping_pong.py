"""Round trips of 64 bytes between two processes, and what waiting costs.

    ping ── there ──► pong
         ◄── back ──

Needs 2 cores; each process is pinned to one, so that the kernel cannot put both on the same. Expected: each answer
carries the number of its question. With pauses both sides compute for a while before they send, so that the other one
is asleep; the pauses are taken off. Who is woken finds the caches cold, and an interpreter is large: the same
semaphores with the interpreter around them tell how much of the time that is.
"""

from __future__ import annotations

import mmap
import time
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

import shmengine as shm
from benches.measure import cpu_seconds
from benches.rivals import PATIENCE, PipeOfBytes, compiled, fork, known, round_trips
from shmengine.bench.compare import Each
from shmengine.bench.crew import Crew, cores
from shmengine.bench.registry import MECHANISMS

IDLE_SECONDS = 2.0
PAUSE_NS = 200_000  # four times as long as anybody of ours spins


def test_ping_pong(compare: Any, targets: Any) -> None:
    """The default adaptive wait against a pipe, and against those that never sleep."""
    spinning = known("kickmsg (spinning)", "iceoryx2 (polling)")
    with ExitStack() as stack:
        result = compare(
            {
                **{
                    name: round_trips(stack, link, 64, "block", 20_000)
                    for name, link in (known("Ring", "shm") | spinning).items()
                },
                "multiprocessing.Pipe": round_trips(stack, PipeOfBytes, 64, "copy", 2_000),
            },
            unit="a round trip",
        )
    targets.at_least("ping-pong, Ring to Pipe", result.ratio("Ring", "multiprocessing.Pipe"), 10)
    if "kickmsg (spinning)" in spinning:
        ratio = result.ratio("shm", "kickmsg (spinning)")
        targets.at_least("ping-pong, shm to kickmsg spinning", ratio, 1.0)


def test_ping_pong_of_arrays(compare: Any, targets: Any) -> None:
    """The four channels, arrays that exist, against `multiprocessing.Pipe().send` and bare pyzmq."""
    links = known(*MECHANISMS, "multiprocessing.Pipe", "pyzmq")
    with ExitStack() as stack:
        result = compare(
            {name: round_trips(stack, link, 64, "copy", 2_000) for name, link in links.items()},
            unit="a round trip",
        )
    for name in MECHANISMS:
        ratio = result.ratio(name, "multiprocessing.Pipe")
        targets.note(f"ping-pong, {name} to multiprocessing.Pipe, send(array)", f"{ratio:.3g}x")


def test_ping_pong_asleep(compare: Any, targets: Any) -> None:
    """Both sides asleep: against bare semaphores in C."""
    count = 300
    with ExitStack() as stack:
        contestant = partial(_asleep, stack, count=count)
        (left, right), (sender, receiver) = shm.channel("shm"), shm.channel("shm")
        for end in (left, right, sender, receiver):
            stack.callback(end.close)
        there, back = (stack.enter_context(shm.Ring(capacity=4, arena_bytes=1 << 20)) for _ in range(2))
        result = compare(
            {
                "shm": contestant(partial(_ping, left, left), partial(_pong, right, right)),
                "Ring": contestant(partial(_ping, there, back), partial(_pong, back, there)),
                "shm, bytes sent": contestant(partial(_ping_bytes, sender), partial(_pong_bytes, receiver)),
                "sem_t in Python": contestant(*_semaphores_in_python()),
                "sem_t in C": contestant(*_semaphores()),
            },
            unit="a round trip, less the pause",
        )
    for name in ("shm", "Ring"):
        ratio = 1 / result.ratio(name, "sem_t in C")
        targets.at_most(f"ping-pong of sleepers, {name} to sem_t in C, time", ratio, 1.15, "x")
    for name in ("shm, bytes sent", "sem_t in Python"):
        targets.note(f"the same, {name}", f"{1 / result.ratio(name, 'sem_t in C'):.3g}x")


def test_large_messages_to_who_sleeps(compare: Any, targets: Any) -> None:
    """1 MiB there, filled in place or copied in, and a short answer: who sleeps wakes meanwhile."""
    count, nbytes = 300, 1 << 20
    with ExitStack() as stack:
        left, right = shm.channel("shm")
        for end in (left, right):
            stack.callback(end.close)
        there, back = (stack.enter_context(shm.Ring(capacity=4, arena_bytes=64 << 20)) for _ in range(2))
        contestants = {
            "shm": (partial(_ping, left, left), partial(_pong, right, right)),
            "Ring": (partial(_ping, there, back), partial(_pong, back, there)),
            "sem_t in Python": _semaphores_in_python(nbytes),
        }
        result = compare(
            {
                name: _asleep(stack, partial(ping, nbytes=nbytes), pong, count)
                for name, (ping, pong) in contestants.items()
            },
            unit="a round trip, less the pause",
        )
    for name in ("shm", "Ring"):
        ratio = 1 / result.ratio(name, "sem_t in Python")
        targets.at_most(f"1 MiB to who sleeps, {name} to sem_t in Python, time", ratio, 1, "x")


def _asleep(stack: ExitStack, ping: Any, pong: Any, count: int) -> Any:
    """Return a contestant: round trips between two who compute for a while before they send."""
    crew = stack.enter_context(Crew((_member(ping), _member(pong)), cores(2), PATIENCE))

    def run() -> Each:
        trips, right = crew.ask(count, count)
        assert right == count == len(trips), "wrong answers"
        return Each(float(np.median(trips)) - PAUSE_NS / 1e9)

    return run


def _member(part: Any) -> Any:
    return lambda: (part, lambda: None)


def _think(ns: int) -> None:
    """Compute for a while, in the language of those who do: a call out of the interpreter would be part of a trip."""
    clock = time.perf_counter_ns
    end = clock() + ns
    while clock() < end:
        pass


def _ping(out: Any, back: Any, count: int, nbytes: int = 64) -> list[float]:
    clock, trips = time.perf_counter, []
    for number in range(count):
        _think(PAUSE_NS)
        start = clock()
        frame = out.claim(nbytes, "u1")
        frame.array.fill(number & 127)
        frame.commit()
        frame = back.lease()
        answer = int(frame.array[63])
        frame.release()
        trips.append(clock() - start)
        assert answer == (number & 127) + 1
    return trips


def _pong(out: Any, back: Any, count: int) -> int:
    for _ in range(count):
        frame = back.lease()
        value = int(frame.array[63])
        frame.release()
        _think(PAUSE_NS)
        frame = out.claim(64, "u1")
        frame.array.fill(value + 1)
        frame.commit()
    return count


def _ping_bytes(end: Any, count: int) -> list[float]:
    clock, trips = time.perf_counter, []
    for number in range(count):
        _think(PAUSE_NS)
        start = clock()
        end.send(bytes((number & 127,)) * 64)
        answer = end.receive()[63]
        trips.append(clock() - start)
        assert answer == (number & 127) + 1
    return trips


def _pong_bytes(end: Any, count: int) -> int:
    for _ in range(count):
        value = end.receive()[63]
        _think(PAUSE_NS)
        end.send(bytes((value + 1,)) * 64)
    return count


def _semaphores_in_python(room: int = 64) -> Any:
    message = np.frombuffer(mmap.mmap(-1, max(room, 4096)), np.uint8)
    answer_here = message[:64]
    there, back = fork.Semaphore(0), fork.Semaphore(0)

    def ping(count: int, nbytes: int = 64) -> list[float]:
        clock, trips, question = time.perf_counter, [], message[:nbytes]
        for number in range(count):
            _think(PAUSE_NS)
            start = clock()
            question.fill(number & 127)
            there.release()
            back.acquire()
            answer = int(message[63])
            trips.append(clock() - start)
            assert answer == (number & 127) + 1
        return trips

    def pong(count: int) -> int:
        for _ in range(count):
            there.acquire()
            value = int(message[63])
            _think(PAUSE_NS)
            answer_here.fill(value + 1)
            back.release()
        return count

    return ping, pong


def _semaphores() -> Any:
    rival = compiled()
    memory = np.frombuffer(mmap.mmap(-1, 4096), np.uint8)
    rival.rival_trip_init(memory.ctypes.data)

    def ping(count: int) -> list[float]:
        times = np.zeros(count, np.uint64)
        assert rival.rival_ping(memory.ctypes.data, count, PAUSE_NS, times.ctypes.data) == count
        return list(times / 1e9)

    return ping, lambda count: rival.rival_pong(memory.ctypes.data, count, PAUSE_NS)


def _wait_for_one(ring: shm.Ring) -> None:
    with ring.lease(60):
        pass
    with ring.lease(60):  # idle from here on
        pass


def test_idle_waiter(benchmark: Any, spawn: Any, targets: Any) -> None:
    """A process that waits for a message; CPU time while nothing comes."""
    with shm.Ring(capacity=4, arena_bytes=1 << 20) as ring:
        waiter = spawn.Process(target=_wait_for_one, args=(ring,), daemon=True)
        waiter.start()
        with ring.claim(1, "u1", 60):
            pass
        while ring.approx_fill():
            time.sleep(0.001)
        time.sleep(0.1)  # it settles down: that is not what is measured
        before = cpu_seconds(waiter.pid)
        benchmark.pedantic(time.sleep, (IDLE_SECONDS,), rounds=1)
        used = cpu_seconds(waiter.pid) - before
        with ring.claim(1, "u1", 60):
            pass
        waiter.join(60)
        assert waiter.exitcode == 0
    targets.at_most("idle waiter on a ring, CPU", used / IDLE_SECONDS * 100, 1, " %")


def test_idle_engine(benchmark: Any, targets: Any) -> None:
    """An engine without work: the workers, and the service thread in the main process."""
    import psutil

    with shm.Engine(2) as engine:
        assert list(engine.map(abs, range(-1000, 0))) == list(range(1000, 0, -1))
        workers = [child.pid for child in psutil.Process().children() if _is_worker(child)]
        assert len(workers) == engine.workers
        time.sleep(0.1)
        main, before = time.process_time(), [cpu_seconds(pid) for pid in workers]
        benchmark.pedantic(time.sleep, (IDLE_SECONDS,), rounds=1)
        used = sum(cpu_seconds(pid) - start for pid, start in zip(workers, before, strict=True))
        main = time.process_time() - main
    targets.at_most("idle engine, CPU of two workers", used / IDLE_SECONDS * 100, 0.1, " %")
    targets.at_most("idle engine, CPU of the main process", main / IDLE_SECONDS * 100, 0.1, " %")


def _is_worker(process: Any) -> bool:
    return any("shmengine" in argument for argument in process.cmdline())
