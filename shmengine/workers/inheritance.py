"""What workers inherit: an initializer, with locks, queues and connections of `multiprocessing` in its arguments."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from shmengine import codec
from shmengine.descriptors import Descriptor
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

    Raises
    ------
    SerializationError
        With the path to what cannot be pickled.
    """

    def __init__(self, initializer: Callable[..., Any] | None = None, initargs: tuple[Any, ...] = ()) -> None:
        self.frame: bytes | None = None
        self._duplicates: list[Descriptor] = []
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
        duplicate = Descriptor(os.dup(fd), "what an initializer inherits")
        self._duplicates.append(duplicate)
        return duplicate.number

    def filenos(self) -> list[int]:
        """Return the descriptors that each worker must inherit under these numbers: duplicates, until `close`.

        Raises
        ------
        ShmError
            Other code has closed one.
        """
        return [duplicate.fileno() for duplicate in self._duplicates]

    def close(self) -> None:
        """Close the duplicates; no worker can start any more."""
        for duplicate in self._duplicates:
            duplicate.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
