"""What the machine allows: cores, memory, limits of containers; and byte sizes as people write them.

Everything is read from ``/proc`` and ``/sys`` at the moment of the call, in some tens of
microseconds, so it may be asked before each growth of shared memory. Functions that read these
trees take a ``root`` path in front of them, for tests.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from typing import NamedTuple, SupportsIndex

__all__ = [
    "cgroup_headroom",
    "default_budget",
    "default_workers",
    "format_bytes",
    "memory_available",
    "parse_bytes",
    "shm_free",
    "thread_limit_environment",
]

KIB = 1 << 10
MIB = 1 << 20
EXTENT_BYTES = 2 * MIB
"""Shared memory grows in steps of this size: one huge page on x86-64 and on aarch64 with 4 KiB pages."""

MINIMUM_BUDGET = 16 * MIB
"""Less than this does not carry two workers' windows of blocks."""

POOL_THREAD = "shmengine-pool"
RESULTS_THREAD = "shmengine-results"
SERVICE_THREADS = (POOL_THREAD, RESULTS_THREAD)
"""Names of the threads that an engine has in the main process."""

THREAD_LIMIT_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMBA_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)

_UNITS: dict[str, int] = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgtp", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgtp", start=1)},
}
_SIZE = re.compile(r"\s*(\d[\d_]*(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE)

# cgroup v1 writes "no limit" as the largest multiple of the page size below 2**63.
_NO_LIMIT = 1 << 60


# --- byte sizes ---------------------------------------------------------------------------------


def parse_bytes(size: str | SupportsIndex) -> int:
    """Number of bytes that ``size`` means.

    Parameters
    ----------
    size : int or str
        A number of bytes, or a number with a unit: ``"256 MiB"``, ``"1.5GiB"``, ``"64 kB"``. IEC units
        (KiB, MiB, GiB, TiB, PiB) are powers of 1024, SI units (kB, MB, GB, TB, PB) powers of 1000; upper
        and lower case are the same. A fraction of a byte is rounded.

    Raises
    ------
    ValueError
        The text is no size, its unit is unknown, or the size is negative.
    TypeError
        ``size`` is neither an integer nor a string.
    """
    if not isinstance(size, str):
        if isinstance(size, bool) or not hasattr(size, "__index__"):
            raise TypeError(f"a size is an int (bytes) or a string like '256 MiB', not {type(size).__name__}")
        count = size.__index__()
        if count < 0:
            raise ValueError(f"a size cannot be negative: {count}")
        return count
    match = _SIZE.fullmatch(size)
    if match is None:
        raise ValueError(
            f"not a size: {size!r}; write a number of bytes, or a number and a unit like '256 MiB'"
        )
    number: str = match[1]
    unit: str = match[2]
    factor = _UNITS.get(unit.lower())
    if factor is None:
        raise ValueError(
            f"unknown unit {unit!r} in size {size!r}; use B, KiB, MiB, GiB, TiB, PiB (powers of 1024) "
            "or kB, MB, GB, TB, PB (powers of 1000)"
        )
    number = number.replace("_", "").rstrip(".")
    if number.isdecimal():
        return int(number) * factor
    from fractions import Fraction  # slow to load

    return round(Fraction(number) * factor)


def format_bytes(count: int) -> str:
    """Write a number of bytes for people, in IEC units with three digits or more: ``"1.5 GiB"``."""
    value, unit = float(abs(count)), "B"
    for following in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1023.5:  # would round to less than 1024 of this unit
            break
        value, unit = value / 1024, following
    sign = "-" if count < 0 else ""
    digits = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return f"{sign}{digits} {unit}"


# --- cores --------------------------------------------------------------------------------------


def default_workers(root: str = "/") -> int:
    """How many workers an engine starts when nobody says: the cores that this process may really use.

    The smaller of the CPU affinity and the CPU quota of the control group (v1 or v2, every ancestor; a
    fraction of a core counts as one). The environment variable ``SHMENGINE_WORKERS`` overrides it.

    Raises
    ------
    ValueError
        ``SHMENGINE_WORKERS`` is set to something else than an integer of at least 1.
    """
    override = os.environ.get("SHMENGINE_WORKERS", "").strip()
    if override:
        if not override.isascii() or not override.isdigit() or int(override) < 1:
            raise ValueError(f"SHMENGINE_WORKERS must be an integer of at least 1, not {override!r}")
        return int(override)
    cores = len(os.sched_getaffinity(0))
    for quota, period in _cpu_quotas(root):
        cores = min(cores, -(-quota // period))
    return max(cores, 1)


def thread_limit_environment(threads: int) -> dict[str, str]:
    """Environment variables that keep numerical libraries to ``threads`` threads, if set before they load."""
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    return dict.fromkeys(THREAD_LIMIT_VARIABLES, str(threads))


# --- memory -------------------------------------------------------------------------------------


def default_budget(root: str = "/") -> int:
    """Shared memory that an engine may use when nobody says, in bytes.

    A quarter of what is available (see `memory_available`) or of what the control group leaves (see
    `cgroup_headroom`), whichever is less; a multiple of 2 MiB, and at least 16 MiB.
    """
    free = memory_available(root)
    headroom = cgroup_headroom(root)
    if headroom is not None:
        free = min(free, headroom)
    return max(free // 4 // EXTENT_BYTES * EXTENT_BYTES, MINIMUM_BUDGET)


def memory_available(root: str = "/") -> int:
    """Bytes that programs can still allocate without swapping, as the kernel estimates it (MemAvailable)."""
    with open(os.path.join(root, "proc/meminfo"), "rb") as file:
        for line in file:
            if line.startswith(b"MemAvailable:"):
                return int(line.split()[1]) * KIB
    raise OSError("no MemAvailable in /proc/meminfo")


def cgroup_headroom(root: str = "/") -> int | None:
    """Bytes that the control group of this process still leaves; None when no limit is set.

    The least over the group and all its ancestors, v1 and v2, never negative. Inactive file pages count as
    free: the kernel drops them before it kills.
    """
    least: int | None = None
    for group in _cgroup_directories(root, "memory"):
        limit = _read_int(group.path, "memory.max" if group.v2 else "memory.limit_in_bytes")
        usage = _read_int(group.path, "memory.current" if group.v2 else "memory.usage_in_bytes")
        if limit is None or limit >= _NO_LIMIT or usage is None:
            continue
        reclaimable = _read_field(
            group.path, "memory.stat", "inactive_file" if group.v2 else "total_inactive_file"
        )
        headroom = max(limit - usage + reclaimable, 0)
        least = headroom if least is None else min(least, headroom)
    return least


def shm_free(path: str = "/dev/shm") -> int:
    """Bytes free in the file system of POSIX shared memory; 0 when there is none."""
    try:
        status = os.statvfs(path)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


# --- control groups -----------------------------------------------------------------------------


class _Group(NamedTuple):
    """One control group directory."""

    path: str
    v2: bool


def _cpu_quotas(root: str) -> Iterator[tuple[int, int]]:
    """(quota, period) in microseconds of CPU time, for each group that has one."""
    for group in _cgroup_directories(root, "cpu"):
        if group.v2:
            fields = _read_text(group.path, "cpu.max").split()
        else:
            fields = [_read_text(group.path, f"cpu.cfs_{what}_us") for what in ("quota", "period")]
        try:
            quota, period = (int(field) for field in fields)
        except ValueError:  # "max", or no such file
            continue
        if quota > 0 and period > 0:
            yield quota, period


def _cgroup_directories(root: str, controller: str) -> tuple[_Group, ...]:
    """Directories of this process's groups that may limit ``controller``: innermost first, v1 and v2."""
    membership = _read_text(root, "proc/self/cgroup")
    return _find_cgroup_directories(root, controller, membership)


@functools.lru_cache(maxsize=16)  # keyed by membership too: a process may be moved while it lives
def _find_cgroup_directories(root: str, controller: str, membership: str) -> tuple[_Group, ...]:
    groups: list[_Group] = []
    mounts = list(_cgroup_mounts(root))
    for line in membership.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        v2 = hierarchy == "0" and not controllers
        if not v2 and controller not in controllers.split(","):
            continue
        for mount_is_v2, mount_controllers, mount_root, mount_point in mounts:
            if mount_is_v2 != v2 or not (v2 or controller in mount_controllers):
                continue
            # Inside a container the mount shows a subtree: its root is a prefix of our path, or (in a
            # namespace of control groups) our path is already relative to it.
            inside = path
            if mount_root != "/" and (path == mount_root or path.startswith(mount_root + "/")):
                inside = path[len(mount_root) :]
            parts = [part for part in inside.split("/") if part]
            if ".." in parts:  # a group outside the visible subtree: its nearest visible ancestor
                parts = []
            top = os.path.join(root, mount_point.lstrip("/"))
            for depth in range(len(parts), -1, -1):
                directory = os.path.join(top, *parts[:depth])
                if os.path.isdir(directory):
                    groups.append(_Group(directory, v2))
            break
    return tuple(groups)


def _cgroup_mounts(root: str) -> Iterator[tuple[bool, list[str], str, str]]:
    """(is v2, controllers, root inside the hierarchy, mount point) of each mounted hierarchy."""
    for line in _read_text(root, "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        yield kind[0] == "cgroup2", kind[2].split(","), _unescape(fields[3]), _unescape(fields[4])


def _unescape(path: str) -> str:
    r"""Undo mountinfo's octal escapes (a space is ``\040``)."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _read_text(directory: str, name: str) -> str:
    try:
        with open(os.path.join(directory, name), encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def _read_int(directory: str, name: str) -> int | None:
    text = _read_text(directory, name).strip()
    return int(text) if text.isdigit() else None


def _read_field(directory: str, name: str, field: str) -> int:
    """Value of ``field`` in a file of ``field value`` lines; 0 when it is not there."""
    for line in _read_text(directory, name).splitlines():
        key, _, value = line.partition(" ")
        if key == field and value.isdigit():
            return int(value)
    return 0
