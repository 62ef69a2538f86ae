"""All that crosses the border between the main process and its workers, nothing more.

::

    main ── TASK ──► task ring ──► any worker          a batch of calls of one function, tag = batch number
         ── BLOCK ──►                                  one call of a block function, likewise
    main ◄── VALUE | NUMBER | BATCH | BROKEN ◄──       the same tag; through the result ring
         ◄── PART                                      before that, if one task of a batch takes long
         ◄── PLACED                                    instead of a block function's result
         ◄── EVENT                                     from main to itself: a worker died; behind its last results

A frame (`shmengine.codec`) lies in a block of its own and names the blocks that it refers to, so these stay
alive for as long as the frame does.
"""

from __future__ import annotations

import functools
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from shmengine._native import ffi, lib
from shmengine._native.status import INTERRUPTED, OK
from shmengine.arena import Arena
from shmengine.arrays import Bytes, readonly
from shmengine.codec import LONG, Encoded, decode
from shmengine.errors import Corrupt

__all__ = [
    "BATCH",
    "BLOCK",
    "BROKEN",
    "EVENT",
    "LEAVING",
    "MODES",
    "NUMBER",
    "OWN",
    "PART",
    "PLACED",
    "PRIVATE",
    "READ_ONLY",
    "RESULT_RING",
    "SHARED",
    "SHORT",
    "STARTING",
    "TASK",
    "TASK_RING",
    "USUAL_ERRSTATE",
    "VALUE",
    "WHOLE_BATCH",
    "account_of",
    "load_shared",
    "pack_account",
    "pack_part",
    "part_of",
    "read_frame",
    "with_errstate",
    "write_frame",
]

TASK_RING = 0
RESULT_RING = 1

TASK = 10
VALUE = 11  # one task, its value bare
BATCH = 12  # a list of (True, value), (False, encoded exception) or, if it is of unpickling, (None, encoded exception)
BROKEN = 13  # the initializer failed; the payload is an encoded exception
EVENT = 14
SHORT = 15  # there was no memory for the results of a batch; the payload is an encoded exception
PART = 19  # like BATCH, of the first tasks; the last ones were not begun, and are given back
BLOCK = 16  # main to worker: one block of each array as bare bytes, see `shmengine.workers.scatter`
NUMBER = 18  # worker to main: one task, its value a number that is in the descriptor
PLACED = 17  # worker to main: its result is in its place, or named by reference

# What a worker says it is doing, beside "task so-and-so of batch so-and-so":
STARTING = (1 << 64) - 1  # as the batch: it has not run its initializer yet
LEAVING = (1 << 64) - 2  # likewise: it has done its number of tasks
WHOLE_BATCH = (1 << 64) - 1  # as the task: it decodes the batch, or encodes its results

# How a task's arrays appear to the function; said in the descriptor, since it decides how to decode.
READ_ONLY = b"\0"
PRIVATE = b"\1"
SHARED = b"\2"
MODES = {False: READ_ONLY, True: PRIVATE, "private": PRIVATE, "shared": SHARED}
OWN = b"\1"  # behind it: what results hold of memory that came by reference is copied, for main alone

# A function up to this size travels with each batch; a larger one is put into shared memory once.
INLINE_FUNCTION_BYTES = 4096
OBJECTS_KEPT = 32
objects_kept_bytes = 1 << 62  # together; a worker sets a part of the memory budget

_ACCOUNT = struct.Struct("<QQQ")
_PART = struct.Struct("<QQ")


# What an unpickled reference reads from: set where objects are decoded.
class _Unpickling(threading.local):
    """What this thread is unpickling: there is no other way to hand something down."""

    resolve: Callable[[Any], Bytes] | None = None


_unpickling = _Unpickling()
_loaded: dict[tuple[int, int], list[Any]] = {}  # (address, bytes) of a frame -> frame, object, last use


def write_frame(
    arena: Arena,
    ring: int,
    kind: int,
    tag: int,
    encoded: Encoded,
    *,
    payload_check: int = 0,
    spec: bytes = b"",
    items: int = -1,
    deadline: int = -1,
    block: Any = None,
) -> int:
    """Claim, fill and commit one message; return a status code.

    Parameters
    ----------
    spec : bytes, optional
        A few bytes carried in the descriptor: `MODES` of a task, `pack_account` of a result.
    items : int
        A ring whose items interrupt the wait (ITEM_WAITS); -1: none.
    """
    handle = arena.region.handle
    if block is None:
        block = ffi.new("shmr_block *")
    references, count = ffi.NULL, len(encoded.references)
    if count:
        references = ffi.new("shmr_ref[]", count)
        for i, (_, number, generation, _offset) in enumerate(encoded.references):
            references[i].block = number
            references[i].generation = generation
    block.state = 0
    try:
        while True:
            status: int = lib.shmr_claim(handle, encoded.nbytes, references, count, items, deadline, block)
            if status == OK:
                break
            if status != INTERRUPTED:
                return status
        if encoded.nbytes >= LONG:
            lib.shmr_announce(handle, ring)
        encoded.write_into(arena.region.root(block.offset, encoded.nbytes, writable=True))
        block.kind = kind
        block.tag = tag
        block.length = encoded.nbytes
        ffi.memmove(block.spec, spec, len(spec))
        block.spec_bytes = len(spec)
        while True:
            status = lib.shmr_commit(handle, ring, payload_check, items, deadline, block)
            if status != INTERRUPTED:
                return status
    finally:
        if block.state:  # not committed: no room, an error, or a signal's handler
            lib.shmr_abort(handle, block)


def pack_account(nanoseconds: int, copied: int, shared: int) -> bytes:
    """Return what the work on a batch took, and the bytes of its results that were copied and shared, as a spec."""
    return _ACCOUNT.pack(nanoseconds, copied, shared)


_PYTHON_NUMBERS = {float: b"f", int: b"i", bool: b"b", type(None): b"-"}
_NUMPY_NUMBERS = frozenset("?bBhHiIlLqQefdgFDG")
_DOUBLE, _LONG = struct.Struct("<d"), struct.Struct("<q")


def pack_number(value: Any) -> bytes | None:
    """Return a number (or None, or a NumPy scalar of a numeric type) as a few bytes; None if it is none, or large."""
    kind = _PYTHON_NUMBERS.get(type(value))
    if kind is None:
        if isinstance(value, np.generic) and value.dtype.char in _NUMPY_NUMBERS:
            dtype = value.dtype
            return b"n" + dtype.char.encode() + value.tobytes() if type(value) is dtype.type else None
        return None
    if kind == b"f":
        return kind + _DOUBLE.pack(value)
    if kind == b"i":
        return kind + _LONG.pack(value) if -(1 << 63) <= value < 1 << 63 else None
    return kind + b"\1" if value else kind


def unpack_number(raw: bytes) -> Any:
    """Return what `pack_number` packed."""
    kind = raw[:1]
    if kind == b"n":
        char = raw[1:2].decode()
        if char not in _NUMPY_NUMBERS:  # NumPy would warn of some
            raise ValueError(f"{char!r} is no dtype of numbers")
        return np.frombuffer(raw, char, 1, 2)[0]
    if kind == b"f":
        return _DOUBLE.unpack_from(raw, 1)[0]
    if kind == b"i":
        return _LONG.unpack_from(raw, 1)[0]
    return None if kind == b"-" else len(raw) > 1


def write_number(
    arena: Arena, tag: int, nanoseconds: int, number: bytes, *, payload_check: int, block: Any
) -> int:
    """Commit a task's value that `pack_number` packed to the result ring; return a status code."""
    spec = pack_account(nanoseconds, 0, 0) + number
    return write_bare(arena, NUMBER, tag, spec, payload_check=payload_check, block=block)


def number_in(block: Any) -> tuple[int, Any]:
    """Return (nanoseconds, value) of such a message.

    Raises
    ------
    Corrupt
        If its descriptor has something else.
    """
    raw = ffi.buffer(block.spec, block.spec_bytes)[:]
    try:
        return _ACCOUNT.unpack_from(raw)[0], unpack_number(raw[_ACCOUNT.size :])
    except (struct.error, ValueError, IndexError) as error:
        raise Corrupt(f"not a number in a descriptor: {error}", "spec") from error


def write_bare(
    arena: Arena,
    kind: int,
    tag: int,
    spec: bytes,
    *,
    references: Any = ffi.NULL,
    count: int = 0,
    payload_check: int,
    block: Any,
) -> int:
    """Commit a message without payload, all of it in the descriptor, to the result ring; return a status code."""
    handle = arena.region.handle
    status: int = INTERRUPTED
    while status in (INTERRUPTED, lib.SHMR_DENIED):  # a few bytes: there will be room for them
        status = lib.shmr_claim(handle, 1, references, count, -1, -1, block)
    if status != OK:
        return status
    block.kind, block.tag, block.length, block.spec_bytes = kind, tag, 0, len(spec)
    ffi.memmove(block.spec, spec, len(spec))
    status = INTERRUPTED
    while status == INTERRUPTED:
        status = lib.shmr_commit(handle, RESULT_RING, payload_check, -1, -1, block)
    if status != OK:
        lib.shmr_abort(handle, block)
    return status


class _WithErrstate(functools.partial[Any]):
    """A function under the floating-point error handling of its caller."""

    errors: dict[str, Any]

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        with np.errstate(**self.errors):
            return super().__call__(*args, **kwargs)


USUAL_ERRSTATE = {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"}


def with_errstate(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return `fn` with the `numpy.errstate` of the caller, if that is not the usual one."""
    errors = np.geterr()
    if errors == USUAL_ERRSTATE:
        return fn
    wrapped = _WithErrstate(fn)
    wrapped.errors = {
        kind: how if how in ("ignore", "warn", "raise", "print") else "warn" for kind, how in errors.items()
    }
    return wrapped


def task_rng(entropy: Any, index: int) -> np.random.Generator:
    """Return the generator of task `index`: independent of all others, whatever worker runs it."""
    return np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=(index,)))


def account_of(block: Any) -> tuple[int, int, int]:
    """Return (nanoseconds, bytes copied, bytes shared) that a result brings along."""
    if block.spec_bytes != _ACCOUNT.size:
        return 0, 0, 0
    return _ACCOUNT.unpack(ffi.buffer(block.spec, _ACCOUNT.size))


def pack_part(done: int, rest: int) -> bytes:
    """Return how many tasks of a batch have ended, and how many are given back, as a spec."""
    return _PART.pack(done, rest)


def part_of(block: Any) -> tuple[int, int]:
    """Return what `pack_part` packed; zeros if it is something else."""
    return _PART.unpack(ffi.buffer(block.spec, _PART.size)) if block.spec_bytes == _PART.size else (0, 0)


def read_frame(root: Bytes, resolve: Callable[[Any], Bytes], *, copy: bool = False) -> Any:
    """Decode the frame in a leased block."""
    _unpickling.resolve = resolve
    try:
        return decode(root, resolve=resolve, verify=True, copy=copy)
    finally:
        _unpickling.resolve = None  # it would keep the region


# --- objects that were put ---------------------------------------------------------------------------------------


def load_shared(frame: Bytes, copy: bool = False, resolve: Callable[[Any], Bytes] | None = None) -> Any:
    """Decode an object that was put into shared memory, once (in workers, until they have nothing to do).

    Its arrays are read-only views of that memory, or (`copy`) private. Without `resolve`: as for the frame
    that is being unpickled.
    """
    key = (frame.__array_interface__["data"][0], frame.nbytes)
    known = _loaded.get(key)
    if known is not None:
        known[2] = time.perf_counter_ns()
        return known[1]
    # The frame is kept, so its block, and with it the key, stays what it is. One that a function brought along is a
    # private copy, and no different.
    obj = decode(readonly(frame), resolve=resolve or _unpickling.resolve, copy=copy)
    if len(_loaded) >= OBJECTS_KEPT or sum(size for _, size in _loaded) + frame.nbytes > objects_kept_bytes:
        _loaded.clear()
    _loaded[key] = [frame, obj, time.perf_counter_ns()]
    return obj


def forget_shared() -> None:
    """Let go of the objects that `load_shared` has kept."""
    _loaded.clear()


def forget_unused(before: int) -> None:
    """Let go of those that were last used before this time."""
    for key in [key for key, (_, _, used) in _loaded.items() if used < before]:
        del _loaded[key]


def has_shared() -> bool:
    """Tell whether `load_shared` keeps anything."""
    return bool(_loaded)


def empty_block() -> Any:
    """Return a fresh ``shmr_block``."""
    return ffi.new("shmr_block *")


def frame_root(arena: Arena, block: Any, *, writable: bool = False) -> Bytes:
    """Return the flat bytes of a leased message."""
    root: np.ndarray[Any, Any] = arena.region.root(block.offset, block.length, writable=writable)
    return root
