"""The default engine: `map`, `map_blocks` and `reduce` for those who want no ``with`` block.

Made at first use with default settings (one worker a core), shared by all threads, closed at exit. A
forked child makes its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from shmengine.engine.api import Engine

__all__ = ["default_engine", "map", "map_blocks", "reduce"]

T = TypeVar("T")

_lock = threading.Lock()
_engine: Engine | None = None


def default_engine() -> Engine:
    """Return the engine behind the module-level functions; it is made at first use.

    If you close it, the next use makes a new one.
    """
    global _engine
    with _lock:
        if _engine is None or _engine.closed:
            _engine = Engine()  # ends at exit by its own finaliser
        return _engine


def _after_fork_in_child() -> None:
    # The parent's engine is of no use here, and another thread may have held the lock.
    global _engine, _lock
    _engine, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def map(  # noqa: A001  # its public name
    fn: Callable[..., Any], *iterables: Iterable[Any], **options: Any
) -> Iterator[Any]:
    """Call `Engine.map` of the default engine (same arguments, same result)."""
    return default_engine().map(fn, *iterables, **options)


def map_blocks(fn: Callable[..., T], *arrays: Any, **options: Any) -> T:
    """Call `Engine.map_blocks` of the default engine (same arguments, same result)."""
    return default_engine().map_blocks(fn, *arrays, **options)


def reduce(fn: Callable[..., Any], *arrays: Any, combine: Callable[[Any, Any], Any], **options: Any) -> Any:
    """Call `Engine.reduce` of the default engine (same arguments, same result)."""
    return default_engine().reduce(fn, *arrays, combine=combine, **options)
