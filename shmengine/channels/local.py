"""What is behind ZeroMQ's connections and ``ipc://`` addresses: sockets of this machine, and their files."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import stat
import struct
import termios

__all__ = ["SocketFile", "check_free", "process_behind", "socket_option", "unread_bytes", "user_behind"]

_libc = ctypes.CDLL(None)
_COUNT = struct.Struct("i")
_CREDENTIALS = struct.Struct("3i")  # process, user, group


def socket_option(fd: int, level: int, option: int, size: int) -> bytes:
    """Return an option of a connection whose descriptor is ZeroMQ's, of at most so many bytes; none: it has ended.

    Not by way of a `socket.socket`: that would need a copy of the descriptor, which a handler of a signal that raises
    loses.
    """
    found, length = ctypes.create_string_buffer(size), ctypes.c_uint32(size)
    if _libc.getsockopt(fd, level, option, found, ctypes.byref(length)) != 0:
        return b""
    return found.raw[: length.value]


def user_behind(fd: int) -> int:
    """Return the user of the process at the other side of a Unix connection; -1: it has ended."""
    return _credentials(fd)[1]


def process_behind(fd: int) -> int:
    """Return the process at the other side; -1: the connection has ended; 0: it is none of those to be seen here."""
    return _credentials(fd)[0]


def unread_bytes(fd: int) -> int:
    """Return how much memory what the other side of a Unix connection has not read takes; 0 if that is not known."""
    try:
        return int(_COUNT.unpack(fcntl.ioctl(fd, termios.TIOCOUTQ, bytes(_COUNT.size)))[0])
    except OSError:
        return 0


def _credentials(fd: int) -> tuple[int, int, int]:
    found = socket_option(fd, socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(found) if len(found) == _CREDENTIALS.size else (-1, -1, -1)


def check_free(path: str) -> None:
    """See that nothing is where a server wants to listen: ZeroMQ would remove it without asking.

    Raises
    ------
    FileExistsError
        A file is there that is no socket.
    OSError
        Somebody listens there.
    """
    if path.startswith("@"):
        return
    try:
        mode = os.lstat(path).st_mode
    except OSError:  # nothing is there; or what is wrong, `bind` says
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "a file is there that is no socket", path)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        if probe.connect_ex(path) in (0, errno.EAGAIN):
            raise OSError(errno.EADDRINUSE, "somebody listens there", path)


class SocketFile:
    """The file of a socket that this process has just bound, and has open until `remove`."""

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)  # wherever the process goes
        self._status = os.lstat(path)

    def remove(self) -> None:
        """Remove the file, unless something else is there by now. May be called again."""
        # An open socket keeps its inode: none that comes later has the same number.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(self._path), self._status):
                os.unlink(self._path)
