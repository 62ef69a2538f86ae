"""Whose fault it is that an object cannot be pickled: the path to the innermost part that cannot."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np

from shmengine.plain import brief

__all__ = ["find_culprit"]

MOST_STEPS = 100  # of a path: each costs as much as pickling what is left, and nobody reads more


def find_culprit(
    obj: Any, label: str, why_not: Callable[[Any], Exception | None]
) -> tuple[str, Any, Exception | None]:
    """Find the innermost part of an object that cannot be pickled.

    Parameters
    ----------
    obj : object
        For instance the arguments of a call.
    label : str
        What the path begins with, for instance ``"args"``.
    why_not : callable
        Tries to pickle something; returns what that raises, or None.

    Returns
    -------
    path : str
        For instance ``args[0]['lock']``.
    culprit : object
        The innermost one down to `MOST_STEPS`.
    reason : Exception or None
        What pickling the culprit alone raised; None if the whole object can be pickled.
    """
    reason = why_not(obj)
    path = label
    seen: set[int] = set()
    while reason is not None and id(obj) not in seen and len(seen) < MOST_STEPS:
        seen.add(id(obj))
        if _refuses(obj):
            break
        for step, part in _parts_of(obj):
            failure = why_not(part)
            if failure is not None:
                path, obj, reason = path + step, part, failure
                break
        else:
            break
    return path, obj, reason


def _refuses(obj: Any) -> bool:
    """Tell whether the object itself says no, whatever its parts are."""
    if isinstance(obj, (type, FunctionType)):
        return False
    try:
        obj.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    except Exception:
        return True
    return False


def _parts_of(obj: Any) -> Any:
    """Yield (step of the path, part) for everything that pickling this object leads to."""
    if isinstance(obj, (list, tuple)):
        yield from ((f"[{index}]", part) for index, part in enumerate(obj))
    elif isinstance(obj, dict):
        for key, part in obj.items():
            yield f".key({brief(key)})", key
            yield f"[{brief(key)}]", part
    elif isinstance(obj, (set, frozenset)):
        yield from ((f".element({brief(part)})", part) for part in obj)
    elif isinstance(obj, np.ndarray) and obj.dtype.hasobject and obj.dtype.names is None:
        for index in np.ndindex(obj.shape):
            yield f"[{', '.join(map(str, index))}]", obj[index]
    elif isinstance(obj, FunctionType):
        for name, cell in zip(obj.__code__.co_freevars, obj.__closure__ or (), strict=False):
            try:
                yield f".<closure {name}>", cell.cell_contents
            except ValueError:  # an empty cell
                continue
        for name in obj.__code__.co_names:
            if name in obj.__globals__:
                yield f".<global {name}>", obj.__globals__[name]
        yield ".__defaults__", obj.__defaults__
        yield ".__kwdefaults__", obj.__kwdefaults__
    for name in ("__self__", "func", "args", "keywords"):  # methods and partials
        part = getattr(obj, name, None)
        if part is not None and not isinstance(obj, type) and not isinstance(part, type(sys)):
            yield f".{name}", part
    attributes = getattr(obj, "__dict__", None)
    if isinstance(attributes, dict) and not isinstance(obj, (type, FunctionType)):
        yield from ((f".{name}", part) for name, part in attributes.items())
    slots = getattr(type(obj), "__slots__", ())
    for name in (slots,) if isinstance(slots, str) else slots:
        if hasattr(obj, name) and name not in ("__dict__", "__weakref__"):
            yield f".{name}", getattr(obj, name)
