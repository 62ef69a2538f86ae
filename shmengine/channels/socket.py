"""Channels over sockets (ZeroMQ), and such a channel between two processes of one machine."""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Final

import numpy as np

from shmengine._native.status import deadline_of
from shmengine.arrays import Bytes, address_of
from shmengine.channels.compression import SMALLEST_BYTES
from shmengine.channels.dialing import DialPort
from shmengine.channels.end import End
from shmengine.channels.frames import GOODBYE, FrameLink, aligned_empty
from shmengine.channels.greetings import Proof
from shmengine.channels.link import NOTHING, Capabilities, Link, Options
from shmengine.channels.listening import ListenPort
from shmengine.channels.loans import Borrowed
from shmengine.channels.meter import Meter
from shmengine.channels.ports import Port
from shmengine.channels.presence import Fate, Presence, PresenceToken
from shmengine.channels.sessions import (
    ACKNOWLEDGE_MESSAGES,
    LENT_BYTES,
    PREFIX_BYTES,
    Kind,
    Session,
    most_part_bytes,
)
from shmengine.channels.small import (
    UNKNOWN,
    beginning_of,
    decode_small,
    encode_small,
    open_small,
    seal_small,
)
from shmengine.channels.waiter import Waiter
from shmengine.channels.zeromq import zmq
from shmengine.codec import KIND_ARRAY, KIND_PICKLE
from shmengine.config import format_bytes
from shmengine.stats import ChannelStats

__all__ = ["SocketLink", "pair"]

PEER_SECONDS = 10.0
SMALL_BYTES = 1 << 16  # up to here few steps count, and not few copies
SMALL_FRAME_BYTES = SMALL_BYTES + 512
LARGE_BYTES = 1 << 16  # from here on a message that travels is not copied where that can be avoided
ALIGNMENT = 16  # of frames that are used where they arrived; malloc gives it
DRAIN_NS = 500_000_000  # after a death, for what the kernel still has of the dead
PACE_NS = 10_000_000  # that a sender waits for room within the pace; then it goes on until the buffer is full
LOOK_EVERY = 64  # messages of a sender, between looks what was acknowledged

_DATA: Final = int(Kind.DATA)
_BEGINNING: Final = int(Kind.BEGINNING)
_CAPABILITIES = Capabilities(
    mechanism="socket",
    between_hosts=True,
    in_place=False,
    compresses=True,
    priorities=1,
    reconnects=True,
    writable=True,
    at_once_in_asyncio=True,
    outlives_sender=False,
)


class SocketLink(FrameLink):
    """A session of this process, and the port that it goes through."""

    capabilities: ClassVar[Capabilities] = _CAPABILITIES

    def __init__(self, options: Options) -> None:
        # What `write` takes says nothing of the link. Within a machine nothing does, and compression stays off.
        self._meter = Meter()
        super().__init__(options, self._meter.seconds_per_byte)
        self._checks_all = options.check == "payload"
        # What could be compressed goes the long way, where that is seen to.
        self._small_bytes = SMALLEST_BYTES if options.compression else SMALL_BYTES
        self._known = (KIND_ARRAY, KIND_PICKLE) if options.allow_pickle else (KIND_ARRAY,)
        self._pid = 0
        self._closed = False
        self._said_goodbye = False
        self._port: Port
        self._session: Session
        self._reader: Waiter
        self._writer: Waiter

    def _attach(self, port: Port, session: Session) -> None:
        """Become the one who uses a session in this process."""
        self._port, self._session = port, session
        self._reader, self._writer = port.add(session)
        self.read_fd, self.write_fd = self._reader.fd, self._writer.fd
        self._expected[0] = 0
        if self.options.compression == "auto" and not port.is_local:
            session.meter = self._meter
        session.use(
            port.wire,
            port.lock,
            port.armed,
            port.raw,
            port.hub,
            np.ndarray,
            beginning_of,
            partial(encode_small, allow_pickle=self.options.allow_pickle, most_bytes=self._small_bytes),
            self._expected,
            decode_small,
            UNKNOWN,
            aligned_empty,
            self._checks_all,
            self.options.allow_pickle,
            not self.options.compression,
            self._small_bytes,
            ACKNOWLEDGE_MESSAGES,
        )
        port.links[session.key] = self
        self._pid = os.getpid()

    def end(self, options: Options, *, sends: bool = True, receives: bool = True) -> End:
        """Return the end over this link."""
        return SocketEnd(self, options, sends=sends, receives=receives)

    # --- messages --------------------------------------------------------------------------------

    def next_sequence(self, priority: int) -> int:  # noqa: ARG002  there are none
        """Return the number of the next message."""
        return self._session.messages

    def encode(self, obj: Any) -> Any:
        """Make an object ready for `send`: a small frame in one piece, any other as `FrameLink` does."""
        frame = encode_small(obj, allow_pickle=self.options.allow_pickle, most_bytes=self._small_bytes)
        return super().encode(obj) if frame is None else frame

    def send(self, message: Any, priority: int, deadline: int) -> bool:
        """Send a message that was encoded."""
        self._session.sends = False  # in the short way: its number is this one's
        sent = self._send(message, priority, deadline)
        if sent:
            self._session.sends = True
        return sent

    def _send(self, message: Any, priority: int, deadline: int) -> bool:
        if type(message) is not bytes:
            return super().send(message, priority, deadline)
        nbytes = len(message)
        frame = seal_small(message, self.next_sequence(priority), checks_all=self._checks_all)
        if not self.write([frame], nbytes, priority, deadline):
            return False
        counts = self.counts
        counts.messages_sent += 1
        counts.bytes_sent += nbytes
        counts.wire_bytes_sent += nbytes
        return True

    def write(self, pieces: list[Any], nbytes: int, priority: int, deadline: int) -> bool:  # noqa: ARG002
        """Keep a copy of a message until the other end has it, and send that; wait while there is no room."""
        session, port = self._session, self._port
        window = session.window_there
        paces = session.answers and deadline != 0
        with port.lock:
            number = session.next_number
            if number % LOOK_EVERY == 0:
                port.pump(-1)
            if session.has_room(nbytes, session.pace_of(nbytes) if paces else window):
                self._keep(number, pieces, nbytes)
                return True
        return self._write_later(pieces, nbytes, deadline, time.monotonic_ns() + PACE_NS if paces else 0)

    def _keep(self, number: int, pieces: list[Any], nbytes: int) -> None:
        session, port = self._session, self._port
        port.hub.notice()  # which goes on with it if a signal's handler raises here
        session.keep(self._parts(number, pieces, nbytes))
        port.hand_over(session)
        session.told()

    def _write_later(self, pieces: list[Any], nbytes: int, deadline: int, paced_until: int) -> bool:
        """Write a message when there is room, until `paced_until` more than that."""
        session, port = self._session, self._port
        window = session.window_there
        try:
            while True:
                with port.lock:
                    port.pump(-1)
                    if session.has_room(nbytes, session.pace_of(nbytes) if paced_until else window):
                        self._keep(session.next_number, pieces, nbytes)
                        return True
                    self._writer.arm()
                    port.acknowledge(session)
                now = time.monotonic_ns()
                if deadline == 0 or 0 < deadline <= now:
                    return False
                if 0 < paced_until <= now:
                    paced_until = 0
                    session.answers = False
                elif paced_until:
                    self._writer.wait(paced_until if deadline < 0 else min(paced_until, deadline))
                else:
                    self._writer.wait(deadline)
        finally:
            if deadline:
                self._writer.disarm()

    def _parts(self, number: int, pieces: list[Any], nbytes: int) -> list[Any]:
        """Return a copy of a message, in one part, or in several if it is large.

        They are bytes, frames of ZeroMQ, which it sends without another copy, or memory that is lent.
        """
        prefix = self._session.prefix
        if nbytes >= LENT_BYTES:
            self._port.offer(self._session)
            if (lent := self._session.lend(number, pieces, nbytes)) is not None:
                return [lent]
        if nbytes < LARGE_BYTES:
            return [b"".join((prefix(_DATA, number), *pieces))]
        most = self._session.part_bytes
        if nbytes <= most:
            return [self._frame([prefix(_DATA, number), *pieces], nbytes)]
        parts: list[Any] = []
        for some in _cut(pieces, most):
            nbytes -= most
            kind = _DATA if nbytes <= 0 else _BEGINNING
            parts.append(self._frame([prefix(kind, number + len(parts)), *some], most + min(nbytes, 0)))
        return parts

    def _frame(self, pieces: list[Any], nbytes: int) -> Any:
        nbytes += PREFIX_BYTES
        part = self._session.spare(nbytes)
        if part is None:
            part = zmq.Frame(memoryview(np.empty(nbytes, np.uint8)), copy=True)  # type: ignore[arg-type]
        _join(pieces, np.frombuffer(part, np.uint8))
        return part

    def give_up(self) -> None:
        """Take back nothing: a message is sent whole, or not at all."""
        self._session.sends = True

    def receive(self, deadline: int) -> Any:
        """Return the next message, `NOTHING` or `END`; the same one again until `settle`."""
        self._session.receives = False  # in the short way: what is next is this one's
        got = super().receive(deadline)
        if got is NOTHING:
            self._session.receives = not self._number_unknown
        return got

    def failed(self, error: BaseException) -> None:
        """Note that the short way raised: the next message goes the long way, which knows what to do about it."""
        self._blame.is_the_messages(error)
        self._session.receives = False

    def settle(self) -> None:
        """Let go of the message that `receive` has returned."""
        super().settle()
        self._session.receives = not self._number_unknown

    def read(self, deadline: int) -> Bytes | bytes | object:
        """Return the next message."""
        session, port = self._session, self._port
        try:
            while True:
                found = session.next_message()
                if found is None:
                    with port.lock:
                        more = port.pump()
                        found = session.next_message()
                        if found is None:
                            if more:
                                continue
                            self._reader.arm()
                            port.acknowledge(session)
                            found = session.next_message()
                if found is not None:
                    return self._opened(*found)
                if deadline == 0 or 0 < deadline <= time.monotonic_ns():
                    return NOTHING
                self._reader.wait(deadline)
        finally:
            if deadline:
                self._reader.disarm()

    def _opened(self, goodbye: bool, parts: list[Any]) -> Bytes | bytes | object:
        if goodbye:
            self._session.take()
            with self._port.lock:
                self._port.acknowledge(self._session)
            return GOODBYE
        if type(borrowed := parts[0]) is Borrowed:
            return borrowed.copy(self._memory)
        if len(parts) > 1:
            pieces = [memoryview(part)[PREFIX_BYTES:] for part in parts]
            whole = self._memory(sum(map(len, pieces)))
            _join(pieces, whole)
            return whole
        if len(parts[0]) <= SMALL_FRAME_BYTES:
            return bytes(memoryview(parts[0])[PREFIX_BYTES:])
        message = np.frombuffer(parts[0], np.uint8, -1, PREFIX_BYTES)
        if len(message) < LARGE_BYTES or address_of(message) % ALIGNMENT:
            return message.copy()
        return message

    def _memory(self, nbytes: int) -> Bytes:
        try:
            return aligned_empty(nbytes)
        except (MemoryError, ValueError):
            self._number_unknown = True  # so that it is not said to be missing, too
            self.taken()
            raise MemoryError(f"no memory for a message of {format_bytes(nbytes)}: it is dropped") from None

    def _open(self, wire: Any) -> Any:
        """Check a message and make it the current one."""
        if type(wire) is not bytes:
            return super()._open(wire)
        obj, number = open_small(wire, self._known)
        if obj is UNKNOWN:
            return super()._open(np.frombuffer(bytearray(wire), np.uint8))
        self._accept(obj, number, 0, len(wire), len(wire))
        return obj

    def short_ways(
        self, *, sends: bool, receives: bool
    ) -> tuple[Callable[[Any, int], bool] | None, Callable[[list[Any]], bool] | None]:
        """Return what sends a small object, and what takes a small message, if they can do so at once."""
        session = self._session
        return session.send_small if sends else None, session.take_small if receives else None

    def count_short_ways(self, stats: ChannelStats) -> ChannelStats:
        """Add what has gone the short ways."""
        if self._pid == 0:
            return stats
        session = self._session
        return replace(
            stats,
            messages_sent=stats.messages_sent + session.quick_sent,
            bytes_sent=stats.bytes_sent + session.quick_sent_bytes,
            wire_bytes_sent=stats.wire_bytes_sent + session.quick_sent_bytes,
            messages_received=stats.messages_received + session.quick_received,
            bytes_received=stats.bytes_received + session.quick_received_bytes,
            wire_bytes_received=stats.wire_bytes_received + session.quick_received_bytes,
        )

    def taken(self) -> None:
        """Forget the message that `read` has returned."""
        session = self._session
        session.take()
        if session.owes_acknowledgement:
            with self._port.lock:
                self._port.acknowledge(session)
        else:
            self._port.hub.notice()  # it tells the other end soon, whose process may wait for that to end

    # --- the other end -----------------------------------------------------------------------------

    def fate(self) -> Fate:
        """Say what has become of the other end."""
        session = self._session
        with self._port.lock:
            if not self._port.closed:
                self._port.pump(-1)
        if session.goodbye:
            return Fate.CLOSED
        if session.refusal:
            return Fate.LOST
        return self._fate()

    def loss(self) -> str:
        """Say what is known of an end that is lost."""
        refusal = self._session.refusal
        return f"the other end is lost: {refusal}" if refusal else super().loss()

    @abstractmethod
    def _fate(self) -> Fate:
        """Say it of an end that has not said goodbye."""

    # --- the end of it -----------------------------------------------------------------------------

    def close(self) -> None:
        """Leave the rest to the service: it says goodbye when all that was sent has been taken."""
        if not self._closed:
            self._closed = True
            if self._pid == os.getpid():
                self._session.sends = self._session.receives = False
                self._port.hub.finish(self)
            else:
                self._closed_unused()

    def _closed_unused(self) -> None:
        """Close an end that this process does not use."""

    def _finished(self, *, delivered: bool) -> None:
        """Note that the session is over; some of what was sent may not have been taken."""

    def finish(self, *, hurry: bool) -> bool:
        """End the session, if there is nothing left to wait for. Called by the service, again and again."""
        port, session = self._port, self._session
        with port.lock:
            if not self._said_goodbye:
                self._said_goodbye = True
                session.keep([session.prefix(Kind.GOODBYE, session.next_number)])
            port.read_events()
            port.pump(-1)
            port.hand_over(session)
        unheard = session.missed_since == 0 and session.peer is None and session.next_number == 1
        delivered = not session.outstanding or session.only_goodbye_left or unheard
        if not (delivered or hurry) and self.fate() in (Fate.UNUSED, Fate.ALIVE):
            return False
        with port.lock:
            port.acknowledge(session)
            port.remove(session)
        self._finished(delivered=delivered or not hurry)
        return True


class SocketEnd(End):
    """One end of a channel over a socket: small messages go the short ways of its session, where nothing waits."""

    _link: SocketLink

    def _begin(self) -> None:
        super()._begin()
        self._post: Callable[[Any, int], bool] | None = None
        self._take: Callable[[list[Any]], bool] | None = None

    def _start(self) -> None:
        super()._start()
        self._post, self._take = self._link.short_ways(sends=self._sends, receives=self._receives)

    def send(self, obj: Any, timeout: float | None = None, *, priority: int = 0) -> None:
        """Send an object, as `End.send` says."""
        post = self._post
        if post is not None and not priority:
            if timeout is not None:
                deadline_of(timeout)
            if post(obj, self._looked):
                return
        super().send(obj, timeout, priority=priority)

    def receive(self, timeout: float | None = None) -> Any:
        """Take the next message, as `End.receive` says."""
        take = self._take
        if take is not None and not self._ready:
            if timeout is not None:
                deadline_of(timeout)
            box: list[Any] = []
            try:
                if take(box):
                    return box[0]
            except BaseException as error:
                if box:  # what a signal's handler keeps from being returned is for the next call
                    self._ready.appendleft(box)
                else:
                    self._link.failed(error)
                raise
        return super().receive(timeout)

    def stats(self) -> ChannelStats:
        """Return what this end has done so far, in this process."""
        return self._link.count_short_ways(super().stats())

    def close(self) -> None:
        """Use this end no more; the other one receives what was sent, and then `EndOfStream`. Never waits."""
        self._post = self._take = None
        super().close()


def _join(pieces: list[Any], target: Bytes) -> None:
    at = 0
    for piece in pieces:
        end = at + len(piece)
        target[at:end] = np.frombuffer(piece, np.uint8)
        at = end


def _cut(pieces: list[Any], nbytes: int) -> Iterator[list[Any]]:
    """Cut into runs of so many bytes; the last one may be shorter."""
    some: list[Any] = []
    room = nbytes
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            some.append(rest[:room])
            rest = rest[room:]
            room -= len(some[-1])
            if not room:
                yield some
                some, room = [], nbytes
    if some:
        yield some


@dataclass(frozen=True)
class _PairToken:
    """What another process needs to have a copy of an end of `pair`."""

    options: Options
    name: str
    secret: bytes
    presence: PresenceToken

    def __call__(self) -> Link:
        return _PairLink(self.options, self.name, self.secret, Presence.from_token(self.presence))


class _PairLink(SocketLink):
    """An end of a channel between two processes of one machine: the left one listens, the right one connects.

    The name of the socket is an abstract one: it ends with the process that listens, whatever becomes of that.
    """

    def __init__(self, options: Options, name: str, secret: bytes, presence: Presence) -> None:
        super().__init__(options)
        self._name = name
        self._secret = secret
        self._presence = presence
        self._dead_since = 0

    def start(self) -> None:
        """Become this process's."""
        if self._pid == os.getpid():
            return
        self._presence.use()
        proof = Proof(self._secret)
        key = self._secret[:16]
        address = f"ipc://@{self._name}"
        session = Session(key, self.counts, self.options.buffer_bytes, most_part_bytes(address))
        port: Port
        if self._presence.side == 0:
            port = ListenPort(address, proof, PEER_SECONDS, alone=session)
        else:
            port = DialPort(zmq.PAIR, address, session, proof, PEER_SECONDS, None)
        self._attach(port, session)

    def token(self) -> Any:
        """Return what another process needs for a copy of this end."""
        return _PairToken(self.options, self._name, self._secret, self._presence.token())

    def _fate(self) -> Fate:
        fate = self._presence.fate()
        if fate is Fate.UNUSED or fate is Fate.ALIVE:
            self._dead_since = 0
            return fate
        # What it has sent may still be on its way: until the connection ends, or, should a forked child have
        # inherited that, for a moment.
        now = time.monotonic_ns()
        self._dead_since = self._dead_since or now
        waits = self._session.peer is not None and now - self._dead_since < DRAIN_NS
        return Fate.ALIVE if waits else fate

    def _closed_unused(self) -> None:
        self._presence.close()

    def _finished(self, *, delivered: bool) -> None:
        if delivered:  # else the end of the process tells the other end that something is missing
            self._presence.close()


def pair(options: Options) -> tuple[Link, Link]:
    """Return the links of both ends of a channel between two processes of this machine."""
    left, right = Presence.pair()
    name, secret = f"shmengine-{os.urandom(16).hex()}", os.urandom(32)
    return _PairLink(options, name, secret, left), _PairLink(options, name, secret, right)
