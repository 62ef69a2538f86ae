"""Who sent what, and what arrived: an account that no death can falsify.

A message bears the life that sent it, its number in that life, and six times a check of the two.

*Sent*: each producer writes down, after each commit that returned, how many have. So message ``sent`` of a dead
producer may or may not arrive: its commit was under way. Numbers beyond it must not.

*Arrived*: each consumer writes down each message (life, number, attempts) while it has it leased: before the release.
The cursor of the log is moved last, so a consumer that dies in between has written nothing; its message was not
released either and comes again. Its successor goes on in the same log.

What follows from the two, once everybody has ended and the ring is empty:

lost
    number < sent, and in no log.
duplicated
    The same (life, number, attempts) twice: delivered again as if for the first time. Or: more deliveries that say of
    themselves that they are repeated (attempts > 0) than consumers that died, each with one lease.
wrong
    number > sent, a life that never was, a check that does not fit.
"""

from __future__ import annotations

import mmap
import struct
from typing import Any

import numpy as np

from tests.soak.report import Report

WORDS = 8
"""Words of the shortest message, 64 bytes."""

_MASK = (1 << 64) - 1
_HEADER = struct.Struct("<8Q")
_LIFE_BITS, _NUMBER_BITS, _ATTEMPT_BITS = 24, 32, 7
_WRONG = 1 << 63


def write_message(frame: Any, life: int, number: int) -> None:
    """Fill a frame, a contiguous array of at least 8 u8."""
    check = (life * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + 1) & _MASK
    if len(frame) > WORDS:
        frame[WORDS:] = check
    _HEADER.pack_into(frame, 0, life, number, check, check, check, check, check, check)


def read_message(frame: Any, attempts: int) -> int:
    """Return the log's entry for a message."""
    life: int
    number: int
    life, number, *checks = _HEADER.unpack_from(frame)
    check = (life * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + 1) & _MASK
    if checks != [check] * 6 or (len(frame) > WORDS and (frame[WORDS:] != check).any()):
        return _WRONG
    return attempts << (_LIFE_BITS + _NUMBER_BITS) | life << _NUMBER_BITS | number


class Ledger:
    """The account of one round, in memory shared by fork.

    Parameters
    ----------
    consumers : int
        Roles that have a log.
    lives : int
        How many there can be.
    arrivals : int
        How long each log can become: more than all messages together.
    """

    def __init__(self, consumers: int, lives: int, arrivals: int) -> None:
        self._memory = mmap.mmap(-1, 8 * (2 + lives + consumers * (1 + arrivals)))
        words = memoryview(self._memory).cast("Q")
        self.flags, self.sent = words[:2], words[2 : 2 + lives]
        self.cursors = words[2 + lives : 2 + lives + consumers]
        logs = words[2 + lives + consumers :]
        self.logs = [logs[i * arrivals : (i + 1) * arrivals] for i in range(consumers)]
        self.extra: list[int] = []
        """Entries of whoever empties the ring at the end."""

    def stop_producing(self) -> None:
        """Tell the producers to end."""
        self.flags[0] = 1

    def stop_consuming(self) -> None:
        """Tell the consumers to end."""
        self.flags[1] = 1

    @property
    def total_sent(self) -> int:
        """Commits that returned."""
        return int(np.frombuffer(self.sent, "u8").sum())

    @property
    def total_arrived(self) -> int:
        """Deliveries written down."""
        return sum(self.cursors) + len(self.extra)

    def settle(self, births: int, consumer_deaths: int, report: Report) -> None:
        """Add what the account says to a report; everybody has ended."""
        entries = np.concatenate(
            [
                np.frombuffer(log, "u8", cursor)
                for log, cursor in zip(self.logs, self.cursors, strict=True)
                if cursor
            ]
            + [np.array(self.extra, "u8")]
        )
        torn = entries >= _WRONG
        entries = entries[~torn]
        lives, numbers = entries >> _NUMBER_BITS & (1 << _LIFE_BITS) - 1, entries & (1 << _NUMBER_BITS) - 1
        sent = np.frombuffer(self.sent, "u8")
        invented = (lives >= births) | (numbers > sent[np.minimum(lives, len(sent) - 1)])
        redelivered = int((entries >> _LIFE_BITS + _NUMBER_BITS > 0).sum())
        # A log is not in order, and its entries are what they are: sort, and count what differs.
        messages = np.unique((lives << _NUMBER_BITS | numbers)[~invented])
        promised = messages & (1 << _NUMBER_BITS) - 1 < sent[messages >> _NUMBER_BITS]
        report.messages += len(messages)
        report.redelivered += redelivered
        report.lost += self.total_sent - int(promised.sum())
        report.duplicated += len(entries) - len(np.unique(entries)) + max(0, redelivered - consumer_deaths)
        report.wrong += int(torn.sum()) + int(invented.sum())
