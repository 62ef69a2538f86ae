"""Sockets that others connect to: it is seen there whose session a connection goes on with, or begins."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from shmengine._native._handles import Part
from shmengine.channels.greetings import Greeting, Proof
from shmengine.channels.keys import Keys
from shmengine.channels.local import SocketFile, check_free
from shmengine.channels.ports import EVENT, GREETING_SECONDS, NOW, Port
from shmengine.channels.sessions import PREFIX_BYTES, Kind, Session, refusal
from shmengine.channels.zeromq import uninterrupted, zmq
from shmengine.descriptors import Descriptor
from shmengine.interrupts import InterruptsLater

__all__ = ["ListenPort"]

MOST_UNKNOWN = 1024  # sessions that wait for `accept`

_OF_CONNECTIONS = (zmq.Event.ACCEPTED, zmq.Event.DISCONNECTED)  # whose values are their descriptors
_MORE = int(zmq.SNDMORE | zmq.DONTWAIT)


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
        self._ended: set[int] = set()  # descriptors of connections that have ended
        self._lost = 0  # stand-ins for descriptors that have become another connection's; negative
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
            # So far there is only this event. The descriptor is ZeroMQ's, and closed here only in forked children.
            self._listener = Descriptor(EVENT.unpack_from(self.monitor.recv_multipart()[0])[1], "a server")
            self.address = bytes(self._socket.getsockopt(zmq.LAST_ENDPOINT)).decode().rstrip("\0")
            self.hub.watch(self)
        except BaseException:
            self.close()
            raise

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
            if self.armed:  # sending may have swallowed the sign that something has come
                self.pump(-1)
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
        elif event == zmq.Event.ACCEPTED:
            self._ended.discard(fd)
        elif event == zmq.Event.DISCONNECTED:
            if fd >= 0:
                self._ended.add(fd)
            if (session := self._by_fd.get(fd)) is not None:  # forgotten last: a signal's handler may raise
                self.cut_off(session)
                del self._by_fd[fd]

    def cut_off(self, session: Session) -> None:
        super().cut_off(session)
        self._forget_peers(session)

    def remove(self, session: Session) -> None:
        super().remove(session)
        self._forget_peers(session)
        self._by_fd = {fd: other for fd, other in self._by_fd.items() if other is not session}

    def _forget_peers(self, session: Session) -> None:
        """Take what its connections still bring for nobody's. (Who found out by sending has left a name here.)"""
        self._peers = {peer: other for peer, other in self._peers.items() if other is not session}

    def post(self, peer: bytes, part: Any) -> bool:
        try:
            if self._alone:
                self._send(part, NOW, False)
                return True
            if self.wire.half:
                self._end_half()
            self.wire.half = True  # if a signal's handler, which pyzmq calls, raises
            deque(map(self._send, (peer, part), (_MORE, NOW), (False, False)), 0)
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
            self._send(b"", NOW, False)
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
        # What has become of an earlier connection with this descriptor must not be taken for this one's fate.
        self._note_descriptor(part.source)
        if part.source in self._ended:
            return
        earlier = self._by_fd.get(part.source)
        if earlier is not None and earlier.key != greeting.key:
            # One of both connections has ended. Where ZeroMQ takes something, that is the one that is there.
            self._posted = True
            if earlier.peer is not None and self.post(earlier.peer, earlier.prefix(Kind.ACKNOWLEDGE)):
                return
            self.cut_off(earlier)
        session = self._session_of(greeting, part)
        if session is None or session.refusal:
            why = "it does not know this session any more, or takes no new ones"
            self._posted = True
            self.post(peer, refusal(self._proof.greeting(Kind.REFUSAL, greeting.key, greeting.nonce, why)))
            return
        answer = self._proof.greeting(Kind.WELCOME, greeting.key, greeting.nonce, window=session.window)
        self._posted = True
        if not self.post(peer, session.greet(Kind.WELCOME, answer)):
            # This connection has ended; another one of this session may be there.
            if session in self.arrived and session.peer is None and session.missed_since == 0:
                self.arrived.remove(session)
                self.remove(session)
            return
        session.disconnected()
        self._forget_peers(session)
        self._by_fd = {fd: other for fd, other in self._by_fd.items() if other is not session}
        self._by_fd[part.source] = session
        self._peers[peer] = session
        session.connected(peer, part, greeting, part.source)
        self._hand_over(session)
        self.wake_all()

    def _note_descriptor(self, fd: int) -> None:
        """Note what has happened to connections with this descriptor.

        That one has ended is all that is noted of it now. It may have brought more, which is read before its session is
        cut off: in its turn among the other news, under a stand-in.
        """
        news, known = self.hear_news(), False
        for at, (event, of) in enumerate(list(news)):
            if of != fd or event not in _OF_CONNECTIONS:
                continue
            known = True
            session = self._by_fd.get(fd)
            if event == zmq.Event.DISCONNECTED and session is not None:
                self._ended.add(fd)
                self._lost -= 1
                # No call from here on, in which a signal's handler could raise.
                self._by_fd[self._lost] = session
                news[at] = event, self._lost
                del self._by_fd[fd]
            self.on_event(event, fd)
        for each in [each for each in news if each[1] == fd and each[0] in _OF_CONNECTIONS]:
            news.remove(each)
        if known:  # ZeroMQ is to see at once, too, whose connections have ended
            self._socket.getsockopt(zmq.EVENTS)
            self._posted = True
        if news:
            self.hub.notice()

    def _session_of(self, greeting: Greeting, part: Part) -> Session | None:
        """Return the session that a greeting is of, made if it is new; None: it is refused."""
        key = greeting.key
        session = self.sessions.get(key)
        if session is None and self._alone is None and self._make is not None:
            number = int.from_bytes(memoryview(part)[8:PREFIX_BYTES], "little")
            if number == 0 and len(self.arrived) < MOST_UNKNOWN:
                session = self._make(key)
                with InterruptsLater():
                    try:
                        self.add(session)
                    except OSError:  # no descriptors are left
                        return None
        is_somebodys = self._alone is not None or key in self.links or session in self.arrived
        if session is not None and not is_somebodys:  # whoever is interrupted before this comes here again
            self.arrived.append(session)
            self.news.set()
        return session
