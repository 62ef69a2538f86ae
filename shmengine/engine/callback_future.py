"""Futures for those who are called back and never wait."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any

__all__ = ["CallbackFuture"]

_turn = threading.RLock()  # of all, for a moment; a signal's handler may come to another one in it


class CallbackFuture(Future[Any]):
    """A `concurrent.futures.Future` that tells one function when it has ended, and that nobody can wait for.

    `Future` has a condition to wait on, which takes long, beside a task that takes next to no time. `result`
    and `exception` are for when it has ended.
    """

    def __init__(self) -> None:
        self._began = self._cancelled = self._ended = False
        self._value: Any = None
        self._error: BaseException | None = None
        self._then: Callable[[Future[Any]], object] | None = None

    def __repr__(self) -> str:
        state = "ended" if self._ended else "running" if self._began else "pending"
        return f"<{type(self).__name__} {state}>"

    def cancel(self) -> bool:
        """Keep it from running, if it has not begun."""
        with _turn:
            if self._began or self._ended:
                return self._cancelled
            self._cancelled = True
        self._end(None, CancelledError())
        return True

    def cancelled(self) -> bool:
        """Tell whether it will never run."""
        return self._cancelled

    def running(self) -> bool:
        """Tell whether it runs, or has been sent to do so."""
        return self._began and not self._ended

    def done(self) -> bool:
        """Tell whether it has ended."""
        return self._ended

    def set_running_or_notify_cancel(self) -> bool:
        """It begins, unless it was cancelled."""
        with _turn:
            self._began = not self._cancelled
        return self._began

    def set_result(self, result: Any) -> None:
        """It has ended."""
        self._end(result, None)

    def set_exception(self, exception: BaseException | None) -> None:
        """It has failed."""
        self._end(None, exception)

    def _end(self, value: Any, error: BaseException | None) -> None:
        self._value, self._error = value, error
        with _turn:
            self._ended = True
            then, self._then = self._then, None
        if then is not None:
            then(self)

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        """Call `fn`, the only one, when it has ended."""
        with _turn:
            if not self._ended:
                self._then = fn
                return
        fn(self)

    def result(self, timeout: float | None = None) -> Any:  # noqa: ARG002  # Future's
        """Return what it has ended with, or raise that."""
        error = self._error
        if error is not None:
            try:
                raise error
            finally:
                del error, self
        return self._value

    def exception(self, timeout: float | None = None) -> BaseException | None:  # noqa: ARG002  # Future's
        """Return what it has ended with, if that is an error."""
        return self._error


def _after_fork_in_child() -> None:
    global _turn
    _turn = threading.RLock()  # another thread may have held it


os.register_at_fork(after_in_child=_after_fork_in_child)
