"""The main job on real input: photographs (or your own array), through the engine, checked against NumPy.

    python examples/demo.py                  three photographs, repeated to about 1 GiB
    python examples/demo.py file.npy         any numeric array, memory-mapped
    python examples/demo.py --bytes 64MiB    smaller

Three jobs: a tone curve (cheap, as memory-bound as it gets), a sum of sines (compute-heavy), a blur along
the first axis (blocks with ghost cells). Each runs in plain NumPy and in worker processes, the answers are
compared, and a table says what it took. Times are the best of three, with warm memory on both sides;
memory is measured in a run of its own, because looking slows what is looked at.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import shmengine as shm
from shmengine.config import cgroup_headroom, format_bytes, memory_available, parse_bytes

Array = NDArray[Any]
REPEATS = 3
SAMPLE_SECONDS = 0.02


# --- the jobs: what runs in the workers ---------------------------------------------------------


def tone_curve(block: Array) -> Array:
    """Brighten: the square root, scaled."""
    result: Array = np.sqrt(np.abs(block)) * 2 + 1
    return result


def sum_of_sines(block: Array) -> Any:
    """Something that keeps a core busy; added up in at least double precision."""
    return np.sin(block).sum(dtype=np.result_type(block.dtype, np.float64))


def blur(block: Array) -> Array:
    """Five-point binomial blur along the first axis; the outermost two rows stay as they are."""
    source = block.astype(np.result_type(block.dtype, np.float32), copy=False)
    result = source.copy()
    result[2:-2] = (source[:-4] + source[4:] + 4 * (source[1:-3] + source[3:-1]) + 6 * source[2:-2]) / 16
    return result


def plain_blur(array: Array) -> Array:
    """The same in plain NumPy, with the edges repeated as ``boundary="reflect"`` does."""
    edges = [(2, 2)] + [(0, 0)] * (array.ndim - 1)
    return blur(np.pad(array, edges, mode="symmetric"))[2:-2]


@dataclass
class Job:
    """One row of the table."""

    name: str
    plain: Callable[[Array], Any]
    engine: Callable[[shm.Engine, Array, Any], Any]


JOBS = [
    Job(
        "map_blocks: sqrt(x)*2+1",
        tone_curve,
        lambda engine, x, progress: engine.map_blocks(tone_curve, x, progress=progress),
    ),
    Job(
        "reduce: sum of sin(x)",
        sum_of_sines,
        lambda engine, x, progress: engine.reduce(sum_of_sines, x, combine=np.add, progress=progress),
    ),
    Job(
        "map_overlap: blur",
        plain_blur,
        lambda engine, x, progress: engine.map_overlap(blur, x, depth=2, progress=progress),
    ),
]


# --- input --------------------------------------------------------------------------------------


def photographs(wanted_bytes: int) -> tuple[Array, str]:
    """Brightness of three photographs of 512 x 512 pixels, one below the other, again and again."""
    import pywt.data

    pictures = np.concatenate([pywt.data.aero(), pywt.data.ascent(), pywt.data.camera()]).astype(np.float64)
    times = max(wanted_bytes // pictures.nbytes, 1)
    result = np.empty((times, *pictures.shape))
    result[:] = pictures
    return result.reshape(-1, pictures.shape[1]), f"3 photographs, repeated {times} times"


def load(path: str) -> tuple[Array, str]:
    """An array from a file, memory-mapped: only the blocks at work are in memory."""
    array = np.load(path, mmap_mode="r")
    if array.dtype.kind not in "biuf" or array.ndim == 0 or len(array) < 5:
        what = f"{array.dtype} {array.shape}"
        sys.exit(f"{path}: the demo wants an array of real numbers with at least 5 rows, not {what}")
    return array, os.path.basename(path)


# --- measuring ----------------------------------------------------------------------------------


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
    """Watches this process and its children from a thread, while it is used in a ``with``.

    `peak` is what they had at most, beyond what this process alone had at the start; keep the result of
    what you measure alive until the end.
    """

    def __enter__(self) -> Self:
        import psutil

        self.peak = 0
        self._before = proportional_bytes([os.getpid()])
        self._stop = threading.Event()
        self._main = psutil.Process()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Look for the last time."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            self._look()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._look()

    def _look(self) -> None:
        pids = [self._main.pid, *(child.pid for child in self._main.children(recursive=True))]
        self.peak = max(self.peak, proportional_bytes(pids) - self._before)


def best_time(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the fastest of some runs, and the last result."""
    best, result = float("inf"), None
    for _ in range(REPEATS):
        result = None  # give the memory back first, as a loop in a program would
        start = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - start)
    return best, result


def disagreement(found: Any, expected: Any, terms: int) -> str:
    """Empty when the answers agree: arrays bit for bit, sums of so many terms up to their order.

    Terms are at most 1 in size. Each addition rounds, up or down as luck has it, so that errors grow with the
    square root of the number of additions.
    """
    if type(found) is not type(expected) or np.shape(found) != np.shape(expected):
        return f"{type(found).__name__}{np.shape(found)} instead of {type(expected).__name__}{np.shape(expected)}"
    if found.dtype != expected.dtype:
        return f"{found.dtype} instead of {expected.dtype}"
    inexact = expected.dtype.kind == "f"
    if expected.ndim == 0:
        tolerance = np.finfo(expected.dtype).eps * terms**1.5 if inexact else 0
        agree = np.isclose(found, expected, rtol=0, atol=tolerance, equal_nan=inexact)
        return "" if agree else f"{found} instead of {expected}"
    rows = max(len(expected) * (1 << 24) // max(expected.nbytes, 1), 1)  # 16 MiB at a time
    for start in range(0, len(expected), rows):
        here, there = found[start : start + rows], expected[start : start + rows]
        if not np.array_equal(here, there, equal_nan=inexact):
            return f"differs after row {start}"
    return ""


def run(job: Job, array: Array, backend: str, table: Table) -> str:
    """Do one job in both ways, add a row; returns what is wrong, or nothing."""
    plain_seconds, expected = best_time(lambda: job.plain(array))
    output_bytes = expected.nbytes if isinstance(expected, np.ndarray) else 0
    with PeakMemory() as plain_memory:
        found = job.plain(array)
    found = None
    with PeakMemory() as engine_memory, shm.Engine(backend=backend) as engine:
        found = job.engine(engine, array, True)
        engine_memory.stop()
        start = engine.stats()
        found = None
        engine_seconds, found = best_time(lambda: job.engine(engine, array, False))
        end = engine.stats()
    wrong = disagreement(found, expected, array.size)
    table.add_row(
        job.name,
        f"{plain_seconds:.2f} s",
        f"{engine_seconds:.2f} s",
        f"{plain_seconds / engine_seconds:.2f}x",
        format_bytes((end.bytes_copied - start.bytes_copied) // REPEATS),
        format_bytes((end.bytes_shared - start.bytes_shared) // REPEATS),
        format_bytes(max(plain_memory.peak - output_bytes, 0)),
        format_bytes(max(engine_memory.peak - output_bytes, 0)),
    )
    return f"{job.name}: {wrong}" if wrong else ""


def processor() -> str:
    """Name of the processor."""
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    """The whole demo."""
    parser = argparse.ArgumentParser(description="The main job on real input, checked against NumPy.")
    parser.add_argument("input", nargs="?", help="a .npy file; without it, photographs")
    parser.add_argument("--bytes", default="1 GiB", help="size of the photographs, repeated (default: 1 GiB)")
    parser.add_argument("--backend", default="process", choices=("process", "thread", "serial"))
    options = parser.parse_args()

    # The input, two results and NumPy's temporaries must fit beside each other.
    headroom = cgroup_headroom()
    free = memory_available() if headroom is None else min(memory_available(), headroom)
    size = min(parse_bytes(options.bytes), free // 8)
    array, what = load(options.input) if options.input else photographs(size)

    console = Console(width=None if sys.stdout.isatty() else 118)
    size_text = format_bytes(array.nbytes)
    console.print(f"Input: {what}: {array.dtype} {array.shape}, {size_text}", highlight=False)
    table = Table()
    table.add_column("job")
    for title in ("NumPy", "engine", "speed-up", "copied", "by reference", "NumPy memory", "engine memory"):
        table.add_column(title, justify="right")
    wrong = [text for job in JOBS if (text := run(job, array, options.backend, table))]

    console.print(table)
    console.print(
        f"{processor()}, {len(os.sched_getaffinity(0))} cores; NumPy {np.__version__}; best of {REPEATS}. "
        "Copied, by reference: bytes that crossed between processes in one run. "
        "Memory: peak beside input and output, of the main process and all workers, as PSS (what they share "
        "counts once). A speed-up beyond the number of cores comes from blocks that fit into the cache, "
        "where plain NumPy sends whole temporary arrays through memory.",
        highlight=False,
    )
    if wrong:
        sys.exit("WRONG: " + "; ".join(wrong))
    console.print("All answers are equal to plain NumPy.", highlight=False)


main()  # no guard: workers never import this script
