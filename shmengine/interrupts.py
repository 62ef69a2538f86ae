"""Handlers of signals at a moment that suits: a message that was taken must not be lost on its way to whom it is for.

A handler may raise, as the one of Ctrl-C does, or that of an alarm that is to end a call.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["InterruptsLater"]

SIGNALS: tuple[int, ...] = (
    signal.SIGINT,
    signal.SIGALRM,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
# Without the conversion to enumerations: this is done for every drain.
_getsignal = getattr(signal.getsignal, "__wrapped__", signal.getsignal)
_setsignal = getattr(signal.signal, "__wrapped__", signal.signal)


class InterruptsLater:
    """Within it, in the main thread, handlers wait until the end; a second Ctrl-C comes through at once.

    What waits in the C core is still woken.
    """

    __slots__ = ("_before", "_came")

    def __init__(self) -> None:
        self._before: list[tuple[int, Any]] = []
        self._came: dict[int, FrameType | None] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = _getsignal(number)
                if callable(handler):
                    self._before.append((number, handler))
            try:
                for number, _ in self._before:
                    _setsignal(number, self._handle)
            except ValueError:  # the main thread of another interpreter
                self._before.clear()
            except BaseException:  # a handler that has not been exchanged yet
                self._end()
                raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before:
            self._end()

    def _end(self) -> None:
        try:
            self._put_back(list(self._before))
        finally:
            self._run()

    def _run(self) -> None:
        if self._came:
            number, frame = self._came.popitem()
            try:
                dict(self._before)[number](number, frame)
            finally:
                self._run()  # the others, whatever this one raised

    def _put_back(self, left: list[tuple[int, Any]]) -> None:
        try:
            while left:
                _setsignal(*left[-1])
                left.pop()
        finally:
            if left:
                self._put_back(left)  # the others, whatever one raised that is back already

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self._came:
            dict(self._before)[number](number, frame)
        self._came[number] = frame
