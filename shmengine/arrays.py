"""What the bytes of an array are: specs, views over shared bytes, real read-only views.

An `ArraySpec` says how to read memory as an array. It travels as a few dozen bytes and never
contains a pickle. `view` is the one place where bytes become an `ndarray`; whatever it returns
keeps its *root* (the flat ``uint8`` array it was cut from) alive, and so does everything derived
from it: a weak reference to the root dies with the last view.
"""

from __future__ import annotations

import ast
import copy
import math
import re
import struct
import sys
from collections.abc import Callable
from ctypes import c_size_t
from dataclasses import dataclass
from pickle import PickleBuffer
from typing import Any, NamedTuple, cast

import numpy as np

from shmengine.errors import ArrayError, Corrupt

__all__ = [
    "MAX_NDIM",
    "ArraySpec",
    "Bytes",
    "GivenReference",
    "SharedReference",
    "address_of",
    "compact",
    "decode_spec",
    "detach",
    "encode_spec",
    "extent_of",
    "has_views",
    "is_alone",
    "is_plain_dtype",
    "owner_of",
    "pack_spec",
    "readonly",
    "spec_of",
    "view",
    "writable_alias",
]

Array = np.ndarray[Any, np.dtype[Any]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
"""A flat ``uint8`` array over some memory."""

MAX_NDIM = 64
SPEC_VERSION = 1
MAX_DTYPE_TEXT = 1 << 20
MAX_CACHED = 4096

_ndarray = np.ndarray
_PREFIX = struct.Struct("<BBBxI")  # version, flags, ndim, length of the dtype text
_HAS_STRIDES = 1
_HAS_OFFSET = 2
_WORDS = [struct.Struct(f"<{count}q") for count in range(2 * MAX_NDIM + 2)]
_SIMPLE_DTYPE = re.compile(r"[<>|][biufcmMSUV]\d{1,10}(\[[0-9A-Za-z]{1,16}\])?")
_NUM_HALF = 23
_NUM_OBJECT = 17


class SharedReference(NamedTuple):
    """Where an array lies in shared memory.

    Attributes
    ----------
    region : int
        63-bit number that names the region.
    block, generation : int
        The block, and which use of it.
    offset : int
        Bytes from the start of the block to the array's lowest address.
    """

    region: int
    block: int
    generation: int
    offset: int


class GivenReference(SharedReference):
    """The same for an array that its sender cannot reach any more: who gets it may write to it."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """How to read memory as an array.

    Attributes
    ----------
    dtype : numpy.dtype
        Any dtype but object, `~numpy.dtypes.StringDType` and user-defined ones.
    shape : tuple of int
    strides : tuple of int or None
        Bytes; ``None`` means C-contiguous.
    offset : int
        Bytes from the start of the memory to element ``[0, 0, ...]``. With negative strides
        that is not the lowest address.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Size of a compact copy in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


# --- dtypes as text ----------------------------------------------------------------------


def is_plain_dtype(dtype: np.dtype[Any]) -> bool:
    """Tell whether values of this dtype are nothing but bytes (no object, StringDType or user dtype)."""
    return 0 <= dtype.num <= _NUM_HALF and not dtype.hasobject


def _describe(dtype: np.dtype[Any]) -> Any:
    """Return literals from which `_build` makes the same dtype again."""
    if not is_plain_dtype(dtype):
        raise ArrayError(f"an array of dtype {dtype!r} has no spec: its elements are more than bytes")
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return (_describe(base), shape)
    if dtype.names is None:
        return dtype.str
    fields = [cast("dict[str, Any]", dtype.fields)[name] for name in dtype.names]
    titles = [field[2] if len(field) > 2 else None for field in fields]
    if not all(title is None or type(title) is str for title in titles):
        raise ArrayError(f"a dtype with a title that is no string has no spec: {dtype!r}")
    return {
        "names": list(dtype.names),
        "formats": [_describe(field[0]) for field in fields],
        "offsets": [field[1] for field in fields],
        "titles": titles if any(title is not None for title in titles) else None,
        "itemsize": dtype.itemsize,
        "aligned": dtype.isalignedstruct,
        "record": dtype.type is np.record,
    }


def _build(described: Any) -> np.dtype[Any]:
    if isinstance(described, str):
        if not _SIMPLE_DTYPE.fullmatch(described):
            raise ValueError(f"not a dtype: {described[:80]!r}")
        return np.dtype(described)
    if isinstance(described, tuple):
        base, shape = described
        return np.dtype((_build(base), shape))
    parts = {key: described[key] for key in ("names", "offsets", "itemsize")}
    parts["formats"] = [_build(field) for field in described["formats"]]
    if described["titles"] is not None:
        parts["titles"] = described["titles"]
    dtype: np.dtype[Any] = np.dtype(parts, align=bool(described["aligned"]))  # type: ignore[call-overload]
    return np.dtype((np.record, dtype)) if described["record"] else dtype


_dtype_texts: dict[Any, bytes] = {}
_dtypes: dict[bytes, np.dtype[Any]] = {}


def _dtype_text(dtype: np.dtype[Any]) -> bytes:
    # Equal structured dtypes can still differ in alignment and scalar type.
    key: Any = dtype if dtype.names is None else (dtype, dtype.isalignedstruct, dtype.type)
    text = _dtype_texts.get(key)
    if text is None:
        described = _describe(dtype)
        text = (described if isinstance(described, str) else repr(described)).encode()
        if len(text) > MAX_DTYPE_TEXT:
            raise ArrayError(f"a dtype with {len(dtype.names or ())} fields is too big for a spec")
        if len(_dtype_texts) >= MAX_CACHED:
            _dtype_texts.clear()
        _dtype_texts[key] = text
    return text


def _dtype_of(raw: bytes) -> np.dtype[Any]:
    dtype = _dtypes.get(raw)
    if dtype is None:
        text = raw.decode()
        dtype = _build(text if text[:1] in "<>|" else ast.literal_eval(text))
        if not is_plain_dtype(dtype):
            raise ValueError("an object dtype")
        if len(_dtypes) >= MAX_CACHED:
            _dtypes.clear()
        _dtypes[raw] = dtype
    return dtype


# --- specs as bytes ----------------------------------------------------------------------

_packed: dict[Any, bytes] = {}
_specs: dict[bytes, ArraySpec] = {}


def pack_spec(
    dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...] | None = None, offset: int = 0
) -> bytes:
    """Do what `encode_spec` does, without an `ArraySpec` in between."""
    key = (dtype, shape, strides, offset)
    raw = _packed.get(key)
    if raw is not None and dtype.names is None:
        return raw
    text = _dtype_text(dtype)
    ndim = len(shape)
    words = shape
    flags = 0
    if strides is not None:
        flags |= _HAS_STRIDES
        words += strides
    if offset:
        flags |= _HAS_OFFSET
        words += (offset,)
    raw = _PREFIX.pack(SPEC_VERSION, flags, ndim, len(text)) + _WORDS[len(words)].pack(*words) + text
    if dtype.names is None:
        if len(_packed) >= MAX_CACHED:
            _packed.clear()
        _packed[key] = raw
    return raw


def encode_spec(spec: ArraySpec) -> bytes:
    """Turn a spec into bytes; at most 112 for a simple dtype, 8 dimensions and no strides.

    Raises
    ------
    ArrayError
        For dtypes whose elements are more than bytes: object, StringDType, user-defined.
    """
    return pack_spec(spec.dtype, spec.shape, spec.strides, spec.offset)


def decode_spec(raw: bytes) -> ArraySpec:
    """Turn bytes from `encode_spec` into a spec.

    The bytes may come from anywhere: nothing is evaluated, and nothing big is allocated.

    Raises
    ------
    Corrupt
        If these bytes are not a spec.
    """
    spec = _specs.get(raw)
    if spec is None:
        try:
            spec = _parse_spec(raw)
        except Exception as error:  # whatever rubbish provokes in struct, ast or numpy
            raise Corrupt(f"not an array spec: {error}", "array spec") from error
        if len(_specs) >= MAX_CACHED:
            _specs.clear()
        _specs[raw] = spec
    return spec


def _parse_spec(raw: bytes) -> ArraySpec:
    version, flags, ndim, text_bytes = _PREFIX.unpack_from(raw)
    if version != SPEC_VERSION:
        raise ValueError(f"version {version}, expected {SPEC_VERSION}")
    if ndim > MAX_NDIM or flags & ~(_HAS_STRIDES | _HAS_OFFSET) or text_bytes > MAX_DTYPE_TEXT:
        raise ValueError("impossible flags, ndim or dtype length")
    has_strides, has_offset = flags & _HAS_STRIDES, flags & _HAS_OFFSET
    words_format = _WORDS[ndim * (2 if has_strides else 1) + (1 if has_offset else 0)]
    text_start = _PREFIX.size + words_format.size
    if len(raw) != text_start + text_bytes:
        raise ValueError(f"{len(raw)} bytes, expected {text_start + text_bytes}")
    words = words_format.unpack_from(raw, _PREFIX.size)
    dtype = _dtype_of(raw[text_start:])
    shape = words[:ndim]
    strides = words[ndim : 2 * ndim] if has_strides else None
    offset = words[-1] if has_offset else 0
    if offset < 0 or (ndim and min(shape) < 0) or math.prod(shape) * dtype.itemsize >= 1 << 62:
        raise ValueError("impossible offset or shape")
    return ArraySpec(dtype, shape, strides, offset)


# --- views -------------------------------------------------------------------------------


def view(root: Bytes, spec: ArraySpec, offset: int = 0) -> Array:
    """Make an array over the memory of `root`.

    Parameters
    ----------
    root : ndarray of uint8, 1-d
        Contiguous; read-only or writable, and so will the view be (a read-only root makes a view
        whose ``writeable`` flag cannot be switched on if the root's cannot).
    spec : ArraySpec
    offset : int, optional
        Bytes added to ``spec.offset``.

    Returns
    -------
    ndarray
        Keeps `root` alive, as does everything derived from it.

    Raises
    ------
    Corrupt
        If any element would lie outside of `root`.
    """
    start = spec.offset + offset
    strides = spec.strides
    if strides is not None:
        # numpy checks strides as well, but in arithmetic that can overflow.
        low = high = start
        shape = spec.shape
        if len(strides) != len(shape):
            raise Corrupt(f"{len(strides)} strides for {len(shape)} dimensions", "strides")
        if 0 not in shape:
            for count, stride in zip(shape, strides, strict=True):
                if stride >= 0:
                    high += (count - 1) * stride
                else:
                    low += (count - 1) * stride
            if low < 0 or high + spec.dtype.itemsize > root.nbytes:
                raise Corrupt(f"an array from {low} to {high} is outside of {root.nbytes} bytes", "bounds")
        elif not 0 <= start <= root.nbytes:
            raise Corrupt(f"an array at {start} is outside of {root.nbytes} bytes", "bounds")
        else:
            strides = None  # no element to stride over
    dtype = spec.dtype
    if dtype.names is not None:
        dtype = copy.copy(dtype)  # fields can be renamed, in place: of this array alone
    try:
        return _ndarray(spec.shape, dtype, root, start, strides)
    except (TypeError, ValueError, OverflowError, MemoryError) as error:
        message = f"an array of {spec.nbytes} bytes at {start} does not fit in {root.nbytes} bytes: {error}"
        raise Corrupt(message, "bounds") from error


# The address of an array's first element is a fixed field of numpy's C struct (its ABI), and
# reading it so costs a tenth of ``array.ctypes.data``. Checked once, here.
_DATA_FIELD = 16
_at = c_size_t.from_address
_probe = np.empty(3)
if _at(id(_probe) + _DATA_FIELD).value == _probe.__array_interface__["data"][0]:

    def address_of(array: Array) -> int:
        """Return the address of element ``[0, 0, ...]``."""
        return _at(id(array) + _DATA_FIELD).value

else:  # pragma: no cover - another build of CPython or numpy

    def address_of(array: Array) -> int:
        """Return the address of element ``[0, 0, ...]``."""
        return cast("int", array.__array_interface__["data"][0])


def owner_of(array: Array) -> Array:
    """Return the array that the memory of a view comes from: the last one in its chain of bases."""
    while isinstance(array.base, _ndarray):
        array = array.base
    return array


def is_alone(holder: list[Any], i: int) -> bool:
    """Tell whether nobody but ``holder[i]``, an array, can reach its memory; `holder` alone must refer to it."""
    base = holder[i].base
    if base is not None and (
        not isinstance(base, _ndarray) or base.base is not None or sys.getrefcount(base) > _ALONE
    ):
        return False
    del base
    array = holder[i]
    return sys.getrefcount(array) <= _ALONE


def _references(holder: list[Any], i: int) -> int:
    array = holder[i]
    return sys.getrefcount(array)


# The count of an array to which one list and one local variable refer; measured, since interpreters count differently.
_ALONE = _references([np.empty(0)], 0)


def _nowhere_else(array: Array) -> bool:  # noqa: ARG001  # as `detach` has it
    return False


def detach(holder: list[Any], depth: int = 2, kept: Callable[[Array], bool] = _nowhere_else) -> None:
    """Replace, in `holder`, every array whose memory somebody else may hold too by a copy of it.

    Looks into exact tuples, lists and dicts, `depth` deep. Arrays for which `kept` is true stay as they are.
    """
    for i in range(len(holder)):
        kind = type(holder[i])
        if kind is tuple or kind is list or kind is dict:
            if not depth:
                continue
            container, holder[i] = holder[i], None
            parts = list(container.values() if kind is dict else container)
            keys = list(container) if kind is dict else []
            del container  # now `parts` alone refers to them, unless the container is kept elsewhere
            detach(parts, depth - 1, kept)
            holder[i] = dict(zip(keys, parts, strict=True)) if kind is dict else kind(parts)
        elif isinstance(holder[i], _ndarray) and not is_alone(holder, i) and not kept(holder[i]):
            holder[i] = holder[i].copy(order="K")


def has_views(holder: list[Any]) -> bool:
    """Tell whether anything but ``holder[0]``, which `holder` alone must refer to, refers to that array."""
    array = holder[0]
    return sys.getrefcount(array) > _ALONE


def extent_of(array: Array) -> tuple[int, int]:
    """Return the lowest address of an array's elements, and the one just behind the highest.

    Both are equal for an array without elements.
    """
    low = address_of(array)
    if array.flags.forc:
        return low, low + array.nbytes
    if array.size == 0:
        return low, low
    high = low + array.itemsize
    for count, stride in zip(array.shape, array.strides, strict=True):
        if stride >= 0:
            high += (count - 1) * stride
        else:
            low += (count - 1) * stride
    return low, high


def spec_of(array: Array) -> ArraySpec:
    """Describe an array as it lies in memory, from its lowest address on.

    ``view(root, spec_of(array))`` is that array again if `root` begins at ``extent_of(array)[0]``.
    """
    if array.flags.c_contiguous:
        return ArraySpec(array.dtype, array.shape)
    return ArraySpec(array.dtype, array.shape, array.strides, address_of(array) - extent_of(array)[0])


def compact(array: Array) -> tuple[bytes, Array, tuple[int, ...] | None]:
    """Say how to copy an array so that it takes as little room as possible.

    Its memory order is kept where it is C's or Fortran's (with gaps or without), and elements that
    it repeats by a stride of zero are copied once.

    Returns
    -------
    spec : bytes
        What the copy is, encoded.
    source : ndarray
        What to copy.
    strides : tuple of int or None
        Where to: the strides of the copy, None for C order.
    """
    shape, steps = array.shape, array.strides
    repeated = [step == 0 and count > 1 for step, count in zip(steps, shape, strict=True)]
    source = array
    if True in repeated:
        source = array[tuple(slice(0, 1) if once else slice(None) for once in repeated)]
    order = [abs(step) for step, count in zip(steps, source.shape, strict=True) if count > 1]
    fortran = len(order) > 1 and order == sorted(order)
    strides = [0] * len(shape)
    step = array.itemsize
    axes = range(len(shape))
    for axis in axes if fortran else reversed(axes):
        strides[axis] = step
        step *= source.shape[axis]
    copied = tuple(strides) if fortran else None
    spread = tuple(0 if once else step for once, step in zip(repeated, strides, strict=True))
    return pack_spec(array.dtype, shape, spread if fortran or True in repeated else None), source, copied


class _Window:
    """Memory of somebody else's array, in the form that numpy takes without a buffer."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, owner: Array, **interface: Any) -> None:
        self.owner = owner
        self.__array_interface__ = {"version": 3, **interface}


def readonly(array: Array) -> Array:
    """Return a view that cannot be written through, whatever is done to its flags.

    Parameters
    ----------
    array : ndarray
        Of any dtype. Subclasses other than `numpy.memmap` only get their ``writeable`` flag cleared.

    Returns
    -------
    ndarray
        The same elements at the same address; keeps `array` alive.
    """
    if type(array) is not _ndarray:
        if type(array) is np.memmap:
            plain = readonly(array.view(_ndarray)).view(np.memmap)
            plain.__array_finalize__(array)
            return plain
        result = array.view()
        result.flags.writeable = False
        return result
    dtype = array.dtype
    if array.flags.forc and array.nbytes and dtype.kind in "biufcSUV" and dtype.names is None:
        # frombuffer keeps the read-only memoryview as base; ndarray(buffer=memoryview) looks behind it.
        root = np.frombuffer(PickleBuffer(cast("Any", array)).raw().toreadonly(), np.uint8)
        return _ndarray(array.shape, dtype, root, 0, array.strides)
    if dtype.char == "O":
        return np.asarray(memoryview(cast("Any", array)).toreadonly())
    if not is_plain_dtype(dtype):
        result = array.view()
        result.flags.writeable = False
        return result
    low, high = extent_of(array)
    window = _Window(array, data=(low, True), shape=(high - low,), typestr="|u1")
    root = np.asarray(window)
    if low == high:
        return _ndarray(array.shape, dtype, root)
    return _ndarray(array.shape, dtype, root, address_of(array) - low, array.strides)


def writable_alias(array: Array) -> Bytes:
    """Return the bytes of a contiguous array as a writable one, whatever its flags say; keeps `array` alive.

    For libraries that know no read-only memory, and over memory that could be written but for a flag.
    """
    if array.flags.writeable or not array.nbytes:
        return array.reshape(-1).view(np.uint8) if array.nbytes else np.empty(0, np.uint8)
    window = _Window(array, data=(address_of(array), False), shape=(array.nbytes,), typestr="|u1")
    return np.asarray(window)
