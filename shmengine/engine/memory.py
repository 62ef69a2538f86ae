"""What an engine keeps in memory that its workers reach: objects, and arrays that are born there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from shmengine.engine.backend import Backend, Ref
from shmengine.engine.checks import check_choice
from shmengine.errors import ArrayError

__all__ = ["SharedMemory"]


class SharedMemory:
    """What an engine offers for memory: its part of `Engine`."""

    _backend: Backend

    def _check_usable(self) -> None:
        raise NotImplementedError

    def put(self, obj: Any) -> Ref:
        """Keep a copy of `obj` where all workers can read it, and return a reference to it.

        Pass the reference to tasks, in an argument, in anything that an argument contains, or in what the
        function captures: it gets the object itself, with its arrays read-only. (Here ``ref.get()`` returns
        it.) The object is freed when the last reference dies.

        Whatever contains a reference, other than lists, tuples and dicts, is pickled on all backends, so that
        functions get a copy of it.

        Raises
        ------
        SerializationError
            `obj` cannot be sent.
        MemoryBudgetExceeded
            It does not fit.
        """
        self._check_usable()
        return self._backend.put(obj)

    def empty(self, shape: int | Sequence[int], dtype: Any = float, order: str = "C") -> np.ndarray:
        """Return an uninitialised array born shared: it and its views go to workers without a copy.

        Parameters
        ----------
        shape : int or sequence of int
        dtype : dtype
        order : {"C", "F"}

        Raises
        ------
        ArrayError
            The dtype holds Python objects.
        MemoryBudgetExceeded
            The array does not fit.
        """
        self._check_usable()
        dtype = np.dtype(dtype)
        if dtype.hasobject:
            raise ArrayError(f"an array of dtype {dtype} holds pointers to objects and cannot be born shared")
        check_choice("order", order, ("C", "F"))
        return self._backend.empty(shape, dtype, order)  # type: ignore[arg-type]

    def zeros(self, shape: int | Sequence[int], dtype: Any = float, order: str = "C") -> np.ndarray:
        """Return an array of zeros born shared; see `empty`."""
        array = self.empty(shape, dtype, order)
        array[...] = np.zeros((), array.dtype)
        return array

    def full(
        self, shape: int | Sequence[int], fill_value: Any, dtype: Any = None, order: str = "C"
    ) -> np.ndarray:
        """Return an array filled with `fill_value`, born shared; see `empty`."""
        array = self.empty(shape, np.asarray(fill_value).dtype if dtype is None else dtype, order)
        array[...] = fill_value
        return array

    def asarray(self, array: Any, dtype: Any = None) -> np.ndarray:
        """Return `array` as an array that goes to workers without a copy: itself, if it does already."""
        self._check_usable()
        given = np.asarray(array, dtype)
        if not given.dtype.hasobject and self._backend.is_shared(given):
            return given
        made = self.empty(given.shape, given.dtype, "F" if given.flags.fnc else "C")
        made[...] = given
        return made

    def allocator(self) -> AbstractContextManager[None]:
        """Within ``with engine.allocator():`` the large arrays that NumPy makes are born shared.

        For the calling thread: ``np.zeros``, ``np.load``, results of arithmetic and so on. They are plain
        ndarrays, stay valid after the block and after the engine, and go to workers without a copy.
        """
        self._check_usable()
        return self._backend.allocator()
