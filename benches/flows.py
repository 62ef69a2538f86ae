"""Ways to numbered messages that any number of processes may share, and crews that send numbers through them.

A message is an array of 64-bit integers, all of which are its number; STOP says that nothing more comes.
"""

from __future__ import annotations

import multiprocessing
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

import shmengine as shm
from benches.rivals import PATIENCE, SLOTS
from shmengine.bench.crew import Crew

STOP = (1 << 64) - 1
fork = multiprocessing.get_context("fork")


class Flow(ABC):
    """From any number of producers to any number of consumers."""

    def __init__(self, nbytes: int) -> None:
        self.length = nbytes // 8

    @abstractmethod
    def send(self, number: int) -> None: ...

    @abstractmethod
    def receive(self) -> int: ...

    @abstractmethod
    def close(self) -> None: ...

    def look(self, array: Any) -> int:
        """Return the number of a message that is whole."""
        number = int(array[0])
        assert array.size == self.length, f"{array.size} elements, not {self.length}"
        assert int(array[-1]) == number == int(array[self.length // 2]), f"message {number} is torn"
        return number


class RingFlow(Flow):
    """`shmengine.Ring`, filled and read in place."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self.ring = shm.Ring(capacity=SLOTS, arena_bytes=4 * (SLOTS + 8) * max(nbytes, 1 << 16))

    def send(self, number: int) -> None:
        frame = self.ring.claim(self.length, "u8")
        frame.array.fill(number)
        frame.commit()

    def receive(self) -> int:
        with self.ring.lease() as frame:
            return self.look(frame)

    def close(self) -> None:
        self.ring.close()


class ShmQueueFlow(Flow):
    """`shmengine.Queue`."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self.queue: Any = shm.Queue(SLOTS)

    def send(self, number: int) -> None:
        self.queue.put(np.full(self.length, number, np.uint64))

    def receive(self) -> int:
        return self.look(self.queue.get())

    def close(self) -> None:
        self.queue.close()


class QueueFlow(ShmQueueFlow):
    """`multiprocessing.Queue`."""

    def __init__(self, nbytes: int) -> None:
        Flow.__init__(self, nbytes)
        self.queue = fork.Queue(SLOTS)


FLOWS = {"Ring": RingFlow, "Queue": ShmQueueFlow, "multiprocessing.Queue": QueueFlow}

Part = Callable[[int], Any]
"""One process's part in a round of `count` messages; what it returns is checked."""


def contestants(
    stack: ExitStack,
    flows: int,
    nbytes: int,
    parts: Callable[..., Sequence[Part]],
    check: Callable[[int, list[Any]], None],
    count: int,
) -> dict[str, Callable[[], float]]:
    """For each kind of flow a crew that sends `count` messages in a round.

    Parameters
    ----------
    flows : int
        How many of them `parts` is given.
    parts : callable
        ``parts(flow, ...)``: one function for each process.
    check : callable
        ``check(count, replies)``: asserts that what the processes have returned is the expected answer.
    """
    found = {}
    for name, kind in FLOWS.items():
        made = [kind(nbytes) for _ in range(flows)]
        for flow in made:
            stack.callback(flow.close)
        members = [_member(part) for part in parts(*made)]
        crew = stack.enter_context(Crew(members, (), PATIENCE))

        def run(crew: Crew = crew, size: int = len(members)) -> float:
            check(count, crew.ask(*[count] * size))
            return count

        found[name] = run
    return found


def _member(part: Part) -> Any:
    return lambda: (part, lambda: None)
