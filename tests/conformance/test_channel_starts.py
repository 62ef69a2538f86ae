"""Ends on their way to others: as arguments of processes and tasks, and from hand to hand."""

from __future__ import annotations

import multiprocessing
import os

import numpy as np
import pytest

from shmengine import EndOfStream, Engine
from tests.helpers.channels import FOREVER, echo, is_message, make_pair, message, number_of
from tests.helpers.partners import Child

INHERITS = True
METHODS = ["fork", "spawn", "forkserver"]


def converse(end):
    for number in range(25):
        end.send(message(number), FOREVER)
        obj = end.receive(FOREVER)
        assert is_message(obj)
        assert number_of(obj) == number
    end.close()


@pytest.mark.parametrize("how", METHODS)
def test_as_an_argument_of_a_process(ends_here, how):
    left, right = ends_here
    process = multiprocessing.get_context(how).Process(target=echo, args=(right,))
    process.start()
    right.close()
    converse(left)
    process.join()
    assert process.exitcode == 0
    process.close()


def echo_of(end, number):
    for obj in end:
        end.send((number, obj))
    return os.getpid()


def test_as_an_argument_of_tasks(mechanism):
    with Engine(2, memory="64 MiB") as engine:
        pairs = [make_pair(mechanism) for _ in range(2)]
        futures = [engine.submit(echo_of, right, number) for number, (_, right) in enumerate(pairs)]
        for number, (left, _) in enumerate(pairs):
            left.send("hello")
            assert left.receive(FOREVER) == (number, "hello")
        for left, _ in pairs:
            left.close()
        assert len({future.result(FOREVER) for future in futures}) == 2
        for _, right in pairs:
            right.close()


def relay(carrier):
    """Get an end through a channel, and use it."""
    end = carrier.receive(FOREVER)
    carrier.send("got it")
    end.send_many([os.getpid(), np.arange(10)])
    end.close()


def test_through_another_channel(make_channel, make_channel_here):
    left, right = make_channel_here()
    carrier, other = make_channel()
    job = other.start(relay)
    carrier.send(right)
    assert carrier.receive(FOREVER) == "got it"
    right.close()
    assert left.receive(FOREVER) == other.pid
    assert left.receive(FOREVER).tolist() == list(range(10))
    with pytest.raises(EndOfStream):
        left.receive(FOREVER)
    job.result()


def test_both_ends_elsewhere(mechanism, take):
    """Who made the channel uses none of them."""
    left, right = make_pair(mechanism)
    child = Child(converse, left)
    left.close()
    take(right).run(echo)
    assert child.outcome() == (True, None)
