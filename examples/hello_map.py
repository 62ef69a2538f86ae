"""A large array, cut into blocks, through all cores: no guard, no picklable function needed."""

from __future__ import annotations

import numpy as np

import shmengine as shm

x = np.linspace(0.0, 1.0, 5_000_000)

with shm.Engine() as engine:
    y = engine.map_blocks(lambda block: np.sqrt(block) * 2 + 1, x)
    total = engine.reduce(np.sum, x, combine=np.add)

assert np.array_equal(y, np.sqrt(x) * 2 + 1)
print(f"{y.size} values, the last is {y[-1]:.1f}; the sum of x is {total:.1f}")
