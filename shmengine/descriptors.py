"""Descriptors that are kept: each remembers which file it was opened for.

Code that closes whatever it finds (who becomes a daemon, `os.closerange`) closes ours too, and the number is soon
another file's. So a number is believed only after a look at what is behind it: before a read or a write that is
rare, and before it is closed. (Between that look and the use other threads of the process can still do harm.)
"""

from __future__ import annotations

import errno
import os
from types import TracebackType
from typing import Self

from shmengine._native import ffi, lib
from shmengine.errors import ShmError

__all__ = ["Descriptor", "pipe"]

_NONE = ffi.new("shmr_file *", {"fd": -1})


class Descriptor:
    """A descriptor of ours, which is closed once, and only if its number is not another file's by now.

    Parameters
    ----------
    fd : int
        Taken over. Not of an eventfd, timerfd or the like: these have all the same inode, and cannot be told apart.
        (Those of processes can.)
    what : str
        What it is the descriptor of, for errors.

    Raises
    ------
    OSError
        This is no open descriptor.
    """

    __slots__ = ("_file", "what")

    def __init__(self, fd: int, what: str) -> None:
        self.what = what
        self._file = ffi.new("shmr_file *")
        if not lib.shmr_file_keep(self._file, fd):
            raise OSError(errno.EBADF, f"{fd} is no open descriptor, as that of {what} must be")

    @classmethod
    def open(cls, path: str, flags: int, what: str) -> Self:
        """Open a file; no program that this process executes inherits it."""
        return cls(os.open(path, flags | os.O_CLOEXEC), what)

    @property
    def number(self) -> int:
        """The bare number; -1 after `close`."""
        return int(self._file.fd)

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode of the file."""
        return int(self._file.device), int(self._file.inode)

    def is_ours(self) -> bool:
        """Tell whether the file behind the number is still the one that was opened."""
        return bool(lib.shmr_file_is_ours(self._file, ffi.NULL))

    def fileno(self) -> int:
        """Return the number, after a look at the file behind it.

        Raises
        ------
        ShmError
            Other code has closed it; or it is closed.
        """
        if not self.is_ours():
            how = "was closed by other code (`os.closerange`?)" if self._file.fd >= 0 else "is closed"
            raise ShmError(f"the descriptor of {self.what} {how}")
        return self.number

    def read(self, size: int) -> bytes:
        """Read at most so many bytes: none at the end of the file, or if the descriptor is not ours any more.

        Raises
        ------
        BlockingIOError
            There is nothing yet, and the descriptor does not wait.
        """
        return os.read(self.number, size) if self.is_ours() else b""

    def duplicate(self) -> Descriptor:
        """Return another descriptor of the same open file, for a child or for somebody who closes it himself.

        Raises
        ------
        ShmError
            As `fileno`.
        """
        fd = os.dup(self.fileno())
        copy = Descriptor(fd, self.what)
        if copy.identity != self.identity:  # closed since the look
            copy.close()
            self.fileno()
        return copy

    def detach(self) -> int:
        """Give the number away: whoever gets it closes it.

        Raises
        ------
        ShmError
            As `fileno`.
        """
        fd = self.fileno()
        self._file = _NONE
        return fd

    def close(self) -> None:
        """Close it, if it is ours; at most once, whoever else is at it."""
        file, self._file = self._file, _NONE
        lib.shmr_file_close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.number} of {self.what}>"


def pipe(what: str, flags: int = 0) -> tuple[Descriptor, Descriptor]:
    """Return the reading and the writing end of a new pipe, which no program that we execute inherits unasked."""
    read, write = os.pipe2(os.O_CLOEXEC | flags)
    return Descriptor(read, what), Descriptor(write, what)
