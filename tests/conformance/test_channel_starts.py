"""Ends on their way to other processes: under every start method, to workers of an engine, and from hand to hand."""

from __future__ import annotations

import multiprocessing
import os

import numpy as np
import pytest

from shmengine import EndOfStream, Engine
from tests.helpers.channels import FOREVER, is_message, make_pair, message, number_of

METHODS = ["fork", "spawn", "forkserver"]


def echo(end):
    for obj in end:
        end.send(obj)


def converse(end):
    for number in range(25):
        end.send(message(number), FOREVER)
        obj = end.receive(FOREVER)
        assert is_message(obj)
        assert number_of(obj) == number
    end.close()


@pytest.mark.parametrize("method", METHODS)
def test_as_an_argument_of_a_process(ends_here, method):
    left, right = ends_here
    process = multiprocessing.get_context(method).Process(target=echo, args=(right,))
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


def test_through_another_channel(make_channel_here, partners):
    left, right = make_channel_here()
    carrier, other = make_channel_here()
    job = partners.start("fork", relay, other)
    carrier.send(right)
    assert carrier.receive(FOREVER) == "got it"
    right.close()
    assert left.receive(FOREVER) == job.pid
    assert left.receive(FOREVER).tolist() == list(range(10))
    with pytest.raises(EndOfStream):
        left.receive(FOREVER)
    job.result()


def test_both_ends_elsewhere(ends_here, partners):
    """Who made the channel uses none of them."""
    left, right = ends_here
    one = partners.start("fork", echo, right)
    other = partners.start("fork", converse, left)
    one.result()
    other.result()
