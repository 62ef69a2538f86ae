"""What a process has and could leave behind: names in /dev/shm, children, descriptors, threads.

Reads /proc directly, so that looking opens nothing that stays and starts nothing.
"""

from __future__ import annotations

import ctypes
import os
import threading
from dataclasses import dataclass, field

PR_SET_CHILD_SUBREAPER = 36


def shm_names() -> set[str]:
    """Names in /dev/shm: shared memory, and named semaphores as ``sem.NAME``."""
    try:
        return set(os.listdir("/dev/shm"))
    except FileNotFoundError:
        return set()


def open_fds() -> dict[int, str]:
    """Open descriptors of this process and what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the descriptor of the listing itself
            continue
    return found


def _stat_fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty when the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def state_of(pid: int) -> str:
    """The letter that /proc has for what a process does: S sleeps, Z is dead; empty when it is gone."""
    return "".join(_stat_fields(pid)[:1])


def stands_still(pid: int) -> bool:
    """Whether each thread of a process has stopped: a SIGSTOP takes effect in one after the other."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return False
    return all(state_of(int(thread)) == "T" for thread in threads)


def _parents() -> dict[int, int]:
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := _stat_fields(int(name))):
            found[int(name)] = int(fields[1])
    return found


def children(pid: int | None = None) -> set[int]:
    """Direct children of a process, zombies included."""
    pid = os.getpid() if pid is None else pid
    return {child for child, parent in _parents().items() if parent == pid}


def descendants(pid: int | None = None) -> set[int]:
    """Children, their children, and so on."""
    parents = _parents()
    found: set[int] = set()
    frontier = {os.getpid() if pid is None else pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier} - found
        found |= frontier
    return found


def orphan_zombies() -> set[int]:
    """Dead children that we only inherited (see `adopt_orphans`): they come from another session."""
    own = str(os.getsid(0))
    found = set()
    for pid in children():
        fields = _stat_fields(pid)
        if fields and fields[0] == "Z" and fields[3] != own:
            found.add(pid)
    return found


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies, so that none can hide from the leak check."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def describe_process(pid: int) -> str:
    """One line: pid, state, what it waits for in the kernel, command."""
    fields = _stat_fields(pid)
    if not fields:
        return f"{pid} (gone)"

    def read(name: str) -> str:
        try:
            with open(f"/proc/{pid}/{name}", "rb") as file:
                return file.read().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            return "?"

    return f"{pid} state {fields[0]}, parent {fields[1]}, in {read('wchan')}: {read('cmdline')[:200]}"


@dataclass
class Inventory:
    """What this process has at one moment."""

    names: set[str] = field(default_factory=set)
    processes: set[int] = field(default_factory=set)
    fds: dict[int, str] = field(default_factory=dict)
    threads: set[threading.Thread] = field(default_factory=set)

    def new_since(self, before: Inventory) -> Inventory:
        """What is here and was not there before."""
        return Inventory(
            names=self.names - before.names,
            processes=self.processes - before.processes,
            fds={fd: what for fd, what in self.fds.items() if before.fds.get(fd) != what},
            threads=self.threads - before.threads,
        )

    def __bool__(self) -> bool:
        return bool(self.names or self.processes or self.fds or self.threads)

    def __str__(self) -> str:
        lines = [f"/dev/shm/{name}" for name in sorted(self.names)]
        lines += [f"process {describe_process(pid)}" for pid in sorted(self.processes)]
        lines += [f"descriptor {fd} -> {what}" for fd, what in sorted(self.fds.items())]
        lines += [f"thread {thread.name!r}, daemon={thread.daemon}" for thread in self.threads]
        return "\n".join(lines)


def take_inventory(*, daemons: bool = False) -> Inventory:
    """Look at everything that a test could leave behind.

    With `daemons` our own daemon threads count too; those of others may stay until the interpreter ends.
    """
    return Inventory(
        names=shm_names(),
        processes=descendants(),
        fds=open_fds(),
        threads={
            thread
            for thread in threading.enumerate()
            if not thread.daemon or (daemons and thread.name.startswith("shmengine"))
        },
    )
