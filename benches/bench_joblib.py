"""joblib on our workers and on loky's: tasks that do nothing, one large array for many, a grid search of scikit-learn.

    Parallel ──► 2 warm workers of each backend ──► results

Needs 2 cores and 6 GiB.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from operator import neg
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky import get_reusable_executor

import shmengine
from benches.measure import PeakMemory

ROOT = Path(__file__).resolve().parents[1]
OURS = "shmengine"
LOKY = "loky"
WITHOUT_MEMMAPS = "loky, max_nbytes=None"


@contextlib.contextmanager
def warm(*backends: str) -> Iterator[None]:
    """Both have their workers, and end them afterwards."""
    shmengine.joblib.register()
    for backend in backends:
        Parallel(2, backend=backend)(delayed(time.sleep)(0.2) for _ in range(4))
    yield
    shmengine.joblib.shutdown()
    get_reusable_executor().shutdown()


# --- tasks ----------------------------------------------------------------------------------------


def nothing(backend: str, count: int) -> int:
    results = Parallel(2, backend=backend, batch_size=1)(delayed(neg)(number) for number in range(count))
    assert results == [-number for number in range(count)]
    return count


def test_tasks_that_do_nothing(compare: Any, targets: Any) -> None:
    """With ``batch_size=1``, where each is a message; ``"auto"`` makes few of them."""
    with warm(OURS, LOKY):
        result = compare(
            {OURS: lambda: nothing(OURS, 6000), LOKY: lambda: nothing(LOKY, 3000)}, unit="a task"
        )
    targets.at_least("no-op tasks, batch_size=1, to loky", result.ratio(OURS, LOKY), 3)


# --- one large array ------------------------------------------------------------------------------


def corners(array: np.ndarray) -> tuple[float, float]:
    return float(array[0]), float(array[-1])


def pass_to_many(array: np.ndarray, backend: str, **options: Any) -> None:
    """As it is then: each round sees another array."""
    array[0] += 1
    found = Parallel(2, backend=backend, **options)(delayed(corners)(array) for _ in range(64))
    assert set(found) == {(array[0], array[-1])}


def test_one_array_for_many_tasks(compare: Any, targets: Any) -> None:
    """100 MB to 64 tasks, which read a few bytes of it."""
    array = np.arange(12_500_000.0)
    with warm(OURS, LOKY):
        result = compare(
            {
                OURS: lambda: pass_to_many(array, OURS),
                LOKY: lambda: pass_to_many(array, LOKY),
                WITHOUT_MEMMAPS: lambda: pass_to_many(array, LOKY, max_nbytes=None),
            },
            repeats=3,
        )
    targets.at_least("100 MB to 64 tasks, to loky", result.ratio(OURS, LOKY), 2)
    targets.at_least("the same, to loky without memmapping", result.ratio(OURS, WITHOUT_MEMMAPS), 20)


# --- a grid search --------------------------------------------------------------------------------

ROWS, COLUMNS = 625_000, 100  # 500 MB
ALPHAS = [1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0]


def make_data(rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    samples = random.standard_normal((rows, COLUMNS))
    return samples, samples @ random.standard_normal(COLUMNS) + random.standard_normal(rows)


def search(data: tuple[np.ndarray, np.ndarray], backend: str, jobs: int = 2) -> np.ndarray:
    """18 fits and scores of a `Ridge`, without the last fit on everything; return the scores."""
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV

    grid = GridSearchCV(Ridge(), {"alpha": ALPHAS}, cv=3, refit=False)
    with parallel_config(backend, n_jobs=jobs):
        return grid.fit(*data).cv_results_["mean_test_score"]


def print_peak(backend: str) -> None:
    """Search, and print what it took at its peak, with workers, beyond the array itself; see `peak_of`."""
    shmengine.joblib.register()
    search(make_data(2000), "sequential", 1)  # all that is imported
    data = make_data()
    with PeakMemory() as memory:
        search(data, backend)
    print(memory.peak)


def peak_of(backend: str) -> int:
    """Measure in a process of its own: what others have left behind is not in it."""
    command = [sys.executable, "-m", "benches.bench_joblib", backend]
    return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def test_grid_search(compare: Any, targets: Any) -> None:
    """`GridSearchCV` on 500 MB. What a backend adds is its time beyond half of what this process alone takes."""
    data = make_data()
    expected = search(data, "sequential", 1)

    def check(backend: str, jobs: int = 2) -> None:
        np.testing.assert_allclose(search(data, backend, jobs), expected, rtol=1e-9)

    with warm(OURS, LOKY):
        before = shmengine.joblib.stats().bytes_copied
        check(OURS)
        copied = (shmengine.joblib.stats().bytes_copied - before) / data[0].nbytes
        result = compare(
            {OURS: lambda: check(OURS), LOKY: lambda: check(LOKY), "alone": lambda: check("sequential", 1)},
            repeats=5,
            unit="a search",
        )
    half = [seconds / 2 for seconds in result.costs("alone")]
    added = {
        backend: statistics.median(s - h for s, h in zip(result.costs(backend), half, strict=True))
        for backend in (OURS, LOKY)
    }
    peaks = {backend: [] for backend in (OURS, LOKY)}
    for _ in range(3):
        for backend, found in peaks.items():
            found.append(peak_of(backend))
    ours, loky = (statistics.median(peaks[backend]) for backend in (OURS, LOKY))
    targets.at_most("grid search on 500 MB, bytes copied of it", copied, 1.2, "x")
    targets.at_least("its time, to loky", result.ratio(OURS, LOKY), 0.95)
    targets.note("added to compute / 2", f"{added[OURS]:.2f} s, loky {added[LOKY]:.2f} s")
    targets.at_most("added, of what loky adds", added[OURS] / added[LOKY], 1 / 3, "x")
    targets.note("peak PSS beyond the array", f"{ours / 1e6:.0f} MB, loky {loky / 1e6:.0f} MB")
    targets.at_most("peak PSS, of loky's", ours / loky, 1, "x")


if __name__ == "__main__":
    print_peak(sys.argv[1])
