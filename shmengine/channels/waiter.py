"""Waiting for a socket of ZeroMQ in one thread, while others may use it, too."""

from __future__ import annotations

import os
import select
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shmengine.channels.ports import Port

__all__ = ["Waiter"]


class Waiter:
    """Where one thread at a time waits for a port: for its socket, or for somebody who has used that meanwhile."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self._event = -1
        self._woken = False
        self._epoll = select.epoll()
        try:
            self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._epoll.register(self._event, select.EPOLLIN)
            self._epoll.register(port.fd, select.EPOLLIN)
        except BaseException:
            self.close()
            raise
        self.fd = self._epoll.fileno()

    def arm(self) -> None:
        """Be woken from here on, once. Under the port's lock, and when its socket has nothing more."""
        if self._woken:
            try:
                os.eventfd_read(self._event)
            except BlockingIOError:
                pass
            self._woken = False
        self._port.armed.add(self)

    def wake(self) -> None:
        """Wake who waits, or is about to. Under the port's lock."""
        if not self._woken:
            self._woken = True
            os.eventfd_write(self._event, 1)
        self._port.armed.discard(self)  # the short ways are open again

    def wait(self, deadline: int) -> None:
        """Wait, after `arm`, until it may be time to look again; until the deadline at the latest."""
        seconds = -1.0 if deadline < 0 else max(0, deadline - time.monotonic_ns()) / 1e9
        self._epoll.poll(seconds, 1)

    def disarm(self) -> None:
        """Need not be woken."""
        self._port.armed.discard(self)

    def close(self) -> None:
        self._port.armed.discard(self)
        self._epoll.close()
        if self._event >= 0:
            event, self._event = self._event, -1
            os.close(event)
