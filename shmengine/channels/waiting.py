"""Waiting in asyncio without a thread: for a descriptor, or, where there is none, by short sleeps that grow."""

from __future__ import annotations

import asyncio

__all__ = ["Pause"]

FIRST_SECONDS = 50e-6
MOST_SECONDS = 2e-3


class Pause:
    """The waiting of one call.

    Parameters
    ----------
    fd : int or None
        What to wait for; nobody else in this event loop waits for the same.
    writing : bool, optional
        Whether for it to become writable, and not readable.
    """

    def __init__(self, fd: int | None, *, writing: bool = False) -> None:
        self._fd = fd
        self._writing = writing
        self._seconds = FIRST_SECONDS

    async def wait(self, limit: float) -> None:
        """Return when it may be time to try again, after `limit` seconds at the latest."""
        if self._fd is None:
            await asyncio.sleep(min(self._seconds, limit))
            self._seconds = min(MOST_SECONDS, self._seconds * 1.5)
            return
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        add, remove = (
            (loop.add_writer, loop.remove_writer) if self._writing else (loop.add_reader, loop.remove_reader)
        )
        add(self._fd, _wake, ready)
        try:
            await asyncio.wait((ready,), timeout=limit)
        finally:
            remove(self._fd)
            ready.cancel()


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
