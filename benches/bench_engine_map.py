"""`map_blocks` and `reduce` over an array in ordinary memory, against one NumPy process.

    x (1 GiB) ── blocks ──► worker 0: sqrt(b)*2+1 ──► result (1 GiB)
                       └──► worker 1: sqrt(b)*2+1 ──┘

Needs 2 cores and about 5 GiB. The rival is a serial loop over blocks that fit into the cache, with `out=`
everywhere, in the best of some block sizes and of two ways to write it; plain NumPy is slower. All memory is
warm: every contestant runs once before the rounds, and all of the input is read in each round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import shmengine as shm
from benches.measure import PeakMemory, show_seconds

Array = NDArray[np.float64]
Loop = Callable[[Array, Array], None]

NBYTES = 1 << 30
KIB, MIB = 1 << 10, 1 << 20
BLOCK_SIZES = (64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, 1 * MIB)
WINDOW_BLOCKS = 8  # of 1 MiB, in the copies that make the ceiling


def curve(block: Array) -> Array:
    """What the workers run: plain NumPy, as anybody would write it."""
    result: Array = np.sqrt(block) * 2 + 1
    return result


def sum_of_sines(block: Array) -> Any:
    return np.sin(block).sum()


# --- the rival: blocked, serial -----------------------------------------------------------------


def through_buffer(elements: int) -> Loop:
    """The steps in a block buffer, the last one into the result."""
    buffer = np.zeros(elements)

    def loop(x: Array, result: Array) -> None:
        for start in range(0, len(x), elements):
            block = x[start : start + elements]
            work = buffer[: len(block)]
            np.sqrt(block, out=work)
            np.multiply(work, 2, out=work)
            np.add(work, 1, out=result[start : start + elements])

    return loop


def in_result(elements: int) -> Loop:
    """All steps in the block of the result, which stays in the cache between them."""

    def loop(x: Array, result: Array) -> None:
        for start in range(0, len(x), elements):
            work = result[start : start + elements]
            np.sqrt(x[start : start + elements], out=work)
            np.multiply(work, 2, out=work)
            np.add(work, 1, out=work)

    return loop


def blocked_sum_of_sines(x: Array, elements: int) -> float:
    buffer, partials = np.zeros(elements), []
    for start in range(0, len(x), elements):
        block = x[start : start + elements]
        work = buffer[: len(block)]
        np.sin(block, out=work)
        partials.append(work.sum())
    return math.fsum(partials)


def half_of_sines(turns: int, elements: int) -> float:
    """Half of the work of the reduction, on data of its own: what one of two independent processes does."""
    return sum(blocked_sum_of_sines(HALF_DATA, elements) for _ in range(turns))


HALF_DATA = np.linspace(0.0, 1.0, 16 * MIB // 8)


def seconds_of(call: Callable[[], Any], repeats: int = 3) -> float:
    """Seconds of the fastest of some runs."""
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def best_loop(x: Array, result: Array) -> tuple[str, Loop]:
    """The fastest way to write the rival on this machine."""
    loops = {
        f"{name}, {size // KIB} KiB": make(size // 8)
        for name, make in (("block buffer", through_buffer), ("in the result", in_result))
        for size in BLOCK_SIZES
    }
    seconds = {name: seconds_of(lambda loop=loop: loop(x, result)) for name, loop in loops.items()}  # type: ignore[misc]
    name = min(seconds, key=seconds.__getitem__)
    return name, loops[name]


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


def same(found: Array, expected: Array) -> bool:
    """Bit for bit, 16 MiB at a time."""
    step = 2 * MIB
    return found.shape == expected.shape and all(
        np.array_equal(found[start : start + step], expected[start : start + step])
        for start in range(0, len(expected), step)
    )


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
    quarter = x[: len(x) // 8]
    seconds = {
        size: seconds_of(lambda s=size: blocked_sum_of_sines(quarter, s // 8), 2) for size in BLOCK_SIZES
    }  # type: ignore[misc]
    size = min(seconds, key=seconds.__getitem__)

    def check(value: Any) -> None:
        assert math.isclose(value, expected, rel_tol=1e-12)

    def independent() -> None:
        assert len(pool.starmap(half_of_sines, [(NBYTES // HALF_DATA.nbytes // 2, size // 8)] * 2, 1)) == 2

    name = f"serial blocks ({size // KIB} KiB)"
    with spawn.Pool(2) as pool:
        result = compare(
            {
                "engine.reduce": lambda: check(engine.reduce(sum_of_sines, x, combine=np.add)),
                name: lambda: check(blocked_sum_of_sines(x, size // 8)),
                "plain NumPy": lambda: check(np.sin(x).sum()),
                "two independent processes": independent,
            },
            repeats=5,
            bytes_each=NBYTES,
        )
    targets.at_least("reduce, sum of sin, to blocked serial NumPy", result.ratio("engine.reduce", name), 1.8)
    both = result.ratio("two independent processes", name)
    targets.note("the same of two independent processes, without any engine", f"{both:.3g}x")
