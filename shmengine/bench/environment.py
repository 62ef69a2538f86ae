"""What a number depends on: stamped on every result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import UTC, datetime

from shmengine import config

__all__ = ["load_per_core", "stamp"]

PACKAGES = ("numpy", "shmengine", "pyzmq", "posix-ipc", "faster-fifo", "kickmsg", "iceoryx2", "blosc2")


def stamp(*, pinned: bool = True) -> dict[str, str]:
    """Describe machine, kernel and versions, and how busy the machine is.

    Returns
    -------
    dict of str to str
        In the order in which it reads best.
    """
    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}",
        "memory": config.format_bytes(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "none to be seen",
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "/dev/shm": f"{config.format_bytes(config.shm_free())} free",
        "pinned": "each process to a core" if pinned else "no",
        "python": f"{platform.python_implementation()} {platform.python_version()}, {platform.python_compiler()}",
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def load_per_core() -> float:
    """Return the load of the last minute, for each processor that this process may use."""
    return os.getloadavg()[0] / len(os.sched_getaffinity(0))


def _processor() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith(("model name", "CPU part")):
            return line.partition(":")[2].strip()
    return platform.machine()


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""
