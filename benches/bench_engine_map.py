"""`map_blocks` and `reduce` over an array in ordinary memory, against one NumPy process.

    x (1 GiB) ── blocks ──► worker 0: sqrt(b)*2+1 ──► result (1 GiB)
                       └──► worker 1: sqrt(b)*2+1 ──┘

Needs 2 cores and about 5 GiB. The rival is a serial loop over blocks that fit into the cache, with `out=`
everywhere, in the best of some block sizes and of two ways to write it; plain NumPy is slower. All memory is
warm: every contestant runs once before the rounds, and all of the input is read in each round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import shmengine as shm
from benches.measure import PeakMemory
from shmengine.bench.compare import show_seconds
from shmengine.bench.plan import KIB, MIB
from shmengine.bench.work import (
    Array,
    Loop,
    best_loop,
    best_sum,
    blocked_sum_of_sines,
    curve,
    same,
    sum_of_sines,
)

NBYTES = 1 << 30
WINDOW_BLOCKS = 8  # of 1 MiB, in the copies that make the ceiling


def half_of_sines(turns: int, elements: int) -> float:
    """Half of the work of the reduction, on data of its own: what one of two independent processes does."""
    return sum(blocked_sum_of_sines(HALF_DATA, elements) for _ in range(turns))


HALF_DATA = np.linspace(0.0, 1.0, 16 * MIB // 8)


# --- fixtures -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def x() -> Array:
    """1 GiB of ordinary, warm memory."""
    return np.random.default_rng(8).random(NBYTES // 8)


@pytest.fixture(scope="module")
def right(x: Array) -> Array:
    return np.sqrt(x) * 2 + 1


@pytest.fixture(scope="module")
def engine() -> Iterator[shm.Engine]:
    with shm.Engine(2) as engine:
        yield engine


@pytest.fixture(scope="module")
def loop(x: Array) -> tuple[str, Loop]:
    """The rival, found once."""
    result = np.zeros_like(x)
    return best_loop(x[: len(x) // 4], result[: len(x) // 4])


# --- benches ------------------------------------------------------------------------------------


def test_map_blocks_fresh(
    x: Array, right: Array, engine: shm.Engine, loop: tuple[str, Loop], compare: Any, targets: Any
) -> None:
    """Both sides allocate a fresh result each time."""
    loop_name, blocked = loop
    kept: dict[str, Array] = {}

    def serial() -> None:
        result = np.empty_like(x)
        blocked(x, result)
        kept["serial"] = result[:: len(result) - 1].copy()

    def plain() -> None:
        kept["plain"] = (np.sqrt(x) * 2 + 1)[:: len(x) - 1].copy()

    def ours() -> None:
        kept["ours"] = engine.map_blocks(curve, x)[:: len(x) - 1].copy()

    assert same(engine.map_blocks(curve, x), right)
    result = compare(
        {"engine.map_blocks": ours, f"serial blocks ({loop_name})": serial, "plain NumPy": plain},
        repeats=7,
        bytes_each=NBYTES,
    )
    for name, ends in kept.items():
        assert np.array_equal(ends, right[:: len(right) - 1]), name
    ratio = result.ratio("engine.map_blocks", f"serial blocks ({loop_name})")
    targets.at_least("map_blocks, fresh result, to blocked serial NumPy", ratio, 1.25)
    targets.note("the same to plain NumPy", f"{result.ratio('engine.map_blocks', 'plain NumPy'):.3g}x")


def test_map_blocks_out(
    x: Array, right: Array, engine: shm.Engine, loop: tuple[str, Loop], compare: Any, targets: Any
) -> None:
    """Into a warm result; the ceiling is what the main process must do itself, plus the work, on two cores."""
    loop_name, blocked = loop
    result_serial, result_ours = np.zeros_like(x), np.zeros_like(x)
    window = np.zeros((WINDOW_BLOCKS, MIB // 8))

    def copies() -> None:
        """What main must do at least: each block into a warm window, and each result out of one."""
        elements = window.shape[1]
        for number in range(len(x) // elements):
            span = slice(number * elements, (number + 1) * elements)
            np.copyto(window[number % WINDOW_BLOCKS], x[span])
            np.copyto(result_serial[span], window[(number + WINDOW_BLOCKS // 2) % WINDOW_BLOCKS])

    def serial() -> None:
        blocked(x, result_serial)

    def ours() -> None:
        assert engine.map_blocks(curve, x, out=result_ours) is result_ours

    name = f"serial blocks ({loop_name})"
    result = compare(
        {
            "engine.map_blocks": ours,
            "copies of main": copies,
            name: serial,
        },
        repeats=7,
        bytes_each=NBYTES,
    )
    assert same(result_serial, right)
    assert same(result_ours, right)
    ceilings = [
        (a + b) / 2 for a, b in zip(result.seconds[name], result.seconds["copies of main"], strict=True)
    ]
    ratios = [c / ours for c, ours in zip(ceilings, result.seconds["engine.map_blocks"], strict=True)]
    targets.at_least("map_blocks, warm out=, to the ceiling", float(np.median(ratios)), 0.9)
    targets.note(
        "the ceiling: (serial + copies of main) / 2",
        f"({show_seconds(result.cost(name))} + {show_seconds(result.cost('copies of main'))}) / 2"
        f" = {show_seconds(float(np.median(ceilings)))}",
    )
    targets.note("the same to blocked serial NumPy", f"{result.ratio('engine.map_blocks', name):.3g}x")


def test_map_blocks_memory(x: Array, right: Array, benchmark: Any, targets: Any) -> None:
    """Peak of main and all workers beside input and output, from before the engine starts; in a run of its own."""

    def run() -> Array:
        with shm.Engine(2) as engine:
            return engine.map_blocks(curve, x)

    with PeakMemory() as memory:
        result = benchmark.pedantic(run, rounds=1)
    assert same(result, right)
    targets.at_most("map_blocks, peak extra memory", (memory.peak - result.nbytes) / MIB, 256, " MiB")


def test_reduce(x: Array, engine: shm.Engine, spawn: Any, compare: Any, targets: Any) -> None:
    """Compute-heavy: what two cores should nearly double (if they are two cores: the last row tells)."""
    expected = blocked_sum_of_sines(x, MIB // 8)
    elements = best_sum(x[: len(x) // 8])

    def check(value: Any) -> None:
        assert math.isclose(value, expected, rel_tol=1e-12)

    def independent() -> None:
        assert len(pool.starmap(half_of_sines, [(NBYTES // HALF_DATA.nbytes // 2, elements)] * 2, 1)) == 2

    name = f"serial blocks ({elements * 8 // KIB} KiB)"
    with spawn.Pool(2) as pool:
        result = compare(
            {
                "engine.reduce": lambda: check(engine.reduce(sum_of_sines, x, combine=np.add)),
                name: lambda: check(blocked_sum_of_sines(x, elements)),
                "plain NumPy": lambda: check(np.sin(x).sum()),
                "two independent processes": independent,
            },
            repeats=5,
            bytes_each=NBYTES,
        )
    targets.at_least("reduce, sum of sin, to blocked serial NumPy", result.ratio("engine.reduce", name), 1.8)
    both = result.ratio("two independent processes", name)
    targets.note("the same of two independent processes, without any engine", f"{both:.3g}x")
