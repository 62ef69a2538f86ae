"""What is behind ZeroMQ's connections and ``ipc://`` addresses: sockets of this machine, and their files."""

from __future__ import annotations

import contextlib
import errno
import os
import socket as unix
import stat
import struct

__all__ = ["SocketFile", "check_free", "connection_of", "process_behind", "user_behind"]

_CREDENTIALS = struct.Struct("3i")  # process, user, group


def connection_of(fd: int) -> unix.socket:
    """Return a copy of a connection whose descriptor is ZeroMQ's: that may have closed it, and it be any file by now.

    Raises
    ------
    OSError
        It is no socket.
    """
    copy = os.dup(fd)
    try:
        return unix.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def user_behind(fd: int) -> int:
    """Return the user of the process at the other side of a Unix connection; -1: it has ended."""
    return _credentials(fd)[1]


def process_behind(fd: int) -> int:
    """Return the process at the other side; -1: the connection has ended; 0: it is none of those to be seen here."""
    return _credentials(fd)[0]


def _credentials(fd: int) -> tuple[int, int, int]:
    try:
        with connection_of(fd) as connection:
            pid, user, group = _CREDENTIALS.unpack(
                connection.getsockopt(unix.SOL_SOCKET, unix.SO_PEERCRED, 12)
            )
            return pid, user, group
    except OSError:
        return -1, -1, -1


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
    with unix.socket(unix.AF_UNIX) as probe:
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
