"""Each backend in turn: serial is the oracle, the others must not differ from it. And each mechanism of channels."""

from __future__ import annotations

import functools

import pytest

from shmengine.engine import Engine
from tests.helpers.channels import MECHANISMS, STARTS, Partners, make_pair

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


# --- channels ------------------------------------------------------------------------------------


@pytest.fixture(params=MECHANISMS)
def mechanism(request):
    return request.param


@pytest.fixture(params=STARTS)
def how(request):
    """How whoever has the other end is started."""
    return request.param


@pytest.fixture(scope="module")
def partners():
    """Those who have the other ends; a module's tests share their processes."""
    shared = Partners()
    yield shared
    shared.close()


@pytest.fixture
def make_channel(mechanism):
    """Makes channels, and closes in the end what is still open."""
    made = []

    def make(**options):
        made.append(make_pair(mechanism, **options))
        return made[-1]

    yield make
    for ends in made:
        for end in ends:
            end.close()


@pytest.fixture
def ends(make_channel):
    return make_channel()
