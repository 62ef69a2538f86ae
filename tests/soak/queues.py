"""`Queue` and `JoinableQueue` among strangers who are killed and replaced."""

from __future__ import annotations

import queue
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from shmengine.codec import decode
from shmengine.queues import JoinableQueue, Queue
from tests.soak.ledger import WORDS, Ledger, read_message, write_message
from tests.soak.report import Report
from tests.soak.rounds import LOOK_SECONDS, SHAPES, Shape, play_all


class QueueChannel:
    """Messages are arrays that are put and got."""

    def __init__(self, shape: Shape) -> None:
        self.queue = self.make(shape.capacity, shape.memory)
        self.region = self.queue._region
        self.largest = shape.largest

    def make(self, maxsize: int, memory: str) -> Any:
        return LoggedQueue(maxsize, memory=memory)

    def produce(self, ledger: Ledger, life: int) -> None:
        sizes = random.Random(life)
        flags, sent = ledger.flags, ledger.sent
        number = 0
        array = np.empty(WORDS, "u8")
        while not flags[0]:
            if self.largest > WORDS:
                array = np.empty(sizes.randint(WORDS, self.largest), "u8")
            write_message(array, life, number)
            try:
                self.queue.put(array, timeout=LOOK_SECONDS)
            except queue.Full:
                continue
            number += 1
            sent[life] = number
        self.queue.close()

    def consume(self, ledger: Ledger, role: int, life: int) -> None:
        flags, log, cursors = ledger.flags, ledger.logs[role], ledger.cursors

        def write_down(entry: int) -> None:
            log[cursors[role]] = entry
            cursors[role] += 1

        while not flags[1] and cursors[role] < len(log):
            try:
                self.get(write_down, timeout=LOOK_SECONDS)
            except queue.Empty:
                continue
        self.queue.close()

    def get(self, write_down: Callable[[int], None], timeout: float) -> None:
        self.queue.write_down = write_down
        self.queue.get(timeout=timeout)

    def take_rest(self, ledger: Ledger) -> None:
        while True:
            try:
                self.get(ledger.extra.append, timeout=0)
            except queue.Empty:
                return

    def close(self) -> None:
        self.queue.close()


class LoggedQueue(Queue[Any]):
    """A queue that writes down what it got while it still has it leased; who calls `get` cannot."""

    write_down: Callable[[int], None]

    def _got(self, message: Any) -> None:
        array = decode(self._region.root(message.offset, message.length), copy=True)
        self.write_down(read_message(array, message.attempts))
        super()._got(message)


class JoinableChannel(QueueChannel):
    """The same, with `task_done`: what was got and not done is delivered again."""

    def make(self, maxsize: int, memory: str) -> Any:
        return JoinableQueue(maxsize, memory=memory)

    def get(self, write_down: Callable[[int], None], timeout: float) -> None:
        array = self.queue.get(timeout=timeout)
        write_down(read_message(array, self.queue._outstanding[-1].attempts))
        self.queue.task_done()

    def take_rest(self, ledger: Ledger) -> None:
        super().take_rest(ledger)
        self.queue.join()  # everything is done, so this returns


def run(seconds: float, seed: int) -> Report:
    """Play rounds of all shapes, with queues of both kinds."""
    return play_all([QueueChannel, JoinableChannel], SHAPES, seconds, seed)
