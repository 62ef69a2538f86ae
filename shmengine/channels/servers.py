"""Channels between machines, or between processes that are not related: `listen`, `connect`."""

from __future__ import annotations

import ipaddress
import os
import re
import socket as sockets
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from shmengine._native.status import deadline_of
from shmengine.channels.dialing import DialPort
from shmengine.channels.end import End
from shmengine.channels.greetings import Proof, is_gone
from shmengine.channels.keys import Keys
from shmengine.channels.link import Counts, Options
from shmengine.channels.listening import ListenPort
from shmengine.channels.open import check_options
from shmengine.channels.ports import Port
from shmengine.channels.presence import Fate
from shmengine.channels.sessions import SESSION_BYTES, Session, most_part_bytes
from shmengine.channels.socket import DRAIN_NS, PEER_SECONDS, SocketLink
from shmengine.channels.zeromq import zmq
from shmengine.errors import Closed, PeerLost, SerializationError, Timeout, UseAfterFork, WouldBlock
from shmengine.interrupts import InterruptsLater

__all__ = ["Server", "connect", "listen"]

LOOK_SECONDS = 0.05
PATH_BYTES = 107  # of a socket's, without the zero at its end
_PORT = re.compile("[0-9]{1,5}")

Auth = Keys | str | os.PathLike[str] | None


class _RemoteLink(SocketLink):
    """An end of a channel whose other end was made elsewhere."""

    def __init__(self, options: Options, port: Port, session: Session, peer_timeout: float) -> None:
        super().__init__(options)
        self.counts = session.counts
        self._patience_ns = int(peer_timeout * 1e9)
        self._dead_since = 0
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
        with self._port.lock:  # another thread may be noting that a connection has ended, or begun
            peer, missed_since, other = session.peer, session.missed_since, session.other
        if peer is not None:
            if not (self._port.is_local and is_gone(other)):
                self._dead_since = 0
                return Fate.ALIVE
            # A forked child of the dead has inherited the connection, so it does not end. (Over TCP beats do that.)
            now = time.monotonic_ns()
            self._dead_since = self._dead_since or now
            return Fate.ALIVE if now - self._dead_since < DRAIN_NS else Fate.LOST
        patience = 0 if is_gone(other) else self._patience_ns
        return Fate.ALIVE if time.monotonic_ns() - missed_since < patience else Fate.LOST

    def loss(self) -> str:
        """Say what is known of an end that is lost."""
        session = self._session
        if session.refusal or is_gone(session.other):
            return super().loss()
        seconds = self._patience_ns / 1e9
        return (
            f"the other end could not be reached for {seconds:g} seconds (peer_timeout): it died, or the network"
            " between is broken"
        )


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
        self._accepted: deque[End] = deque()  # whose `accept` was interrupted before it could return them

        def make(key: bytes) -> Session:
            return Session(key, Counts(), options.buffer_bytes, most_part_bytes(address), accepted=False)

        try:
            with InterruptsLater():  # half a server would keep the address
                self._port = ListenPort(address, Proof(b""), peer_timeout, auth, make=make)
                self.address = self._port.address
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"cannot listen at {address}: {error.strerror}") from None

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
            port.news.clear()
            self._check_open()
            end = None
            try:
                with InterruptsLater(), self._accepting:
                    if not self._accepted:
                        self._accept_one()
                    if self._accepted:
                        end = self._accepted.popleft()
            except BaseException:
                if end is not None and self._closed:
                    end.close()
                elif end is not None:
                    self._accepted.appendleft(end)
                raise
            if end is not None:
                return end
            now = time.monotonic_ns()
            if deadline == 0:
                raise WouldBlock("accept: nobody waits to be accepted")
            if 0 < deadline <= now:
                raise Timeout("accept: nobody has connected", timeout)
            # Of several who wait, one may clear what was set for another: so look again soon.
            port.news.wait(LOOK_SECONDS if deadline < 0 else min(LOOK_SECONDS, (deadline - now) / 1e9))

    def _accept_one(self) -> None:
        """Make an end for who has waited longest, if somebody waits. A signal's handler must not raise here."""
        port = self._port
        with port.lock:
            while port.arrived:
                session = port.arrived[0]
                # Else a handler has raised here all the same, as that of a second Ctrl-C does.
                if session.key in port.sessions and session.key not in port.links:
                    end = _RemoteLink(self._options, port, session, self._peer_timeout).end(self._options)
                    port.accept(session)
                    self._accepted.append(end)
                    port.arrived.popleft()
                    return
                port.arrived.popleft()

    def __iter__(self) -> Iterator[End]:
        """Accept until the server is closed."""
        while True:
            try:
                end = self.accept()
            except Closed:
                return
            yield end

    def close(self) -> None:
        """Accept nobody any more. Ends that were accepted go on, and may still come back after an interruption.

        The file of an ``ipc://`` path goes now, or with the last of these ends.
        """
        if not self._closed:
            self._closed = True
            self._accepted.clear()
            if self._pid == os.getpid():
                self._port.stop()

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
        Seconds without a connection after which the other end of a channel is lost, and one that waits to be accepted
        is forgotten. One that comes back sooner goes on where it was.

    Raises
    ------
    ValueError
        There is no such address or option, or it needs ``auth=``.
    TypeError
        `address` or `auth` is something else.
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
        Own keys, which know the server's, and no other. A path is that of a key file (see `Keys.load`).
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
    TypeError
        `address` or `auth` is something else.
    OSError
        The address cannot be used.
    ModuleNotFoundError
        pyzmq is not installed.
    """
    until = deadline_of(timeout)
    place = _Place.of(address, auth, "connect")
    options = place.options(check, allow_pickle, compression, buffer_bytes, peer_timeout)
    if place.is_remote and (place.address.startswith("tcp://*:") or place.address.endswith(":0")):
        raise ValueError(
            f"connect: {address!r} is no place to connect to: give the name of one host, and the port of its server"
            " (see Server.address)"
        )
    session = Session(
        os.urandom(SESSION_BYTES),
        Counts(),
        options.buffer_bytes,
        most_part_bytes(place.address),
    )
    made: list[End] = []
    try:
        with InterruptsLater():  # half an end would never be closed
            port = DialPort(zmq.DEALER, place.address, session, Proof(b""), peer_timeout, place.keys)
            made.append(_RemoteLink(options, port, session, peer_timeout).end(options))
        while not port.answered.wait(
            LOOK_SECONDS if until < 0 else max(0, until - time.monotonic_ns()) / 1e9
        ):
            if until >= 0 and time.monotonic_ns() >= until:
                hint = "" if place.keys is None else ", with a key that this end knows"
                raise Timeout(f"connect to {address}: no server answers there{hint}", timeout)
        if session.refusal:
            raise PeerLost(f"connect to {address}: the server refuses: {session.refusal}")
    except zmq.ZMQError as error:
        raise OSError(error.errno, f"cannot connect to {address}: {error.strerror}") from None
    except BaseException:
        for end in made:
            end.close()
        raise
    return made[0]


@dataclass(frozen=True)
class _Place:
    """An address, as ZeroMQ takes it, and what follows from it."""

    address: str
    keys: Keys | None
    is_remote: bool

    @classmethod
    def of(cls, address: str, auth: Auth, what: str) -> _Place:
        """Check an address and whether it needs keys."""
        if not isinstance(address, str):
            raise TypeError(
                f"{what}: an address is a text such as 'tcp://host:port', not {type(address).__name__}"
            )
        keys = None
        if isinstance(auth, Keys):
            keys = auth
        elif isinstance(auth, (str, os.PathLike)):
            keys = None if auth == "none" else Keys.load(auth)
        elif auth is not None:
            raise TypeError(
                f"{what}: auth is Keys, the path of a key file, 'none' or None, not {type(auth).__name__}"
            )
        if what == "connect" and keys is not None and len(keys.known) > 1:
            raise ValueError(
                f"connect: these keys know {len(keys.known)} public keys, and a server has one: give that alone, as by"
                " Keys.load(path, known=['server.key.pub'])"
            )
        transport, _, rest = address.partition("://")
        if transport == "ipc":
            _check_path(rest, what)
            if keys is not None:
                raise ValueError(f"{what}: ipc:// is for one user of one machine, and takes no auth=")
            return cls(address, None, is_remote=False)
        host, colon, port = rest.rpartition(":")
        if transport != "tcp" or not colon or not _PORT.fullmatch(port) or int(port) > 65535 or not host:
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


def _check_path(path: str, what: str) -> None:
    """See that a socket can be there."""
    try:
        encoded = path.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what}: the path {path!r} of an ipc:// address is no Unicode: {error.reason}"
        ) from None
    if path in ("", "@", "*") or "\0" in path:
        raise ValueError(f"{what}: an address is 'ipc://path' or 'ipc://@name', not {'ipc://' + path!r}")
    if len(encoded) > PATH_BYTES:
        raise ValueError(
            f"{what}: a path of {len(encoded)} bytes is too long for a socket: at most {PATH_BYTES} are possible;"
            " 'ipc://@name' needs no path"
        )


def _numeric(host: str, what: str) -> str:
    """Return the address of a host, for a link-local one with its interface."""
    try:
        if "\0" in host:
            raise UnicodeError("a name has no NUL")
        numeric, *_, scope = map(str, sockets.getaddrinfo(host, None, type=sockets.SOCK_STREAM)[0][4])
    except (sockets.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{what}: there is no host {host!r}: {reason}") from None
    address = ipaddress.ip_address(numeric)
    if address.version == 4 or not address.is_link_local:
        return numeric
    if scope == "0":
        raise ValueError(
            f"{what}: {host} is on several networks: say through which interface, as in [{host}%eth0]"
        )
    return f"{address}%{scope}"


def _is_loopback(host: str) -> bool:
    return host != "*" and ipaddress.ip_address(host.partition("%")[0]).is_loopback
