"""One copy of a model in shared memory, read by every task; arrays born shared cross by reference."""

from __future__ import annotations

import numpy as np

import shmengine as shm

table = np.arange(1_000_000, dtype="f8")

with shm.Engine(workers=2) as engine:
    model = engine.put({"table": table, "name": "squares"})
    values = list(engine.map(lambda i, m: float(m["table"][i] ** 2), range(5), [model] * 5))

    image = engine.empty((1000, 1000), "f4")  # a plain ndarray that workers reach by reference
    image[:] = 2
    before = engine.stats().bytes_copied
    doubled = engine.submit(np.multiply, image[::2], image[1::2]).result()
    copied = engine.stats().bytes_copied - before

assert doubled.shape == (500, 1000)
assert (doubled == 4).all()
print(f"{values}, bytes copied for the image: {copied}")
