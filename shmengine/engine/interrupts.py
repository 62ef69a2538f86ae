"""Ctrl-C at a moment that suits: a message that has been taken must not be lost on its way to whom it is for."""

from __future__ import annotations

import contextlib
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["InterruptsLater"]


class InterruptsLater:
    """Within it, in the main thread, an interrupt waits until the end; a second one comes through at once.

    What waits in the C core is still woken by the first.
    """

    __slots__ = ("_before", "_came")

    def __init__(self) -> None:
        self._before: Any = None
        self._came: FrameType | None = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGINT)
            if callable(before):
                with contextlib.suppress(ValueError):  # the main thread of another interpreter
                    signal.signal(signal.SIGINT, self._handle)
                    self._before = before

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            if self._came is not None:
                frame, self._came = self._came, None
                self._before(signal.SIGINT, frame)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._came is not None and self._before is not None:
            self._before(number, frame)
        self._came = frame
