"""Worker processes: start, watch, replace. Death is learnt from the kernel (pidfd), never from a clock.

Workers are started by exec, with the region's descriptor inherited. One thread a pool, started after the
first workers, waits for their pidfds and passes on what they print; a worker that dies is recovered, reported
and replaced.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shmengine import config
from shmengine._native import ffi, lib
from shmengine.region import Region
from shmengine.workers import logs, stacks
from shmengine.workers.inheritance import Inheritance
from shmengine.workers.messages import LEAVING, STARTING

__all__ = ["Activity", "Death", "Pool"]

PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
# Not `-m`: the package may be importable for the main process only. -P: the working directory must not shadow it.
BOOTSTRAP = "import sys; sys.path.append({root!r}); from shmengine.workers.child import main; main({fds})"
STDERR_LINES = 20
LATEST_LOOK = 3600.0
GRACE_SECONDS = 2.0
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


def _pipe(flags: int, ours: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[int, int]:
    """Return the ends of a pipe, each closed by its stack."""
    read, write = os.pipe2(os.O_CLOEXEC | flags)
    ours.callback(os.close, read)
    theirs.callback(os.close, write)
    return read, write


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


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    pidfd: int
    stack_pipe: int
    log_pipe: int
    started: int = field(default_factory=time.monotonic_ns)
    streams: dict[int, str] = field(default_factory=dict)
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=STDERR_LINES))
    partial: dict[int, bytes] = field(default_factory=dict)
    killed_for: tuple[int, int] | None = None
    stack: str = ""  # then


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
        self._workers: dict[int, _Worker] = {}
        self._lock = threading.RLock()
        self._asking = threading.Lock()  # for stacks
        self._closing = False
        self._timed = False
        self._missing = 0  # workers that could not be started, and are tried again
        self._retry_at = 0.0
        self._inheritance = inheritance
        self._descriptors = contextlib.ExitStack()
        self._descriptors.callback(inheritance.close)
        try:
            self._setup_fd = self._keep(_file_of(pickle.dumps({**setup, "initializer": inheritance.frame})))
            self._parent_pidfd = self._keep(os.pidfd_open(os.getpid()))
            self._wake_fd = self._keep(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            self._selector = self._descriptors.enter_context(selectors.DefaultSelector())
            self._selector.register(self._wake_fd, selectors.EVENT_READ, None)
            for _ in range(start):
                self._start()
        except BaseException:
            self.kill()
            self._descriptors.close()
            raise
        self._thread = threading.Thread(target=self._watch, name=config.POOL_THREAD, daemon=True)
        self._thread.start()

    def _keep(self, fd: int) -> int:
        """Close this descriptor at the end."""
        self._descriptors.callback(os.close, fd)
        return fd

    # --- starting --------------------------------------------------------------------------------

    def _start(self) -> None:
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            stack_pipe, stack_end = _pipe(os.O_NONBLOCK, ours, theirs)
            log_pipe, log_end = _pipe(0, ours, theirs)
            process = self._exec((self.region.fd, self._parent_pidfd, self._setup_fd, stack_end, log_end))
            try:
                worker = _Worker(process, os.pidfd_open(process.pid), stack_pipe, log_pipe)
            except OSError:
                process.kill()
                process.communicate()
                raise
            ours.pop_all()
        assert process.stdout is not None
        assert process.stderr is not None
        for stream, name in ((process.stdout, "stdout"), (process.stderr, "stderr")):
            os.set_blocking(stream.fileno(), False)
            worker.streams[stream.fileno()] = name
        os.set_blocking(log_pipe, False)
        worker.streams[log_pipe] = "log"
        with self._lock:
            self._workers[process.pid] = worker
            self._selector.register(worker.pidfd, selectors.EVENT_READ, worker)
            for fd in worker.streams:
                self._selector.register(fd, selectors.EVENT_READ, worker)

    def _exec(self, fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
        source = BOOTSTRAP.format(root=PACKAGE_ROOT, fds=", ".join(map(str, fds)))
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        flags = [flag for flag in flags if flag != "-i"]
        return subprocess.Popen(
            [sys.executable, *flags, "-P", "-c", source],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(*fds, *self._inheritance.fds),
            env={**os.environ, **self._environment},
            process_group=0,  # Ctrl-C at the terminal reaches main alone
        )

    # --- watching --------------------------------------------------------------------------------

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        with self._lock:
            return list(self._workers)

    def processes(self) -> dict[int, subprocess.Popen[bytes]]:
        """Return the workers by their process ids."""
        with self._lock:
            return {pid: worker.process for pid, worker in self._workers.items()}

    def provide(self, tasks: int, *, at_once: bool) -> None:
        """Before this number of tasks is out: start a worker if none is idle, or (`at_once`) all that are missing."""
        if len(self._workers) >= self.count:
            return
        with self._lock:
            while (
                len(self._workers) < self.count and not self._closing and (at_once or tasks > self._ready())
            ):
                self._start()
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
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake_fd, 1)

    def _watch(self) -> None:
        while True:
            wait = self._enforce_limits() if self._timed else LATEST_LOOK
            if self._missing:
                wait = min(wait, max(self._retry_at - time.monotonic(), 0))
            for key, _ in self._selector.select(wait):
                worker: _Worker | None = key.data
                if worker is None:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._wake_fd)
                elif key.fd == worker.pidfd:
                    self._bury(worker)
                else:
                    self._forward(worker, key.fd)
            if self._closing and not self._workers:
                return
            if self._missing and time.monotonic() >= self._retry_at:
                self._start_missing()

    def _enforce_limits(self) -> float:
        """Kill workers whose task runs longer than it may; return the seconds until the next look."""
        wait = 0.05
        now = time.monotonic_ns()
        any_limit = False
        for pid, worker in list(self._workers.items()):
            found = self._progress(pid)
            if found is None:
                continue
            tag, index, since, _ = found
            limit = self._time_limit(tag, index) if tag else None
            if limit is None or not since or worker.killed_for is not None:
                continue
            any_limit = True
            left = limit - (now - since) / 1e9
            if left <= 0:
                self._end_overdue(worker, found)
            else:
                wait = min(wait, left)
        return wait if any_limit or self._timed else LATEST_LOOK

    def _end_overdue(self, worker: _Worker, found: tuple[int, int, int, int]) -> None:
        """Kill a worker for the task that it runs too long; if it is at that task no more, let it go on."""
        pid = worker.process.pid
        with self._asking, contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(worker.pidfd, signal.SIGSTOP)  # what is killed is what was judged
            stacks.await_standstill(pid)
            now = self._progress(pid)
            if now is None or now[:3] != found[:3]:
                signal.pidfd_send_signal(worker.pidfd, signal.SIGCONT)
                return
            worker.killed_for = found[:2]
            (worker.stack,) = stacks.answers([stacks.Question(pid, worker.stack_pipe, last=True)])
            signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)

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
                        pipe = os.dup(worker.stack_pipe)
                        files.callback(os.close, pipe)
                        questions.append(stacks.Question(pid, pipe))
            said = stacks.answers(questions)
            with self._lock:
                # Without those that have moved on, whose stack is of something else.
                return [
                    Activity(pid, tag, index, seconds, starves, stack)
                    for (seconds, pid, tag, index, since, starves), stack in sorted(
                        zip(found, said, strict=True), reverse=True
                    )
                    if (self._progress(pid) or (tag, index, since))[:3] == (tag, index, since)
                ]

    def _forward(self, worker: _Worker, fd: int) -> None:
        """Pass on what a worker printed, whole lines at a time."""
        try:
            piece = os.read(fd, 1 << 16)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        if not piece:
            self._selector.unregister(fd)
            self._print(worker, fd, worker.partial.pop(fd, b""))
            return
        whole, newline, rest = (worker.partial.pop(fd, b"") + piece).rpartition(b"\n")
        if len(rest) > 1 << 20:
            whole, newline, rest = whole + newline + rest, b"", b""
        if rest:
            worker.partial[fd] = rest
        self._print(worker, fd, whole + newline)

    def _print(self, worker: _Worker, fd: int, raw: bytes) -> None:
        if not raw:
            return
        name = worker.streams[fd]
        if name == "log":
            logs.deliver(raw)
            return
        text = raw.decode(errors="replace")
        if name == "stderr":
            worker.tail.extend(text.splitlines())
        stream = sys.stdout if name == "stdout" else sys.stderr
        with contextlib.suppress(Exception):  # the user's stream may be anything, or closed
            stream.write(text)
            stream.flush()

    def _drain(self, worker: _Worker) -> None:
        """Read what a dead worker has left in its pipes; a grandchild may hold them open, so never wait."""
        for fd in worker.streams:
            if fd not in self._selector.get_map():
                continue
            while True:
                try:
                    piece = os.read(fd, 1 << 16)
                except OSError:
                    piece = b""
                if not piece:
                    break
                worker.partial[fd] = worker.partial.get(fd, b"") + piece
            self._selector.unregister(fd)
            self._print(worker, fd, worker.partial.pop(fd, b""))

    # --- death -----------------------------------------------------------------------------------

    def _bury(self, worker: _Worker) -> None:
        process = worker.process
        with self._lock:
            self._selector.unregister(worker.pidfd)
            self._drain(worker)
            returncode = process.wait()
            progress = self._progress(process.pid)
            leased = self._recover(process.pid)
            os.close(worker.pidfd)
            os.close(worker.stack_pipe)
            os.close(worker.log_pipe)
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
            del self._workers[process.pid]
        tag, index = (progress[0], progress[1]) if progress else (0, 0)
        if returncode == 0 and tag == LEAVING:
            self._missing += 1
            self._start_missing()
            return
        expected = self._closing and returncode == 0
        if not expected:
            self.deaths += 1
        death = Death(
            process.pid,
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
            except (OSError, MemoryError) as error:
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
        self._descriptors.close()

    def kill(self) -> None:
        """End all workers now."""
        self._closing = True
        with self._lock:
            for worker in self._workers.values():
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)
            if not hasattr(self, "_thread"):
                for worker in list(self._workers.values()):
                    self._bury(worker)


def _file_of(raw: bytes) -> int:
    fd = os.memfd_create("shmengine-setup", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(raw)
    except BaseException:
        os.close(fd)
        raise
    return fd


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
