"""What workers inherit: an initializer, with locks, queues and connections of `multiprocessing` in its arguments."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from shmengine import codec
from shmengine.pickling import MultiprocessingReducers

__all__ = ["Inheritance"]


class Inheritance:
    """An initializer and its arguments, pickled as `multiprocessing` does it while it spawns a process.

    Parameters
    ----------
    initializer : callable, optional
    initargs : tuple

    Attributes
    ----------
    frame : bytes or None
        What a worker decodes.
    fds : list of int
        Descriptors that each worker must inherit under these numbers; duplicates, until `close`.

    Raises
    ------
    SerializationError
        With the path to what cannot be pickled.
    """

    def __init__(self, initializer: Callable[..., Any] | None = None, initargs: tuple[Any, ...] = ()) -> None:
        self.frame: bytes | None = None
        self.fds: list[int] = []
        self._duplicates = ExitStack()
        if initializer is None:
            return
        context = sys.modules.get("multiprocessing.context")  # without it there are no such objects
        if context is None:
            self.frame = self._encode(initializer, initargs)
            return
        from multiprocessing.popen_spawn_posix import _DupFd

        self.DupFd = _DupFd
        context.set_spawning_popen(self)
        try:
            self.frame = self._encode(initializer, initargs)
        except BaseException:
            self.close()
            raise
        finally:
            context.set_spawning_popen(None)

    def _encode(self, initializer: Callable[..., Any], initargs: tuple[Any, ...]) -> bytes:
        encoded = codec.encode(
            (initializer, initargs), reducers=MultiprocessingReducers(), label="(initializer, initargs)"
        )
        return encoded.to_bytes()

    def duplicate_for_child(self, fd: int) -> int:
        """Return the number under which workers get a descriptor (`multiprocessing` asks for it)."""
        duplicate = os.dup(fd)
        self._duplicates.callback(os.close, duplicate)
        self.fds.append(duplicate)
        return duplicate

    def close(self) -> None:
        """Close the duplicates; no worker can start any more."""
        self._duplicates.close()
