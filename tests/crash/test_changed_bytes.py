"""With ``check="payload"`` a byte that changes in shared memory, on its way, is found: the task fails, others go on."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from shmengine._native import lib
from shmengine.engine import Engine
from shmengine.errors import Corrupt
from shmengine.workers.messages import RESULT_RING, TASK_RING
from tests.conformance.conftest import Gate, wait_for_file
from tests.helpers import poll_until

MARK = 1234.56789
ITEMS = 8192  # of a marked array: born shared where it is made


@pytest.fixture
def engine():
    with Engine(1, memory="16 MiB", check="payload") as engine:
        assert engine.submit(abs, -1).result() == 1
        yield engine
        assert list(engine.map(abs, [-1, -2])) == [1, 2]
        assert engine.stats().worker_deaths == 0


def flip(engine, value=MARK):
    """Flip a bit of each number of this value that lies in shared memory; False if there are not enough."""
    words = np.frombuffer(engine._backend._core.region.memory, "u8")
    (places,) = np.nonzero(words == np.float64(value).view("u8"))
    if len(places) < ITEMS:
        return False
    words[places] ^= np.uint64(1 << 7)
    return True


def waiting(engine, ring=RESULT_RING):
    """Messages in a ring."""
    return lib.shmr_approx_fill(engine._backend._core.handle, ring)


class Undrained:
    """While it is entered, nobody takes results in the main process."""

    def __init__(self, engine):
        self.core = engine._backend._core

    def __enter__(self):
        with self.core.turn:
            self.core.turn.wait_for(lambda: self.core.drainer is None)
            self.core.drainer = -1

    def __exit__(self, *_):
        with self.core.turn:
            self.core.drainer = None
            self.core.turn.notify_all()


def marked(_=None):
    return np.full(ITEMS, MARK)


def in_thread(call):
    """Run this in a thread; return what gives its error."""
    caught = []

    def run():
        try:
            caught.append(call())
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def result():
        thread.join()
        return caught.pop()

    return result


RESULTS = {
    "by reference": marked,
    "by reference, in a list": lambda _: [1, marked()],
    "by reference, strided": lambda _: np.full((ITEMS, 4), MARK)[:, ::3],
    "by copy": lambda _: [np.full(1000, MARK) for _ in range(10)],
}


@pytest.mark.parametrize("kind", RESULTS)
@pytest.mark.parametrize("way", ["submit", "map"])
def test_a_result(engine, kind, way):
    fn = RESULTS[kind]
    with Undrained(engine):
        if way == "submit":
            error = engine.submit(fn, 0).exception
        else:
            error = in_thread(lambda: next(engine.map(fn, [0])))
        poll_until(lambda: waiting(engine), what="the result is in shared memory")
        assert flip(engine)
    assert isinstance(error(), Corrupt)


def test_a_task(engine, tmp_path):
    gate = Gate(str(tmp_path / "gate"))
    first = engine.submit(gate.wait)
    second = engine.submit(np.sum, marked())
    assert flip(engine)
    gate.open()
    first.result()
    assert isinstance(second.exception(), Corrupt)


def test_an_object_that_was_put(engine):
    ref = engine.put({"x": marked()})
    assert flip(engine)
    assert isinstance(engine.submit(id, ref).exception(), Corrupt)
    with pytest.raises(Corrupt):
        ref.get()
    other = engine.put([1, marked()])
    assert engine.submit(lambda obj: float(obj[1][0]), other).result() == MARK


def wait_once(path, block):
    wait_for_file(path)
    return block[:, 0].copy()


def test_a_block_on_its_way_out(engine, tmp_path):
    gate = Gate(str(tmp_path / "gate"))
    x = np.zeros((6, ITEMS))
    x[1] = MARK
    path = gate.wait.args[0]
    error = in_thread(lambda: engine.map_blocks(lambda b: wait_once(path, b), x, block_bytes=x[0].nbytes))
    poll_until(lambda: waiting(engine, TASK_RING), what="the block is in shared memory")
    assert flip(engine)
    gate.open()
    assert isinstance(error(), Corrupt)


def test_a_block_on_its_way_back(engine):
    x = np.zeros((6, ITEMS))
    out = np.empty(x.shape)
    assert (engine.map_blocks(lambda b: b + 1, x, out=out, block_bytes=x[0].nbytes) == 1).all()
    with Undrained(engine):
        error = in_thread(lambda: engine.map_blocks(lambda b: b + MARK, x, out=out, block_bytes=x[0].nbytes))
        poll_until(lambda: waiting(engine) > 1, what="results are in shared memory")
        assert flip(engine)
    assert isinstance(error(), Corrupt)
