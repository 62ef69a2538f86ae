"""What any bytes do to the readers of frames and descriptors: a value, or one of the errors that they document."""

from __future__ import annotations

import contextlib
import pickle
import random
import struct
from unittest import mock

import numpy as np

from shmengine import codec
from shmengine._native import crc32c, ffi
from shmengine.errors import Corrupt, SerializationError, StaleReference
from shmengine.workers import messages
from tests.helpers.arrays import aligned

REFUSALS = (Corrupt, StaleReference, SerializationError)
COPIED_MAX = 1 << 20
SHARED = np.arange(4096, dtype=np.uint8)
MARKERS = 0xA5  # of the memory around a frame


def seeds():
    """Sound frames of every kind."""
    table = {"a": np.arange(6.0).reshape(2, 3), "b": [np.zeros(3, "i2"), b"xyz", None, 1 << 70, -1.5, "text"]}
    scalars = [np.int8(3), np.datetime64(3, "s"), np.zeros(1, "i4,f8")[0], np.str_("text"), np.bytes_(b"\0")]
    reference = codec.SharedReference(1, 2, 3, 64)
    return [
        frame.to_bytes()
        for frame in (
            codec.encode(np.arange(10.0)),
            codec.encode(np.asfortranarray(np.arange(12, dtype="<u2").reshape(3, 4))),
            codec.encode(np.broadcast_to(np.float32(3), (4, 5))),
            codec.encode(np.zeros(3, [("x", "i4"), ("y", "f8", 2)])),
            codec.encode(table),
            codec.encode(table, allow_pickle=False),
            codec.encode(scalars, allow_pickle=False),
            codec.encode(((), {}, True, False, 2 + 1j, np.int8(3)), allow_pickle=True),
            codec.encode([memoryview(b"bytes"), bytearray(100)]),
            codec.encode([np.arange(3), np.arange(9.0)[::2]], share=lambda _: reference),
        )
    ]


def resealed(raw):
    """The same bytes with the lengths and the checksum of a frame, so that what is behind the header is looked at."""
    raw = bytearray(raw)
    if len(raw) < codec.HEADER_BYTES:
        return bytes(raw)
    checked = min(struct.unpack_from("<Q", raw, 32)[0], len(raw) - codec.HEADER_BYTES)
    raw[:4] = codec.FRAME_MAGIC
    raw[8] = codec.FRAME_VERSION
    raw[9] = 1 + raw[9] % 3
    raw[10:12] = b"\0\0"
    struct.pack_into("<QQ", raw, 24, len(raw), checked)
    struct.pack_into("<I", raw, 4, crc32c(raw[8 : codec.HEADER_BYTES + checked]))
    return bytes(raw)


def _arrays_in(obj):
    if isinstance(obj, np.ndarray):
        yield obj
    elif isinstance(obj, (list, tuple)):
        for part in obj:
            yield from _arrays_in(part)
    elif isinstance(obj, dict):
        for key, part in obj.items():
            yield from _arrays_in(key)
            yield from _arrays_in(part)


def _check_value(obj, root):
    """Every element of every array can be read, and lies in the frame or in what was shared."""
    for array in _arrays_in(obj):
        if array.size == 0:
            continue
        low, high = np.lib.array_utils.byte_bounds(array)
        homes = [(home.ctypes.data, home.ctypes.data + home.nbytes) for home in (root, SHARED)]
        assert any(start <= low <= high <= end for start, end in homes), "an array outside of its frame"
        if array.size <= COPIED_MAX:
            array.copy()


def _decode(root, *, trusted, **options):
    """Decode; an unpickling is only allowed if the frame's checks succeed, and is not really done unless `trusted`."""
    sound = False
    with contextlib.suppress(Corrupt):
        codec.inspect_frame(root)
        sound = True

    def load(in_band, *, buffers):
        assert sound or not options["verify"], "unpickled a frame whose checks fail"
        return pickle.loads(in_band, buffers=buffers) if trusted else list(buffers)

    with mock.patch.object(codec, "pickle", mock.Mock(loads=load)):
        return codec.decode(root, resolve=lambda _: SHARED, **options)


def check_frame(raw, *, trusted=False):
    """Any bytes: a value that lies where it may, or a refusal."""
    around = aligned(len(raw) + 128)
    around[:] = MARKERS
    root = around[64 : 64 + len(raw)]
    root[:] = np.frombuffer(raw, np.uint8)
    for verify in (True, False):
        for allow_pickle in (True, False):
            options = {"verify": verify, "allow_pickle": allow_pickle}
            try:
                value = _decode(root, trusted=trusted, **options)
            except REFUSALS:
                continue
            _check_value(value, root)
            if sum(array.nbytes for array in _arrays_in(value)) <= COPIED_MAX:
                _decode(root, trusted=trusted, copy=True, **options)
    assert (around[:64] == MARKERS).all()
    assert (around[64 + len(raw) :] == MARKERS).all()


def check_descriptor(raw):
    """Any bytes as the spec of a message."""
    block = ffi.new("shmr_block *")
    block.spec_bytes = min(len(raw), 128)
    ffi.memmove(block.spec, raw, block.spec_bytes)
    with contextlib.suppress(Corrupt):
        messages.number_in(block)
    messages.account_of(block)


def check_bytes(raw):
    """What a fuzzer calls: the bytes as they are, and as a frame with a good checksum."""
    check_frame(raw)
    check_frame(resealed(raw))
    check_descriptor(raw)


def mutated(raw, rng: random.Random):
    """Some bytes of a frame changed, taken away or put in."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw)) if raw else 0
        choice = rng.randrange(5)
        if choice == 0 and raw:
            raw[at] = rng.randrange(256)
        elif choice == 1 and raw:
            raw[at] ^= 1 << rng.randrange(8)
        elif choice == 2 and len(raw) >= 8:
            at = rng.randrange(len(raw) - 7)
            struct.pack_into(
                "<Q", raw, at, rng.choice([0, 1, 64, (1 << 63) - 1, (1 << 64) - 1, 1 << 62, len(raw), 4096])
            )
        elif choice == 3:
            raw[at : at + rng.randint(0, 9)] = b""
        else:
            raw[at:at] = rng.randbytes(rng.randint(0, 9))
    return bytes(raw)
