"""Small machines: little /dev/shm (as in containers) and little memory (control groups)."""

from __future__ import annotations

import fcntl
import os
import resource
import secrets
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shmengine import config
from tests.helpers.scripts import run_script


def mount_namespace_prefix(shm_size: str | int) -> list[str]:
    """A command prefix: what follows sees a /dev/shm of its own of that size (``"64m"``, ``"1m"``, bytes)."""
    user_namespace = [] if os.geteuid() == 0 else ["--map-root-user"]
    shell = 'mount -t tmpfs -o size="$0",mode=1777 tmpfs /dev/shm && exec "$@"'
    return [
        "unshare",
        *user_namespace,
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        shell,
        str(shm_size),
    ]


def mount_namespace_run(
    source: str | Path, shm_size: str | int, *, prefix: Sequence[str] = (), **options: Any
) -> subprocess.CompletedProcess[str]:
    """`run_script` with a /dev/shm of its own of that size."""
    return run_script(source, prefix=[*prefix, *mount_namespace_prefix(shm_size)], **options)


@contextmanager
def message_queues(*, alone: bool = False) -> Iterator[None]:
    """Within it this process may have message queues, beside other tests or alone.

    The kernel counts those of all processes of a user together, also those that are made in a user namespace.
    """
    path = Path(tempfile.gettempdir(), f"shmengine-tests-queues-{os.getuid()}")
    # Where tests were not allowed more of them (tests/conftest.py) they take turns.
    few = 0 <= resource.getrlimit(resource.RLIMIT_MSGQUEUE)[0] <= 819_200
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone or few else fcntl.LOCK_SH)
        yield


def queues_for(mechanism: str) -> AbstractContextManager[None]:
    """Within it this process may have channels of a mechanism: `message_queues`, if it is that one."""
    return message_queues() if mechanism == "mqueue" else nullcontext()


@dataclass(frozen=True)
class MemoryGroup:
    """A control group with a limit of memory."""

    path: str
    v2: bool

    @property
    def prefix(self) -> list[str]:
        """A command prefix: what follows runs in this group."""
        return ["sh", "-c", 'echo $$ > "$0"/cgroup.procs && exec "$@"', self.path]

    @property
    def oom_kills(self) -> int:
        """How many processes of this group the kernel has killed for want of memory."""
        text = Path(self.path, "memory.events" if self.v2 else "memory.oom_control").read_text()
        return int(dict(line.split() for line in text.splitlines())["oom_kill"])

    @property
    def peak(self) -> int:
        """Most memory that the group ever used, bytes."""
        return int(Path(self.path, "memory.peak" if self.v2 else "memory.max_usage_in_bytes").read_text())


@contextmanager
def memory_cgroup(limit: int) -> Iterator[MemoryGroup]:
    """A control group (v1 or v2) with a limit of `limit` bytes and no swap, removed at the end.

    Raises
    ------
    RuntimeError
        No such group can be made here; says what was tried.
    """
    group = _make_group()
    try:
        Path(group.path, "memory.max" if group.v2 else "memory.limit_in_bytes").write_text(str(limit))
        swap = Path(group.path, "memory.swap.max" if group.v2 else "memory.memsw.limit_in_bytes")
        if swap.exists():
            swap.write_text("0" if group.v2 else str(limit))
        yield group
    finally:
        _remove_group(group.path)


def _make_group() -> MemoryGroup:
    tried = []
    for parent in config._cgroup_directories("/", "memory"):
        path = os.path.join(parent.path, f"shmengine-test-{secrets.token_hex(4)}")
        try:
            os.mkdir(path)
        except OSError as error:
            tried.append(f"{parent.path}: {error.strerror}")
            continue
        limit_file = "memory.max" if parent.v2 else "memory.limit_in_bytes"
        if os.access(os.path.join(path, limit_file), os.W_OK):
            return MemoryGroup(path, parent.v2)
        os.rmdir(path)
        tried.append(f"{parent.path}: no writable {limit_file} in a new group")
    raise RuntimeError(
        "this test needs a control group with a memory limit, and none can be made (as root it usually can): "
        + ("; ".join(tried) or "no cgroup file system with a memory controller is mounted")
    )


def _remove_group(path: str) -> None:
    """Remove the group as soon as its last process is gone (the kernel needs a moment)."""
    deadline = time.monotonic() + 30
    while True:
        try:
            os.rmdir(path)
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
