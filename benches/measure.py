"""What processes use: CPU time of any of them, and memory as PSS."""

from __future__ import annotations

import threading
import time
from typing import Self

SAMPLE_SECONDS = 0.02


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used, with all its threads, the ended ones too; in nanosecond steps."""
    return time.clock_gettime(~pid << 3 | 2)  # what clock_getcpuclockid() returns on Linux


def proportional_bytes(pids: list[int]) -> int:
    """Memory of these processes; what several of them share is counted once (PSS)."""
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
                for line in file:
                    if line.startswith(b"Pss:"):
                        total += int(line.split()[1]) * 1024
        except OSError:  # it has ended
            continue
    return total


class PeakMemory:
    """Watches this process and its descendants from a thread; `peak` is what they had beyond the start, at most."""

    def __enter__(self) -> Self:
        import psutil

        self.peak = 0
        self._main = psutil.Process()
        self._before = proportional_bytes(self._pids())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, proportional_bytes(self._pids()) - self._before)

    def _pids(self) -> list[int]:
        return [self._main.pid, *(child.pid for child in self._main.children(recursive=True))]
