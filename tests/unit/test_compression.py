"""Compression: what comes out is what went in, it is smaller where it can be, and damage is an error."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import shmengine as shm
from shmengine._native import crc32c
from shmengine.channels import compression
from shmengine.channels.compression import Compressor, decompress, is_compressed
from shmengine.channels.frames import aligned_empty
from shmengine.codec import decode, encode
from tests.helpers import run_script

METHODS = ["lz4", "zstd"]


def packed(obj, method="lz4"):
    """The wire of an object, and whether it is shorter than its frame."""
    frame = encode(obj, memmap_mode=None)
    pieces, nbytes = Compressor(method).compress(frame.pieces(sequence=7), frame.nbytes, frame.item_bytes())
    wire = np.frombuffer(b"".join(pieces), np.uint8)
    assert len(wire) == nbytes
    return wire, nbytes < frame.nbytes


def unpacked(wire):
    frame = decompress(wire, aligned_empty) if is_compressed(wire) else wire
    return decode(frame)


def random_bytes(nbytes, seed=0):
    return np.frombuffer(np.random.default_rng(seed).bytes(nbytes), np.uint8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "dtype",
    [
        "?",
        "u1",
        "<i2",
        ">i4",
        "i8",
        "f2",
        "f4",
        "f8",
        "c8",
        "c16",
        "g",
        "M8[ns]",
        "S7",
        "U5",
        "V300",
        "i4,f8",
    ],
)
def test_every_dtype_comes_back(method, dtype):
    array = np.zeros(10_000, dtype)
    array.view("u1").reshape(10_000, -1)[:, 0] = (np.arange(10_000) // 100) % 2
    wire, smaller = packed(array, method)
    assert smaller
    got = unpacked(wire)
    assert got.dtype == array.dtype
    assert got.tobytes() == array.tobytes()


@pytest.mark.parametrize("method", METHODS)
def test_numbers_are_sorted_by_significance(method):
    """Small numbers in wide elements: without shuffle lz4 finds little in them."""
    array = np.random.default_rng(0).integers(0, 256, 100_000)
    wire, smaller = packed(array, method)
    assert smaller
    assert len(wire) < array.nbytes / 5


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_compressed_goes_as_it_is(method):
    wire, smaller = packed(random_bytes(100_000), method)
    assert not smaller
    assert not is_compressed(wire)


def test_pieces_that_can_are_and_others_are_not():
    obj = {
        "noise": random_bytes(50_000),
        "zeros": np.zeros(50_000),
        "text": "x" * 100_000,
        "few": np.arange(3),
    }
    wire, smaller = packed(obj)
    assert smaller
    assert 50_000 < len(wire) < 60_000
    got = unpacked(wire)
    for name in ("noise", "zeros", "few"):
        assert np.array_equal(got[name], obj[name])
    assert got["text"] == obj["text"]


def test_small_messages_are_left_alone():
    for obj in (None, np.zeros(100), "x" * 3000):
        assert not is_compressed(packed(obj)[0])


def test_large_pieces_are_cut(monkeypatch):
    monkeypatch.setattr(compression, "LARGEST_BYTES", 10_000)
    array = np.arange(100_003, dtype="f8")
    wire, smaller = packed(array)
    assert smaller
    assert np.array_equal(unpacked(wire), array)


@settings(max_examples=60, deadline=None)
@given(
    array=hnp.arrays(
        hnp.scalar_dtypes() | hnp.array_dtypes(max_size=3),
        hnp.array_shapes(min_dims=1, max_dims=3, max_side=5),
    ),
    repeats=st.integers(1, 3000),
    method=st.sampled_from(METHODS),
)
def test_arrays_come_back(array, repeats, method):
    try:
        array = np.tile(array, (repeats, *[1] * (array.ndim - 1)))
        frame = encode(array, memmap_mode=None)
    except shm.SerializationError:
        return
    pieces, nbytes = Compressor(method).compress(frame.pieces(), frame.nbytes, frame.item_bytes())
    wire = np.frombuffer(b"".join(pieces), np.uint8)
    assert len(wire) == nbytes
    got = unpacked(wire)
    assert got.dtype == array.dtype
    assert got.shape == array.shape
    assert got.tobytes() == array.tobytes()


# --- damage -------------------------------------------------------------------------------------------


def seal(wire):
    """Make the checksum right: what only an attacker does."""
    wire = wire.copy()
    wire[4:8] = np.frombuffer(struct.pack("<I", crc32c(memoryview(wire[8:]))), np.uint8)
    return wire


def test_every_damaged_byte_is_noticed():
    wire, _ = packed({"a": np.arange(5000), "b": np.zeros(5000)})
    for at in [*range(4, 200), *range(200, len(wire), 37)]:
        damaged = wire.copy()
        damaged[at] ^= 1 << at % 8
        with pytest.raises(shm.Corrupt):
            decompress(damaged, aligned_empty)


def test_every_truncation_is_noticed():
    wire, _ = packed(np.arange(5000))
    for length in [*range(4, 100), *range(100, len(wire), 101)]:
        with pytest.raises(shm.Corrupt):
            decompress(wire[:length], aligned_empty)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_hostile_bytes_with_a_right_checksum_do_no_harm(data):
    wire, _ = packed({"a": np.arange(5000), "b": np.zeros(5000)}, data.draw(st.sampled_from(METHODS)))
    wire = wire.copy()
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(8, len(wire) - 1) | st.integers(8, 200))
        wire[at] = data.draw(st.integers(0, 255))
    wire = seal(wire[: data.draw(st.integers(24, len(wire)) | st.just(len(wire)))])
    try:
        frame = decompress(wire, aligned_empty)
        decode(frame, allow_pickle=False)
    except (shm.Corrupt, shm.SerializationError):
        return
    assert len(frame) < 1 << 20


@settings(max_examples=100, deadline=None)
@given(raw=st.binary(max_size=300))
def test_any_bytes_behind_the_magic_are_refused(raw):
    wire = np.frombuffer(compression.MAGIC + raw, np.uint8)
    with pytest.raises(shm.Corrupt):
        decompress(wire, aligned_empty)
    if len(wire) > 8:
        with pytest.raises(shm.Corrupt):
            decompress(seal(wire), aligned_empty)


@pytest.mark.parametrize("nbytes", [1 << 20, 65 << 20])
def test_what_compresses_very_well_arrives(nbytes):
    wire, smaller = packed(np.zeros(nbytes, "u1"))
    assert smaller
    assert len(wire) < nbytes // 200
    got = unpacked(wire)
    assert len(got) == nbytes
    assert not got.any()


def test_a_bomb_is_refused_before_memory_is_taken(monkeypatch):
    def never(nbytes):
        raise AssertionError(f"asked for {nbytes}")

    one, _ = packed(np.zeros(1 << 24))
    table = compression._HEADER.size
    pieces = struct.unpack_from("<I", one, 12)[0]
    entries = [list(compression._ENTRY.unpack_from(one, table + 16 * i)) for i in range(pieces)]
    largest = max(entries)
    body = bytes(one[table + 16 * pieces :])
    start = sum(stored for _, stored in entries[: entries.index(largest)])
    bomb = body[start : start + largest[1]]
    count = 20_000  # times 128 MiB
    raw = compression._HEADER.pack(compression.MAGIC, 0, compression.VERSION, count, count * largest[0])
    raw += compression._ENTRY.pack(*largest) * count + bomb * count
    with pytest.raises(shm.Corrupt, match="more than 256 times as much"):
        decompress(seal(np.frombuffer(raw, np.uint8)), never)
    monkeypatch.setattr(compression, "MOST_RATIO", 1 << 40)
    with pytest.raises(shm.Corrupt, match="more than the memory"):
        decompress(seal(np.frombuffer(raw, np.uint8)), never)
    lie = compression._HEADER.pack(compression.MAGIC, 0, compression.VERSION, 1, 1 << 40)
    lie += compression._ENTRY.pack(1 << 40, len(bomb)) + bomb
    with pytest.raises(shm.Corrupt, match="another size"):
        decompress(seal(np.frombuffer(lie, np.uint8)), never)


# --- "auto" -------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 0.0
        self.thinking = 0.0

    def __call__(self):
        self.now += self.thinking
        return self.now


def go(compressor, clock, array, link):
    """Send an array through a link of so many bytes a second; whether it was compressed."""
    frame = encode(array)
    _, nbytes = compressor.compress(frame.pieces(), frame.nbytes, frame.item_bytes())
    clock.now += nbytes / link
    compressor.written(nbytes)
    return nbytes < frame.nbytes


NUMBERS = np.arange(1 << 18)
NOISE = random_bytes(1 << 21).view("f8")


def test_auto_compresses_where_the_link_is_slow():
    clock = Clock()
    clock.thinking = 1e-3  # for each look at the clock: about 128 MB/s for a sample
    compressor = Compressor("auto", clock)
    assert not go(compressor, clock, NUMBERS, 1e6)  # nothing is known so far
    clock.now += 2
    assert go(compressor, clock, NUMBERS, 1e6)


def test_auto_stays_off_where_the_link_is_fast():
    clock = Clock()
    clock.thinking = 1e-3
    compressor = Compressor("auto", clock)
    for _ in range(5):
        assert not go(compressor, clock, NUMBERS, 1e10)
        clock.now += 2


def test_auto_stays_off_for_what_cannot_be_compressed_and_looks_again():
    clock = Clock()
    clock.thinking = 1e-4
    compressor = Compressor("auto", clock)
    for _ in range(3):
        assert not go(compressor, clock, NOISE, 1e6)
        clock.now += 2
    assert go(compressor, clock, NUMBERS, 1e6)
    clock.now += 2
    assert not go(compressor, clock, NOISE, 1e6)


def test_auto_goes_by_what_was_measured_and_stops_when_nothing_is():
    clock = Clock()
    clock.thinking = 1e-3
    speeds = []
    compressor = Compressor("auto", clock, speeds.pop)
    for pause, speed, compresses in [
        (0, None, False),
        (0, 1e-6, True),
        (0, 1e-10, True),  # it looks once a second
        (2, 1e-10, False),
        (2, 1e-6, True),
        (2, None, False),
        (0, 1e-6, True),  # at once: nothing was known, so it has not looked
    ]:
        clock.now += pause
        speeds[:] = [speed]
        assert go(compressor, clock, NUMBERS, math.inf) is compresses


# --- through channels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, "auto"])
@pytest.mark.parametrize("mechanism", ["pipe", "socket"])
def test_channels_compress(mechanism, method):
    left, right = shm.channel(mechanism, compression=method, buffer_bytes="4 MiB")
    with left, right:
        for i in range(10):
            block = np.full(30_000, i)
            left.send({"i": i, "block": block})
            got = right.receive(30)
            assert got["i"] == i
            assert np.array_equal(got["block"], block)
            assert got["block"].flags.writeable
        sent, received = left.stats(), right.stats()
        assert sent.bytes_sent == received.bytes_received
        assert sent.wire_bytes_sent == received.wire_bytes_received
        if method != "auto":
            assert sent.wire_bytes_sent < sent.bytes_sent / 10
        right.send(1)
        assert left.receive(30) == 1


def test_without_blosc2_the_error_says_what_to_install():
    run_script(
        """
        import sys
        sys.modules["blosc2"] = None
        import shmengine as shm
        try:
            shm.channel("pipe", compression="lz4")
        except ModuleNotFoundError as error:
            assert "shmengine[compression]" in str(error)
        else:
            raise AssertionError
        """,
        check=True,
    )
