"""Each backend in turn: serial is the oracle, the others must not differ from it. And each mechanism of channels."""

from __future__ import annotations

import functools

import pytest

from shmengine.engine import Engine
from tests.helpers.channels import MECHANISMS, make_pair
from tests.helpers.limits import queues_for
from tests.helpers.partners import STARTS, Partners

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
    with queues_for(request.param):
        yield request.param


@pytest.fixture(params=STARTS)
def how(request):
    """How whoever has the other end is started."""
    return request.param


@pytest.fixture(scope="module")
def partners():
    """Those who have the other ends; a module's tests share their processes."""
    shared = Partners(ready=True)
    yield shared
    shared.close()


@pytest.fixture
def take(partners, how, request):
    """Gives an end to a partner, and returns it as one that is there; closes it in the end.

    Only in modules that say INHERITS is a child forked each time: where copies of ends are part of what is tested.
    """
    taken = []
    pickled_anyway = how == "fork" and not getattr(request.module, "INHERITS", False)

    def take(end, *, pickled=False):
        taken.append(partners.take(how, end, pickled=pickled or pickled_anyway))
        return taken[-1]

    yield take
    for end in taken:
        end.leave()


@pytest.fixture
def make_channel(mechanism, take):
    """Makes channels whose right end a partner has, and closes in the end what is still open."""
    made = []

    def make(**options):
        left, right = make_pair(mechanism, **options)
        made.append(left)
        return left, take(right)

    yield make
    for end in made:
        end.close()


@pytest.fixture
def ends(make_channel):
    """Both of a channel: the left one is here, the right one with a partner."""
    return make_channel()


@pytest.fixture
def make_channel_here(mechanism):
    """Makes channels both of whose ends are the test's own."""
    made = []

    def make(**options):
        made.append(make_pair(mechanism, **options))
        return made[-1]

    yield make
    for ends in made:
        for end in ends:
            end.close()


@pytest.fixture
def ends_here(make_channel_here):
    return make_channel_here()
