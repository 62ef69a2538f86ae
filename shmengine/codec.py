"""Objects to frames and back, with array data beside the pickle instead of in it.

A *frame* is one run of bytes that describes itself, so that the same frame can lie in a block of
shared memory or travel through a pipe, a message queue or a socket::

    0        64                       64-byte aligned
    | header | table | specs | in-band | part 0 | part 1 | ...

The table has one entry for each part: a buffer, an array (its `ArraySpec` is among the specs) or
a reference to an array that is already in shared memory. A bare array has no in-band bytes at all.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np

from shmengine._native import copy_bytes, crc32c, ffi, lib
from shmengine.arrays import (
    Array,
    Bytes,
    GivenReference,
    SharedReference,
    address_of,
    compact,
    decode_spec,
    extent_of,
    is_plain_dtype,
    pack_spec,
    view,
)
from shmengine.errors import (
    Corrupt,
    SerializationError,
    ShmError,
    StaleReference,
)
from shmengine.filemap import mapping_behind
from shmengine.pickling import Place, Reducers, dump
from shmengine.plain import dump_plain, load_plain

__all__ = [
    "LONG",
    "Encoded",
    "FrameInfo",
    "SerializationError",
    "SharedReference",
    "decode",
    "encode",
    "inspect_frame",
    "mapping_behind",
    "number_of",
]

FRAME_MAGIC = b"SHMF"
FRAME_VERSION = 1
FRAME_ALIGNMENT = 64
LONG = 64 << 10  # bytes of a message; from here on it is worth a call to announce it

# What the in-band bytes are.
KIND_PICKLE = 1
KIND_PLAIN = 2
KIND_ARRAY = 3  # none: the object is part 0

# magic, CRC; version, kind, flags, producer; in-band bytes, total bytes, checked bytes, sequence;
# parts, bytes of table and specs. The CRC begins behind itself, at the version, and goes on to the
# end of the checked bytes, which are counted from the end of the header.
_HEADER = struct.Struct("<4sIBBHIQQQQII8x")
HEADER_BYTES = 64
_CRC = struct.Struct("<I")
_CRC_AT = 4
_CHECKED_FROM = 8
_NUMBER = struct.Struct("<12xI24xQ")  # of all this the producer and the sequence

# offset from the start of the frame, bytes, bytes of the spec, what it is
_ENTRY = struct.Struct("<QQII")
_PART_BUFFER = 0
_PART_ARRAY = 1
_PART_SHARED = 2  # from here on without bytes in the frame
_PART_GIVEN = 3
_PART_SHARED_BUFFER = 4  # as _PART_SHARED, read as the buffer that it was
_CHECKED = 1 << 32  # in place of the bytes of one without any: the rest is a checksum of what it refers to

_REFERENCE = struct.Struct("<QQQQ")

# Up to here the in-band bytes are joined, copied at once, and always covered by the CRC.
SMALL_BYTES = 1 << 16
# From here on an array is copied around the cache: its reader is another core.
LARGE_BYTES = 1 << 18
_FIRST_LOOK = 4096

_ndarray = np.ndarray
_ZEROS = bytes(FRAME_ALIGNMENT)


Share = Callable[[Array], "SharedReference | None"]
Resolve = Callable[[SharedReference], Bytes]


class _Parts:
    """The parts of a frame in the making."""

    __slots__ = (
        "bytes_shared",
        "check_given",
        "entries",
        "memmap_mode",
        "named",
        "place",
        "reducers",
        "references",
        "share",
        "sources",
        "specs",
    )

    def __init__(
        self,
        share: Share | None,
        memmap_mode: str | None,
        reducers: Reducers | None,
        place: Place | None,
    ) -> None:
        self.share = share
        self.memmap_mode = memmap_mode
        self.reducers = reducers
        self.place = place
        self.check_given = False
        self.entries: list[tuple[int, int, int]] = []  # bytes, bytes of the spec, what it is
        self.specs: list[bytes] = []
        # For each part with bytes: an array and the strides of its copy, or a memoryview and None.
        self.sources: list[tuple[Any, tuple[int, ...] | None]] = []
        self.references: list[SharedReference] = []
        self.named: list[Array] = []  # what these refer to: perhaps nobody else keeps it
        self.bytes_shared = 0

    def reset(self) -> None:
        self.bytes_shared = 0
        self.entries.clear()
        self.specs.clear()
        self.sources.clear()
        self.references.clear()
        self.named.clear()

    def add_buffer(self, buffer: pickle.PickleBuffer) -> None:
        raw = buffer.raw()
        if self.share is not None and raw.nbytes:
            array = np.frombuffer(raw, np.uint8)
            reference = self.share(array)
            if reference is not None:
                self._add_shared(array, reference, _PART_SHARED_BUFFER)
                return
        self.entries.append((raw.nbytes, 0, _PART_BUFFER))
        self.sources.append((raw, None))

    def add_array(self, array: Array) -> None:
        share = self.share
        if share is not None:
            reference = share(array)
            if reference is not None:
                self._add_shared(array, reference)
                return
        strides = None
        if array.flags.c_contiguous:
            spec = pack_spec(array.dtype, array.shape)
        else:
            spec, array, strides = compact(array)
        self.specs.append(spec)
        self.entries.append((array.nbytes, len(spec), _PART_ARRAY))
        self.sources.append((array, strides))

    def _add_shared(self, array: Array, reference: SharedReference, what: int = _PART_SHARED) -> None:
        spec = _REFERENCE.pack(*reference)
        if array.flags.c_contiguous:
            spec += pack_spec(array.dtype, array.shape)
        else:
            low = extent_of(array)[0]
            spec += pack_spec(array.dtype, array.shape, array.strides, address_of(array) - low)
        self.references.append(reference)
        self.named.append(array)
        self.bytes_shared += array.nbytes
        self.specs.append(spec)
        if type(reference) is GivenReference:
            check = _CHECKED | crc32c_of(array) if self.check_given else 0
            self.entries.append((check, len(spec), _PART_GIVEN))
        else:
            self.entries.append((0, len(spec), what))


def _flat(source: Any, nbytes: int, strides: tuple[int, ...] | None) -> memoryview:
    """Return the bytes of a part, as they lie in a frame; without a copy if it is laid out like that."""
    if type(source) is memoryview:
        return source
    if strides == source.strides and source.flags.f_contiguous:
        source = source.T
    elif strides is not None:
        laid_out = np.empty(nbytes, np.uint8)
        _ndarray(source.shape, source.dtype, laid_out, 0, strides)[...] = source
        return memoryview(cast("Any", laid_out))
    return memoryview(cast("Any", np.ascontiguousarray(source).reshape(-1).view(np.uint8)))


def copy_array(target: Array, source: Array) -> None:
    """Copy between arrays of one shape and dtype; a large one around the cache, since its reader is another core."""
    plain = source.flags.c_contiguous and target.flags.c_contiguous and not source.dtype.hasobject
    if plain and source.nbytes >= LARGE_BYTES:
        copy_bytes(address_of(target), address_of(source), source.nbytes)
    else:
        target[...] = source


def crc32c_of(array: Array) -> int:
    """Return the checksum of all bytes between the first and the last of an array."""
    low, high = extent_of(array)
    return int(lib.shmr_crc32c(0, ffi.cast("void *", low), high - low))


class Encoded:
    """An object ready to be written as a frame. The object's arrays are not copied before that.

    Attributes
    ----------
    nbytes : int
        Size of the whole frame.
    bytes_inline : int
        Bytes of arrays, buffers and big ``bytes`` objects that are copied into the frame.
    bytes_shared : int
        Bytes of arrays that travel by reference instead, to shared memory or to a mapped file.
    references : list of SharedReference
        Those in shared memory.
    named : list of ndarray
        The arrays that these refer to. A reducer may have made them: nothing else may keep them until
        the frame is written, or their references are held.
    """

    __slots__ = (
        "_body",
        "_copies",
        "_counts",
        "_kind",
        "bytes_inline",
        "bytes_shared",
        "named",
        "nbytes",
        "references",
    )

    def __init__(self, kind: int, parts: _Parts, pieces: list[Any]) -> None:
        in_band_bytes = sum(map(len, pieces)) if pieces else 0
        inline = 0
        copies: list[tuple[int, int, Any, tuple[int, ...] | None]] = []
        entries = parts.entries
        prefix: list[Any] = []
        prefix_bytes = 0
        end = HEADER_BYTES + in_band_bytes
        if entries:
            prefix_bytes = _ENTRY.size * len(entries) + sum(map(len, parts.specs))
            end += prefix_bytes
            sources = iter(parts.sources)
            for nbytes, spec_bytes, what in entries:
                offset = 0
                if what < _PART_SHARED:
                    offset = (end + 63) & -64
                    end = offset + nbytes
                    inline += nbytes
                    copies.append((offset, nbytes, *next(sources)))
                prefix.append(_ENTRY.pack(offset, nbytes, spec_bytes, what))
            prefix += parts.specs
        if in_band_bytes <= SMALL_BYTES:
            prefix += pieces
            self._body: list[Any] = [b"".join(prefix)]
        else:
            self._body = [b"".join(prefix), *pieces]
            inline += sum(len(piece) for piece in pieces if len(piece) >= SMALL_BYTES)
        self._kind = kind
        self._counts = (in_band_bytes, len(entries), prefix_bytes)
        self._copies = copies
        self.nbytes = end
        self.bytes_inline = inline
        self.bytes_shared = parts.bytes_shared
        self.references = parts.references
        self.named = parts.named

    def write_into(
        self, target: Any, *, sequence: int = 0, producer: int = 0, checksum: bool = False
    ) -> None:
        """Write the frame; every array is copied exactly once, straight to its place.

        Parameters
        ----------
        target : memoryview or ndarray of uint8
            Writable and contiguous, at least `nbytes` long, 64-byte aligned.
        sequence, producer : int, optional
            What the header says about the sender.
        checksum : bool, optional
            Let the CRC cover all bytes, and not only what is not array data.
        """
        root: Bytes = target if type(target) is _ndarray else np.frombuffer(target, np.uint8)
        memory = memoryview(cast("Any", root))
        at = HEADER_BYTES
        for piece in self._body:
            end = at + len(piece)
            memory[at:end] = piece
            at = end
        for offset, nbytes, source, strides in self._copies:
            if at < offset:
                memory[at:offset] = _ZEROS[at - offset :]
            at = offset + nbytes
            if type(source) is memoryview:
                memory[offset:at] = source
            elif nbytes:
                copy_array(_ndarray(source.shape, source.dtype, root, offset, strides), source)
        checked = self.nbytes - HEADER_BYTES if checksum else len(self._body[0])
        memory[:HEADER_BYTES] = self._header(sequence, producer, checked)
        _CRC.pack_into(memory, _CRC_AT, crc32c(memory[_CHECKED_FROM : HEADER_BYTES + checked]))

    def _header(self, sequence: int, producer: int, checked: int) -> bytes:
        """Return the header, its CRC still zero."""
        in_band_bytes, part_count, prefix_bytes = self._counts
        return _HEADER.pack(
            FRAME_MAGIC,
            0,
            FRAME_VERSION,
            self._kind,
            0,
            producer,
            in_band_bytes,
            self.nbytes,
            checked,
            sequence,
            part_count,
            prefix_bytes,
        )

    def pieces(self, *, sequence: int = 0, producer: int = 0, checksum: bool = False) -> list[Any]:
        """Return the frame as buffers whose bytes follow each other, for vectored writes.

        Parameters
        ----------
        sequence, producer, checksum
            As for `write_into`.

        Returns
        -------
        list of bytes or memoryview
            Flat. Large contiguous arrays are not copied: they must not change until the buffers have been written.
        """
        pieces: list[Any] = [b"", *self._body]
        at = HEADER_BYTES + sum(map(len, self._body))
        for offset, nbytes, source, strides in self._copies:
            if at < offset:
                pieces.append(_ZEROS[at - offset :])
            at = offset + nbytes
            if nbytes:
                pieces.append(_flat(source, nbytes, strides))
        checked = self.nbytes - HEADER_BYTES if checksum else len(self._body[0])
        header = bytearray(self._header(sequence, producer, checked))
        crc = crc32c(header[_CHECKED_FROM:])
        for piece in pieces[1:] if checksum else pieces[1:2]:
            crc = crc32c(piece, crc)
        _CRC.pack_into(header, _CRC_AT, crc)
        pieces[0] = bytes(header)
        return pieces

    def item_bytes(self) -> dict[int, int]:
        """Return the size of the numbers that each array part consists of, by where it begins in the frame."""
        return {
            offset: source.itemsize // 2 if source.dtype.kind == "c" else source.itemsize
            for offset, nbytes, source, _ in self._copies
            if nbytes and type(source) is not memoryview
        }

    def to_bytes(self) -> bytes:
        """Return the frame as bytes."""
        memory = np.empty(self.nbytes, np.uint8)
        self.write_into(memory)
        return memory.tobytes()


def encode(
    obj: Any,
    *,
    share: Share | None = None,
    allow_pickle: bool = True,
    by_value: bool = True,
    memmap_mode: str | None = "r",
    reducers: Reducers | None = None,
    place: Place | None = None,
    check_given: bool = False,
    label: str = "",
) -> Encoded:
    """Make an object ready to be written as a frame.

    Parameters
    ----------
    obj : object
        Anything that cloudpickle can pickle. Arrays of every kind and layout, masked arrays, record
        arrays and other subclasses travel as data beside the pickle; arrays come back read-only
        if the frame is. A ``memoryview`` comes back as one, over the frame.
    share : callable, optional
        ``share(array)`` returns a `SharedReference` if the array lies in shared memory that the
        reader can reach (a `GivenReference` if only the reader will write to it). It may be called
        more than once for an array.
    allow_pickle : bool, optional
        False: only arrays, NumPy's scalars, None, bool, int, float, complex, str, bytes, list, tuple
        and dict, and no references to files.
    by_value : bool, optional
        Whether functions and classes that other processes cannot import (those of ``__main__``
        first of all) go by value. False is for processes that share the caller's modules by fork.
    memmap_mode : {"r", "r+", None}, optional
        How the reader opens a `numpy.memmap` or a view of one, which travels as the name of its
        file; with None its data travels.
    reducers : Reducers, optional
        How objects of some types are pickled, before all rules but those for other libraries' memory.
    place : callable, optional
        ``place(array)`` returns the array that goes in its place, wherever it is in `obj`, and a function that is
        called with it on the other side, or None. Not asked about files that travel by name.
    check_given : bool, optional
        Whether the reader is to verify what a `GivenReference` refers to.
    label : str, optional
        What the path in an error begins with.

    Raises
    ------
    SerializationError
        With the path to what cannot be encoded, for instance ``args[0]['lock']``.
    """
    parts = _Parts(share, memmap_mode, reducers, place)
    parts.check_given = check_given
    if (
        type(obj) is _ndarray
        and place is None
        and is_plain_dtype(obj.dtype)
        and (obj.base is None or memmap_mode is None or mapping_behind(obj) is None)
    ):
        parts.add_array(obj)
        return Encoded(KIND_ARRAY, parts, [])
    if not allow_pickle:
        return Encoded(KIND_PLAIN, parts, dump_plain(obj, parts, label))
    return Encoded(KIND_PICKLE, parts, dump(obj, parts, by_value=by_value, label=label))


class FrameInfo(NamedTuple):
    """What a frame's header says."""

    kind: int
    nbytes: int
    sequence: int
    producer: int
    in_band_bytes: int
    part_count: int
    prefix_bytes: int
    checked_bytes: int


def inspect_frame(frame: Any, *, verify: bool = True) -> FrameInfo:
    """Check a frame and return what its header says, without decoding it.

    Parameters
    ----------
    frame : ndarray of uint8, or any flat buffer
        May be longer than the frame.
    verify : bool, optional
        Whether to verify the checksum.

    Raises
    ------
    Corrupt
        If this is no frame, a damaged one, or not the whole of it.
    """
    root: Bytes = frame if type(frame) is _ndarray else np.frombuffer(frame, np.uint8)
    return FrameInfo(*_open_frame(root, verify)[1:])


def number_of(frame: Bytes) -> tuple[int, int]:
    """Return sequence and producer of a frame that was decoded, and so is sound."""
    producer, sequence = _NUMBER.unpack_from(cast("Any", frame))
    return sequence, producer


def _open_frame(root: Bytes, verify: bool) -> tuple[Any, ...]:
    """Return a private copy of a frame's beginning, as far as it will be parsed, and the header."""
    # Somebody may still write into shared memory: copy, check the copy, use the copy.
    raw = root[:_FIRST_LOOK].tobytes()
    if len(raw) < HEADER_BYTES:
        raise Corrupt(f"{len(raw)} bytes are too few for a frame", "length")
    magic, crc, version, kind, flags, producer, in_band, total, checked, sequence, count, prefix = (
        _HEADER.unpack_from(raw)
    )
    if magic != FRAME_MAGIC:
        raise Corrupt(f"no frame: it begins with {magic!r}", "magic")
    if version != FRAME_VERSION:
        raise Corrupt(f"a frame of version {version}; this is version {FRAME_VERSION}", "version")
    if not KIND_PICKLE <= kind <= KIND_ARRAY or flags:
        raise Corrupt(f"a frame of kind {kind} with flags {flags}", "kind")
    checked_end = HEADER_BYTES + checked
    body_end = HEADER_BYTES + prefix + in_band
    if total > root.nbytes or body_end > total or checked_end > total:
        raise Corrupt(f"a frame of {total} bytes ({prefix} + {in_band}) in {root.nbytes}", "length")
    if count * _ENTRY.size > prefix:
        raise Corrupt(f"{count} parts in a table of {prefix} bytes", "parts")
    if body_end > len(raw):
        rest = root[_FIRST_LOOK : body_end if in_band <= SMALL_BYTES else HEADER_BYTES + prefix]
        raw += rest.tobytes()
    if verify:
        memory: Any = raw if checked_end <= len(raw) else memoryview(cast("Any", root))
        if crc32c(memory[_CHECKED_FROM:checked_end]) != crc:
            raise Corrupt("the checksum of a frame is wrong", "CRC")
    return raw, kind, total, sequence, producer, in_band, count, prefix, checked


def decode(
    frame: Any,
    *,
    resolve: Resolve | None = None,
    allow_pickle: bool = True,
    verify: bool = True,
    copy: bool = False,
) -> Any:
    """Turn a frame into the object it was made from.

    Parameters
    ----------
    frame : ndarray of uint8, or any flat buffer
        May be longer than the frame. Arrays are views of it, read-only if it is, and keep it alive.
    resolve : callable, optional
        ``resolve(reference)`` returns the memory of a block in shared memory from its first byte, writable for
        a `GivenReference`.
    allow_pickle : bool, optional
        False: refuse frames that contain a pickle, without looking at it.
    verify : bool, optional
        Whether to verify the checksum. Lengths and bounds are always verified.
    copy : bool, optional
        Whether arrays are private, writable copies.

    Raises
    ------
    Corrupt
        If this is no frame or a damaged one.
    StaleReference
        If it names shared memory or a file that cannot be reached any more.
    SerializationError
        If it is sound and cannot be unpickled here, or must not be.
    """
    root: Bytes = frame if type(frame) is _ndarray else np.frombuffer(frame, np.uint8)
    raw, kind, total, _, _, in_band_bytes, count, prefix_bytes, checked_bytes = _open_frame(root, verify)
    prefix_end = HEADER_BYTES + prefix_bytes
    body_end = prefix_end + in_band_bytes
    parts = _read_parts(root, raw, count, prefix_end, body_end, total, resolve, copy) if count else []
    if kind == KIND_ARRAY:
        if len(parts) != 1 or type(parts[0]) is memoryview or in_band_bytes:
            raise Corrupt("a frame of one array has something else", "parts")
        return parts[0]
    in_band: Any = memoryview(raw if body_end <= len(raw) else cast("Any", root))[prefix_end:body_end]
    if kind == KIND_PLAIN:
        return load_plain(in_band, parts)
    if not allow_pickle:
        raise SerializationError("a frame with a pickle, and allow_pickle is False")
    try:
        return pickle.loads(in_band, buffers=parts)
    except ShmError:
        raise
    except Exception as error:
        if verify and HEADER_BYTES + checked_bytes >= body_end:
            message = f"cannot unpickle in this process: {type(error).__name__}: {error}"
            raise SerializationError(message) from error
        raise Corrupt(f"the pickle in a frame is damaged: {error}", "in-band bytes") from error


def _read_parts(
    root: Bytes,
    raw: bytes,
    count: int,
    prefix_end: int,
    body_end: int,
    total: int,
    resolve: Resolve | None,
    copy: bool,
) -> list[Any]:
    spec_start = HEADER_BYTES + count * _ENTRY.size
    parts: list[Any] = []
    for offset, nbytes, spec_bytes, what in _ENTRY.iter_unpack(raw[HEADER_BYTES:spec_start]):
        spec_end = spec_start + spec_bytes
        if spec_end > prefix_end:
            raise Corrupt("the spec of an array is outside of its place", "parts")
        if _PART_SHARED <= what <= _PART_SHARED_BUFFER:
            kind = GivenReference if what == _PART_GIVEN else SharedReference
            shared: Any = _read_shared(raw[spec_start:spec_end], kind, nbytes, resolve, copy)
            if what == _PART_SHARED_BUFFER:
                if shared.dtype != np.uint8 or shared.ndim != 1:
                    raise Corrupt(f"a buffer of {shared.ndim} dimensions of {shared.dtype}", "parts")
                shared = memoryview(shared)
            parts.append(shared)
            spec_start = spec_end
            continue
        if offset < body_end or offset + nbytes > total or offset & (FRAME_ALIGNMENT - 1):
            raise Corrupt(f"a part of {nbytes} bytes at {offset} in a frame of {total}", "parts")
        if what == _PART_ARRAY:
            spec = decode_spec(raw[spec_start:spec_end])
            spec_start = spec_end
            strides = spec.strides
            if strides is None:
                array = view(root, spec, offset)
                if array.nbytes != nbytes or spec.offset:
                    raise Corrupt(f"{nbytes} bytes for an array of {array.nbytes}", "parts")
            else:
                if spec.offset or min(strides, default=0) < 0:
                    raise Corrupt(f"impossible strides {strides}", "parts")
                array = view(root[: offset + nbytes], spec, offset)
                if 0 in strides:  # several elements in one place: not to be written to
                    array.flags.writeable = False
            parts.append(array.copy("K") if copy else array)
        elif what == _PART_BUFFER:
            part: Any = root[offset : offset + nbytes]
            parts.append(memoryview(part.copy() if copy else part))
        else:
            raise Corrupt(f"a part of unknown kind {what}", "parts")
    return parts


def _read_shared(
    raw: bytes, kind: type[SharedReference], check: int, resolve: Resolve | None, copy: bool
) -> Array:
    if len(raw) < _REFERENCE.size:
        raise Corrupt(f"{len(raw)} bytes for a reference to shared memory", "parts")
    reference = kind(*_REFERENCE.unpack_from(raw))
    spec = decode_spec(raw[_REFERENCE.size :])
    if resolve is None:
        raise StaleReference(f"{reference} is shared memory of others")
    array = view(resolve(reference), spec, reference.offset)
    if check & _CHECKED and check != _CHECKED | crc32c_of(array):
        raise Corrupt("an array that is named by reference was changed on its way", "payload")
    return array.copy("K") if copy else array
