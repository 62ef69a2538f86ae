"""What the tasks of `joblib.Parallel` are in a worker; apart from the backend, which no worker has to import."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from joblib.parallel import BatchedCalls

__all__ = ["Runner", "own_copy"]


def own_copy(array: np.ndarray) -> np.ndarray:
    """Return a copy that a task may write to, laid out like the array."""
    return array.copy("K")


class Runner:
    """A `BatchedCalls` without its calls, which is the same for all batches of one call of Parallel.

    Parameters
    ----------
    fn : function, optional
        What is called, if that is the same for all calls, and goes by reference: others are pickled anew with each
        batch, like their arguments, because they may have a state.
    """

    def __init__(self, batch: BatchedCalls, fn: Callable[..., Any] | None) -> None:
        self._batch = copy.copy(batch)
        self._batch.items = []
        self._fn = fn

    def __call__(self, *calls: Any) -> Any:
        """Make the calls of a batch in a worker; return their results, or the only one."""
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
