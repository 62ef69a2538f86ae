"""Arrays in the shared memory of a region: born there, sent by reference, read by reference.

Every participant allocates from an arena of its own. An array is shared if its bytes lie in a block that can be
named; no wrapper type is needed to find out, its address tells. `share` turns an array into a reference,
`resolve` a reference into the bytes of its block, which stay held until the last view of them dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

from shmengine._native import ffi, lib
from shmengine._native.status import NOT_SHARED, OK, STALE, fail
from shmengine.arrays import Array, Bytes, GivenReference, SharedReference, address_of, extent_of
from shmengine.config import format_bytes
from shmengine.errors import MemoryBudgetExceeded, StaleReference
from shmengine.region import EXTENT_BYTES, Region

__all__ = ["Arena"]

# NumPy's C API by number (numpy/_core/code_generators/numpy_api.py); both are part of its stable ABI (NEP 49).
_SET_HANDLER = 304
_CAPSULE_NAME = b"mem_handler"


def _set_handler(capsule: Any) -> Any:
    """Make `capsule` this context's memory handler; return the one before."""
    global _set_handler  # replaced by the C function at its first call
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    table = get_pointer(np._core._multiarray_umath._ARRAY_API, None)  # type: ignore[attr-defined]
    functions = ctypes.cast(table, ctypes.POINTER(ctypes.c_void_p))
    prototype = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)
    _set_handler = prototype(functions[_SET_HANDLER])
    return _set_handler(capsule)


def _make_capsule(pointer: Any) -> Any:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(int(ffi.cast("uintptr_t", pointer)), _CAPSULE_NAME, None)


def _extents(offset: int, nbytes: int) -> range:
    return range(offset // EXTENT_BYTES, -(-(offset + nbytes) // EXTENT_BYTES))


class Arena:
    """This process's arrays in one region.

    Parameters
    ----------
    region : Region
    limit : int, optional
        Bytes that arrays made by NumPy's handler may take; beyond it they are private. None: no limit.
    """

    def __init__(self, region: Region, limit: int | None = None) -> None:
        self.region = region
        self._handle = region.handle
        self._limit = limit if limit is not None else 1 << 62
        base = int(ffi.cast("uintptr_t", lib.shmr_base(region.handle)))
        self._low = base
        self._high = base + int(lib.shmr_mapped_bytes(region.handle))
        self._capsules: dict[int, Any] = {}
        self._roots: dict[tuple[int, int, bool], weakref.ref[Any]] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}  # by id: two threads may resolve the same at once
        self._root_ids: set[int] = set()  # of the roots that are alive
        self._lock = threading.Lock()
        self._pins: dict[int, int] = {}  # an extent: how many roots and leases lie in it
        self._unpinned: deque[tuple[int, int]] = deque()
        self._ref = threading.local()

    # --- born shared -----------------------------------------------------------------------------

    def handler(self, threshold: int) -> Any:
        """Return NumPy's memory handler whose arrays of at least `threshold` bytes are born here."""
        capsule = self._capsules.get(threshold)
        if capsule is None:
            pointer = lib.shmr_numpy_handler(self._handle, threshold, self._limit)
            if pointer == ffi.NULL:
                raise MemoryError("no memory for a handler")
            capsule = self._capsules[threshold] = _make_capsule(pointer)
        return capsule

    def install(self, threshold: int) -> None:
        """Let all arrays of at least `threshold` bytes that this context makes be born here, for good."""
        _set_handler(self.handler(threshold))

    @contextlib.contextmanager
    def allocator(self, threshold: int) -> Iterator[None]:
        """Within it, arrays that this context makes are born here."""
        before = _set_handler(self.handler(threshold))
        try:
            yield
        finally:
            _set_handler(before)

    def empty(self, shape: Any, dtype: Any = float, order: Literal["C", "F"] = "C") -> Array:
        """Return an uninitialised array that is born here.

        Raises
        ------
        MemoryBudgetExceeded
            There is no room for it.
        """
        with self.allocator(1):
            array: Array = np.empty(shape, dtype, order)
        if array.nbytes and not self.contains(array):
            lib.shmr_trim(self._handle)  # the next attempt finds whatever was free in pieces
            with self.allocator(1):
                array = np.empty(shape, dtype, order)
            if not self.contains(array):
                c = self.region.counters()
                raise MemoryBudgetExceeded(
                    f"an array of {format_bytes(array.nbytes)} does not fit: {format_bytes(c.used)} of the memory"
                    f" budget of {format_bytes(c.budget)} are in use by arrays of this process, and"
                    f" {format_bytes(c.reserved)} by all; give the engine a larger memory=, or let arrays go",
                    array.nbytes,
                    c.budget,
                    c.used,
                )
        return array

    def contains(self, array: Array) -> bool:
        """Tell whether the array's memory is this region's."""
        return self._low <= address_of(array) < self._high

    def made_here(self, array: Array, owner: Array) -> bool:
        """Tell whether the array's memory was allocated by this process and did not come by reference.

        Parameters
        ----------
        owner : ndarray
            ``owner_of(array)``.
        """
        if id(owner) in self._root_ids:
            return False
        return bool(lib.shmr_allocated_here(self._handle, ffi.cast("void *", address_of(array))))

    def offset_of(self, array: Array) -> int:
        """Return where in the region an array's element ``[0, 0, ...]`` lies."""
        return address_of(array) - self._low

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the extents that views made by `resolve`, and leases counted by `holding`, keep from being used."""
        with self._lock:
            self._settle()
            return len(self._pins) * EXTENT_BYTES

    def holding(self, offset: int, nbytes: int) -> Callable[[], None]:
        """Count a lease that views keep alive; call what is returned when they are gone."""
        self._pin(offset, nbytes)
        return functools.partial(self._unpinned.append, (offset, nbytes))

    def _pin(self, offset: int, nbytes: int) -> None:
        with self._lock:
            self._settle()
            for extent in _extents(offset, nbytes):
                self._pins[extent] = self._pins.get(extent, 0) + 1

    def _settle(self) -> None:
        """Take off what was unpinned: by finalizers, which may run anywhere and must not wait for the lock."""
        while self._unpinned:
            offset, nbytes = self._unpinned.popleft()
            for extent in _extents(offset, nbytes):
                self._pins[extent] -= 1
                if not self._pins[extent]:
                    del self._pins[extent]

    # --- by reference -----------------------------------------------------------------------------

    def share(self, array: Array) -> SharedReference | None:
        """Return (region, block, generation, offset of the lowest byte) if the array can be named, else None."""
        low = address_of(array)
        if not self._low <= low < self._high:
            return None
        low, high = extent_of(array)
        try:
            ref = self._ref.value
        except AttributeError:
            ref = self._ref.value = ffi.new("shmr_ref *")
        status = lib.shmr_share(self._handle, ffi.cast("void *", low), high - low, ref)
        if status != OK:
            if status != NOT_SHARED and status != lib.SHMR_NO_MEMORY:
                fail(status, "send an array by reference")
            return None
        return SharedReference(self.region.number, ref.block, ref.generation, ref.offset)

    @contextlib.contextmanager
    def borrowed(self, reference: Any) -> Iterator[Bytes]:
        """Within it, the bytes of the block that a reference names can be written; no view may leave it.

        Raises
        ------
        StaleReference
            As for `resolve`.
        """
        region, block, generation, _ = reference
        ref = ffi.new("shmr_ref *")
        if region != self.region.number or lib.shmr_hold(self._handle, block, generation, ref) != OK:
            raise StaleReference("what this reference named has been freed")
        try:
            yield self.region.root(ref.offset, ref.length, writable=True)
        finally:
            lib.shmr_drop(self._handle, block, generation)

    def hold(self, reference: Any) -> bool:
        """Keep the block that a reference names from being freed until `drop`; False if it is gone."""
        ref = ffi.new("shmr_ref *")
        return bool(lib.shmr_hold(self._handle, reference[1], reference[2], ref) == OK)

    def drop(self, reference: Any) -> None:
        """Undo `hold`."""
        lib.shmr_drop(self._handle, reference[1], reference[2])

    def resolve(self, reference: Any, *, writable: bool = False) -> Bytes:
        """Return the bytes of the block that a reference names; held until the last view of them dies.

        Writable if that is asked for, or the reference says so.

        Raises
        ------
        StaleReference
            The block has been freed, or the reference belongs to another region.
        """
        region, block, generation, _ = reference
        if region != self.region.number:
            raise StaleReference("this reference belongs to another engine")
        if (block | generation) >> 32:
            raise StaleReference("nothing can have the name in this reference")
        writable = writable or type(reference) is GivenReference
        key = (block, generation, writable)
        known = self._roots.get(key)
        if known is not None:
            root: Bytes | None = known()
            if root is not None:
                return root
        ref = ffi.new("shmr_ref *")
        try:
            status = lib.shmr_hold(self._handle, block, generation, ref)
            if status == STALE:
                raise StaleReference("what this reference named has been freed")
            if status != OK:
                fail(status, "read an array by reference")
            return self._watch(key, int(ref.offset), int(ref.length))
        except BaseException:  # a signal's handler too
            if ref.generation and key not in self._roots:
                lib.shmr_drop(self._handle, block, generation)
            raise

    def _watch(self, key: tuple[int, int, bool], offset: int, nbytes: int) -> Bytes:
        """Return the bytes of a block that was just held; it is dropped with them."""
        block, generation, writable = key
        root = self.region.root(offset, nbytes, writable=writable)
        identity = id(root)
        self._pin(offset, nbytes)

        def drop(gone: weakref.ref[Any]) -> None:
            del self._watched[id(gone)]
            self._root_ids.discard(identity)
            if self._roots.get(key) is gone:
                del self._roots[key]
            self._unpinned.append((offset, nbytes))
            lib.shmr_drop(self._handle, block, generation)

        self._root_ids.add(identity)
        watcher = weakref.ref(root, drop)
        self._watched[id(watcher)] = self._roots[key] = watcher
        return root
