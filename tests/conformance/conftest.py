"""Each backend in turn: serial is the oracle, the others must not differ from it."""

from __future__ import annotations

import functools

import pytest

from shmengine.engine import Engine

BACKENDS = ["serial", "thread", "process"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(scope="module", params=BACKENDS)
def engine(request):
    """An engine that a module's tests share: none of them may hurt it."""
    with Engine(2, backend=request.param, memory="256 MiB") as shared:
        yield shared


@pytest.fixture
def make_engine(backend):
    """Makes engines for tests that close, break or configure them."""
    made = []

    def make(workers=2, **settings):
        made.append(Engine(workers, backend=backend, **{"memory": "64 MiB", **settings}))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def gate(tmp_path):
    """Something that a task in any process can wait for: ``gate.wait`` returns after ``gate.open()``."""
    return Gate(str(tmp_path / "gate"))


class Gate:
    def __init__(self, path):
        self.path = path

    def open(self):
        with open(self.path, "w"):
            pass

    @property
    def wait(self):
        return functools.partial(wait_for_file, self.path)


def wait_for_file(path, value=None):
    import os
    import time

    while not os.path.exists(path):
        time.sleep(0.001)
    return value
