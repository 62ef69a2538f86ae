"""The four channels: one producer, one consumer, arrays and other objects that exist are sent.

    producer ── send(array) ──► pipe, mqueue, shm or socket ──► receive() ── consumer
    producer ── send({table, arrays, texts}) ──► shm ──► receive() ── consumer

Needs 2 cores; each process is pinned to one. Expected: every message, once, in order, equal to what was sent.
"""

from __future__ import annotations

import multiprocessing
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import pytest

import shmengine as shm
from benches.rivals import PATIENCE, PipeThatKeepsMemory, known, one_way
from shmengine.bench.crew import Crew, cores

MIB = 1 << 20


@pytest.mark.parametrize(
    ("nbytes", "count"),
    [
        pytest.param(64, 5_000, id="64B"),
        pytest.param(1 << 14, 2_000, id="16KiB"),
        pytest.param(MIB, 200, id="1MiB"),
    ],
)
def test_arrays(nbytes: int, count: int, compare: Any, targets: Any) -> None:
    """Those that go through the kernel, against `multiprocessing.Pipe` and bare pyzmq."""
    kept = "multiprocessing.Pipe, memory kept"
    links = known("pipe", "mqueue", "socket", "shm", "multiprocessing.Pipe", "pyzmq")
    links |= {kept: PipeThatKeepsMemory} if nbytes == MIB else {}
    with ExitStack() as stack:
        result = compare(
            {name: one_way(stack, link, nbytes, "copy", count) for name, link in links.items()},
            unit="a message",
            bytes_each=nbytes if nbytes > 64 else 0,
        )
    for name in ("pipe", "mqueue", "socket"):
        ratio = result.ratio(name, "multiprocessing.Pipe")
        if nbytes == MIB:
            targets.at_least(f"{name} to multiprocessing.Pipe, send(array)", ratio, 2)
            targets.note(f"{name} to one whose memory is kept", f"{result.ratio(name, kept):.3g}x")
        elif nbytes == 64 and name != "socket":
            targets.at_least(f"{name} to multiprocessing.Pipe, send(array)", ratio, 0.9)
        else:
            targets.note(f"{name} to multiprocessing.Pipe, send(array)", f"{ratio:.3g}x")
    targets.at_least("socket to bare pyzmq, two parts over ipc", result.ratio("socket", "pyzmq"), 0.9)


def ten_megabytes() -> dict[str, Any]:
    """A table, arrays and texts: 10 MB in all."""
    import pandas as pd

    numbers = np.arange(500_000, dtype=np.float64)
    return {
        "table": pd.DataFrame({"x": numbers[:250_000], "y": numbers[:250_000] ** 2, "n": np.arange(250_000)}),
        "arrays": [numbers[:400_000], np.arange(100_000, dtype=np.int32)],
        "texts": [f"text number {number}" for number in range(1_000)],
    }


def test_objects(compare: Any, targets: Any) -> None:
    """A dict with a DataFrame, arrays and strings, against `multiprocessing.Queue`."""
    count = 20
    with ExitStack() as stack:
        left, right = shm.channel("shm", buffer_bytes="256 MiB")
        for end in (left, right):
            stack.callback(end.close)
        queue: Any = multiprocessing.get_context("fork").Queue(16)
        stack.callback(queue.close)
        obj = ten_megabytes()

        def contestant(send: Any, receive: Any) -> Any:
            members = (partial(_sender, send, obj), partial(_receiver, receive, obj))
            crew = stack.enter_context(Crew(members, cores(2), PATIENCE))

            def run() -> float:
                assert crew.ask(count, count) == [count, count], "what arrived is not what was sent"
                return count

            return run

        result = compare(
            {
                "shm": contestant(left.send, right.receive),
                "multiprocessing.Queue": contestant(queue.put, queue.get),
            },
            unit="an object",
        )
    ratio = result.ratio("shm", "multiprocessing.Queue")
    targets.at_least("shm to multiprocessing.Queue, 10 MB of objects", ratio, 5)


def _sender(send: Any, obj: dict[str, Any]) -> Any:
    def run(count: int) -> int:
        for number in range(count):
            send({**obj, "number": number})
        return count

    return run, lambda: None


def _receiver(receive: Any, expected: dict[str, Any]) -> Any:
    def run(count: int) -> int:
        right = 0
        for number in range(count):
            got = receive()
            right += (
                got["number"] == number
                and len(got["table"]) == len(expected["table"])
                and got["table"]["y"].iloc[-1] == expected["table"]["y"].iloc[-1]
                and all(
                    np.array_equal(a[::512], b[::512])
                    for a, b in zip(got["arrays"], expected["arrays"], strict=True)
                )
                and got["texts"] == expected["texts"]
            )
        return right

    return run, lambda: None
