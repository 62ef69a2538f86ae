"""Ctrl-C at any moment of a call: a KeyboardInterrupt, and an engine that goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import time

import pytest

from shmengine import interrupts
from shmengine.interrupts import SIGNALS, InterruptsLater
from tests.helpers.scripts import run_script

CALLS = {
    "out": "engine.map_blocks(np.sqrt, x, out=out, block_bytes=20_000)",
    "fresh": "engine.map_blocks(np.sqrt, x, block_bytes=20_000)",
    "reduce": "engine.reduce(np.sum, x, combine=np.add, block_bytes=20_000)",
    "map": "list(engine.map(np.sum, x.reshape(100, -1)))",
    "submit": "[f.result() for f in [engine.submit(np.sum, part) for part in x.reshape(100, -1)[:20]]]",
}

SCRIPT = """
import os, random, signal, sys, threading, time
import numpy as np, shmengine as shm

x, out = np.arange(200_000.0), np.empty(200_000)
interrupts = 0
with shm.Engine(2, memory="64 MiB") as engine:
    def call():
        return CALL
    expected = call()
    start = time.perf_counter()
    call()
    usual = time.perf_counter() - start
    others = []
    def submit():
        while not others or others[-1] != "stop":
            assert engine.submit(abs, -3).result(60) == 3
    thread = threading.Thread(target=submit)
    thread.start()
    for seed in range(60):
        wait = random.Random(seed).uniform(0, 1.5 * usual)
        timer = threading.Timer(wait, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            call()
            timer.join()
            time.sleep(0.01)
        except KeyboardInterrupt:
            interrupts += 1
    others.append("stop")
    thread.join()
    assert np.array_equal(call(), expected)
    core = engine._backend._core
    deadline = time.monotonic() + 30
    while core.in_flight or core.drainer is not None:  # the results' thread may be having a last look
        assert time.monotonic() < deadline, (engine.stats(), core.drainer)
        time.sleep(0.01)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
print(interrupts)
"""


@pytest.mark.parametrize("what", CALLS)
def test_interrupts_at_any_moment(what):
    result = run_script(SCRIPT.replace("CALL", CALLS[what]), check=True, timeout=50)
    # Python swallows those that it raises in a finalizer, or in the callback of a weak reference.
    assert int(result.stdout) >= 30


def test_the_second_interrupt_comes_through_at_once():
    """Whatever is called within may be stuck: a callback of a future, say."""
    came = []
    with pytest.raises(KeyboardInterrupt), InterruptsLater():
        os.kill(os.getpid(), signal.SIGINT)
        came.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        came.append(2)
    assert came == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_first_one_waits():
    came = []
    with pytest.raises(KeyboardInterrupt):
        with InterruptsLater():
            os.kill(os.getpid(), signal.SIGINT)
            came.append(1)
        came.append(2)
    assert came == [1]


def test_other_handlers_are_called_later_and_none_stays_none():
    came = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        with InterruptsLater():
            os.kill(os.getpid(), signal.SIGINT)
            assert came == []
        assert came == [signal.SIGINT]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with InterruptsLater():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_each_handler_runs_though_another_one_raises():
    """None of the signals that came meanwhile is forgotten."""
    ran = []

    def handler(number, frame):
        ran.append(number)
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        with pytest.raises(KeyboardInterrupt), InterruptsLater():
            for number in before:
                signal.raise_signal(number)
            assert not ran
        assert sorted(ran) == sorted(before)
    finally:
        for number, own in before.items():
            signal.signal(number, own)


@pytest.mark.parametrize("step", range(2 * len(SIGNALS)))
def test_a_handler_that_raises_while_others_are_replaced_leaves_none_of_ours(monkeypatch, step):
    """An alarm, say, after the handler of Ctrl-C was exchanged, but before its own."""

    class Alarm(BaseException):
        pass

    before = {number: signal.signal(number, lambda number, frame: None) for number in SIGNALS}
    theirs = {number: signal.getsignal(number) for number in SIGNALS}
    steps = []

    def exchange(number, handler):
        signal.signal(number, handler)
        steps.append(number)
        if len(steps) == step + 1:
            raise Alarm

    monkeypatch.setattr(interrupts, "_setsignal", exchange)
    try:
        with pytest.raises(Alarm), InterruptsLater():
            pass
        assert {number: signal.getsignal(number) for number in SIGNALS} == theirs
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
