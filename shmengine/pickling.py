"""Objects to an in-band pickle and the parts that travel beside it.

Three roads, cheapest first:

* exact builtin types, standard library and numpy types: the C pickler, at its full speed. It asks
  `reducer_override` only about what it has no opcode for, so plain values cost nothing extra;
* anything else: cloudpickle's pickler (also C), so that functions, classes and instances of
  ``__main__``, and of modules that another process cannot import, go by value;
* ``by_value=False``: what `pickle` does, for processes that share the caller's modules (fork).

On all of them our reducers take out what pickle 5 would copy into the stream: every kind of array,
and what other libraries keep in memory of their own (`shmengine.reducers`). ``bytes`` and ``bytearray``
objects from 64 KiB on stay in the stream, but as pieces of their own that are copied straight into the
frame.
"""

from __future__ import annotations

import importlib.machinery
import os
import pickle
import sys
from collections.abc import Callable
from functools import lru_cache
from pickle import PickleBuffer
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, Protocol

import numpy as np

from shmengine import filemap
from shmengine.arrays import Array, is_plain_dtype
from shmengine.culprit import find_culprit
from shmengine.errors import SerializationError
from shmengine.reducers import reduce_strings, reducer_of

__all__ = [
    "MultiprocessingReducers",
    "Parts",
    "Place",
    "Reducers",
    "dump",
    "goes_by_reference",
    "original_error",
    "substitute",
]

PROTOCOL = 5
_ndarray = np.ndarray
_STABLE_PACKAGES = sys.stdlib_module_names | {"numpy", "shmengine"}


class Parts(Protocol):
    """Collects what travels beside the pickle, in the order in which the pickle names it."""

    def add_array(self, array: Array) -> None:
        """Take an array of a plain dtype."""

    def add_buffer(self, buffer: PickleBuffer) -> None:
        """Take a contiguous buffer."""

    def reset(self) -> None:
        """Forget everything: pickling starts again."""

    memmap_mode: str | None
    reducers: Reducers | None
    place: Place | None
    bytes_shared: int


Place = Callable[[Array], tuple[Callable[[Array], Any] | None, Array]]
"""Says what goes in place of an array: another one, and what is called with it on the other side."""


class Reducers(Protocol):
    """How objects of exactly some types are pickled; only `shmengine.reducers` come before."""

    def get(self, cls: type, /) -> Callable[[Any], Any] | None:
        """Return a reducer."""


# --- what the reading side calls -----------------------------------------------------------

# pickle lets a reader supply any object for an out-of-band buffer. So the stream only says "the
# next part" (one opcode), and the decoder hands over arrays that it has already checked and made.
_NEXT_PART = PickleBuffer(bytearray(1))


def _part(part: Any) -> Any:
    return part


def _subclass(cls: type[Array], array: Array) -> Array:
    return array.view(cls)


def _set_attributes(array: Array, attributes: dict[str, Any]) -> None:
    array.__dict__.update(attributes)


def _memoryview(raw: Any, layout: str, shape: tuple[int, ...]) -> memoryview:
    flat = memoryview(raw)
    if flat.nbytes == 0 or (layout == "B" and len(shape) == 1):
        return flat
    return flat.cast(layout, shape) if layout == "B" else flat.cast(layout).cast("B").cast(layout, shape)  # type: ignore[call-overload, no-any-return]


def _cached_function(function: Any, maxsize: int | None, typed: bool) -> Any:
    return lru_cache(maxsize, typed)(function)


# --- reducers ------------------------------------------------------------------------------


def _reduce_array(parts: Parts, array: Array) -> Any:
    if not is_plain_dtype(array.dtype):
        is_text = type(array) is _ndarray and isinstance(array.dtype, np.dtypes.StringDType)
        return reduce_strings(array) if is_text else NotImplemented
    if array.base is not None and parts.memmap_mode is not None:
        reference = filemap.reference_to(array, parts.memmap_mode)
        if reference is not None:
            parts.bytes_shared += array.nbytes
            return filemap.open_view, reference
    arrive = None
    if parts.place is not None:
        arrive, array = parts.place(array)
    parts.add_array(array)
    return arrive or _part, (_NEXT_PART,)


def _reduce_subclass(parts: Parts, array: Array) -> Any:
    cls = type(array)
    if cls is np.memmap or not is_plain_dtype(array.dtype):
        return _reduce_array(parts, array)
    if not _has_standard_pickling(cls):
        return NotImplemented
    attributes = getattr(array, "__dict__", None)
    if not attributes:
        return _subclass, (cls, array.view(_ndarray))
    return _subclass, (cls, array.view(_ndarray)), attributes, None, None, _set_attributes


def _has_standard_pickling(cls: type[Array]) -> bool:
    """Tell whether data and ``__dict__`` are all there is to an instance of this subclass."""
    masked = sys.modules.get("numpy.ma")
    for known in (_ndarray,) if masked is None else (_ndarray, masked.MaskedArray, np.recarray):
        if (
            issubclass(cls, known)
            and cls.__reduce__ is known.__reduce__
            and cls.__reduce_ex__ is known.__reduce_ex__
            and cls.__setstate__ is known.__setstate__
        ):
            return True
    return cls in (np.recarray, np.matrix)


def _reduce_memoryview(view: memoryview) -> Any:
    if view.c_contiguous:
        return _memoryview, (PickleBuffer(view), view.format, view.shape)
    return _memoryview, (PickleBuffer(view.tobytes()), view.format, view.shape)


def _reduce(parts: Parts, obj: Any) -> Any:
    """Return our own reduction of what is not an exact ndarray; NotImplemented if we have none."""
    reducer = reducer_of(type(obj))
    if reducer is not None:
        reduced = reducer(obj)
        if reduced is not NotImplemented:
            return reduced
    if parts.reducers is not None:
        reducer = parts.reducers.get(type(obj))
        if reducer is not None:
            return reducer(obj)
    if isinstance(obj, _ndarray):
        return _reduce_subclass(parts, obj)
    if type(obj) is memoryview:
        return _reduce_memoryview(obj)
    if type(obj).__module__ == "multiprocessing.connection" and hasattr(obj, "fileno"):
        # As a plain object it would arrive with the same number, which is another descriptor there, or none.
        raise TypeError("a connection's descriptor cannot be sent here; a shmengine.Queue can")
    return NotImplemented


# --- picklers ------------------------------------------------------------------------------


class _NotPlain(Exception):
    """Something that the plain pickler must not decide about."""


class _Sink:
    """A file that keeps what is written as a list of pieces (big ``bytes`` come as themselves)."""

    __slots__ = ("write",)

    def __init__(self, pieces: list[Any]) -> None:
        self.write = pieces.append


_plain_types: set[type] = set()


def _is_stable(name: object) -> bool:
    return type(name) is str and name.partition(".")[0] in _STABLE_PACKAGES


class _Buffers:
    """Takes out-of-band buffers to the parts.

    It is no method of the pickler: in such a cycle everything that the pickler has seen would live
    until the garbage collector comes.
    """

    parts: Parts

    def __call__(self, buffer: PickleBuffer) -> None:
        if buffer is not _NEXT_PART:
            self.parts.add_buffer(buffer)


class _PlainPickler(pickle.Pickler):
    def __init__(self) -> None:
        self.pieces: list[Any] = []
        self.buffers = _Buffers()
        super().__init__(_Sink(self.pieces), PROTOCOL, buffer_callback=self.buffers)

    def start(self, parts: Parts) -> None:
        self.parts = self.buffers.parts = parts

    def finish(self) -> list[Any]:
        pieces = self.pieces.copy()
        self.pieces.clear()
        self.clear_memo()
        del self.parts, self.buffers.parts
        return pieces

    def reducer_override(self, obj: Any) -> Any:
        cls = type(obj)
        if cls is _ndarray:
            return _reduce_array(self.parts, obj)
        if cls in _plain_types and self.parts.reducers is None:
            return NotImplemented
        if isinstance(obj, (type, FunctionType, BuiltinFunctionType)):
            if not _is_stable(obj.__module__):
                raise _NotPlain
            return NotImplemented
        # Callables and type variables have a module of their own beside that of their class.
        if not (_is_stable(cls.__module__) and _is_stable(getattr(obj, "__module__", None))):
            raise _NotPlain
        reduced = _reduce(self.parts, obj)
        if (
            reduced is NotImplemented
            and not callable(obj)
            and not isinstance(obj, _ndarray)
            and cls.__module__ != "typing"
        ):
            _plain_types.add(cls)
        return reduced


class _ReferencePickler(_PlainPickler):
    """Functions and classes by reference, as `pickle` does."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is _ndarray:
            return _reduce_array(self.parts, obj)
        return _reduce(self.parts, obj)


class MultiprocessingReducers:
    """How `multiprocessing` pickles sockets, connections and the like, which is as duplicates of descriptors.

    These wait in this process for their receiver; `take_back` is for a message that does not go out.
    """

    __slots__ = ("_known", "_waiting")

    def __init__(self) -> None:
        # Whoever has a connection, or a process to send it to, has loaded this.
        reduction = sys.modules.get("multiprocessing.reduction")
        self._known: dict[type, Callable[[Any], Any]] = (
            {} if reduction is None else reduction.ForkingPickler._extra_reducers
        )
        self._waiting: list[Any] = []

    def get(self, cls: type) -> Callable[[Any], Any] | None:
        """Return the reducer for objects of this type."""
        return self._reduce if cls in self._known else None

    def _reduce(self, obj: Any) -> Any:
        reduced = self._known[type(obj)](obj)
        sharer = sys.modules.get("multiprocessing.resource_sharer")
        if sharer is not None:
            self._waiting += (part for part in reduced[1] if isinstance(part, sharer.DupFd))
        return reduced

    def take_back(self) -> None:
        """Close the duplicates."""
        while self._waiting:
            os.close(self._waiting.pop().detach())


def _make_value_pickler() -> Any:
    import cloudpickle

    class ValuePickler(cloudpickle.Pickler):  # type: ignore[misc]
        """Functions and classes by value where another process could not import them."""

        def __init__(self, parts: Parts) -> None:
            self.parts = parts
            self.pieces: list[Any] = []
            buffers = _Buffers()
            buffers.parts = parts
            super().__init__(_Sink(self.pieces), PROTOCOL, buffer_callback=buffers)

        def reducer_override(self, obj: Any) -> Any:
            if type(obj) is _ndarray:
                return _reduce_array(self.parts, obj)
            reduced = _reduce(self.parts, obj)
            if reduced is not NotImplemented:
                return reduced
            if isinstance(obj, _CachedFunction):
                return _reduce_cached_function(obj)
            if type(obj) is MethodType and getattr(obj.__self__, obj.__name__, None) == obj:
                return getattr, (
                    obj.__self__,
                    obj.__name__,
                )  # cloudpickle would take a classmethod apart, by value
            if isinstance(obj, (type, FunctionType)):
                module = sys.modules.get(obj.__module__) if type(obj.__module__) is str else None
                if module is not None and not _is_importable(obj.__module__):
                    cloudpickle.register_pickle_by_value(module)
            return super().reducer_override(obj)

    return ValuePickler


_CachedFunction = type(lru_cache(len))


def _reduce_cached_function(obj: Any) -> Any:
    """Take a function under `functools.lru_cache` like the function: cloudpickle does not know it."""
    name = obj.__module__
    if type(name) is str and name != "__main__" and _is_importable(name):
        found: Any = sys.modules.get(name)
        for step in obj.__qualname__.split("."):
            found = getattr(found, step, None)
        if found is obj:
            return NotImplemented
    parameters = obj.cache_parameters()
    return _cached_function, (obj.__wrapped__, parameters["maxsize"], parameters["typed"])


def goes_by_reference(fn: Any) -> bool:
    """Tell whether a function is pickled as its name, so that its pickle is the same each time."""
    if type(fn) not in (FunctionType, BuiltinFunctionType):
        return False
    name = fn.__module__
    module = sys.modules.get(name) if type(name) is str and name != "__main__" else None
    if getattr(module, fn.__qualname__, None) is not fn or not _is_importable(name):
        return False
    return _is_stable(name) or name.partition(".")[0] not in _by_value()


def _by_value() -> set[str]:
    """Return the packages of which something was registered to go by value."""
    import cloudpickle

    return {name.partition(".")[0] for name in cloudpickle.list_registry_pickle_by_value()}


_importable: dict[str, bool] = {"__main__": True}  # cloudpickle knows __main__ itself


def _is_importable(name: str) -> bool:
    """Tell whether another process with our ``sys.path`` could import the package of this module."""
    package = name.partition(".")[0]
    known = _importable.get(package)
    if known is None:
        known = package in _STABLE_PACKAGES or _can_be_found(package)
        _importable[package] = known
    return known


def _can_be_found(package: str) -> bool:
    module = sys.modules.get(package)
    loaded: importlib.machinery.ModuleSpec | None = getattr(module, "__spec__", None)
    if module is not None and loaded is None:
        return False
    for finder in sys.meta_path:
        try:
            found = finder.find_spec(package, None)
        except Exception:  # a broken finder is not our affair
            continue
        if found is not None:
            return loaded is None or found.origin == loaded.origin
    return False


_idle: list[_PlainPickler] = []
_value_pickler: Any = None


def dump(obj: Any, parts: Parts, *, by_value: bool = True, label: str = "") -> list[Any]:
    """Pickle an object.

    Parameters
    ----------
    obj : object
    parts : Parts
        Receives the arrays and buffers.
    by_value : bool, optional
        Whether functions and classes that other processes cannot import go by value.
    label : str, optional
        How the error calls `obj`.

    Returns
    -------
    list of bytes-like
        The pickle, in pieces. Pieces may be the caller's own ``bytes`` and ``bytearray`` objects.

    Raises
    ------
    SerializationError
        With the path to what cannot be pickled.
    """
    try:
        return _dump(obj, parts, by_value)
    except Exception as error:
        trial = _NoParts(parts.reducers)
        path, culprit, reason = find_culprit(obj, label, lambda part: _why_not(part, trial, by_value))
        what = f"{type(culprit).__qualname__!r} object"
        message = f"cannot pickle {what} at {path}" if path else f"cannot pickle {what}"
        raise SerializationError(f"{message}: {reason or error}", path) from (reason or error)


def original_error(error: BaseException) -> BaseException:
    """Return what pickle raised, with the path to the culprit as a note; other errors as they are."""
    cause = error.__cause__
    if not isinstance(error, SerializationError) or cause is None:
        return error
    cause.add_note(str(error))
    return cause


def _dump(obj: Any, parts: Parts, by_value: bool) -> list[Any]:
    global _value_pickler
    if not by_value:
        reference_pickler = _ReferencePickler()
        reference_pickler.start(parts)
        reference_pickler.dump(obj)
        return reference_pickler.pieces
    try:
        pickler = _idle.pop()
    except IndexError:  # a Ctrl-C from here on would be shown as raised "during handling" of it
        pickler = None
    if pickler is None:
        pickler = _PlainPickler()
    pickler.start(parts)
    try:
        pickler.dump(obj)
    except Exception:  # _NotPlain, or something that cloudpickle may know better
        parts.reset()
    else:
        pieces = pickler.finish()
        _idle.append(pickler)
        return pieces
    if _value_pickler is None:
        _value_pickler = _make_value_pickler()
    value_pickler = _value_pickler(parts)
    value_pickler.dump(obj)
    return value_pickler.pieces  # type: ignore[no-any-return]


class _NoParts:
    """Parts that are only counted out: for trying whether something can be pickled."""

    memmap_mode: str | None = None
    place: Place | None = None
    bytes_shared = 0

    def __init__(self, reducers: Reducers | None) -> None:
        self.reducers = reducers

    def add_array(self, array: Array) -> None: ...

    def add_buffer(self, buffer: PickleBuffer) -> None: ...

    def reset(self) -> None: ...


def _why_not(obj: Any, parts: Parts, by_value: bool) -> Exception | None:
    try:
        _dump(obj, parts, by_value)
    except Exception as error:
        return error
    return None


# --- objects with others in their place ----------------------------------------------------------


class _Kept:
    """Parts that are kept as they are; among them what takes the place of objects of a type."""

    memmap_mode: str | None = None
    place: Place | None = None
    bytes_shared = 0

    def __init__(self, cls: type, replacement: Callable[[Any], Any]) -> None:
        self.cls = cls
        self.replacement = replacement
        self.reducers: Reducers | None = self
        self.found = False
        self.parts: list[Any] = []

    def add_array(self, array: Array) -> None:
        self.parts.append(array)

    def add_buffer(self, buffer: PickleBuffer) -> None:
        self.parts.append(buffer)

    def reset(self) -> None:
        self.parts.clear()

    def get(self, cls: type) -> Callable[[Any], Any] | None:
        return self._reduce if issubclass(cls, self.cls) else None

    def _reduce(self, obj: Any) -> Any:
        self.found = True
        self.parts.append(self.replacement(obj))
        return _part, (_NEXT_PART,)


def substitute(obj: Any, cls: type, replacement: Callable[[Any], Any]) -> Any:
    """Return what would arrive if `obj` were pickled, with other objects in place of those of a type.

    Arrays in it are the same arrays. `obj` itself is returned if nothing is to be replaced, or if it cannot
    be pickled.
    """
    parts = _Kept(cls, replacement)
    try:
        pieces = _dump(obj, parts, by_value=True)
        return pickle.loads(b"".join(pieces), buffers=parts.parts) if parts.found else obj
    except Exception:
        return obj
