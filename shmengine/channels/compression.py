"""Compression of frames by blosc2: bytes of a kind side by side first (shuffle), then lz4 or zstd.

A compressed message has its own header, and a table with the sizes of each piece of the frame, as it was and as it is::

    | magic, CRC of all that follows, version, pieces, bytes of the frame | table | piece 0 | piece 1 | ... | padding

A frame of more than `FREE_BYTES` has at most `MOST_RATIO` times the bytes of its message, which is padded where it
would be smaller: so whoever wants a receiver to take memory has to send something for it.
"""

from __future__ import annotations

import importlib
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from shmengine import config
from shmengine._native import crc32c
from shmengine.arrays import Bytes
from shmengine.errors import Corrupt

__all__ = ["Compressor", "decompress", "is_compressed"]

MAGIC = b"SHMZ"
VERSION = 1
_HEADER = struct.Struct("<4sIIIQ")
_CHECKED_FROM = 8
_ENTRY = struct.Struct("<QQ")

SMALLEST_BYTES = 1 << 12  # smaller pieces stay as they are
LARGEST_BYTES = 1 << 30  # larger ones are cut: blosc2 takes less than 2 GiB
MOST_ITEM_BYTES = 255
FREE_BYTES = 64 << 20
MOST_RATIO = 256
LEVELS: Final = {"lz4": 5, "zstd": 1}

SAMPLE_BYTES = 1 << 17
LOOK_SECONDS = 1.0  # between two looks of "auto" whether it pays
MEASURE_BYTES = 1 << 20  # that have to have gone before a link's speed is known
GAIN = 0.8  # of the time that must be left for compression to pay


def _blosc2() -> Any:
    try:
        return importlib.import_module("blosc2")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "compression needs blosc2: pip install 'shmengine[compression]'", name=error.name
        ) from None


class Compressor:
    """Compresses the messages of one sender.

    Parameters
    ----------
    method : {"lz4", "zstd", "auto"}
        With ``"auto"`` the method is chosen by how fast messages have been going out, and by what a sample of the
        data gains; none as long as none would be faster.
    measure : callable, optional
        For ``"auto"``: returns how many seconds a byte takes, or None while that is not known. Without it messages have
        gone when they are `written`.

    Raises
    ------
    ModuleNotFoundError
        blosc2 is not installed.
    """

    def __init__(
        self,
        method: str,
        clock: Callable[[], float] = time.perf_counter,
        measure: Callable[[], float | None] | None = None,
    ) -> None:
        self._library = _blosc2()
        self._clock = clock
        self._measure = measure or self._seconds_per_byte
        self._auto = method == "auto"
        self.method = None if self._auto else method
        self._looked = -LOOK_SECONDS
        self._began = 0.0
        self._bytes_written = 0
        self._seconds = 0.0

    def compress(
        self, pieces: list[Any], nbytes: int, item_bytes: Mapping[int, int]
    ) -> tuple[list[Any], int]:
        """Return a message's pieces compressed, and their bytes; or as they are, if it does not pay.

        Parameters
        ----------
        pieces : list of bytes or memoryview
            Flat.
        nbytes : int
            Of all of them.
        item_bytes : mapping
            Size of the elements of pieces, by where they begin.
        """
        if nbytes >= SMALLEST_BYTES:
            if self._auto:
                self._choose(pieces, item_bytes)
            if self.method is not None:
                pieces, nbytes = self._compress(self.method, pieces, nbytes, item_bytes)
        self._began = self._clock()
        return pieces, nbytes

    def written(self, nbytes: int) -> None:
        """Note that the message has gone."""
        if self._auto:
            self._seconds += self._clock() - self._began
            self._bytes_written += nbytes
            if self._bytes_written > MEASURE_BYTES << 6:  # what was long ago counts less
                self._bytes_written >>= 1
                self._seconds /= 2

    def _seconds_per_byte(self) -> float | None:
        """Return it as `written` has seen it."""
        return self._seconds / self._bytes_written if self._bytes_written >= MEASURE_BYTES else None

    def _compress(
        self, method: str, pieces: list[Any], nbytes: int, item_bytes: Mapping[int, int]
    ) -> tuple[list[Any], int]:
        table: list[bytes] = []
        stored: list[Any] = []
        at = 0
        for piece in pieces:
            size = item_bytes.get(at, 1)
            at += len(piece)
            for start in range(0, len(piece), LARGEST_BYTES):
                part = piece[start : start + LARGEST_BYTES]
                packed = self._pack(method, part, size) if len(part) >= SMALLEST_BYTES else part
                table.append(_ENTRY.pack(len(part), len(packed)))
                stored.append(packed)
        after = _HEADER.size + sum(map(len, table)) + sum(map(len, stored))
        if after >= nbytes:
            return pieces, nbytes
        header = bytearray(_HEADER.pack(MAGIC, 0, VERSION, len(table), nbytes))
        if nbytes > FREE_BYTES and after * MOST_RATIO < nbytes:
            stored.append(bytes(-(-nbytes // MOST_RATIO) - after))
            after += len(stored[-1])
        prefix = b"".join(table)
        crc = crc32c(prefix, crc32c(header[_CHECKED_FROM:]))
        for packed in stored:
            crc = crc32c(packed, crc)
        struct.pack_into("<I", header, 4, crc)
        return [bytes(header) + prefix, *stored], after

    def _pack(self, method: str, part: Any, size: int) -> Any:
        """Return a piece compressed, or as it is, if that is smaller."""
        library = self._library
        packed = library.compress2(
            part,
            typesize=size if size <= MOST_ITEM_BYTES else 1,
            codec=library.Codec.LZ4 if method == "lz4" else library.Codec.ZSTD,
            clevel=LEVELS[method],
            filters=[library.Filter.SHUFFLE],
            filters_meta=[0],
            nthreads=1,
        )
        return packed if len(packed) < len(part) else part

    def _choose(self, pieces: list[Any], item_bytes: Mapping[int, int]) -> None:
        """Now and then: choose the method by a sample of the largest piece."""
        now = self._clock()
        if now - self._looked < LOOK_SECONDS:
            return
        per_byte = self._measure()
        if per_byte is None:  # not so far, or not any more
            self.method = None
            return
        self._looked = now
        starts = np.cumsum([0, *map(len, pieces)])
        most = max(range(len(pieces)), key=lambda i: len(pieces[i]))
        piece, size = pieces[most], item_bytes.get(int(starts[most]), 1)
        middle = (len(piece) // 2) // size * size
        sample = piece[middle : middle + SAMPLE_BYTES] if len(piece) > SAMPLE_BYTES else piece
        self.method, best = None, GAIN * per_byte
        for method in LEVELS:
            began = self._clock()
            packed = self._pack(method, sample, size)
            cost = (self._clock() - began + len(packed) * per_byte) / len(sample)
            if cost < best:
                self.method, best = method, cost


def is_compressed(wire: Bytes) -> bool:
    """Tell whether a message was compressed."""
    return bytes(wire[:4]) == MAGIC


def decompress(wire: Bytes, empty: Callable[[int], Bytes]) -> Bytes:
    """Return the frame of a compressed message.

    Parameters
    ----------
    wire : ndarray of uint8
    empty : callable
        Returns memory for so many bytes.

    Raises
    ------
    Corrupt
        It is damaged, or claims to be larger than there is memory, or than it may be for its size.
    ModuleNotFoundError
        blosc2 is not installed.
    """
    memory = memoryview(wire)  # type: ignore[arg-type]
    if len(memory) < _HEADER.size:
        raise Corrupt(f"{len(memory)} bytes are too few for a compressed message", "length")
    _, crc, version, count, nbytes = _HEADER.unpack_from(memory)
    start = _HEADER.size + count * _ENTRY.size
    if version != VERSION or start > len(memory):
        raise Corrupt(f"a compressed message of version {version}, with {count} pieces", "version")
    if crc32c(memory[_CHECKED_FROM:]) != crc:
        raise Corrupt("the checksum of a compressed message is wrong", "CRC")
    table = list(_ENTRY.iter_unpack(memory[_HEADER.size : start]))
    if sum(raw for raw, _ in table) != nbytes or sum(stored for _, stored in table) > len(memory) - start:
        raise Corrupt("the sizes in a compressed message do not fit together", "length")
    if nbytes > max(FREE_BYTES, MOST_RATIO * len(memory)):
        raise Corrupt(
            f"a compressed message of {config.format_bytes(len(memory))} claims to be of {config.format_bytes(nbytes)}:"
            f" more than {MOST_RATIO} times as much, and than {config.format_bytes(FREE_BYTES)}",
            "length",
        )
    library = _blosc2()
    for raw, stored in table:
        if stored != raw and _raw_bytes(library, memory[start : start + stored]) != raw:
            raise Corrupt("a piece of a compressed message is none, or of another size", "pieces")
        start += stored
    if nbytes > config.memory_available():
        raise Corrupt(
            f"a compressed message claims to be of {config.format_bytes(nbytes)}: more than the memory",
            "length",
        )
    frame = empty(nbytes)
    start -= sum(stored for _, stored in table)
    at = 0
    for raw, stored in table:
        source, target = memory[start : start + stored], frame[at : at + raw]
        if stored == raw:
            target[:] = np.frombuffer(source, np.uint8)
        else:
            try:
                library.decompress2(source, dst=target, nthreads=1)
            except Exception as error:
                raise Corrupt(f"a piece of a compressed message is damaged: {error}", "pieces") from None
        start += stored
        at += raw
    return frame


def _raw_bytes(library: Any, packed: memoryview) -> int:
    """Return for how many bytes a piece says it is, if it looks like one; else -1."""
    try:
        raw, stored, _ = library.get_cbuffer_sizes(packed)
    except Exception:
        return -1
    return int(raw) if stored == len(packed) else -1
