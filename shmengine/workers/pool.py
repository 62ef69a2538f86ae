"""Worker processes: start, watch, replace. Death is learnt from the kernel (pidfd), never from a clock.

Workers are started by exec, with the region's descriptor inherited. One thread a pool, started after the
first workers, waits for their pidfds and passes on what they print; a worker that dies is recovered, reported
and replaced.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import pickle
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shmengine import config
from shmengine._native import ffi, lib
from shmengine.descriptors import Descriptor, pipe
from shmengine.errors import ShmError
from shmengine.region import Region
from shmengine.threads import Service
from shmengine.workers import stacks
from shmengine.workers.inheritance import Inheritance
from shmengine.workers.messages import LEAVING, STARTING
from shmengine.workers.process import WorkerProcess

__all__ = ["Activity", "Death", "Pool"]

BEGUN_SECONDS = 0.25  # then a line that a worker has begun is passed on without its end
OUTPUT_SECONDS = 1.0  # a result waits no longer for somebody else who is just writing what workers print
LOOK_SECONDS = 1.0  # then at the latest it is noticed that other code has closed our descriptors
GRACE_SECONDS = 2.0
CROWDED_SECONDS = 0.02  # between two looks, where not all can be waited for at once
RETRY_SECONDS = 0.25  # after a worker could not be started


@dataclass
class Death:
    """What is known of a worker that ended."""

    pid: int
    """0: it could not even be started, and no other worker is left."""
    returncode: int | None
    tag: int
    """Batch that it was running; 0: none."""
    index: int
    """Task of that batch, or `messages.WHOLE_BATCH`."""
    leased: list[int]
    """Tags of all batches that it had leased."""
    stderr_tail: str
    cause: str
    timed_out: bool
    """We killed it, for a task that took too long."""
    starting: bool
    """It died before it could run any task."""
    stack: str
    """Where it was when we killed it."""


@dataclass(frozen=True)
class Activity:
    """What a worker has been doing for some time."""

    pid: int
    tag: int
    """Batch; `messages.STARTING`: none yet."""
    index: int
    """Task of that batch, or `messages.WHOLE_BATCH`."""
    seconds: float
    starves: int
    """Bytes of shared memory that it waits for."""
    stack: str
    """In parentheses: why there is none."""


_Source = tuple[Descriptor, WorkerProcess | None, str]
"""A descriptor to be watched, of which worker (None: the one that wakes us), and its name."""


class Pool:
    """A fixed number of workers on one region.

    Parameters
    ----------
    region : Region
        With the task and the result ring.
    count : int
        Workers to keep, at most.
    setup : dict
        What `child.Worker` is told.
    inheritance : Inheritance
        The initializer, and descriptors for it; closed with the pool.
    environment : dict
        Variables set before exec, over the main process's.
    on_death : callable
        Called in the pool's thread with a `Death`, after its memory was recovered and before its replacement starts;
        returns whether to replace it.
    time_limit : callable
        ``time_limit(tag, index)``: seconds that a task may run, or None.
    start : int
        Workers to start now; `provide` starts more.
    """

    def __init__(
        self,
        region: Region,
        count: int,
        setup: dict[str, Any],
        inheritance: Inheritance,
        environment: dict[str, str],
        on_death: Callable[[Death], bool],
        time_limit: Callable[[int, int], float | None],
        *,
        start: int,
    ) -> None:
        self.region = region
        self.count = count
        self.deaths = 0
        self._environment = environment
        self._on_death = on_death
        self._time_limit = time_limit
        self._workers: dict[int, WorkerProcess] = {}
        self._lock = threading.RLock()
        self._asking = threading.Lock()  # for stacks
        self._output = threading.RLock()  # who passes on what workers print; taken before the other lock
        self._places: dict[int, WorkerProcess] = {}  # by number in the region; empty: not known
        self._closing = False
        self._timed = False
        self._missing = 0  # workers that could not be started, and are tried again
        self._retry_at = 0.0
        self._setup = {**setup, "initializer": inheritance.frame}
        self._inheritance = inheritance
        self._poll: select.poll | None = None  # None: what is to be watched has changed
        self._watched: dict[int, _Source] = {}
        with contextlib.ExitStack() as on_failure:
            on_failure.enter_context(inheritance)
            self._setup_file = on_failure.enter_context(_file_of(self._setup))
            self._wake_end, self._waker = map(on_failure.enter_context, _wake_pipe())
            on_failure.callback(self.kill)
            for _ in range(start):
                self._start()
            on_failure.pop_all()
        self._thread = Service(self._watch, config.POOL_THREAD)
        self._thread.start()

    def _start(self) -> None:
        if not self._setup_file.is_ours():
            self._setup_file = _file_of(self._setup)
        worker = WorkerProcess(self.region, self._setup_file, self._inheritance, self._environment)
        with self._lock:
            self._workers[worker.pid] = worker
            self._places = {}
            self._poll = None

    # --- watching --------------------------------------------------------------------------------

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        with self._lock:
            return list(self._workers)

    def processes(self) -> dict[int, WorkerProcess]:
        """Return the workers by their process ids."""
        with self._lock:
            return dict(self._workers)

    def provide(self, tasks: int, *, at_once: bool) -> None:
        """Before this number of tasks is out: start a worker if none is idle, or (`at_once`) all that are missing."""
        if len(self._workers) >= self.count:
            return
        with self._lock:
            while (
                len(self._workers) < self.count and not self._closing and (at_once or tasks > self._ready())
            ):
                self._start()
                self._wake()  # it is to be watched
                tasks = 0

    def _ready(self) -> int:
        """Return how many workers take tasks."""
        progress = [self._progress(pid) for pid in self._workers]
        return sum(found is not None and found[0] not in (STARTING, LEAVING) for found in progress)

    def watch_time(self) -> None:
        """From now on some tasks have a time limit: look at the clock as well."""
        if not self._timed:
            self._timed = True
            self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError, ShmError):
            os.write(self._waker.fileno(), b"\0")

    def _watch(self) -> None:
        look_at = 0.0
        while True:
            now = time.monotonic()
            if now >= look_at:
                self._regain()
                look_at = now + LOOK_SECONDS
            wait = min(look_at - now, self._forward_begun())
            if self._timed:
                wait = min(wait, self._enforce_limits())
            if self._missing:
                wait = min(wait, max(self._retry_at - time.monotonic(), 0))
            for file, worker, name in self._await(wait):
                if not file.is_ours():
                    look_at = 0.0  # others may be lost, too
                    self._poll = None
                elif worker is None:
                    file.read(1 << 10)
                elif name == "pidfd":
                    self._bury(worker)
                else:
                    with self._output:
                        if not worker.forward(name):
                            self._poll = None
            if self._closing and not self._workers:
                return
            if self._missing and time.monotonic() >= self._retry_at:
                self._start_missing()

    def _await(self, seconds: float) -> list[_Source]:
        """Wait until there is something to read, and return where.

        (By `poll`, which has no descriptor of its own that other code could close, and holds the files that it waits
        for: a death is seen whatever becomes of our descriptors meanwhile.)
        """
        with self._lock:  # `provide` starts workers in other threads
            if (poll := self._poll) is None:
                sources: list[_Source] = [(self._wake_end, None, "")]
                for worker in self._workers.values():
                    sources += ((file, worker, name) for name, file in worker.watched())
                self._watched = {source[0].number: source for source in sources if source[0].is_ours()}
                self._poll = poll = select.poll()
                for fd in self._watched:
                    poll.register(fd, select.POLLIN)
        try:
            return [self._watched[fd] for fd, _ in poll.poll(seconds * 1000)]
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        # More descriptors than RLIMIT_NOFILE now allows: one after the other.
        found = []
        for fd, source in self._watched.items():
            single = select.poll()
            single.register(fd, select.POLLIN)
            if single.poll(0):
                found.append(source)
        if not found:
            time.sleep(min(seconds, CROWDED_SECONDS))
        return found

    def _regain(self) -> None:
        """Open anew what other code has closed: it must not go unnoticed that a worker has died."""
        gone = []
        with self._lock, contextlib.suppress(OSError):  # there are no descriptors to be had: at the next look
            if not (self._wake_end.is_ours() and self._waker.is_ours()):
                lost = self._wake_end, self._waker
                self._wake_end, self._waker = _wake_pipe()
                for file in lost:
                    file.close()
                self._poll = None
            for worker in self._workers.values():
                try:
                    if worker.regain():
                        self._poll = None
                except ProcessLookupError:
                    gone.append(worker)
        for worker in gone:
            self._bury(worker)

    def _enforce_limits(self) -> float:
        """Kill workers whose task runs longer than it may; return the seconds until the next look."""
        wait = 0.05
        now = time.monotonic_ns()
        for pid, worker in list(self._workers.items()):
            found = self._progress(pid)
            if found is None:
                continue
            tag, index, since, _ = found
            limit = self._time_limit(tag, index) if tag else None
            if limit is None or not since or worker.killed_for is not None:
                continue
            left = limit - (now - since) / 1e9
            if left <= 0:
                self._end_overdue(worker, found)
            else:
                wait = min(wait, left)
        return wait

    def _end_overdue(self, worker: WorkerProcess, found: tuple[int, int, int, int]) -> None:
        """Kill a worker for the task that it runs too long; if it is at that task no more, let it go on."""
        with self._asking, contextlib.suppress(ProcessLookupError):
            worker.send_signal(signal.SIGSTOP)  # what is killed is what was judged
            stacks.await_standstill(worker.pid)
            now = self._progress(worker.pid)
            if now is None or now[:3] != found[:3]:
                worker.send_signal(signal.SIGCONT)
                return
            worker.killed_for = found[:2]
            (worker.stack,) = stacks.answers([worker.ask_at_last()], self._lock)
            worker.send_signal(signal.SIGKILL)

    def _progress(self, pid: int) -> tuple[int, int, int, int] | None:
        """Return (tag, index, since, bytes it starves for) of a worker."""
        if self.region.closed:
            return None
        slot = lib.shmr_find(self.region.handle, pid)
        if slot < 0:
            return None
        words = ffi.new("uint64_t[4]")
        lib.shmr_progress(self.region.handle, slot, words, words + 1, words + 2, words + 3)
        return words[0], words[1], words[2], words[3]

    def starving(self) -> list[tuple[int, int]]:
        """Return (pid, since) of workers whose task waits for memory; nothing unless nobody else will do anything."""
        found = []
        for pid in self.pids:
            tag, _, since, starves = self._progress(pid) or (STARTING, 0, 0, 0)
            if not starves and tag != 0:
                return []
            if starves and tag != STARTING:
                found.append((pid, since))
        return found

    def deny(self, pid: int) -> None:
        """Make a worker stop waiting for memory."""
        slot = lib.shmr_find(self.region.handle, pid)
        if slot >= 0:
            lib.shmr_deny(self.region.handle, slot)

    def busy(self) -> list[tuple[int, int, int, float]]:
        """Return (pid, tag, index, seconds) of the workers that run a task."""
        now = time.monotonic_ns()
        found = []
        for pid in self.pids:
            progress = self._progress(pid)
            if progress is not None and progress[0] not in (0, STARTING):
                found.append((pid, progress[0], progress[1], (now - progress[2]) / 1e9))
        return found

    def slow(self, after: float) -> list[Activity]:
        """Return what has been going on for so many seconds, the longest first; asks those workers for their stacks."""
        with self._asking, contextlib.ExitStack() as files:
            questions, found = [], []
            with self._lock:  # nobody is buried meanwhile, and the region stays
                now = time.monotonic_ns()
                for pid, worker in self._workers.items():
                    tag, index, since, starves = self._progress(pid) or (STARTING, 0, worker.started, 0)
                    seconds = (now - (since or now)) / 1e9
                    if tag and seconds >= after:
                        found.append((seconds, pid, tag, index, since, starves))
                        questions.append(worker.ask(files))
            said = stacks.answers(questions, self._lock)
            with self._lock:
                # Without those that have moved on, whose stack is of something else.
                return [
                    Activity(pid, tag, index, seconds, starves, stack)
                    for (seconds, pid, tag, index, since, starves), stack in sorted(
                        zip(found, said, strict=True), reverse=True
                    )
                    if (self._progress(pid) or (tag, index, since))[:3] == (tag, index, since)
                ]

    # --- output ----------------------------------------------------------------------------------

    def forward_output(self, place: int | None = None, tag: int = 0) -> None:
        """Pass on what a worker (by its number in the region; None: each) has printed so far.

        For results that are here, of the message with this tag: what their tasks have printed is to come out before
        anybody sees them. But if it has gone on to another message, a line that may have left it in part will have its
        end.
        """
        if not self._output.acquire(timeout=OUTPUT_SECONDS):
            return  # where it is written to holds it up
        try:
            if place is None:
                workers = list(self._workers.values())
            else:
                places = self._places
                if place not in places:
                    handle = self.region.handle
                    places = {lib.shmr_find(handle, pid): each for pid, each in self.processes().items()}
                    self._places = places
                workers = [places[place]] if place in places else []  # else it has died, which passes on all
            for worker in workers:
                if worker.forward_all() and not (
                    tag and worker.has_written_in_part() and not self._is_at(worker.pid, (0, tag))
                ):
                    worker.forward_begun()
        finally:
            self._output.release()

    def _is_at(self, pid: int, tags: tuple[int, int]) -> bool:
        progress = self._progress(pid)
        return progress is None or progress[0] in tags

    def _forward_begun(self) -> float:
        """Pass on lines that were begun some time ago; return when to look again, in seconds."""
        with self._output:
            return min(
                [worker.forward_begun(BEGUN_SECONDS) for worker in self.processes().values()],
                default=math.inf,
            )

    # --- death -----------------------------------------------------------------------------------

    def _bury(self, worker: WorkerProcess) -> None:
        with self._output, self._lock:
            worker.drain()
            returncode = worker.wait()
            progress = self._progress(worker.pid)
            leased = self._recover(worker.pid)
            worker.close()
            del self._workers[worker.pid]
            self._places = {}
            self._poll = None
        tag, index = (progress[0], progress[1]) if progress else (0, 0)
        if returncode == 0 and tag == LEAVING:
            self._missing += 1
            self._start_missing()
            return
        expected = self._closing and returncode == 0
        if not expected:
            self.deaths += 1
        death = Death(
            worker.pid,
            returncode,
            tag,
            index,
            leased,
            "\n".join(worker.tail),
            _likely_cause(returncode),
            worker.killed_for is not None and worker.killed_for == (tag, index),
            progress is None or tag == STARTING,
            worker.stack,
        )
        if self._on_death(death):
            self._missing += 1
            self._start_missing()

    def _start_missing(self) -> None:
        """Replace the dead, or try again later; while nobody is left that counts as a death at the start."""
        with self._lock:
            try:
                while self._missing and not self._closing:
                    self._start()
                    self._missing -= 1
                self._missing, self._retry_at = 0, 0.0
                return
            except (OSError, MemoryError, ShmError) as error:
                failure = str(error) or "no memory"
            nobody_left = not self._workers
        if not self._retry_at:
            self._print_failure(failure)
        self._retry_at = time.monotonic() + RETRY_SECONDS
        cause = f"none can be started: {failure}"
        if nobody_left and not self._on_death(
            Death(0, None, 0, 0, [], "", cause, timed_out=False, starting=True, stack="")
        ):
            self._missing = 0

    def _print_failure(self, failure: str) -> None:
        with contextlib.suppress(Exception):
            sys.stderr.write(f"shmengine: a worker could not be replaced, and is tried again: {failure}\n")

    def _recover(self, pid: int) -> list[int]:
        """Clear up after a dead worker; return the tags of the tasks that it had leased."""
        if self.region.closed:
            return []
        handle = self.region.handle
        slot = lib.shmr_find(handle, pid)
        if slot < 0:
            return []
        # All of it: what does not fit would go back into the ring, and be run again although it has its outcome.
        # (Functions that keep their arguments keep the messages leased, however long ago these were answered.)
        room = self.region.leases().get(pid, 0)
        taken = ffi.new("shmr_block[]", room + 1)
        count = ffi.new("uint32_t *")
        lib.shmr_recover(handle, slot, taken, room, count)
        tags = []
        for i in range(count[0]):
            tags.append(taken[i].tag)
            lib.shmr_release(handle, ffi.addressof(taken, i))
        return tags

    # --- end -------------------------------------------------------------------------------------

    def close(self, *, wait: bool, meanwhile: Callable[[], None]) -> None:
        """End the workers: those that run a task are waited for, or (not `wait`) killed.

        `meanwhile` is called now and then until they have ended.
        """
        with self._lock:  # nobody is just starting one
            self._closing = True
        if wait:
            self._wake()
            deadline = None
            while self._thread.is_alive():
                self._thread.join(0.05)
                meanwhile()
                if self.busy():
                    deadline = None
                elif deadline is None:  # an idle worker that does not go has lost its way
                    deadline = time.monotonic() + GRACE_SECONDS
                elif time.monotonic() > deadline:
                    break
        self.kill()
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        for file in (self._setup_file, self._wake_end, self._waker, self._inheritance):
            file.close()

    def kill(self) -> None:
        """End all workers now."""
        with self._lock:
            self._closing = True
            for worker in self._workers.values():
                with contextlib.suppress(ProcessLookupError):
                    worker.send_signal(signal.SIGKILL)
            if not hasattr(self, "_thread"):
                for worker in list(self._workers.values()):
                    self._bury(worker)


def _wake_pipe() -> tuple[Descriptor, Descriptor]:
    # Not an eventfd, which could not be told from another one: a pipe also wakes us when its other end is closed.
    return pipe("the wake-up of a pool", os.O_NONBLOCK)


def _file_of(setup: dict[str, Any]) -> Descriptor:
    file = Descriptor(os.memfd_create("shmengine-setup", os.MFD_CLOEXEC), "what workers are told")
    try:
        with open(file.fileno(), "wb", closefd=False) as stream:
            stream.write(pickle.dumps(setup))
    except BaseException:
        file.close()
        raise
    return file


def _oom_kills() -> int:
    """Processes that the OOM killer has killed in our memory cgroup or on this machine, as far as we can see."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


_oom_seen = _oom_kills()


def _likely_cause(returncode: int | None) -> str:
    """Say what probably happened, from what was measured."""
    global _oom_seen  # a counter of the machine, compared with its last value
    if returncode == -signal.SIGKILL:
        kills, before = _oom_kills(), _oom_seen
        _oom_seen = kills
        if kills > before:
            available = config.format_bytes(config.memory_available())
            return f"the kernel's OOM killer has struck meanwhile; {available} of memory are available now"
        return "somebody killed it; the OOM killer has not struck"
    if returncode in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGILL, -signal.SIGFPE):
        return "a crash in native code"
    if returncode is not None and returncode >= 0:
        return "the task ended the process"
    return ""
