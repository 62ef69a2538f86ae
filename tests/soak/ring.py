"""A `Ring` among strangers who are killed and replaced: nobody is in charge of recovery but whoever comes by."""

from __future__ import annotations

import random

from shmengine.errors import Timeout
from shmengine.ring import Ring
from tests.soak.ledger import WORDS, Ledger, read_message, write_message
from tests.soak.report import Report
from tests.soak.rounds import LOOK_SECONDS, SHAPES, Shape, play_all


class RingChannel:
    """Messages are filled and read in place."""

    def __init__(self, shape: Shape) -> None:
        self.ring = Ring(shape.capacity, shape.memory)
        self.region = self.ring._region
        self.largest = shape.largest

    def produce(self, ledger: Ledger, life: int) -> None:
        sizes = random.Random(life)
        ring, flags, sent = self.ring, ledger.flags, ledger.sent
        number, words = 0, WORDS
        while not flags[0]:
            if self.largest > WORDS:
                words = sizes.randint(WORDS, self.largest)
            try:
                claim = ring.claim(words, "u8", LOOK_SECONDS)
                write_message(claim.array, life, number)
                claim.commit()
            except Timeout:
                continue
            number += 1
            sent[life] = number
        ring.close()

    def consume(self, ledger: Ledger, role: int, life: int) -> None:
        ring, flags, log, cursors = self.ring, ledger.flags, ledger.logs[role], ledger.cursors
        cursor, end = cursors[role], len(log)
        while not flags[1] and cursor < end:
            try:
                lease = ring.lease(LOOK_SECONDS)
            except Timeout:
                continue
            log[cursor] = read_message(lease.array, lease.attempts)
            cursor += 1
            cursors[role] = cursor
            lease.release()
        ring.close()

    def take_rest(self, ledger: Ledger) -> None:
        while (lease := self.ring.try_lease()) is not None:
            ledger.extra.append(read_message(lease.array, lease.attempts))
            lease.release()

    def close(self) -> None:
        self.ring.close()


def run(seconds: float, seed: int) -> Report:
    """Play rounds of all shapes."""
    return play_all([RingChannel], SHAPES, seconds, seed)
