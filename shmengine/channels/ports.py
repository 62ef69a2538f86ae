"""Sockets of ZeroMQ as channels use them, and the one thread of a process that serves them beside its user's work.

A socket is used by whoever has something to do there, under its port's lock: who sends, who receives, and the service,
which greets, sees connections end, and goes on with what others have left. What somebody takes out for another one he
puts where that one looks, and wakes him.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shmengine._native._handles import Part
from shmengine.channels import hub
from shmengine.channels.greetings import Greeting, Proof
from shmengine.channels.keys import Keys
from shmengine.channels.local import SocketFile, check_free, process_behind, user_behind
from shmengine.channels.sessions import PREFIX_BYTES, Kind, Session, most_part_bytes, refusal
from shmengine.channels.waiter import Waiter
from shmengine.channels.zeromq import monitor_of, uninterrupted, wire_of, zmq
from shmengine.descriptors import Descriptor

if TYPE_CHECKING:
    from shmengine.channels.socket import SocketLink

__all__ = ["DialPort", "ListenPort", "Port"]

BATCH = 128  # parts that are taken from a socket at once
MOST_AT_ONCE = 1 << 14  # that the service takes, of one socket
RECONNECT_MS = (5, 200)  # first and longest pause between two attempts
LINGER_MS = 500  # for what was handed over when a socket is closed
GREETING_SECONDS = 2.0  # within which a connection is expected to say who it is
MOST_UNKNOWN = 1024  # sessions that wait for `accept`

_EVENTS = (
    zmq.Event.LISTENING
    | zmq.Event.HANDSHAKE_SUCCEEDED
    | zmq.Event.DISCONNECTED
    | zmq.Event.HANDSHAKE_FAILED_AUTH
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
)
_EVENT = struct.Struct("=Hi")  # what it is, and for some of them the connection's descriptor
_MORE = int(zmq.SNDMORE | zmq.DONTWAIT)
_NOW = int(zmq.DONTWAIT)


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
            self.wire = wire_of(socket)
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
            more = self.wire.receive(self.raw, most, alone)
            self._sort()
        return more

    def _request(self, session: Session, peer: bytes) -> None:
        self.post(peer, session.request())
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

    def read_events(self, *, pumps: bool = True) -> None:
        """Note all that has happened to connections, after what they have brought. Under the lock."""
        while not self.closed:
            try:
                message = self.monitor.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            event, value = _EVENT.unpack_from(message[0])
            if pumps and event == zmq.Event.DISCONNECTED:
                self.pump(-1)
            self.on_event(event, value)

    @property
    def busy(self) -> bool:
        """Whether the service should look here again soon."""
        return self.greeting_until > 0 or any(
            session.outstanding or session.is_behind for session in self.sessions.values()
        )

    def serve(self) -> None:
        """Do what is left to do. Under the lock."""
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
            except OSError:
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
            self._socket.disable_monitor()
            self.monitor.close(0)
            self._socket.close()


class DialPort(Port):
    """The socket of a session that connects."""

    def __init__(
        self, kind: int, address: str, session: Session, proof: Proof, peer_timeout: float, auth: Keys | None
    ) -> None:
        super().__init__(kind, address, peer_timeout, auth, serves=False, alone=session)
        self._session = session
        self._proof = proof
        self._nonce = b""
        self.answered = threading.Event()
        self._socket.ipv6 = "[" in address
        self._address = address
        try:
            self.add(session)
            uninterrupted(self._socket.connect, address)
        except (zmq.ZMQError, OSError):
            self.close()
            raise
        self.hub.watch(self)

    def on_event(self, event: int, fd: int) -> None:  # noqa: ARG002  there is one connection
        session = self._session
        if event == zmq.Event.HANDSHAKE_SUCCEEDED:
            self._greet()
        elif event == zmq.Event.DISCONNECTED:
            self._nonce = b""
            self.cut_off(session)
            if not self.is_local:
                self._drop_unsent()
        elif event == zmq.Event.HANDSHAKE_FAILED_AUTH and session.missed_since == 0:
            session.refusal = "it does not know the key of this end"
            self.answered.set()
            self.wake_all()

    def _drop_unsent(self) -> None:
        """Drop what the connection that has ended was given and had not sent.

        ZeroMQ would send it over the next one, before the greeting: over a slow path that takes too long. To make a
        connection only where there is one (``IMMEDIATE``) is no way: it drops also what has come and was not read.
        """
        self._socket.linger = 0
        uninterrupted(self._socket.disconnect, self._address)
        self._socket.linger = LINGER_MS
        uninterrupted(self._socket.connect, self._address)

    def serve(self) -> None:
        super().serve()
        if self._nonce and self.greeting_until == 0 and self._session.peer is None:
            self._greet()  # the answer, or the question, was lost on arrival

    def _greet(self) -> None:
        if self._session.refusal:
            return
        self._nonce = os.urandom(16)
        greeting = self._proof.greeting(
            Kind.HELLO, self._session.key, self._nonce, window=self._session.window
        )
        self.post(b"", self._session.greet(Kind.HELLO, greeting))
        self.greeting_until = time.monotonic() + GREETING_SECONDS

    def post(self, peer: bytes, part: Any) -> bool:  # noqa: ARG002  there is one
        self._send(part, _NOW, False)
        return True

    def _sort(self) -> None:
        raw, session = self.raw, self._session
        while raw:
            part = raw[0]
            if session.peer is not None:
                self._feed(session, part)
            elif not part.more and len(part) >= PREFIX_BYTES:
                self._read_answer(part)
            raw.popleft()

    def _read_answer(self, part: Part) -> None:
        session, kind = self._session, memoryview(part)[0]
        if kind not in (Kind.WELCOME, Kind.REFUSAL):
            return
        greeting = Greeting.unpack(part)
        if greeting is None or greeting.key != session.key or greeting.nonce != self._nonce:
            return
        if not self._proof.holds(Kind(kind), greeting):
            return
        user = user_behind(part.source) if self.is_local else os.geteuid()
        if user < 0:  # this connection has ended; who is there the next one will show
            return
        self._nonce, self.greeting_until = b"", 0.0
        if user != os.geteuid():
            session.refusal = "it is a process of another user"
        elif kind == Kind.REFUSAL:
            session.refusal = greeting.text
        else:
            session.connected(b"", part, greeting, part.source)
            self._hand_over(session)
        self.answered.set()
        self.wake_all()


class ListenPort(Port):
    """A socket that others connect to: any number of them, or, with ``alone=``, the other end of one session.

    Attributes
    ----------
    arrived : deque of Session
        Those that nobody has accepted so far.
    """

    def __init__(
        self,
        address: str,
        proof: Proof,
        peer_timeout: float,
        auth: Keys | None = None,
        *,
        alone: Session | None = None,
        make: Callable[[bytes], Session] | None = None,
    ) -> None:
        if address.startswith("ipc:"):
            check_free(address.removeprefix("ipc://"))
        self._make = make
        self._patience_ns = int(peer_timeout * 1e9)
        self._proof = proof
        self._listener: Descriptor | None = None
        self._file: SocketFile | None = None
        self._peers: dict[bytes, Session] = {}
        self._by_fd: dict[int, Session] = {}
        self.arrived: deque[Session] = deque()
        self.news = threading.Event()
        super().__init__(
            zmq.PAIR if alone else zmq.ROUTER, address, peer_timeout, auth, serves=True, alone=alone
        )
        if alone is None:
            self._socket.router_mandatory = True
        if self.is_local:
            self._socket.setsockopt(zmq.IPC_FILTER_UID, os.getuid())
        self._socket.ipv6 = "[" in address
        try:
            if alone is not None:
                self.add(alone)
            uninterrupted(self._socket.bind, address)
            if self.is_local and not address.startswith("ipc://@"):
                self._file = SocketFile(address.removeprefix("ipc://"))
        except (zmq.ZMQError, OSError):
            self.close()
            raise
        # So far there is only this event. The descriptor is ZeroMQ's, and closed here only in forked children.
        self._listener = Descriptor(_EVENT.unpack_from(self.monitor.recv_multipart()[0])[1], "a server")
        self.address = bytes(self._socket.getsockopt(zmq.LAST_ENDPOINT)).decode().rstrip("\0")
        self.hub.watch(self)

    def stop(self) -> None:
        """Have the service refuse new sessions. Waits for nothing."""
        if len(self.sessions) == len(self.arrived):  # of those that were accepted none may come back
            self._remove_file()
        self.hub.finish(self)

    def close(self) -> None:
        self._remove_file()  # before the socket is closed
        super().close()

    def _remove_file(self) -> None:
        if self._file is not None and not self.closed:
            self._file.remove()

    def finish(self, *, hurry: bool) -> bool:  # noqa: ARG002  as of a link
        """Refuse new sessions; those that were accepted may still come back."""
        with self.lock:
            self._make = None
            while self.arrived:
                session = self.arrived.popleft()
                session.keep([session.prefix(Kind.GOODBYE, session.next_number)])
                self._hand_over(session)
                self.remove(session)
            self.news.set()
            if self.is_over:
                self.close()
        return True

    @property
    def is_over(self) -> bool:
        """Whether nobody needs the socket any more."""
        return not self.sessions and self._make is None

    def after_fork(self) -> None:
        if self._listener is not None:
            self._listener.close()

    def serve(self) -> None:
        super().serve()
        long_ago = time.monotonic_ns() - self._patience_ns
        for session in list(self.arrived):
            if session.peer is None and session.missed_since < long_ago:  # nobody is there to be accepted
                self.arrived.remove(session)
                self.remove(session)

    def end(self) -> None:
        super().end()
        self.stop()

    def on_event(self, event: int, fd: int) -> None:
        if event == zmq.Event.HANDSHAKE_SUCCEEDED:
            self.greeting_until = time.monotonic() + GREETING_SECONDS
        elif event == zmq.Event.DISCONNECTED and (session := self._by_fd.pop(fd, None)) is not None:
            self.cut_off(session)

    def cut_off(self, session: Session) -> None:
        if session.peer is not None:
            self._peers.pop(session.peer, None)
        super().cut_off(session)

    def remove(self, session: Session) -> None:
        super().remove(session)
        if session.peer is not None:
            self._peers.pop(session.peer, None)
        self._by_fd = {fd: other for fd, other in self._by_fd.items() if other is not session}

    def post(self, peer: bytes, part: Any) -> bool:
        try:
            if self._alone:
                self._send(part, _NOW, False)
                return True
            if self.wire.half:
                self._end_half()
            self.wire.half = True  # if a signal's handler, which pyzmq calls, raises
            deque(map(self._send, (peer, part), (_MORE, _NOW), (False, False)), 0)
            self.wire.half = False
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            self.wire.half = False
            return False
        return True

    def _end_half(self) -> None:
        """End a message of which only the address was sent, if there is one: nobody is called like this."""
        try:
            self._send(b"", _NOW, False)
        except zmq.ZMQError:
            pass
        self.wire.half = False

    def _sort(self) -> None:
        raw = self.raw
        if self._alone:
            while raw:
                self._receive(b"", raw[0])
                raw.popleft()
            return
        while raw:
            if not raw[0].more:  # the second half of what was dealt with when somebody interrupted
                raw.popleft()
                continue
            if len(raw) < 2:  # the rest is there, but in the next batch
                return
            part = raw[1]
            if part.more:
                self._drop_long()
                continue
            self._receive(bytes(raw[0]), part)
            raw.popleft()
            raw.popleft()

    def _drop_long(self) -> None:
        """Drop a message of more parts than there should be."""
        raw = self.raw
        while raw.popleft().more:
            if not raw:
                self.wire.receive(raw, 1, None)

    def _receive(self, peer: bytes, part: Part) -> None:
        session = self._peers.get(peer)
        kind = memoryview(part)[0] if session is None and len(part) >= PREFIX_BYTES else 0
        if session is not None:
            kind = self._feed(session, part)
        if kind == Kind.HELLO:
            self._greet(peer, part)

    def _greet(self, peer: bytes, part: Part) -> None:
        greeting = Greeting.unpack(part)
        if greeting is None or not self._proof.holds(Kind.HELLO, greeting):
            return
        self.read_events(
            pumps=False
        )  # so that none of an earlier connection with this descriptor comes later
        session = self._session_of(greeting, part)
        if session is None or session.refusal:
            why = "it does not know this session any more, or takes no new ones"
            self.post(peer, refusal(self._proof.greeting(Kind.REFUSAL, greeting.key, greeting.nonce, why)))
            return
        if session.peer is not None:
            self._peers.pop(session.peer, None)
            session.disconnected()
        self._by_fd = {fd: other for fd, other in self._by_fd.items() if other is not session}
        self._by_fd[part.source] = session
        self._peers[peer] = session
        answer = self._proof.greeting(Kind.WELCOME, greeting.key, greeting.nonce, window=session.window)
        self.post(peer, session.greet(Kind.WELCOME, answer))
        session.connected(peer, part, greeting, part.source)
        self._hand_over(session)
        self.wake_all()

    def _session_of(self, greeting: Greeting, part: Part) -> Session | None:
        """Return the session that a greeting is of, made if it is new; None: it is refused."""
        session = self.sessions.get(greeting.key)
        if session is None and self._alone is None and self._make is not None:
            number = int.from_bytes(memoryview(part)[8:PREFIX_BYTES], "little")
            if number == 0 and len(self.arrived) < MOST_UNKNOWN:
                session = self._make(greeting.key)
                try:
                    self.add(session)
                except OSError:  # no descriptors are left
                    return None
                self.arrived.append(session)
                self.news.set()
        return session
