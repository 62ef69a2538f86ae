"""Ways for numbered messages from several processes to several others, and crews that send numbers through them.

A message is an array of 64-bit integers, all of which are its number; STOP says that nothing more comes.

    Ring, Queue                     producers ──► [ ] ──► consumers     whoever is free takes the next one
    pipe, mqueue, shm, socket       a channel for each producer and each consumer:

        producer ──► consumer 0, 1, 2      dealt out in turn
        producer 0, 1, 2 ──► consumer      taken in turn
"""

from __future__ import annotations

import itertools
import multiprocessing
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

import shmengine as shm
from benches.rivals import PATIENCE, SLOTS, known
from shmengine.bench.crew import Crew
from shmengine.bench.ours import memory_for
from shmengine.bench.registry import MECHANISMS

STOP = (1 << 64) - 1
fork = multiprocessing.get_context("fork")


class Flow(ABC):
    """From some producers to some consumers."""

    def __init__(self, nbytes: int, producers: int, consumers: int) -> None:
        self.length = nbytes // 8

    @abstractmethod
    def sender(self, producer: int) -> Callable[[int], None]:
        """Return what sends a number, for one round of one producer."""

    @abstractmethod
    def receiver(self, consumer: int) -> Callable[[], int]:
        """Return what receives a number, for one round of one consumer."""

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

    def __init__(self, nbytes: int, producers: int, consumers: int) -> None:
        super().__init__(nbytes, producers, consumers)
        self.ring = shm.Ring(capacity=SLOTS, arena_bytes=4 * (SLOTS + 8) * max(nbytes, 1 << 16))

    def sender(self, producer: int) -> Callable[[int], None]:
        def send(number: int) -> None:
            frame = self.ring.claim(self.length, "u8")
            frame.array.fill(number)
            frame.commit()

        return send

    def receiver(self, consumer: int) -> Callable[[], int]:
        def receive() -> int:
            with self.ring.lease() as frame:
                return self.look(frame)

        return receive

    def close(self) -> None:
        self.ring.close()


class QueueFlow(Flow):
    """A queue: `shmengine.Queue`, `multiprocessing.Queue`."""

    def __init__(self, nbytes: int, producers: int, consumers: int, *, make: Callable[[int], Any]) -> None:
        super().__init__(nbytes, producers, consumers)
        self.queue = make(SLOTS)

    def sender(self, producer: int) -> Callable[[int], None]:
        return lambda number: self.queue.put(np.full(self.length, number, np.uint64))

    def receiver(self, consumer: int) -> Callable[[], int]:
        return lambda: self.look(self.queue.get())

    def close(self) -> None:
        self.queue.close()


class ChannelFlow(Flow):
    """A `shmengine.channel` for each producer and each consumer."""

    def __init__(self, nbytes: int, producers: int, consumers: int, *, mechanism: str) -> None:
        super().__init__(nbytes, producers, consumers)
        self.channels = {
            pair: shm.channel(mechanism, duplex=False, buffer_bytes=memory_for(nbytes, SLOTS))
            for pair in itertools.product(range(producers), range(consumers))
        }

    def sender(self, producer: int) -> Callable[[int], None]:
        ends = itertools.cycle(left for pair, (left, _) in self.channels.items() if pair[0] == producer)
        return lambda number: next(ends).send(np.full(self.length, number, np.uint64))

    def receiver(self, consumer: int) -> Callable[[], int]:
        ends = itertools.cycle(right for pair, (_, right) in self.channels.items() if pair[1] == consumer)
        return lambda: self.look(next(ends).receive())

    def close(self) -> None:
        for end in itertools.chain(*self.channels.values()):
            end.close()


RIVAL = "multiprocessing.Queue"
FLOWS: dict[str, Callable[[int, int, int], Flow]] = {
    "Ring": RingFlow,
    "Queue": partial(QueueFlow, make=shm.Queue),
    **{name: partial(ChannelFlow, mechanism=name) for name in MECHANISMS if known(name)},
    RIVAL: partial(QueueFlow, make=fork.Queue),
}

Part = Callable[[int], Any]
"""One process's part in a round of `count` messages; what it returns is checked."""


def contestants(
    stack: ExitStack,
    flows: Sequence[tuple[int, int]],
    nbytes: int,
    parts: Callable[..., Sequence[Part]],
    check: Callable[[int, list[Any]], None],
    count: int,
    rivals_count: int,
) -> dict[str, Callable[[], float]]:
    """For each kind of flow a crew that sends `count` messages in a round; the rival, if he is slow, sends fewer.

    Parameters
    ----------
    flows : sequence of (int, int)
        Of those that `parts` is given: how many producers and consumers each has.
    parts : callable
        ``parts(flow, ...)``: one function for each process.
    check : callable
        ``check(count, replies)``: asserts that what the processes have returned is the expected answer.
    """
    found = {}
    for name, kind in FLOWS.items():
        made = []
        for producers, consumers in flows:
            made.append(kind(nbytes, producers, consumers))
            stack.callback(made[-1].close)
        members = [_member(part) for part in parts(*made)]
        crew = stack.enter_context(Crew(members, (), PATIENCE))

        number = rivals_count if name == RIVAL else count

        def run(crew: Crew = crew, size: int = len(members), number: int = number) -> float:
            check(number, crew.ask(*[number] * size))
            return number

        found[name] = run
    return found


def note_ratios(result: Any, targets: Any) -> None:
    """Note how many times faster each kind of ours is than the rival."""
    for name in FLOWS:
        if name != RIVAL:
            targets.note(f"{name} to {RIVAL}", f"{result.ratio(name, RIVAL):.3g}x")


def _member(part: Part) -> Any:
    return lambda: (part, lambda: None)
