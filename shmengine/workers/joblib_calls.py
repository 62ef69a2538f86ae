"""What the tasks of `joblib.Parallel` are in a worker; apart from the backend, which no worker has to import."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
from joblib import register_parallel_backend
from joblib.parallel import BACKENDS, BatchedCalls

__all__ = ["Runner", "own_copy"]


def own_copy(array: np.ndarray) -> np.ndarray:
    """Return a copy that a task may write to, laid out like the array."""
    return array.copy("K")


def _imported(name: str, module: str, **options: Any) -> Any:
    """Return a new backend, of which a module makes the class known to joblib."""
    import_module(module)
    return BACKENDS[name](**options)


class Runner:
    """A `BatchedCalls` without its calls, which is the same for all batches of one call of Parallel.

    Parameters
    ----------
    fn : function, optional
        What is called, if that is the same for all calls, and goes by reference: others are pickled anew with each
        batch, like their arguments, because they may have a state.
    backends : dict of str to str
        Backends that are not joblib's own, and the modules that make them known to it: imported in a worker when a task
        names one.
    """

    def __init__(
        self, batch: BatchedCalls, fn: Callable[..., Any] | None, backends: Mapping[str, str]
    ) -> None:
        self._batch = copy.copy(batch)
        self._batch.items = []
        self._fn = fn
        self._backends = backends

    def __call__(self, *calls: Any) -> Any:
        """Make the calls of a batch in a worker; return their results, or the only one."""
        for name, module in self._backends.items():
            if name not in BACKENDS:
                register_parallel_backend(name, partial(_imported, name, module))
        batch = self._batch
        batch.items = [
            (fn, args, kwargs or {})
            for fn, args, kwargs in (calls if self._fn is None else ((self._fn, *call) for call in calls))
        ]
        try:
            results = batch()
        finally:
            batch.items = []
        return results if len(results) > 1 else results[0]
