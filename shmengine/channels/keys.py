"""Keys of those who talk over a network (CURVE: each side proves who it is, and all is encrypted)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Keys", "generate_keys"]

_FIRST_LINE = "# shmengine key"
_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_KEY_CHARACTERS = 40  # each five are a number of 32 bits


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
        Public keys of those who are let in; or, to connect, the one of the server. None: its own alone.

    Raises
    ------
    ValueError
        One of them is no key, or `known` is no tuple of keys.
    """

    public: str
    secret: str = field(repr=False)
    known: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.known, str):
            raise ValueError("known is a tuple of public keys: write (key,) for one alone")
        object.__setattr__(self, "known", tuple(self.known) or (self.public,))
        for name, key in (
            ("public", self.public),
            ("secret", self.secret),
            *(("known", key) for key in self.known),
        ):
            _check_key(key, f"the {name} key")

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
            Files with the public keys of the others (``*.pub``): of all that may connect to this server, or of the one
            server to connect to. Without them only holders of this same file.

        Raises
        ------
        ValueError
            It is no such file, or `known` are none.
        TypeError
            What should be a path is none: a descriptor is not.
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
        if known is None:
            return cls(own["public"], own["secret"])
        if isinstance(known, (str, bytes, os.PathLike)):
            raise ValueError("known is a list of files with public keys: write [path] for one alone")
        others = tuple(_read(other)["public"] for other in known)
        if not others:
            raise ValueError(
                "known is empty: nobody would be let in; leave it out for holders of this same file"
            )
        return cls(own["public"], own["secret"], others)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the pair to a new file that only its owner can read, and the public key to ``path.pub``; or neither.

        Raises
        ------
        FileExistsError
            One of them is there already.
        """
        name = os.fspath(path)
        public = f"public = {self.public}\n"
        with (
            _written(
                name, f"{_FIRST_LINE}: keep this file to yourself\n{public}secret = {self.secret}\n", 0o600
            ) as own,
            _written(f"{name}.pub", f"{_FIRST_LINE}: for the others\n{public}", 0o644) as others,
        ):
            os.link(own, name)  # which replaces nothing, unlike a renaming
            try:
                os.link(others, f"{name}.pub")
            except BaseException:
                os.unlink(name)
                raise

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
    with open(os.fspath(path), encoding="utf-8", errors="replace") as file:  # which would close a descriptor
        text = file.read(4096)
    found = {}
    for line in text.splitlines():
        name, equals, value = line.partition(" = ")
        if equals and name in ("public", "secret"):
            found[name] = value.strip()
    if not text.startswith(_FIRST_LINE) or "public" not in found:
        raise ValueError(f"{os.fspath(path)} is no key file; `shmengine keys` makes one")
    for name, key in found.items():
        _check_key(key, f"the {name} key in {os.fspath(path)}")
    return found


def _check_key(key: object, what: str) -> None:
    if not (isinstance(key, str) and len(key) == _KEY_CHARACTERS and all(map(_is_number, _fives(key)))):
        raise ValueError(
            f"{what} is none: a key is a text of {_KEY_CHARACTERS} characters in Z85; take it as `shmengine keys` or"
            " generate_keys() has made it"
        )


def _fives(key: str) -> Iterator[str]:
    return (key[start : start + 5] for start in range(0, len(key), 5))


def _is_number(five: str) -> bool:
    """Whether these characters are a number of 32 bits in Z85: there are some more."""
    value = 0
    for character in five:
        digit = _Z85.find(character)
        if digit < 0:
            return False
        value = value * len(_Z85) + digit
    return value < 1 << 32


@contextlib.contextmanager
def _written(path: str, text: str, mode: int) -> Iterator[str]:
    """Write a whole file beside a path; what it is called is only for the ``with`` block."""
    name = f"{path}.{os.urandom(8).hex()}"
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fchmod(fd, mode)
            os.fsync(fd)
        yield name
    finally:
        os.unlink(name)
