"""Sockets of ZeroMQ as channels use them, and the one thread of a process that serves them beside its user's work.

A socket is used by whoever has something to do there, under its port's lock: who sends, who receives, and the service,
which greets, sees connections end, and goes on with what others have left. What somebody takes out for another one he
puts where that one looks, and wakes him.
"""

from __future__ import annotations

import contextlib
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shmengine._native._handles import Part
from shmengine.channels import hub
from shmengine.channels.keys import Keys
from shmengine.channels.local import process_behind
from shmengine.channels.sessions import Kind, Session, most_part_bytes
from shmengine.channels.waiter import Waiter
from shmengine.channels.zeromq import monitor_of, wire_of, zmq

if TYPE_CHECKING:
    from shmengine.channels.socket import SocketLink

__all__ = ["EVENT", "GREETING_SECONDS", "LINGER_MS", "NOW", "RECONNECT_MS", "Port"]

BATCH = 128  # parts that are taken from a socket at once
MOST_AT_ONCE = 1 << 14  # that the service takes, of one socket
RECONNECT_MS = (5, 200)  # first and longest pause between two attempts
LINGER_MS = 500  # for what was handed over when a socket is closed
GREETING_SECONDS = 2.0  # within which a connection is expected to say who it is

_EVENTS = (
    zmq.Event.LISTENING
    | zmq.Event.CONNECTED
    | zmq.Event.ACCEPTED
    | zmq.Event.HANDSHAKE_SUCCEEDED
    | zmq.Event.DISCONNECTED
    | zmq.Event.HANDSHAKE_FAILED_AUTH
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
)
EVENT = struct.Struct("=Hi")  # what it is, and for some of them the connection's descriptor
NOW = int(zmq.DONTWAIT)


class Port:
    """One socket of this process."""

    def __init__(
        self,
        kind: int,
        address: str,
        peer_timeout: float,
        auth: Keys | None,
        *,
        serves: bool,
        alone: Session | None = None,
    ) -> None:
        self.lock = threading.Lock()
        self.armed: set[Waiter] = set()
        self.waiters: dict[bytes, tuple[Waiter, Waiter]] = {}  # who reads, and who writes, by session
        self.sessions: dict[bytes, Session] = {}
        self.links: dict[bytes, SocketLink] = {}
        self.greeting_until = 0.0  # somebody is expected to say who he is
        self.closed = False
        self._news: deque[tuple[int, int]] = deque()
        self._heard: deque[Part] = deque()  # of the monitor, and not among the news yet
        self._posted = False  # something, while parts were sorted
        self.denied = ""
        self.raw: deque[Part] = deque()
        self.is_local = address.startswith("ipc:")
        self._alone = alone  # whose all parts are
        self.hub = hub.enter(self)
        with contextlib.ExitStack() as undo:
            undo.callback(self.hub.forget, self)
            socket = self._socket = self.hub.context.socket(kind)
            undo.callback(socket.close)
            socket.sndhwm = socket.rcvhwm = 0  # the window of each session is the limit
            socket.linger = LINGER_MS
            # Whoever announces more is cut off, before he has said who he is.
            socket.maxmsgsize = most_part_bytes(address) + (1 << 12)
            if not self.is_local:  # of a process of this machine the kernel says when it has gone
                # libzmq 4.3.5 aborts when a beat is due on a connection that it has stopped reading and that the other
                # end has left (zeromq/libzmq#4364): so it would with each one that a PAIR has turned away.
                beat = max(1, int(peer_timeout * 250))
                socket.heartbeat_ivl, socket.heartbeat_timeout, socket.heartbeat_ttl = beat, 2 * beat, 0
            socket.handshake_ivl = socket.connect_timeout = max(50, int(peer_timeout * 500))
            socket.reconnect_ivl, socket.reconnect_ivl_max = RECONNECT_MS
            if auth is not None:
                auth.apply(socket, serves=serves, allow=self.hub.allow)
            self.monitor = monitor_of(socket, int(_EVENTS))
            undo.callback(self.monitor.close, 0)
            undo.callback(socket.disable_monitor)
            self.fd = int(socket.fd)
            self.wire, self._monitor_wire = wire_of(socket), wire_of(self.monitor)
            self._send: Callable[..., Any] = super(zmq.Socket, socket).send
            undo.pop_all()

    # --- under the lock ------------------------------------------------------------------------------

    def pump(self, most: int = BATCH) -> bool:
        """Take in what has come: up to so many parts, -1: all. True: there may be more."""
        if self.raw:
            self._sort()  # a signal's handler has kept somebody from it
        alone = self._alone
        received = 0 if alone is None else alone.received
        more = self.wire.receive(self.raw, most, alone)
        if self.armed and alone is not None and alone.received > received:
            self.waiters[alone.key][0].wake()
        self._sort()
        while self._posted:  # sending may have swallowed the sign that something has come
            self._posted = False
            if most >= 0:
                return True
            received = 0 if alone is None else alone.received
            self.wire.receive(self.raw, -1, alone)
            if self.armed and alone is not None and alone.received > received:
                self.waiters[alone.key][0].wake()
            self._sort()
        return more

    def _request(self, session: Session, peer: bytes) -> None:
        self.post(peer, session.request())
        self._posted = True
        session.requested()

    def hand_over(self, session: Session) -> None:
        """Give the connection of a session all that was kept for it."""
        self._hand_over(session)
        if self.armed:  # sending may have swallowed the sign that something has come
            self.pump(-1)

    def accept(self, session: Session) -> None:
        """Ask for what there was no space for while nobody had accepted a session. Under the lock."""
        session.accept()
        if session.misses and session.peer is not None:
            self._request(session, session.peer)
            if self.armed:
                self.pump(-1)

    def acknowledge(self, session: Session) -> None:
        """Tell the other end what was taken, if it does not know."""
        if session.peer is not None and (part := session.acknowledgement()) is not None:
            self.post(session.peer, part)
            session.told()
            if self.armed:
                self.pump(-1)

    def offer(self, session: Session) -> None:
        """Offer memory to the other end, once for each connection until that has it. Under the lock."""
        if session.peer is not None and not (session.lends or session.offered):
            if self.is_local and (part := session.offer()) is not None:
                self.post(session.peer, part)
            session.offered = True

    def _borrow(self, session: Session, part: Any) -> None:
        answer = session.borrow(part, process_behind(part.source))
        if session.peer is not None:
            self.post(session.peer, answer)
            self._posted = True

    def _hand_over(self, session: Session) -> None:
        peer = session.peer
        if peer is not None:
            if session.meter is not None:
                session.meter.look(session.fd)
            for number, part in session.to_hand_over():
                self._posted = True
                if not self.post(peer, part):
                    session.disconnected()
                    break
                session.handed_over(number)

    def post(self, peer: bytes, part: Any) -> bool:
        """Send a part; False: this connection has ended."""
        raise NotImplementedError

    def _sort(self) -> None:
        raise NotImplementedError

    def _feed(self, session: Session, part: Any) -> int:
        """Give a session what has come for it, and wake who waits for that; return of which kind it is."""
        kind, more, room = session.feed(part)
        if more or room:
            reader, writer = self.waiters[session.key]
            if more:
                reader.wake()
            if room:
                writer.wake()
        if kind == Kind.OFFER and self.is_local:
            self._borrow(session, part)
        if session.peer is not None:
            if session.refusal:
                self.cut_off(session)
            elif session.misses:
                self._request(session, session.peer)
            elif kind == Kind.REPEAT:
                self._hand_over(session)
                if session.peer is not None:  # else that has found the connection ended
                    self.post(session.peer, session.prefix(Kind.ACKNOWLEDGE))
                    self._posted = True
            elif room:
                self._hand_over(session)
        return kind

    def cut_off(self, session: Session) -> None:
        """Have nothing to do any more with the other end of a session. Under the lock."""
        session.disconnected()
        self.wake_all()

    def on_event(self, event: int, fd: int) -> None:
        """Note what has happened to a connection."""
        raise NotImplementedError

    # --- of the service --------------------------------------------------------------------------------

    def hear_news(self) -> deque[tuple[int, int]]:
        """Return what has happened to connections and is not noted yet: events and their values. Under the lock."""
        heard = self._heard
        self._monitor_wire.receive(heard, -1, None)  # no handler of a signal can raise between it and `heard`
        while heard:
            if heard[0].more:  # the second part says of which address
                self._news.append(EVENT.unpack_from(heard[0]))
            heard.popleft()
        return self._news

    def read_events(self) -> None:
        """Note all that has happened to connections, after what they have brought. Under the lock."""
        while not self.closed and (news := self.hear_news()):
            first = news[0]
            if first[0] == zmq.Event.DISCONNECTED:
                self.pump(-1)
                if not news or news[0] is not first:  # a greeting that it brought was from a later connection
                    continue
            self.on_event(*first)
            news.popleft()

    @property
    def busy(self) -> bool:
        """Whether the service should look here again soon."""
        return bool(self._news or self.greeting_until > 0) or any(
            session.outstanding or session.is_behind for session in list(self.sessions.values())
        )

    def serve(self) -> None:
        """Do what is left to do. Under the lock."""
        if self._news:
            self.read_events()
        self.pump(MOST_AT_ONCE)
        for session in list(self.sessions.values()):
            self.hand_over(session)
            self.acknowledge(session)
        if 0 < self.greeting_until < time.monotonic():
            self.greeting_until = 0.0

    def rest(self) -> None:
        """Note that nothing has happened here for a while. Under the lock."""
        for session in list(self.sessions.values()):
            session.drop_spare()

    def after_fork(self) -> None:
        """In a forked child: let go of what would stand in for the parent when that has ended."""

    def add(self, session: Session) -> tuple[Waiter, Waiter]:
        """Have a session here; return who waits to read, and who waits to write."""
        pair = self.waiters.get(session.key)
        if pair is None:
            reader = Waiter(self)
            try:
                pair = reader, Waiter(self)
            except BaseException:
                reader.close()
                raise
            self.waiters[session.key] = pair
        self.sessions[session.key] = session
        return pair

    def end(self) -> None:
        """At the end of the process: close all channels here. Waits for nothing."""
        for link in list(self.links.values()):
            link.close()

    def wake_all(self) -> None:
        """Let everybody look what has become of his session. Under the lock."""
        for pair in self.waiters.values():
            for waiter in pair:
                waiter.wake()

    def remove(self, session: Session) -> None:
        """Have a session here no more. Under the lock."""
        if self.sessions.pop(session.key, None) is not None:
            self.links.pop(session.key, None)
            for waiter in self.waiters.pop(session.key):
                waiter.close()
            session.end_loans()
        if self.is_over:
            self.close()

    @property
    def is_over(self) -> bool:
        """Whether nobody needs the socket any more."""
        return not self.sessions

    def close(self) -> None:
        """Let go of the socket. Under the lock."""
        if not self.closed:
            self.closed = True
            for session in list(self.sessions.values()):
                self.remove(session)
            self.hub.forget(self)
            self.wire.close()
            self._monitor_wire.close()
            self._socket.disable_monitor()
            self.monitor.close(0)
            self._socket.close()
