"""Keys of those who talk over a network (CURVE: each side proves who it is, and all is encrypted)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Keys", "generate_keys"]

_FIRST_LINE = "# shmengine key"
_Z85 = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


@dataclass(frozen=True)
class Keys:
    """A pair of keys, and the public keys of the others.

    A server accepts only ends whose public key is among `known`; an end connects only to a server whose key is.
    With one pair for all, as `generate_keys` returns it, everybody who has the pair knows everybody else.

    Attributes
    ----------
    public : str
        For others, 40 characters.
    secret : str
        For nobody else.
    known : tuple of str
        Public keys of those who are let in, or of the server.
    """

    public: str
    secret: str = field(repr=False)
    known: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in (self.public, self.secret, *self.known):
            if not _Z85.fullmatch(key):
                raise ValueError("a key has 40 characters of the alphabet Z85, unlike this one")
        if not self.known:
            object.__setattr__(self, "known", (self.public,))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], known: Iterable[str | os.PathLike[str]] | None = None
    ) -> Keys:
        """Read a key file.

        Parameters
        ----------
        path : path
            A file with a secret key, as from ``shmengine keys``.
        known : iterable of paths, optional
            Files with the public keys of the others (``*.pub``); without them only holders of this same file.

        Raises
        ------
        ValueError
            It is no such file.
        PermissionError
            Others than the owner may read the secret key.
        """
        own = _read(path)
        if "secret" not in own:
            raise ValueError(f"{os.fspath(path)} has no secret key; give the file without .pub")
        if os.stat(path).st_mode & 0o077:
            raise PermissionError(
                f"{os.fspath(path)} has a secret key, and others may read it: chmod 600 it, or make a new one"
            )
        return cls(own["public"], own["secret"], tuple(_read(other)["public"] for other in known or ()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the pair to a new file that only its owner can read, and the public key to ``path.pub``.

        Raises
        ------
        FileExistsError
            One of them is there already.
        """
        name = os.fspath(path)
        public = f"public = {self.public}\n"
        _write(name, f"{_FIRST_LINE}: keep this file to yourself\n{public}secret = {self.secret}\n")
        _write(f"{name}.pub", f"{_FIRST_LINE}: for the others\n{public}")

    def apply(self, socket: Any, *, serves: bool, allow: Callable[[bytes, frozenset[bytes]], None]) -> None:
        """Make a ZeroMQ socket use them."""
        from zmq.utils import z85

        socket.curve_publickey = self.public.encode()
        socket.curve_secretkey = self.secret.encode()
        if serves:
            domain = os.urandom(16).hex().encode()
            allow(domain, frozenset(z85.decode(key.encode()) for key in self.known))
            socket.curve_server = True
            socket.zap_domain = domain
        else:
            socket.curve_serverkey = self.known[0].encode()


def generate_keys() -> Keys:
    """Make a new pair of keys, which knows nobody but itself: give it to both ends, or `Keys.save` it.

    Raises
    ------
    ModuleNotFoundError
        ZeroMQ is not installed.
    """
    from shmengine.channels.zeromq import zmq

    public, secret = zmq.curve_keypair()
    return Keys(public.decode(), secret.decode())


def _read(path: str | os.PathLike[str]) -> dict[str, str]:
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read(4096)
    found = {}
    for line in text.splitlines():
        name, equals, value = line.partition(" = ")
        if equals and name in ("public", "secret"):
            found[name] = value.strip()
    if not text.startswith(_FIRST_LINE) or "public" not in found:
        raise ValueError(f"{os.fspath(path)} is no key file; `shmengine keys` makes one")
    return found


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="ascii") as file:
        file.write(text)
