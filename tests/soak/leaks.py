"""What is not given back: shared memory, parts of an arena, file descriptors."""

from __future__ import annotations

import gc
import multiprocessing.resource_tracker
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from shmengine._native import ffi, lib
from shmengine._native.status import OK
from shmengine.region import EXTENT_BYTES, Region
from tests.helpers.leftovers import descendants, open_fds, orphan_zombies, shm_names
from tests.soak.report import Report

GRACE_SECONDS = 10.0


@contextmanager
def counted_leaks(report: Report) -> Iterator[None]:
    """Add to `report` what is there after the block and was not before it."""
    multiprocessing.resource_tracker.ensure_running()  # whoever first shares memory starts it
    gc.collect()
    names, fds, processes, mapped = shm_names(), open_fds(), descendants(), _mapped_files()
    yield
    end = time.monotonic() + GRACE_SECONDS  # what is on its way out may take a while
    while True:
        gc.collect()
        for pid in orphan_zombies():
            os.waitpid(pid, 0)
        left_names = {name for name in shm_names() - names if "shmengine" in name}
        left_fds = {fd: what for fd, what in open_fds().items() if fds.get(fd) != what}
        left_processes = descendants() - processes
        left_mapped = {inode: size for inode, size in _mapped_files().items() if inode not in mapped}
        if not (left_names or left_fds or left_processes or left_mapped) or time.monotonic() > end:
            break
        time.sleep(0.01)
    report.bytes_leaked += sum(left_mapped.values()) + sum(_size_of(name) for name in left_names)
    report.fds_leaked += len(left_fds)
    report.hung += len(left_processes)
    for what, left in (("names", left_names), ("descriptors", left_fds), ("processes", left_processes)):
        if left:
            report.failures.append(f"{what} left behind: {left}")


def arena_bytes_lost(region: Region) -> int:
    """Return how much of an arena its last participant cannot have as one block, to the extent."""
    budget = int(region.counters().budget)
    possible, impossible = 0, budget // EXTENT_BYTES + 1
    extents = impossible - 1  # all, as it should be
    while impossible - possible > 1:
        if _can_claim(region, extents * EXTENT_BYTES):
            possible = extents
        else:
            impossible = extents
        extents = (possible + impossible) // 2
    return budget - possible * EXTENT_BYTES


def _can_claim(region: Region, nbytes: int) -> bool:
    block = ffi.new("shmr_block *")
    # Long enough to adopt what others have left.
    if lib.shmr_claim(region.handle, nbytes, ffi.NULL, 0, -1, time.monotonic_ns() + 300_000_000, block) != OK:
        return False
    lib.shmr_abort(region.handle, block)
    return True


def _mapped_files() -> dict[str, int]:
    """Bytes that this process maps of files of shared memory, by inode."""
    found: dict[str, int] = {}
    with open("/proc/self/maps", encoding="utf-8") as file:
        for line in file:
            where, _, _, _, inode, *path = line.split(maxsplit=5)
            if path and path[0].startswith(("/dev/shm/", "/memfd:shmengine")):
                first, last = (int(each, 16) for each in where.split("-"))
                found[inode] = found.get(inode, 0) + last - first
    return found


def _size_of(name: str) -> int:
    try:
        return os.stat(f"/dev/shm/{name}").st_blocks * 512
    except FileNotFoundError:
        return 0
