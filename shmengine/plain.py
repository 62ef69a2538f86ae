"""A small tagged encoding without pickle, for data from senders that are not trusted.

It carries None, bool, int, float, complex, str, bytes, NumPy's scalars, and list, tuple and dict of
these, with arrays as parts beside it. Reading it makes nothing but these.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from shmengine.arrays import Array, decode_spec, is_plain_dtype, pack_spec, view
from shmengine.errors import Corrupt, SerializationError

__all__ = ["brief", "dump_plain", "load_plain"]

MAX_DEPTH = 200

_WORD = struct.Struct("<BQ")
_INT = struct.Struct("<Bq")
_FLOAT = struct.Struct("<Bd")
_COMPLEX = struct.Struct("<Bdd")
_NONE, _FALSE, _TRUE, _SMALL_INT, _BIG_INT, _REAL, _PAIR, _STR, _BYTES, _LIST, _TUPLE, _DICT, _PART = range(
    13
)
# NumPy's scalars: numbers, by the character of their dtype; times and read-only records, and writable ones, by its
# spec; texts, whose dtype would lose zeros at their end.
_NUMBER, _SCALAR, _RECORD, _NUMPY_STR, _NUMPY_BYTES = range(13, 18)

_NUMBER_DTYPES = {ord(character): np.dtype(character) for character in "?bhilqBHILQefdgFDG"}
_NUMBER_TAGS = {dtype.type: bytes((_NUMBER, code)) for code, dtype in _NUMBER_DTYPES.items()}


class _Parts(Protocol):
    def add_array(self, array: Array) -> None: ...


def dump_plain(obj: Any, parts: _Parts, label: str = "") -> list[bytes]:
    """Encode an object; its arrays go to `parts`.

    Raises
    ------
    SerializationError
        For anything that would need a pickle, with the path to it.
    """
    pieces: list[bytes] = []
    _dump(obj, parts, pieces.append, {}, label, 0)
    return pieces


def _dump(obj: Any, parts: _Parts, emit: Any, numbers: dict[int, int], path: str, depth: int) -> None:
    cls = type(obj)
    if depth > MAX_DEPTH:
        raise SerializationError(f"nested deeper than {MAX_DEPTH}, or in itself, at {path}", path)
    if obj is None:
        emit(bytes((_NONE,)))
    elif cls is bool:
        emit(bytes((_TRUE if obj else _FALSE,)))
    elif cls is int:
        if -(1 << 63) <= obj < 1 << 63:
            emit(_INT.pack(_SMALL_INT, obj))
        else:
            raw = obj.to_bytes(obj.bit_length() // 8 + 1, "little", signed=True)
            emit(_WORD.pack(_BIG_INT, len(raw)) + raw)
    elif cls is float:
        emit(_FLOAT.pack(_REAL, obj))
    elif cls is complex:
        emit(_COMPLEX.pack(_PAIR, obj.real, obj.imag))
    elif cls is str or cls is np.str_:
        raw = obj.encode("utf-8", "surrogatepass")
        emit(_WORD.pack(_STR if cls is str else _NUMPY_STR, len(raw)) + raw)
    elif cls is bytes or cls is np.bytes_:
        emit(_WORD.pack(_BYTES if cls is bytes else _NUMPY_BYTES, len(obj)))
        emit(obj)
    elif cls is list or cls is tuple:
        emit(_WORD.pack(_LIST if cls is list else _TUPLE, len(obj)))
        for index, part in enumerate(obj):
            _dump(part, parts, emit, numbers, f"{path}[{index}]", depth + 1)
    elif cls is dict:
        emit(_WORD.pack(_DICT, len(obj)))
        for key, part in obj.items():
            shown = brief(key)
            _dump(key, parts, emit, numbers, f"{path}.key({shown})", depth + 1)
            _dump(part, parts, emit, numbers, f"{path}[{shown}]", depth + 1)
    elif cls in (np.ndarray, np.memmap) and is_plain_dtype(obj.dtype):
        number = numbers.get(id(obj))
        if number is None:
            number = numbers[id(obj)] = len(numbers)
            parts.add_array(obj)
        emit(_WORD.pack(_PART, number))
    elif isinstance(obj, np.generic) and cls in _NUMBER_TAGS:
        emit(_NUMBER_TAGS[cls] + obj.tobytes())
    elif isinstance(obj, np.generic) and cls is obj.dtype.type and is_plain_dtype(obj.dtype):
        spec = pack_spec(obj.dtype, ())
        emit(_WORD.pack(_RECORD if obj.flags.writeable else _SCALAR, len(spec)) + spec + obj.tobytes())
    else:
        what = f"a {cls.__qualname__!r} object" if cls is not np.ndarray else f"an array of dtype {obj.dtype}"
        where = f" at {path}" if path else ""
        raise SerializationError(f"{what}{where} needs a pickle, and allow_pickle is False", path)


def brief(key: Any) -> str:
    """Return how a path names an element by its key."""
    try:
        return f"{key!r:.80}"
    except Exception:  # a large int, too deep a nest, or whatever a user's __repr__ raises
        return f"<{type(key).__qualname__}>"


def load_plain(raw: Any, parts: list[Any]) -> Any:
    """Decode what `dump_plain` made.

    Raises
    ------
    Corrupt
        If the bytes are anything else.
    """
    memory = memoryview(raw)
    try:
        obj, end = _load(memory, 0, parts, 0)
    except Corrupt:
        raise
    except Exception as error:
        raise Corrupt(f"not a plain encoding: {error}", "in-band bytes") from error
    if end != len(memory):
        raise Corrupt(f"{len(memory) - end} bytes too many behind a plain encoding", "in-band bytes")
    return obj


def _load(memory: memoryview, at: int, parts: list[Any], depth: int) -> tuple[Any, int]:
    if depth > MAX_DEPTH:
        raise Corrupt(f"nested deeper than {MAX_DEPTH}", "in-band bytes")
    tag = memory[at]
    if tag <= _TRUE:
        return (None, False, True)[tag], at + 1
    if tag == _SMALL_INT:
        return _INT.unpack_from(memory, at)[1], at + _INT.size
    if tag == _REAL:
        return _FLOAT.unpack_from(memory, at)[1], at + _FLOAT.size
    if tag == _PAIR:
        _, real, imag = _COMPLEX.unpack_from(memory, at)
        return complex(real, imag), at + _COMPLEX.size
    if tag == _NUMBER:
        dtype = _NUMBER_DTYPES[memory[at + 1]]
        return np.frombuffer(memory, dtype, 1, at + 2)[0], at + 2 + dtype.itemsize
    _, count = _WORD.unpack_from(memory, at)
    at += _WORD.size
    if tag == _PART:
        return parts[count], at
    if count > len(memory) - at:  # every element takes at least a byte
        raise Corrupt(f"a length of {count} with {len(memory) - at} bytes left", "in-band bytes")
    if tag in _READERS:
        return _READERS[tag](bytes(memory[at : at + count])), at + count
    if tag in (_SCALAR, _RECORD):
        return _load_scalar(memory, at, count, writable=tag == _RECORD)
    if tag in (_LIST, _TUPLE):
        elements = []
        for _ in range(count):
            element, at = _load(memory, at, parts, depth + 1)
            elements.append(element)
        return elements if tag == _LIST else tuple(elements), at
    if tag == _DICT:
        mapping = {}
        for _ in range(count):
            key, at = _load(memory, at, parts, depth + 1)
            mapping[key], at = _load(memory, at, parts, depth + 1)
        return mapping, at
    raise Corrupt(f"unknown tag {tag}", "in-band bytes")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


_READERS: dict[int, Callable[[bytes], Any]] = {
    _STR: _text,
    _BYTES: bytes,
    _BIG_INT: lambda raw: int.from_bytes(raw, "little", signed=True),
    _NUMPY_STR: lambda raw: np.str_(_text(raw)),
    _NUMPY_BYTES: np.bytes_,
}


def _load_scalar(memory: memoryview, at: int, count: int, *, writable: bool) -> tuple[Any, int]:
    spec = decode_spec(bytes(memory[at : at + count]))
    at += count
    end = at + spec.nbytes
    raw = memory[at:end]
    scalar: Any = view(np.frombuffer(bytearray(raw) if writable else bytes(raw), np.uint8), spec)[()]
    if not isinstance(scalar, np.generic):
        raise Corrupt(f"an array of shape {spec.shape} of {spec.dtype} instead of a scalar", "in-band bytes")
    return scalar, end
