"""What lets a connection break and come back, and still each message arrive once: numbers, acknowledgements, resending.

A sender keeps a copy of each message until the other end has taken it. Both say in their greeting what they have, and
how much may wait with them, and go on from there. Each part that travels begins with a prefix, and a whole frame
follows, or what says where it lies (`Kind`)::

    | kind, 8 bytes | number, 8 | how many messages of the other end its user has taken, 8 | frame

Of what several steps change here each one can be repeated: a signal's handler may raise between any two of them.
"""

from __future__ import annotations

import enum
import struct
import time
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from shmengine import config
from shmengine._native._handles import Stream
from shmengine.channels.link import Counts
from shmengine.channels.loans import Borrowed, Lender, Lent, Loans, accept, borrow
from shmengine.channels.meter import Meter
from shmengine.errors import Corrupt

if TYPE_CHECKING:
    from shmengine.channels.greetings import Greeting

__all__ = [
    "ACKNOWLEDGE_MESSAGES",
    "LENT_BYTES",
    "PREFIX_BYTES",
    "SESSION_BYTES",
    "Kind",
    "Session",
    "most_part_bytes",
    "refusal",
]

PREFIX = struct.Struct("<B7xQQ")
PREFIX_BYTES = PREFIX.size
# Larger messages are cut: over TCP a part has to pass between two beats, or nobody seems to be there. Within a machine
# there are none, and what fits into one part is received without another copy.
PART_BYTES = 1 << 19
LOCAL_PART_BYTES = (1 << 24) + (1 << 16)  # an array of 16 MiB with its frame
MESSAGE_COST = 256  # bytes of memory that a small message takes beside its own
ACKNOWLEDGE_MESSAGES = 1024
ACKNOWLEDGE_BYTES = 2 << 20
# While the other end keeps taking messages no more than this is on its way, so that the copies stay in the cache.
PACE_BYTES = 8 << 20
LENT_BYTES = 1 << 12  # from here on a message is lent, where that is possible; less is sent sooner than lent
# Of what is lent: twice that and some of the largest ones, and rarer answers, for both sides copy at once.
LENT_PACE_BYTES = 16 << 20
LENT_PACE_MESSAGES = 3
LENT_ACKNOWLEDGE_BYTES = 4 << 20
MOST_WINDOW_BYTES = 1 << 60  # more than there can be: twice as much is a number in C
UNKNOWN_BYTES = 1 << 18  # that wait in a session which nobody has accepted; what is more comes again later
SESSION_BYTES = 16


class Kind(enum.IntEnum):
    """What a part is."""

    HELLO = 1
    """Who connects, and what he has received; first on each connection."""
    WELCOME = 2
    """The answer."""
    REFUSAL = 3
    """The other answer; a text follows that says why."""
    DATA = 4
    """A message, or the last part of a large one."""
    GOODBYE = 5
    """The last message."""
    ACKNOWLEDGE = 6
    REPEAT = 7
    """All from this number on is to be sent again, and what was taken to be told: something was lost on arrival."""
    BEGINNING = 8
    """A part of a large message, before others of it."""
    LOAN = 9
    """A message that lies in memory which its sender lends (loans.py)."""
    OFFER = 10
    """The sender has such memory."""
    BORROWS = 11
    """The answer; the number says whether that one can open it."""


_HELLO, _DATA, _GOODBYE = int(Kind.HELLO), int(Kind.DATA), int(Kind.GOODBYE)
_REPEAT, _BEGINNING, _LOAN = int(Kind.REPEAT), int(Kind.BEGINNING), int(Kind.LOAN)
_BORROWS = int(Kind.BORROWS)


class Session(Stream):
    """Both directions of a channel at one of its ends, over one connection or several that follow each other.

    Everything but `next_message` and `take` is called under the lock of the port. What is counted here is in C, with
    the short ways of small messages (csrc/small.c).

    Attributes
    ----------
    window : int
        Bytes of messages, of each direction, that may wait at this end.
    part_bytes : int
        Of the largest part.
    window_there : int
        Bytes of this end's messages that may be on their way: what the other end has room for, `window` at most.
    pace : int
        Bytes of them that are on their way at most while the other end keeps taking messages.
    peer : bytes or None
        Where the other end can be reached through the port now; None: nowhere.
    missed_since : int
        Since when that has been so, in nanoseconds of the monotonic clock; 0: it has never been reached.
    refusal : str
        Why this session does not go on; empty: it does.
    other : str
        The process of the other end, from its greeting.
    fd : int
        The descriptor of the last connection. It is ZeroMQ's, which may have closed it.
    meter : Meter or None
        Who is to see how fast that is.
    lends : bool
        Whether the other end has the memory that this one lends.
    offered : bool
        Whether it was asked to, over this connection, or cannot be.
    """

    def __init__(
        self, key: bytes, counts: Counts, window: int, part_bytes: int = PART_BYTES, *, accepted: bool = True
    ) -> None:
        self.key = key
        self.part_bytes = part_bytes
        self.counts = counts
        window = min(window, MOST_WINDOW_BYTES)
        self.window = self.window_there = window
        self.pace = min(window, PACE_BYTES)
        self.missed_since = 0
        self.refusal = ""
        self.other = ""
        self.fd = -1
        self.meter: Meter | None = None
        self.goodbye = False  # of the other end has come
        self._accepted = accepted  # somebody takes what comes
        self._most_waiting = 2 * window + part_bytes  # who keeps to the window stays far below
        self._look_at = self._most_waiting if accepted else UNKNOWN_BYTES
        self._asked = -1  # the message that was asked for last
        self.misses = False  # something came that should have come after something else
        self._telling = (0, 0)
        self._shown = -1
        self.acknowledge_bytes = min(ACKNOWLEDGE_BYTES, window // 4)
        self._spare: list[Any] = []  # parts whose memory can be used again, all of one size
        self._copies_until = 0  # the number before which parts may have been handed over more than once
        self.lent_pace = min(window, LENT_PACE_BYTES)
        self._lender: Lender | None = None
        self._borrowed: Loans | None = None  # of the other end
        self.lends = False

    # --- sending -----------------------------------------------------------------------------------

    @property
    def next_number(self) -> int:
        """The number of the next message."""
        return self._kept[-1][0] + 1 if self._kept else self._acknowledged

    @property
    def messages(self) -> int:
        """How many messages were sent."""
        return self._kept[-1][3] if self._kept else self._messages

    @property
    def outstanding(self) -> bool:
        """Whether the other end has not yet taken all."""
        return bool(self._kept)

    @property
    def only_goodbye_left(self) -> bool:
        """Whether the other end has taken all messages, and what says that there are no more is on its way."""
        kept = self._kept
        return self.peer is not None and len(kept) == 1 and self._handed_over > kept[-1][0]

    @property
    def is_behind(self) -> bool:
        """Whether something was taken of which the other end has not been told."""
        return self._told < self._taken

    def pace_of(self, nbytes: int) -> int:
        """Return how many bytes may be on their way with a message of this size while others keep being taken."""
        if self.lends and nbytes >= LENT_BYTES:
            return max(self.lent_pace, min(self.window_there, LENT_PACE_MESSAGES * nbytes))
        return self.pace

    def has_room(self, nbytes: int, window: int) -> bool:
        """Whether a message of this size may be sent now, with so many bytes on their way. One alone always may."""
        kept = self._kept
        return not kept or kept[-1][1] - self._released + nbytes + MESSAGE_COST <= window

    def keep(self, parts: list[Any]) -> None:
        """Take over the parts of a message: from here on it is sent."""
        kept = self._kept
        number, end, messages = self._acknowledged, self._released, self._messages
        if kept:
            number, end, _, messages = kept[-1]
            number += 1
        if len(parts) == 1:
            kept.append((number, end + len(parts[0]) + MESSAGE_COST, parts[0], messages + 1))
            if type(parts[0]) is Lent and self._lender is not None:
                self._lender.kept()
            return
        entries: list[tuple[int, int, Any, int]] = []
        for part in parts:
            end += len(part) + MESSAGE_COST
            entries.append((number + len(entries), end, part, messages))
        entries[-1] = (*entries[-1][:3], messages + 1)
        kept.extend(entries)  # all at once, whatever a signal's handler raises

    def to_hand_over(self) -> Iterator[tuple[int, Any]]:
        """Return (number, what travels) of all that the connection has not got; say `handed_over` after each."""
        kept = self._kept
        count = min(self.next_number - self._handed_over, len(kept))
        most = self._released + self.window_there
        if count == 1 and kept[-1][1] <= most:  # as always but after a new connection
            entry = kept[-1]
            return iter(((entry[0], _on_the_way(entry[2])),))
        return self._up_to(most, count)

    def _up_to(self, most: int, count: int) -> Iterator[tuple[int, Any]]:
        """Return the parts among the last `count` that the other end has room for: up to `most`, or one message."""
        kept = self._kept
        before = len(kept) - count
        ended = kept[before - 1][3] if before > 0 else self._messages
        for number, end, part, messages in list(islice(kept, before, None)):
            if end > most and ended > self._messages:
                return
            yield number, _on_the_way(part)
            ended = messages

    def handed_over(self, number: int) -> None:
        """Note that the connection has got this message."""
        if number < self._handed_over_most:
            self.counts.resent += 1
            self._copies_until = self._handed_over_most
        else:
            self._handed_over_most = number + 1
        self._handed_over = number + 1

    def spare(self, nbytes: int) -> Any:
        """Return a part of this size to write to, from those that are no longer needed, or None."""
        spare = self._spare
        if spare and len(spare[-1]) == nbytes:
            return spare.pop()
        return None

    def drop_spare(self) -> None:
        """Keep no memory for later parts."""
        self._spare.clear()
        if self._lender is not None:
            self._lender.rest()

    def lend(self, number: int, pieces: list[Any], nbytes: int) -> Lent | None:
        """Return a message as a part that is lent; None: it has to travel."""
        lender = self._lender
        if lender is None or not self.lends:
            return None
        if (last := lender.last) is None or not self._keeps(last):
            lender.take_back()  # nobody has: a signal's handler has raised
        return lender.lend(number, self.prefix(_LOAN, number), pieces, nbytes)

    def _keeps(self, part: Lent) -> bool:
        """Whether a part was kept, and not taken."""
        kept = self._kept
        behind = self.next_number - part.number
        return 0 < behind <= len(kept) and kept[-behind][2] is part

    def offer(self) -> bytes | None:
        """Return the part that offers memory of this end; None: there is none."""
        try:
            self._lender = self._lender or Lender(self.window)
        except MemoryError:
            return None
        return self.prefix(Kind.OFFER) + self._lender.offer

    def borrow(self, part: Any, pid: int) -> bytes:
        """Open what a process offers; return the part that tells whether that could be done."""
        borrowed = accept(pid, bytes(memoryview(part)[PREFIX_BYTES:]))
        if borrowed is not None:
            self._borrowed = borrowed
            self.borrow_from(borrowed, borrowed.address)
            self.acknowledge_bytes = min(LENT_ACKNOWLEDGE_BYTES, self.window // 4)
        return self.prefix(Kind.BORROWS, borrowed is not None)

    def _answered(self, borrows: int) -> None:
        """Note whether the other end has what was offered; if not, nothing is lent in this session."""
        if borrows:
            self.lends = self._lender is not None
            if self._lender is not None:
                self.lend_from(self._lender, self._lender.address, self._lender.loan_address)
        elif not self.lends:
            self._lender = None

    def end_loans(self) -> None:
        """Lend nothing more, and borrow nothing."""
        self.lends = False
        self.lend_from(None, 0, 0)
        self.borrow_from(None, 0)
        self._borrowed = None
        if self._lender is not None:
            self._lender.rest()
            self._lender = None

    def _acknowledge(self, count: int) -> bool:
        """Let go of the first `count` messages of all; tell whether there were any left of them."""
        kept = self._kept
        if not kept or kept[0][0] >= count:
            return False
        while (part := self.let_go(count)) is not None:
            # Of a part that went twice the second one may still be on its way, in the same memory.
            if self._acknowledged > self._copies_until:
                self._put_aside(part)
        return True

    def _put_aside(self, part: Any) -> None:
        if type(part) is Lent:
            return
        spare = self._spare
        if spare and len(spare[0]) != len(part):
            spare.clear()
        if len(part) * (len(spare) + 1) <= self.window:
            spare.append(part)

    # --- receiving ---------------------------------------------------------------------------------

    def feed(self, part: Any) -> tuple[int, bool, bool]:
        """Take in a part that has come: its kind, whether there is more to take now, whether there is more room."""
        try:
            kind, number, count = PREFIX.unpack_from(part)
        except struct.error:
            self.counts.corrupt += 1
            return 0, False, False
        if kind == _HELLO:
            return kind, False, False
        room = self._acknowledge(count)
        if kind == _BORROWS:
            self._answered(number)
        if kind == _REPEAT:
            self._handed_over = max(self._acknowledged, min(number, self._handed_over))
        if kind != _DATA and kind != _GOODBYE and kind != _BEGINNING and kind != _LOAN:
            return kind, False, room
        if number > self.received:
            self.misses = self._asked != self.received
            return kind, False, room
        if number < self.received:
            self.counts.duplicates += 1
            return kind, False, room
        if kind == _LOAN:
            if (borrowed := self._borrowed_part(part)) is None:
                return kind, False, room
            kind, part = _DATA, borrowed
        if self.goodbye or not (kind == _GOODBYE or self._has_space(len(part))):
            return kind, False, room
        self._inbox.append((number, kind, part))
        self.received = number + 1
        if kind == _GOODBYE:
            self.goodbye = True
            self._look_at = -1  # at each part: nothing more should come
        return kind, True, room

    def _borrowed_part(self, part: Any) -> Borrowed | None:
        try:
            if self._borrowed is None:
                raise Corrupt("a reference to memory of which nobody has told", "parts")
            return borrow(self._borrowed, PREFIX_BYTES, memoryview(part)[PREFIX_BYTES:])
        except Corrupt as error:
            self.counts.corrupt += 1
            self.refusal = f"it has sent what makes no sense: {error}"
            return None

    def _has_space(self, nbytes: int) -> bool:
        """Whether another part may wait here. If the other end does not keep to the window it is refused."""
        self._waiting += nbytes + MESSAGE_COST
        if self._waiting <= self._look_at:
            return True
        inbox = list(self._inbox)
        self._waiting = nbytes + MESSAGE_COST + sum(len(part) + MESSAGE_COST for _, _, part in inbox)
        if not self._accepted:
            self._asked = self.received  # and not again before `accept`
            return False
        self._look_at = self._most_waiting
        if self._waiting <= self._look_at:
            return True
        # A message that is larger than the window comes alone; how large it is nobody knows so far.
        if all(kind == _BEGINNING for _, kind, _ in inbox) and self._waiting < config.memory_available():
            self._look_at = 2 * self._waiting
            return True
        self.refusal = (
            f"it has sent {config.format_bytes(self._waiting)} that wait to be received, and may send"
            f" {config.format_bytes(self.window)} (buffer_bytes), or one larger message for which there is memory"
        )
        return False

    def accept(self) -> None:
        """Note that somebody takes what comes from now on; what there was no space for is missed."""
        if not self._accepted:
            self._accepted = True
            if not self.goodbye:
                self._look_at = self._most_waiting
            self.misses = self._asked == self.received

    def next_message(self) -> tuple[bool, list[Any]] | None:
        """Return the first message that was not taken: whether it is the goodbye, and its parts; None: there is none.

        The same one is returned again until `take`.
        """
        inbox = self._inbox
        while inbox:
            number, kind, part = inbox[0]
            if number < self._taken:
                self._drop_first()
            elif kind != _BEGINNING:
                self._shown = number
                return kind == _GOODBYE, [part]
            else:
                return self._next_in_parts()
        return None

    def _next_in_parts(self) -> tuple[bool, list[Any]] | None:
        parts: list[Any] = []
        for number, kind, part in list(self._inbox):
            parts.append(part)
            if kind != _BEGINNING:
                self._shown = number
                return False, parts
        return None

    def take(self) -> None:
        """Take what `next_message` has returned; another call does no harm."""
        number = self._shown
        if number >= self._taken:
            inbox = self._inbox
            self._taken = number + 1
            while inbox and inbox[0][0] <= number:
                self._taken_bytes += len(inbox[0][2])
                self._drop_first()

    def _drop_first(self) -> None:
        part = self._inbox[0][2]
        if type(part) is Borrowed:
            part.give_back()
        self._inbox.popleft()

    @property
    def owes_acknowledgement(self) -> bool:
        """Whether enough has been taken for the other end to be told."""
        return (
            self._taken - self._told >= ACKNOWLEDGE_MESSAGES
            or self._taken_bytes - self._told_bytes >= self.acknowledge_bytes
        )

    def acknowledgement(self) -> bytes | None:
        """Return the part that tells the other end what was taken; None: it knows."""
        return self.prefix(Kind.ACKNOWLEDGE) if self._told < self._taken else None

    def prefix(self, kind: int, number: int = 0) -> bytes:
        """Return the beginning of a part, which tells what was taken, too; say `told` when it has gone."""
        self._telling = taken, _ = self._taken, self._taken_bytes
        return PREFIX.pack(kind, number, taken)

    def told(self) -> None:
        """Note that the last part has gone that tells what was taken."""
        self._told, self._told_bytes = self._telling

    # --- connections ---------------------------------------------------------------------------------

    def greet(self, kind: Kind, body: bytes) -> bytes:
        """Return a greeting with what this end has received."""
        return self.prefix(kind, self.received) + body

    def request(self) -> bytes:
        """Return the part that asks for all that this end has not received; say `requested` when it has gone."""
        return self.prefix(_REPEAT, self.received)

    def requested(self) -> None:
        """Note that the other end was asked."""
        self._asked = self.received
        self.misses = False

    def connected(self, peer: bytes, part: Any, greeting: Greeting, fd: int = -1) -> None:
        """Go on over a new connection, from where the other end's greeting says."""
        _, received, taken = PREFIX.unpack_from(part)
        self.window_there = min(self.window, greeting.window)
        self.pace = min(self.window_there, PACE_BYTES)
        self.lent_pace = min(self.window_there, LENT_PACE_BYTES)
        self._acknowledge(taken)
        self._handed_over = max(self._acknowledged, min(received, self.next_number))
        if self.missed_since:
            self.counts.reconnects += 1
        self.fd = fd
        self.offered = False
        if self.meter is not None:
            self.meter.begin()
        self.peer, self.missed_since, self.other = peer, 0, greeting.text

    def disconnected(self) -> None:
        """Note that the connection has ended."""
        if self.peer is not None:
            self.missed_since = time.monotonic_ns()  # first: nobody is missed since nothing
            self.peer = None


def _on_the_way(part: Any) -> Any:
    return part.reference if type(part) is Lent else part


def most_part_bytes(address: str) -> int:
    """Return how large a part may be that comes from this address, or is sent there."""
    return LOCAL_PART_BYTES if address.startswith("ipc:") else PART_BYTES


def refusal(body: bytes) -> bytes:
    """Return the part that refuses a session."""
    return PREFIX.pack(Kind.REFUSAL, 0, 0) + body
