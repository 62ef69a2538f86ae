"""The socket of a session that connects: it says who it is, and again on each new connection."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from shmengine._native._handles import Part
from shmengine.channels.greetings import Greeting, Proof
from shmengine.channels.keys import Keys
from shmengine.channels.local import unread_bytes, user_behind
from shmengine.channels.ports import GREETING_SECONDS, LINGER_MS, NOW, RECONNECT_MS, Port
from shmengine.channels.sessions import PREFIX_BYTES, Kind, Session
from shmengine.channels.zeromq import uninterrupted, zmq

__all__ = ["DialPort"]

PAIR_SECONDS = (0.25, 4.0)  # within which a `PAIR` is expected to answer; growing


class DialPort(Port):
    """The socket of a session that connects."""

    def __init__(
        self, kind: int, address: str, session: Session, proof: Proof, peer_timeout: float, auth: Keys | None
    ) -> None:
        super().__init__(kind, address, peer_timeout, auth, serves=False, alone=session)
        self._session = session
        self._proof = proof
        self._meets_pair = kind == zmq.PAIR
        self._patience = PAIR_SECONDS[0] if self._meets_pair else GREETING_SECONDS
        self._fd = -1  # of the connection
        self._hung_up = False
        self._pause = RECONNECT_MS[0] / 1e3  # before the next attempt
        self._dial_at = 0.0  # when that is due
        self._nonce = b""
        self.answered = threading.Event()
        self._socket.ipv6 = "[" in address
        self._address = address
        try:
            self.add(session)
            self._dial()
            self.hub.watch(self)
        except BaseException:
            self.close()
            raise

    def on_event(self, event: int, fd: int) -> None:
        session = self._session
        if event == zmq.Event.CONNECTED:
            self._fd = fd
        elif event == zmq.Event.HANDSHAKE_SUCCEEDED:
            self._greet()
        elif event == zmq.Event.DISCONNECTED:
            self._nonce = b""
            self.cut_off(session)
            if not (self.is_local or self._hung_up):  # (ipc:// is dialed again by ZeroMQ)
                self._wait_and_dial()
        elif event == zmq.Event.HANDSHAKE_FAILED_AUTH and session.missed_since == 0:
            session.refusal = "it does not know the key of this end"
            self.answered.set()
            self.wake_all()

    def _hang_up(self) -> None:
        """Drop the connection, and what it or one that has ended was given and had not sent.

        ZeroMQ would send it over the next one, before the greeting: over a slow path that takes too long. To make a
        connection only where there is one (``IMMEDIATE``) is no way: it drops also what has come and was not read.
        """
        self._socket.linger = 0
        uninterrupted(self._socket.disconnect, self._address)
        self._socket.linger = LINGER_MS

    def _dial(self) -> None:
        self._hung_up = False
        uninterrupted(self._socket.connect, self._address)

    @property
    def busy(self) -> bool:
        """Whether the service should look here again soon."""
        return self._hung_up or super().busy

    def serve(self) -> None:
        super().serve()
        if self._hung_up:
            if self._dial_at <= time.monotonic():
                self._dial()
        elif self._nonce and self.greeting_until == 0 and self._session.peer is None:
            if self._meets_pair and unread_bytes(self._fd):
                # A PAIR turns away whoever comes while it has not done with another connection: of what he sends it
                # reads the first message, and no more. (Of others ZeroMQ's thread reads all, whatever Python does.)
                self._wait_and_dial()
            else:
                self._greet()  # the answer, or the question, was lost on arrival

    def _wait_and_dial(self) -> None:
        """Hang up now, and dial a moment later: this end's own PAIR has to be done with it, too.

        The moments grow, as ZeroMQ's do, until somebody answers: others may be there in place of who is expected, and
        close what they accept.
        """
        self._nonce, self.greeting_until = b"", 0.0
        self._dial_at = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, RECONNECT_MS[1] / 1e3)
        self._hang_up()
        self._hung_up = True

    def _greet(self) -> None:
        if self._session.refusal or self._hung_up:
            return
        self._nonce = os.urandom(16)
        greeting = self._proof.greeting(
            Kind.HELLO, self._session.key, self._nonce, window=self._session.window
        )
        if not self.post(b"", self._session.greet(Kind.HELLO, greeting)):
            self._wait_and_dial()
            return
        self.greeting_until = time.monotonic() + self._patience
        if self._meets_pair:
            self._patience = min(2 * self._patience, PAIR_SECONDS[1])

    def post(self, peer: bytes, part: Any) -> bool:  # noqa: ARG002  there is one
        try:
            self._send(part, NOW, False)
        except zmq.Again:  # the last connection is not quite over
            return False
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
        if user != os.geteuid():
            session.refusal = "it is a process of another user"
        elif kind == Kind.REFUSAL:
            session.refusal = greeting.text
        else:
            session.connected(b"", part, greeting, part.source)
        # Only now: a signal's handler may have raised in between, and the same answer is read again.
        self._nonce, self.greeting_until = b"", 0.0
        if session.peer is not None:
            self._pause = RECONNECT_MS[0] / 1e3
            if self._meets_pair:
                self._patience = PAIR_SECONDS[0]
            self._hand_over(session)
        self.answered.set()
        self.wake_all()
