"""Checks of what callers give to an `Engine`: each mistake its own text, at the call."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any

import numpy as np

from shmengine.config import parse_bytes
from shmengine.engine.backend import Entropy, TaskOptions, function_name
from shmengine.errors import ArrayError

CHECKS = ("frame", "payload")
FOREVER_SECONDS = 1e9

__all__ = [
    "CHECKS",
    "at_least",
    "budget_of",
    "check_callable",
    "check_choice",
    "check_iterables",
    "check_out",
    "idle_seconds",
    "is_index",
    "positive",
    "task_options",
    "total_of",
]


def task_options(
    method: str,
    fn: Callable[..., Any],
    timeout: float | None,
    window: int | None,
    rng: Any,
    writable: Any,
    retries: int | None = None,
) -> TaskOptions:
    """Check what all methods have in common."""
    check_callable("fn", fn)
    if writable is True:
        writable = "private"
    elif writable is not False:
        check_choice("writable", writable, ("private", "shared"))
    return TaskOptions(
        timeout=seconds_of(timeout),
        retries=0 if writable == "shared" else retries,
        writable=writable,
        rng=entropy_of(rng),
        window=None if window is None else positive("window", window),
        label=f"{method}({function_name(fn)})",
    )


def seconds_of(timeout: Any) -> float | None:
    """Return a timeout in seconds; None for no limit, and for one that nobody lives to see."""
    if timeout is None:
        return None
    seconds = _number_of_seconds("timeout", timeout)
    if not seconds > 0:
        raise ValueError(f"timeout must be positive (seconds) or None, not {timeout!r}")
    return float(seconds) if seconds < FOREVER_SECONDS else None


def idle_seconds(name: str, value: Any) -> float:
    """Return how long something may be idle: 0 for not at all, infinity for ever, or longer than anybody lives."""
    seconds = _number_of_seconds(name, value)
    if not seconds >= 0:
        raise ValueError(f"{name} must be at least 0 (seconds) or None, not {value!r}")
    return float(seconds) if seconds < FOREVER_SECONDS else math.inf


def _number_of_seconds(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number of seconds or None, not {value!r}")
    return value


def entropy_of(rng: Any) -> Entropy | None:
    if rng is None:
        return None
    try:
        if isinstance(rng, bool):
            raise TypeError
        seed = operator.index(rng) if is_index(rng) else tuple(operator.index(word) for word in rng)
    except TypeError:
        raise TypeError(f"rng must be a seed (an int or a sequence of ints), not {rng!r}") from None
    if min((seed,) if isinstance(seed, int) else seed, default=0) < 0:
        raise ValueError(f"rng must not be negative, got {rng!r}")
    return seed


def check_iterables(method_name: str, iterables: Sequence[Any]) -> None:
    if not iterables:
        raise TypeError(f"{method_name} needs at least one iterable")
    for iterable in iterables:
        if not any(hasattr(type(iterable), method) for method in ("__iter__", "__getitem__")):
            raise TypeError(f"{method_name}: {type(iterable).__name__} object is not iterable")


def check_out(out: Any, dtype: np.dtype | None) -> None:
    if not isinstance(out, np.ndarray):
        raise ArrayError(f"out must be an ndarray, not {type(out).__name__}")
    if not out.flags.writeable:
        raise ValueError("out is read-only")
    if dtype is not None and dtype != out.dtype:
        raise ValueError(f"dtype {dtype} contradicts out, which has dtype {out.dtype}: give one of them")


def check_callable(name: str, fn: Any) -> None:
    if not callable(fn):
        raise TypeError(f"{name} must be callable, not {type(fn).__name__}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def is_index(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, (bool, np.ndarray))


def positive(name: str, value: Any) -> int:
    return at_least(1, name, value)


def at_least(least: int, name: str, value: Any) -> int:
    if not is_index(value) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
    return operator.index(value)


def budget_of(memory: Any) -> int | None:
    """Return a budget of shared memory in bytes; None for the default one."""
    budget = None if memory is None else parse_bytes(memory)
    if budget == 0:
        raise ValueError("memory must be positive, not 0")
    return budget


def total_of(iterables: Sequence[Iterable[Any]]) -> int | None:
    lengths = [len(iterable) for iterable in iterables if isinstance(iterable, Sized)]
    return min(lengths, default=None)
