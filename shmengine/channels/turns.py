"""Whose turn it is to send, or to receive: one thread's, or one coroutine's, at a time."""

from __future__ import annotations

import sys
import threading
import time
from types import FrameType

__all__ = ["Turn"]

AGAIN_SECONDS = 1e-3


class Turn:
    """One direction of an end.

    A signal's handler may raise at any moment, also between taking a lock and the statement that would see to its
    release. So this asks the lock itself whose it is; who still has it after such a mishap goes on with it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owned = self._lock._is_owned  # type: ignore[attr-defined]  # what threading.Condition uses, too
        self._coroutine_thread = 0

    def take(self, seconds: float) -> bool:
        """Wait for the turn; True: it is this thread's until `leave`.

        Raises
        ------
        RuntimeError
            A coroutine of this thread has it: whoever waits here keeps it from going on.
        """
        lock = self._lock
        # Without a timeout first: that costs a fraction.
        if not self._owned() and not lock.acquire(False) and not lock.acquire(timeout=seconds):
            return False
        thread = self._coroutine_thread
        if not thread:
            return True
        self._lock.release()
        if thread == threading.get_ident():
            raise RuntimeError(
                "a coroutine of this thread is in such a call on this end: await that one first"
            )
        time.sleep(min(AGAIN_SECONDS, seconds))
        return False

    def leave(self) -> None:
        """Give up the turn, if it is this thread's."""
        if self._owned():
            self._lock.release()

    def take_idle(self) -> bool:
        """Take the turn if nobody has it, not even a call that a signal's handler has interrupted in this thread."""
        if self._owned():
            return not self._is_in_use()
        if not self._lock.acquire(blocking=False):
            return False
        if not self._coroutine_thread:
            return True
        self._lock.release()
        return False

    def _is_in_use(self) -> bool:
        """Tell whether a call further up in this thread has the turn, or one that has ended could not give it up.

        The last step of giving it up can be interrupted, too.
        """
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if frame.f_locals.get("turn") is self:  # so it is called by all who take it
                return True
            frame = frame.f_back
        return False

    def take_async(self) -> bool:
        """Take the turn for a coroutine, if it is to be had now: until `leave_async`, over its awaits."""
        if not self.take_idle():
            return False
        self._coroutine_thread = threading.get_ident()
        self._lock.release()
        return True

    def leave_async(self) -> None:
        """Give up the turn of a coroutine."""
        self._coroutine_thread = 0
