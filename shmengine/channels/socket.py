"""Channels over sockets (ZeroMQ): between two processes of one machine, and between machines."""

from __future__ import annotations

import ipaddress
import os
import socket as sockets
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Final, Self

import numpy as np

from shmengine._native.status import deadline_of
from shmengine.arrays import Bytes, address_of
from shmengine.channels.base import NOTHING, Capabilities, Counts, End, Link, Options
from shmengine.channels.frames import GOODBYE, FrameLink
from shmengine.channels.keys import Keys
from shmengine.channels.open import check_options
from shmengine.channels.presence import Fate, Presence, PresenceToken
from shmengine.channels.sessions import PREFIX_BYTES, SESSION_BYTES, Kind, Proof, Session, is_gone
from shmengine.errors import Closed, PeerLost, SerializationError, Timeout, UseAfterFork, WouldBlock

try:
    import zmq
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "channels over sockets need pyzmq: pip install 'shmengine[socket]'", name=error.name
    ) from None

from shmengine.channels.ports import DialPort, ListenPort, Port, Waiter

__all__ = ["Server", "connect", "listen", "pair"]

PEER_SECONDS = 10.0
LARGE_BYTES = 1 << 16  # from here on a message is not copied where that can be avoided
ALIGNMENT = 16  # of frames that are used where they arrived; malloc gives it
DRAIN_NS = 500_000_000  # after a death, for what the kernel still has of the dead
LOOK_EVERY = 64  # messages of a sender, between looks what was acknowledged

_LONG = 3600.0  # seconds; "for ever", but in steps

Auth = Keys | str | os.PathLike[str] | None

_DATA: Final = int(Kind.DATA)
_CAPABILITIES = Capabilities(
    mechanism="socket",
    between_hosts=True,
    in_place=False,
    compresses=True,
    priorities=1,
    reconnects=True,
    writable=True,
)


class SocketLink(FrameLink):
    """A session of this process, and the port that it goes through."""

    capabilities: ClassVar[Capabilities] = _CAPABILITIES

    def __init__(self, options: Options) -> None:
        super().__init__(options)
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
        port.links[session.key] = self
        self._pid = os.getpid()

    # --- messages --------------------------------------------------------------------------------

    def next_sequence(self, priority: int) -> int:  # noqa: ARG002  there are none
        """Return the number of the next message."""
        return self._session.next_number

    def write(self, pieces: list[Any], nbytes: int, priority: int, deadline: int) -> bool:  # noqa: ARG002
        """Keep a copy of a message until the other end has it, and send that; wait while there is no room."""
        session, port = self._session, self._port
        nbytes += PREFIX_BYTES
        try:
            while True:
                with port.lock:
                    number = session.next_number
                    if number % LOOK_EVERY == 0:
                        port.pump()
                    if not session.has_room(nbytes):
                        port.pump(-1)
                    if session.has_room(nbytes):
                        session.keep(self._part(session.prefix(_DATA, number), pieces, nbytes))
                        port.hand_over(session)
                        port.hub.notice()
                        return True
                    self._writer.arm()
                    port.acknowledge(session)
                if deadline == 0 or 0 < deadline <= time.monotonic_ns():
                    return False
                self._writer.wait(deadline)
        finally:
            if deadline:
                self._writer.disarm()

    def _part(self, prefix: bytes, pieces: list[Any], nbytes: int) -> Any:
        """Return a copy of a message: bytes, or a frame of ZeroMQ, which it can send without another copy."""
        if nbytes < LARGE_BYTES:
            return b"".join((prefix, *pieces))
        part = self._session.spare(nbytes)
        if part is None:
            part = zmq.Frame(memoryview(np.empty(nbytes, np.uint8)), copy=True)  # type: ignore[arg-type]
        target = np.frombuffer(part, np.uint8)
        at = 0
        for piece in (prefix, *pieces):
            end = at + len(piece)
            target[at:end] = np.frombuffer(piece, np.uint8)
            at = end
        return part

    def give_up(self) -> None:
        """Take back nothing: a message is sent whole, or not at all."""

    def read(self, deadline: int) -> Bytes | object:
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

    def _opened(self, goodbye: bool, part: Any) -> Bytes | object:
        if goodbye:
            self._session.take()
            with self._port.lock:
                self._port.acknowledge(self._session)
            return GOODBYE
        message = np.frombuffer(part, np.uint8, -1, PREFIX_BYTES)
        if len(message) < LARGE_BYTES or address_of(message) % ALIGNMENT:
            return message.copy()
        return message

    def taken(self) -> None:
        """Forget the message that `read` has returned."""
        session = self._session
        session.take()
        if session.owes_acknowledgement:
            with self._port.lock:
                self._port.acknowledge(session)

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

    @abstractmethod
    def _fate(self) -> Fate:
        """Say it of an end that has not said goodbye."""

    # --- the end of it -----------------------------------------------------------------------------

    def close(self) -> None:
        """Leave the rest to the service: it says goodbye when all that was sent has been taken."""
        if not self._closed:
            self._closed = True
            if self._pid == os.getpid():
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
                session.keep(session.prefix(Kind.GOODBYE, session.next_number))
            port.read_events()
            port.pump(-1)
            port.hand_over(session)
        unheard = session.missed_since == 0 and session.peer is None and session.next_number == 1
        delivered = not session.outstanding or unheard
        if not (delivered or hurry) and self.fate() in (Fate.UNUSED, Fate.ALIVE):
            return False
        with port.lock:
            port.acknowledge(session)
            port.remove(session)
        self._finished(delivered=delivered or not hurry)
        return True


# --- one machine ---------------------------------------------------------------------------------


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
        session = Session(key, self.counts, self.options.buffer_bytes)
        address = f"ipc://@{self._name}"
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


# --- two machines --------------------------------------------------------------------------------


class _RemoteLink(SocketLink):
    """An end of a channel whose other end was made elsewhere."""

    def __init__(self, options: Options, port: Port, session: Session, peer_timeout: float) -> None:
        super().__init__(options)
        self.counts = session.counts
        self._patience_ns = int(peer_timeout * 1e9)
        self._attach(port, session)

    def start(self) -> None:
        """Check that it is this process's."""
        if self._pid != os.getpid():
            raise UseAfterFork("this end of a channel is used by the parent of this forked process")

    def token(self) -> Any:
        """Refuse: the connection is this process's."""
        raise SerializationError(
            "an end from connect or accept is the process's that made it: pass the address on, and connect there"
        )

    def _fate(self) -> Fate:
        session = self._session
        if session.peer is not None:
            return Fate.ALIVE
        patience = 0 if is_gone(session.other) else self._patience_ns
        return Fate.ALIVE if time.monotonic_ns() - session.missed_since < patience else Fate.LOST


class Server:
    """Accepts channels at an address; made by `listen`.

    Attributes
    ----------
    address : str
        Where it listens; give this to `connect`.
    """

    def __init__(self, address: str, auth: Keys | None, options: Options, peer_timeout: float) -> None:
        self._options = options
        self._peer_timeout = peer_timeout
        self._closed = False
        self._pid = os.getpid()
        self._accepting = threading.Lock()

        def make(key: bytes) -> Session:
            return Session(key, Counts(), options.buffer_bytes)

        try:
            self._port = ListenPort(address, Proof(b""), peer_timeout, auth, make=make)
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"cannot listen at {address}: {error.strerror}") from None
        self.address = self._port.address

    def accept(self, timeout: float | None = None) -> End:
        """Wait for somebody to connect, and return this side's end of the channel.

        Parameters
        ----------
        timeout : float, optional
            Seconds; None: for ever, 0: do not wait.

        Raises
        ------
        Timeout
        WouldBlock
            With a timeout of 0.
        Closed
            The server was closed.
        UseAfterFork
            It belongs to the parent of this forked process.
        """
        deadline = deadline_of(timeout)
        if self._pid != os.getpid():
            raise UseAfterFork("this server belongs to the parent of this forked process")
        port = self._port
        while True:
            self._check_open()
            port.news.clear()
            with self._accepting:
                if port.arrived:
                    session = port.arrived[0]
                    link = _RemoteLink(self._options, port, session, self._peer_timeout)
                    end = End(link, self._options)
                    port.arrived.popleft()
                    return end
            now = time.monotonic_ns()
            if deadline == 0:
                raise WouldBlock("accept: nobody waits to be accepted")
            if 0 < deadline <= now:
                raise Timeout("accept: nobody has connected", timeout)
            port.news.wait(_LONG if deadline < 0 else (deadline - now) / 1e9)

    def __iter__(self) -> Iterator[End]:
        """Accept until the server is closed."""
        while True:
            try:
                end = self.accept()
            except Closed:
                return
            yield end

    def close(self) -> None:
        """Accept nobody any more. Ends that were accepted go on, and may still come back after an interruption."""
        if not self._closed:
            self._closed = True
            if self._pid == os.getpid():
                self._port.hub.finish(self._port)

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("this server is closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self.close()

    def __repr__(self) -> str:
        return f"<shmengine server at {self.address}{', closed' if self._closed else ''}>"


def listen(
    address: str,
    auth: Auth = None,
    *,
    check: str = "frame",
    allow_pickle: bool | None = None,
    compression: str | None = None,
    buffer_bytes: int | str = "64 MiB",
    peer_timeout: float = PEER_SECONDS,
) -> Server:
    """Listen at an address for channels from other processes or machines.

    Parameters
    ----------
    address : str
        ``"tcp://host:port"`` (port 0: a free one, see `Server.address`; host ``*``: all interfaces), or
        ``"ipc://path"`` or ``"ipc://@name"`` for this machine and this user.
    auth : Keys, path, or "none", optional
        Whom to let in: only those whose public key these keys know; everything is encrypted then. A path is that of a
        key file (see `Keys.load`). Beyond this machine there is no other way, but to say ``"none"``: everybody.
    allow_pickle : bool, optional
        As for `channel`; by default not over TCP: who may send pickles may run any code here.
    check, compression, buffer_bytes
        As for `channel`.
    peer_timeout : float, optional
        Seconds without a connection after which the other end of a channel is lost. One that comes back sooner goes
        on where it was.

    Raises
    ------
    ValueError
        There is no such address or option, or it needs ``auth=``.
    OSError
        The address cannot be had.
    ModuleNotFoundError
        pyzmq is not installed.
    """
    place = _Place.of(address, auth, "listen")
    options = place.options(check, allow_pickle, compression, buffer_bytes, peer_timeout)
    return Server(place.address, place.keys, options, peer_timeout)


def connect(
    address: str,
    auth: Auth = None,
    timeout: float | None = 5,
    *,
    check: str = "frame",
    allow_pickle: bool | None = None,
    compression: str | None = None,
    buffer_bytes: int | str = "64 MiB",
    peer_timeout: float = PEER_SECONDS,
) -> End:
    """Connect to a server, and return this side's end of a new channel.

    Parameters
    ----------
    address : str
        That of `Server.address`.
    auth : Keys, path, or "none", optional
        Own keys, which know the server's. A path is that of a key file (see `Keys.load`).
    timeout : float, optional
        Seconds to try; None: for ever.
    check, allow_pickle, compression, buffer_bytes, peer_timeout
        As for `listen`.

    Raises
    ------
    Timeout
        No server has answered; one that has other keys does not answer, either.
    PeerLost
        The server refuses: it does not know this key, or was closed.
    ValueError
        There is no such address or option, or it needs ``auth=``.
    ModuleNotFoundError
        pyzmq is not installed.
    """
    until = deadline_of(timeout)
    place = _Place.of(address, auth, "connect")
    options = place.options(check, allow_pickle, compression, buffer_bytes, peer_timeout)
    session = Session(os.urandom(SESSION_BYTES), Counts(), options.buffer_bytes)
    port = DialPort(zmq.DEALER, place.address, session, Proof(b""), peer_timeout, place.keys)
    link = _RemoteLink(options, port, session, peer_timeout)
    end = End(link, options)
    try:
        while not port.answered.wait(_LONG if until < 0 else max(0, until - time.monotonic_ns()) / 1e9):
            if until >= 0 and time.monotonic_ns() >= until:
                hint = "" if place.keys is None else ", with a key that this end knows"
                raise Timeout(f"connect to {address}: no server answers there{hint}", timeout)
        if session.refusal:
            raise PeerLost(f"connect to {address}: the server refuses: {session.refusal}")
    except BaseException:
        end.close()
        raise
    return end


@dataclass(frozen=True)
class _Place:
    """An address, as ZeroMQ takes it, and what follows from it."""

    address: str
    keys: Keys | None
    is_remote: bool

    @classmethod
    def of(cls, address: str, auth: Auth, what: str) -> _Place:
        """Check an address and whether it needs keys."""
        keys = auth if auth is None or isinstance(auth, Keys) else None
        if auth is not None and keys is None and auth != "none":
            keys = Keys.load(auth)
        transport, _, rest = address.partition("://")
        if transport == "ipc" and rest:
            if keys is not None:
                raise ValueError(f"{what}: ipc:// is for one user of one machine, and takes no auth=")
            return cls(address, None, is_remote=False)
        host, colon, port = rest.rpartition(":")
        if transport != "tcp" or not colon or not port.isdigit() or int(port) > 65535 or not host:
            raise ValueError(
                f"{what}: an address is 'tcp://host:port', 'ipc://path' or 'ipc://@name', not {address!r}"
            )
        numeric = host if host == "*" else _numeric(host.strip("[]"), what)
        if keys is None and auth is None and not _is_loopback(numeric):
            raise ValueError(
                f"{what}: {address} can be reached by other machines: give auth= keys (`shmengine keys` makes"
                " them), or auth='none' to let everybody in, unencrypted"
            )
        if ":" in numeric:
            numeric = f"[{numeric}]"
        return cls(f"tcp://{numeric}:{port}", keys, is_remote=True)

    def options(
        self,
        check: str,
        allow_pickle: bool | None,
        compression: str | None,
        buffer_bytes: int | str,
        peer_timeout: float,
    ) -> Options:
        """Return the options of channels, checked."""
        if not 0.1 <= peer_timeout <= 86400:
            raise ValueError(f"peer_timeout must be from 0.1 to 86400 seconds, not {peer_timeout!r}")
        return check_options(
            check=check,
            allow_pickle=not self.is_remote if allow_pickle is None else allow_pickle,
            compression=compression,
            buffer_bytes=buffer_bytes,
        )


def _numeric(host: str, what: str) -> str:
    try:
        return str(sockets.getaddrinfo(host, None, type=sockets.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ValueError(f"{what}: there is no host {host!r}: {error.strerror or error}") from None


def _is_loopback(host: str) -> bool:
    return host != "*" and ipaddress.ip_address(host.partition("%")[0]).is_loopback
