"""Who is at the two ends of a channel between processes of one machine: the living, the closed and the dead.

Bytes of an anonymous file say that an end was used, and that it was closed; locks on them, which the kernel takes
back whatever becomes of their holder, say by whom::

    byte 0, 1   the left, the right end was used, or closed; locked by the process that uses it (one at a time)
    byte 2, 3   an unused copy of it was closed; locked by each copy that could come to be used, forked and pickled ones

Locks of open file descriptions (``F_OFD_SETLK``) are used, so that two ends in one process see each other.

A forked child has copies of both ends. When it uses one, its copy of the other holds that open no more: it would wait
for itself if its parent closed that, or died, without having used it.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import struct
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from shmengine.descriptors import Descriptor
from shmengine.errors import Closed, ShmError, UseAfterFork
from shmengine.tokens import DescriptorToken, lend

__all__ = ["Fate", "Presence", "PresenceToken"]

_LOCK = struct.Struct("hhqqi4x")  # struct flock of a 64-bit Linux
_USED, _CLOSED = 1, 2  # what the byte of a side in the page says
_HOLDERS = 2
_WHAT = "an end of a channel"


class Fate(enum.Enum):
    """What has become of the other end."""

    UNUSED = "nobody has used it so far"
    ALIVE = "a process uses it"
    CLOSED = "it was closed"
    LOST = "its process died"


@dataclass(frozen=True)
class PresenceToken:
    """What another process needs to have a copy of an end."""

    side: int
    file: DescriptorToken


class Presence:
    """One copy of one end of a channel: this process's, or the one that a forked child has inherited.

    Attributes
    ----------
    side : int
        0: left, 1: right.
    closed : bool
        Whether this copy was closed.
    """

    def __init__(self, side: int, fd: int) -> None:
        self.side = side
        self.closed = False
        self._closing = False
        self._holding = Descriptor(
            fd, _WHAT
        )  # children may share this open file description, and the lock with it
        self._using: Descriptor | None = None
        self._beginning = False
        self._user = 0
        self._passed_on = False
        self._inherited = False
        self._holds = True  # keeps the end open
        self._other: Callable[[], Presence | None] = lambda: (
            None
        )  # that of the other end, where both were made
        self._let_other_go = False
        _lock(fd, fcntl.F_RDLCK, _HOLDERS + side)
        _all.add(self)

    @classmethod
    def pair(cls) -> tuple[Presence, Presence]:
        """Return both ends of a new channel."""
        fd = os.memfd_create("shmengine-channel", os.MFD_CLOEXEC)
        try:
            os.truncate(fd, 2 * _HOLDERS)
            left = cls(0, _reopen(fd))
            try:
                right = cls(1, _reopen(fd))
            except BaseException:
                left.close()
                raise
            left._other, right._other = weakref.ref(right), weakref.ref(left)
            return left, right
        finally:
            os.close(fd)

    def token(self) -> PresenceToken:
        """Return what another process needs to have a copy of this end."""
        self._passed_on = True
        return PresenceToken(self.side, lend(self._open(), _WHAT))

    @classmethod
    def from_token(cls, token: PresenceToken) -> Presence:
        """Return this process's copy of an end."""
        return cls(token.side, token.file.open(os.O_RDWR))

    # --- this end ------------------------------------------------------------------------------------

    @property
    def in_use(self) -> bool:
        """Whether this process uses the end."""
        return self._user == os.getpid()

    def use(self) -> None:
        """Become the process that uses this end, if it is not so already.

        Raises
        ------
        UseAfterFork
            Another process uses it.
        """
        if self._user == os.getpid():
            return
        if self._user:
            raise UseAfterFork("this end of a channel is used by the parent of this forked process")
        # Once more after a signal's handler has raised in here: the lock is that of this description.
        if self._using is None:
            self._using = Descriptor(_reopen(self._open()), _WHAT)
        fd = self._using.number
        if not self._holds and not self._hold_again():
            self._stop_using()
            raise UseAfterFork(
                "no other process has a copy of this end of a channel any more, and this one, which is forked, uses the"
                " other end: for that it is closed. Use both ends of a channel before its parent closes one"
            )
        try:
            _lock(fd, fcntl.F_WRLCK, self.side)
            before = os.pread(fd, 1, self.side)[0]
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            before = _USED
        if before and not self._beginning:
            self._stop_using()
            raise UseAfterFork(
                "this end of a channel is used by another process, or was. An end is for one process: pass it on before"
                " its first use, and make one channel for each two that talk"
            )
        self._beginning = True
        os.pwrite(fd, bytes([_USED]), self.side)
        self._user = os.getpid()
        other = self._other()
        self._let_other_go = other is not None and other._let_go()

    def _let_go(self) -> bool:
        """Keep the end open no more, if this copy was inherited, and not used so far."""
        if self._inherited and self._holds and not self._user and self._holding.is_ours():
            try:
                bare = Descriptor(_reopen(self._holding.number), _WHAT)
            except OSError:  # no descriptor is free
                return False
            self._holding, held = bare, self._holding
            self._holds = False
            held.close()
        return not self._holds

    def _hold_again(self) -> bool:
        """Keep the end open again if somebody else does, too; else its end may have been seen."""
        fd, byte = self._holding.number, _HOLDERS + self.side
        _lock(fd, fcntl.F_RDLCK, byte)
        self._holds = _is_locked(fd, byte)
        if not self._holds:
            _lock(fd, fcntl.F_UNLCK, byte)
        return self._holds

    def close(self) -> None:
        """Use this copy no more; if it was in use, or is the last one, then the other end sees an orderly end."""
        if self.closed:
            return
        self._closing = True
        if self._holding.is_ours():
            number = self._holding.number
            if self.in_use:
                os.pwrite(number, bytes([_CLOSED]), self.side)
            elif not self._user and not self._passed_on and self._holds:
                self._close_unused(number)
        self._stop_using()
        self._holding.close()
        self.closed = True

    def _close_unused(self, number: int) -> None:
        """Say that this copy will not be used; that nobody will use this end, if it is the last one."""
        try:
            fd = _reopen(number)
        except (
            OSError
        ):  # no descriptor is free: then nobody can be asked, and the other end sees that nobody is here
            return
        try:
            self._holding.close()
            alone = not _is_locked(fd, _HOLDERS + self.side)
            os.pwrite(fd, bytes([_CLOSED]), self.side if alone else _HOLDERS + self.side)
        finally:
            os.close(fd)

    def _stop_using(self) -> None:
        """Give up the lock: after a fork, the child its share in it."""
        if self._using is not None:
            self._using.close()
            self._using = None

    def _open(self) -> int:
        """Return the descriptor of the file.

        Raises
        ------
        ShmError
            Other code has closed it.
        """
        if self._closing:
            raise Closed("this end of a channel is closed")
        if not self._holding.is_ours():
            raise ShmError(
                "a descriptor of this end of a channel was closed by other code of this process: make a new channel"
            )
        return self._holding.number

    # --- the other one -------------------------------------------------------------------------------

    def fate(self) -> Fate:
        """Say what has become of the other end; nothing is sent by it once that is `CLOSED` or `LOST`."""
        other = 1 - self.side
        fd = self._open()
        held = _is_locked(fd, other)
        state = os.pread(fd, 1, other)[0]
        if state == _CLOSED:
            return Fate.CLOSED
        if held:
            return Fate.ALIVE
        if state == _USED:
            # It may have begun, or been closed, between the two looks.
            return (
                Fate.LOST if not _is_locked(fd, other) and os.pread(fd, 1, other)[0] == _USED else self.fate()
            )
        return Fate.UNUSED if _is_locked(fd, _HOLDERS + other) else self._unheld()

    def _unheld(self) -> Fate:
        """Nobody has a copy of the other end: unless that has changed meanwhile, it is closed or lost."""
        side = 1 - self.side
        state = os.pread(self._open(), 1, side)[0]
        if (
            state == 0 and self._let_other_go
        ):  # else the one that was closed was passed on to somebody who has died
            state = os.pread(self._open(), 1, _HOLDERS + side)[0]
        return {0: Fate.LOST, _CLOSED: Fate.CLOSED}.get(state) or self.fate()


_all: weakref.WeakSet[Presence] = weakref.WeakSet()


def _after_fork() -> None:
    for presence in list(_all):
        presence._inherited = True
        presence._stop_using()


os.register_at_fork(after_in_child=_after_fork)


def _reopen(fd: int) -> int:
    """Return a new open file description of the same file."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)


def _lock(fd: int, kind: int, byte: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _LOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _is_locked(fd: int, byte: int) -> bool:
    """Whether another open file description has a lock on this byte."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(_LOCK.unpack(answer)[0] != fcntl.F_UNLCK)
