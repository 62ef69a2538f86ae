"""How fast a TCP connection carries what is given to it, as the kernels of both ends know it."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable

from shmengine.channels.local import socket_option

__all__ = ["Meter"]

# So little that a slow link is known before a burst has filled the buffer. A hiccup of a fast one may look like it, for
# as long as until the next look of "auto".
ENOUGH_SECONDS = 0.01
ENOUGH_BYTES = 1 << 16

# Of Linux's tcp_info: bytes that the other end has acknowledged, and bytes that wait for it to have room.
_PROGRESS = struct.Struct("=120xQ16xI")


class Meter:
    """The speed of the connection of one session.

    What the session itself hears acknowledged was taken by the other end's user: he may be slow over a fast link, and
    compression would cost him more time still. So it is the kernel that is asked what has passed. What comes, ZeroMQ's
    thread reads at once whatever its user does: until the window is full, and then nothing is on its way that could be
    measured.

    Only time in which something waited to be sent tells of the link; else it is the sender that was slow. What waits
    when `look` is called, before anything new is sent, has waited since the last look. (Small messages go without one:
    they are too few bytes to matter.)
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: tuple[int, float] | None = None
        self._nbytes = 0
        self._seconds = 0.0

    def begin(self) -> None:
        """Note that the connection is another one."""
        self._last = None

    def look(self, fd: int) -> None:
        """Note what has passed since the last look; to be called before something is sent, and at any other time."""
        progress = _progress_of(fd)
        if progress is None:
            self._last = None
            return
        acknowledged, waiting = progress
        now = self._clock()
        if waiting and self._last is not None:
            before, since = self._last
            self._nbytes += acknowledged - before
            self._seconds += now - since
        self._last = acknowledged, now

    def seconds_per_byte(self) -> float | None:
        """Return it as measured since it was returned last; None: so far there is not enough to tell."""
        nbytes, seconds = self._nbytes, self._seconds
        if nbytes < ENOUGH_BYTES or seconds < ENOUGH_SECONDS:
            return None
        self._nbytes, self._seconds = 0, 0.0
        return seconds / nbytes


def _progress_of(fd: int) -> tuple[int, int] | None:
    """Return how many bytes of a connection have arrived, and how many wait; None: it has ended, or is no TCP."""
    info = socket_option(fd, socket.IPPROTO_TCP, socket.TCP_INFO, _PROGRESS.size)
    if len(info) < _PROGRESS.size:
        return None
    acknowledged, waiting = _PROGRESS.unpack(info)
    return acknowledged, waiting
