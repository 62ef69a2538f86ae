"""The first words over each connection of a socket channel: who that is, and that it may be."""

from __future__ import annotations

import functools
import hashlib
import hmac
import os
import struct
from dataclasses import dataclass
from typing import Any

from shmengine.channels.sessions import PREFIX_BYTES, Kind
from shmengine.tokens import start_time

__all__ = ["Greeting", "Proof", "identity_of_this_process", "is_gone"]

VERSION = 2
_GREETING = struct.Struct("<4sI16s16s32sQ")
_MAGIC = b"SHMC"


@dataclass(frozen=True)
class Greeting:
    """The body of a HELLO or WELCOME."""

    key: bytes
    """Names the session."""
    nonce: bytes
    """Of the one who connects; the answer repeats it."""
    proof: bytes
    """That the sender knows the secret of the channel."""
    window: int
    """Bytes of messages that may wait at the sender of this to be received."""
    text: str
    """The process that sends this; in a REFUSAL why."""

    def pack(self) -> bytes:
        """Return it as bytes."""
        return (
            _GREETING.pack(_MAGIC, VERSION, self.key, self.nonce, self.proof, self.window)
            + self.text.encode()
        )

    @classmethod
    def unpack(cls, part: Any) -> Greeting | None:
        """Read one from a part; None: this is none, or one of another version."""
        body = bytes(memoryview(part)[PREFIX_BYTES : PREFIX_BYTES + 512])
        if len(body) < _GREETING.size:
            return None
        magic, version, key, nonce, proof, window = _GREETING.unpack_from(body)
        if magic != _MAGIC or version != VERSION:
            return None
        return cls(key, nonce, proof, window, body[_GREETING.size :].decode(errors="replace"))


class Proof:
    """Makes and checks proofs that the sender of a greeting knows a secret."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def greeting(self, kind: Kind, key: bytes, nonce: bytes, text: str = "", window: int = 0) -> bytes:
        """Return the body of a greeting, of this process or with another text."""
        text = text or identity_of_this_process()
        return Greeting(key, nonce, self._of(kind, key, nonce), window, text).pack()

    def holds(self, kind: Kind, greeting: Greeting) -> bool:
        """Whether a greeting is from somebody who knows the secret."""
        return hmac.compare_digest(greeting.proof, self._of(kind, greeting.key, greeting.nonce))

    def _of(self, kind: Kind, key: bytes, nonce: bytes) -> bytes:
        return hmac.digest(self._secret, bytes([kind]) + key + nonce, hashlib.sha256)


def identity_of_this_process() -> str:
    """Return what names this process among all of all machines: ``boot pid-namespace pid start-time``."""
    pid = os.getpid()
    return f"{_host()} {pid} {start_time(pid)}"


def is_gone(identity: str) -> bool:
    """Whether a process of this machine has ended; False, too, if it is of another one."""
    host, _, process = identity.rpartition(" ")[0].rpartition(" ")
    if host != _host() or not process.isdigit():
        return False
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return not _is_there(int(process))  # it may be hidden
    except OSError:
        return False
    return fields[0] in b"ZX" or fields[19].decode() != identity.rpartition(" ")[2]


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


@functools.lru_cache(1)
def _host_of(pid: int) -> str:  # noqa: ARG001  a forked child may go elsewhere
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return f"{file.read().strip()} {os.stat('/proc/self/ns/pid').st_ino}"


def _host() -> str:
    return _host_of(os.getpid())
