"""Memory-mapped arrays travel as the name of their file, and only where that is the same thing."""

from __future__ import annotations

import os

import numpy as np
import pytest

from shmengine.codec import decode, encode
from shmengine.errors import ShmError, StaleReference
from shmengine.filemap import forget_files
from tests.helpers import open_fds


@pytest.fixture
def path(tmp_path):
    yield tmp_path / "data.bin"
    forget_files()


def make_mapped(path):
    array = np.memmap(path, "<i4", "w+", shape=(40, 60))
    array[:] = np.arange(array.size).reshape(array.shape)
    return array


CUTS = {
    "whole": lambda a: a,
    "rows": lambda a: a[5:9],
    "strided": lambda a: a[::2, 1::3],
    "negative": lambda a: a[::-3, ::-1],
    "transposed": lambda a: a.T,
    "plain view": lambda a: np.asarray(a)[3:],
    "plain strided": lambda a: np.asarray(a)[::-2, ::7],
    "other dtype": lambda a: a.view("<u2"),
    "reshaped": lambda a: a.reshape(-1)[7:],
    "broadcast": lambda a: np.broadcast_to(a[1], (3, 60)),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_views_travel_by_name(cut, mode, path):
    mapped = make_mapped(path)
    array = CUTS[cut](mapped)
    for obj, first in ((array, lambda x: x), ([array, array], lambda x: x[0])):
        encoded = encode(obj, memmap_mode=mode)
        assert (encoded.bytes_inline, encoded.bytes_shared) == (0, array.nbytes)
        assert encoded.nbytes < 700
        back = first(decode(encoded.to_bytes()))
        assert type(back) is type(array)
        assert (back.shape, back.dtype, back.strides) == (array.shape, array.dtype, array.strides)
        assert (back == array).all()
        assert back.flags.writeable == (mode == "r+" and cut != "broadcast") or cut == "broadcast"
    mapped[8, 8] += 1000
    assert (back == array).all()  # the same pages


def test_a_received_view_travels_on(path):
    mapped = make_mapped(path)
    first = decode(encode(mapped[3:, ::2]).to_bytes())
    second = encode(first[2:])
    assert second.bytes_inline == 0
    assert (decode(second.to_bytes()) == mapped[5:, ::2]).all()


def test_writes_reach_the_file(path):
    mapped = make_mapped(path)
    decode(encode(mapped[2], memmap_mode="r+").to_bytes())[5] = -1
    assert mapped[2, 5] == -1


def test_a_file_opened_for_reading_is_never_opened_for_writing(path):
    mapped = make_mapped(path)
    mapped.flush()
    reading = np.memmap(path, "<i4", "r", shape=(40, 60))
    assert not decode(encode(reading, memmap_mode="r+").to_bytes()).flags.writeable


@pytest.mark.parametrize("offset", [4, 4096, 4100, 8192])
def test_offsets(path, offset):
    mapped = make_mapped(path)
    mapped.flush()
    shifted = np.memmap(path, "<i4", "r", offset=offset, shape=(100,))
    encoded = encode(shifted[3:50:5])
    assert encoded.bytes_inline == 0
    assert (decode(encoded.to_bytes()) == np.arange(9600 // 4)[offset // 4 :][3:50:5]).all()


def private(mapped, path):
    mapped.flush()
    return np.memmap(path, "<i4", "c", shape=(40, 60))


def deleted(mapped, path):
    os.unlink(path)
    return mapped


def replaced(mapped, path):
    os.rename(path, f"{path}.old")
    path.write_bytes(bytes(9600))
    return mapped


def copied(mapped, path):
    return mapped.copy()


def computed(mapped, path):
    return mapped + 0


def nameless(mapped, path):
    with open(path, "rb") as file:
        descriptor = os.dup(file.fileno())
    with os.fdopen(descriptor, "rb") as file:
        return np.memmap(file, "<i4", "r", shape=(40, 60))


@pytest.mark.parametrize("change", [private, deleted, replaced, copied, computed, nameless])
def test_what_is_not_the_file_travels_as_data(path, change):
    mapped = make_mapped(path)
    expected = np.array(mapped)
    array = change(mapped, path)
    for cut in (array, np.asarray(array)[3:]):
        encoded = encode([cut])
        assert encoded.bytes_inline == cut.nbytes
        back = decode(encoded.to_bytes())[0]
        assert type(back) is np.ndarray
        assert (back == expected[-len(cut) :]).all()


def test_replaced_after_a_first_encoding(path):
    mapped = make_mapped(path)
    assert encode(mapped).bytes_inline == 0
    replaced(mapped, path)
    assert encode(mapped).bytes_inline == mapped.nbytes


def test_data_travels_where_names_must_not(path):
    mapped = make_mapped(path)
    for encoded in (encode(mapped, memmap_mode=None), encode(mapped, allow_pickle=False)):
        assert encoded.bytes_inline == mapped.nbytes
        assert (decode(encoded.to_bytes()) == mapped).all()


@pytest.mark.parametrize("known", [False, True])
def test_the_reader_checks_the_file(path, known):
    mapped = make_mapped(path)
    raw = encode(mapped[10:]).to_bytes()
    if known:
        decode(raw)
    os.truncate(path, 4096)
    with pytest.raises(StaleReference, match="too short"):
        decode(raw)
    os.rename(path, f"{path}.old")
    with pytest.raises(StaleReference, match=r"data\.bin"):
        decode(raw)
    path.write_bytes(bytes(9600))
    with pytest.raises(StaleReference, match="not the file"):
        decode(raw)


def test_a_file_that_grew_is_mapped_anew(path):
    mapped = make_mapped(path)
    decode(encode(mapped).to_bytes())
    os.truncate(path, 100_000)
    bigger = np.memmap(path, "<i4", "r")
    encoded = encode(bigger[20_000:])
    assert encoded.bytes_inline == 0
    assert decode(encoded.to_bytes()).shape == (5_000,)


def test_few_files_stay_open(tmp_path):
    before = len(open_fds())
    kept = []
    for number in range(60):
        array = np.memmap(tmp_path / str(number), "u1", "w+", shape=100)
        array[:] = number
        kept.append(decode(encode(array).to_bytes())[:5])
        del array
    views = [int(view[0]) for view in kept]
    assert views == list(range(60))
    kept.clear()
    assert len(open_fds()) <= before + 20
    forget_files()
    assert len(open_fds()) == before


def test_damaged_references_are_errors(path):
    mapped = make_mapped(path)
    raw = encode([mapped[3:]]).to_bytes()
    for position in range(64, len(raw)):
        damaged = bytearray(raw)
        damaged[position] ^= 0x41
        with pytest.raises(ShmError):
            decode(bytes(damaged))
