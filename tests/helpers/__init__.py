"""What tests share: running scripts in children, and looking at what a process leaves behind."""

from __future__ import annotations

from tests.helpers.leftovers import (
    Inventory,
    children,
    descendants,
    describe_process,
    open_fds,
    orphan_zombies,
    shm_names,
    take_inventory,
)
from tests.helpers.limits import MemoryGroup, memory_cgroup, mount_namespace_prefix, mount_namespace_run
from tests.helpers.scripts import (
    ROOT,
    PtyResult,
    kill_tree,
    poll_until,
    run_in_pty,
    run_script,
    soak_seconds,
    start_script,
)

__all__ = [
    "ROOT",
    "Inventory",
    "MemoryGroup",
    "PtyResult",
    "children",
    "descendants",
    "describe_process",
    "kill_tree",
    "memory_cgroup",
    "mount_namespace_prefix",
    "mount_namespace_run",
    "open_fds",
    "orphan_zombies",
    "poll_until",
    "run_in_pty",
    "run_script",
    "shm_names",
    "soak_seconds",
    "start_script",
    "take_inventory",
]
