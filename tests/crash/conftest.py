"""Engines that die, or whose workers do."""

from __future__ import annotations

import pytest

from shmengine.engine import Engine


@pytest.fixture
def make_engine():
    made = []

    def make(workers=2, **settings):
        made.append(Engine(workers, **{"memory": "64 MiB", **settings}))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
