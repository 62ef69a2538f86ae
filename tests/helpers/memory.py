"""Is the memory of a ring, a queue or an engine whole again?"""

from __future__ import annotations

from shmengine.errors import MemoryBudgetExceeded

MIB = 1 << 20


def assert_memory_is_whole(attached):
    """Of a ring or queue: this process has nothing allocated, holds nothing, and pins nothing."""
    counters = attached._region.counters()
    assert (counters.used, counters.held, counters.pins) == (0, 0, 0)


def can_have_half(engine):
    """Tell whether half of an engine's budget can be had, in pieces."""
    try:
        arrays = [engine.full(MIB, 1, "u1") for _ in range(engine.stats().memory_budget // 2 // MIB)]
    except MemoryBudgetExceeded:
        return False
    return bool(arrays)
