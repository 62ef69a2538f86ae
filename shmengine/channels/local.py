"""What is at the other side of an ``ipc://`` address: a Unix socket of this machine."""

from __future__ import annotations

import errno
import os
import socket as unix
import stat
import struct

__all__ = ["check_free", "user_behind"]

_CREDENTIALS = struct.Struct("3i")  # process, user, group


def user_behind(fd: int) -> int:
    """Return the user of the process that listens at the other side of a Unix connection; -1: it has ended."""
    try:
        with unix.socket(fileno=os.dup(fd)) as connection:
            return int(_CREDENTIALS.unpack(connection.getsockopt(unix.SOL_SOCKET, unix.SO_PEERCRED, 12))[1])
    except OSError:
        return -1


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
