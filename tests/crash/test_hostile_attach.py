"""What lies under the name of a region, or becomes of its file, may be anything: an error, and no SIGBUS."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import struct
import threading

import numpy as np
import pytest

from shmengine import config, region
from shmengine._native import lib
from shmengine.arena import Arena
from shmengine.engine import Engine
from shmengine.errors import Corrupt, LayoutMismatch, StaleReference
from shmengine.region import Region, RegionConfig
from shmengine.ring import Ring

GEOMETRY = RegionConfig(arena_bytes=4 << 20, capacities=(4,), participants=4, doorbells=8)
PAGE = 4096
HEADER_WORDS = 3 + 15  # magic, ABI, checksum, geometry


@pytest.fixture
def name():
    made = f"test-{secrets.token_hex(4)}"
    yield made
    path = region._path(made)
    if os.path.isdir(path) and not os.path.islink(path):
        os.rmdir(path)
    elif os.path.lexists(path):
        os.unlink(path)


@pytest.fixture
def soon(monkeypatch):
    """Nobody is waited for who would have to finish creating a region."""
    monkeypatch.setattr(region, "ATTACH_SECONDS", 0.02)


@pytest.fixture
def named(name):
    with_name = Region.create(GEOMETRY, name)
    yield with_name
    with_name.close()


def write_word(fd, offset, value):
    os.pwrite(fd, struct.pack("<Q", value & (1 << 64) - 1), offset)


def refused(name, match):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(LayoutMismatch, match=match):
        Region.attach_name(name)
    assert len(os.listdir("/proc/self/fd")) == before


# --- what the name leads to ------------------------------------------------------------------------------------


def test_a_symbolic_link(named, name):
    link = region._path(f"{name}.link")
    os.symlink(region._path(name), link)
    try:
        refused(f"{name}.link", "symbolic link")
    finally:
        os.unlink(link)


def test_a_directory(name):
    os.mkdir(region._path(name))
    refused(name, "directory")


def test_a_fifo(name):
    os.mkfifo(region._path(name), 0o600)
    refused(name, "not a plain file")


def test_a_socket(name):
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(region._path(name))
        refused(name, "cannot be opened")


def test_a_file_of_somebody_else(named, name, monkeypatch):
    owner = os.geteuid()
    if owner == 0:
        owner = 12345
        os.chown(region._path(name), owner, -1)
    else:  # only root can give files away
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    refused(name, f"belongs to user {owner}")


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o602])
def test_a_file_that_others_may_open(named, name, mode):
    os.chmod(region._path(name), mode)
    refused(name, f"mode is {mode:04o}")


def test_regions_are_private_and_have_no_name_unless_it_was_given(named, name):
    info = os.stat(region._path(name))
    assert (info.st_mode & 0o7777, info.st_uid) == (0o600, os.geteuid())
    unnamed = Region.create(GEOMETRY)
    info = os.fstat(unnamed.fd)
    assert (info.st_mode & 0o7777, info.st_uid, info.st_nlink) == (0o600, os.geteuid(), 0)
    root = os.open("/", os.O_RDONLY)
    with pytest.raises(FileNotFoundError):
        os.link(f"/proc/self/fd/{unnamed.fd}", region._path(f"{name}-x"), src_dir_fd=root, dst_dir_fd=root)
    os.close(root)
    unnamed.close()


# --- what is in the file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 100, PAGE, 1 << 20])
def test_zeros(name, length, soon):
    fd = os.open(region._path(name), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.truncate(fd, length)
    os.close(fd)
    refused(name, "nobody has finished")


@pytest.mark.parametrize("seed", range(4))
def test_noise(name, seed):
    with open(region._path(name), "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(np.random.default_rng(seed).bytes(3 * PAGE))
    refused(name, "begin like a region")


@pytest.mark.parametrize("word", range(HEADER_WORDS))
def test_a_wrong_word_in_the_header(named, name, word, soon):
    """Magic, ABI, checksum, geometry."""
    good = struct.unpack("<Q", os.pread(named.fd, 8, 8 * word))[0]
    for wrong in (good ^ 1, good ^ 1 << 40, ~good, good + 256, 0xFFFFFFFF):
        write_word(named.fd, 8 * word, wrong)
        refused(name, "version and geometry")
    write_word(named.fd, 8 * word, good)
    Region.attach_name(name).close()


@pytest.mark.parametrize("change", [-(1 << 30), -PAGE, PAGE])
def test_another_length(named, name, change):
    length = os.fstat(named.fd).st_size
    kept = max(length + change, 1 << 17)  # what the test's own region touches when it leaves
    os.truncate(named.fd, kept)
    refused(name, "another length")
    os.truncate(named.fd, length)


def test_a_poisoned_region(named, name):
    write_word(named.fd, 256, 1)
    with pytest.raises(Corrupt, match="beyond repair"):
        Region.attach_name(name)


# --- while it is in use -------------------------------------------------------------------------------------------


def cut_behind_the_control_words(ring):
    fd = ring._region.fd
    os.truncate(fd, os.fstat(fd).st_size - (2 << 20))  # of the arena; the words are in front


def test_growing_a_file_that_was_cut():
    with Ring(4, "8 MiB") as ring:
        ring.send(np.arange(100))
        cut_behind_the_control_words(ring)
        with pytest.raises(Corrupt):
            ring.send(np.zeros(5 << 20, np.uint8), timeout=60)
        with pytest.raises(Corrupt):  # and for everybody from then on
            ring.receive(timeout=1)
        assert os.fstat(ring._region.fd).st_size == lib.shmr_mapped_bytes(ring._region.handle)


def test_waiting_on_a_file_that_was_cut():
    with Ring(4, "8 MiB") as ring:
        threading.Timer(0.3, cut_behind_the_control_words, (ring,)).start()
        with pytest.raises(Corrupt):
            ring.receive(timeout=60)


@pytest.mark.parametrize("length", [0, 4096])
def test_touching_what_was_cut(length):
    """It reads as zeros, and the next call says why; SIGBUS ends nobody."""
    with Ring(4, "8 MiB") as ring:
        ring.send(np.arange(100_000))
        claim = ring.claim((1000, 1000), np.uint8)
        array = ring.receive()
        os.truncate(ring._region.fd, length)
        claim.array[...] = 1
        assert (array == 0).all()
        with pytest.raises(Corrupt, match="was cut"):
            claim.commit()
        for call in (lambda: ring.send(np.ones(3)), ring.receive, ring.lease, lambda: ring.claim(3)):
            with pytest.raises(Corrupt, match="was cut"):
                call()


def test_a_task_cuts_the_file_of_its_engine():
    def cut():
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}").startswith("/dev/shm/#"):
                    os.ftruncate(int(name), 4096)

    with Engine(1, memory="64 MiB") as engine, pytest.raises(Corrupt, match="was cut"):
        engine.submit(cut).result(60)
        engine.submit(cut).result(60)


@pytest.mark.parametrize("block", [0, 4095, 1 << 20, (1 << 32) - 1, 1 << 32, (1 << 64) - 1])
@pytest.mark.parametrize("generation", [0, 1, (1 << 32) - 1, 1 << 32, (1 << 64) - 1])
def test_references_to_nothing(named, block, generation):
    with pytest.raises(StaleReference):
        Arena(named).resolve((named.number, block, generation, 0))


def test_memory_files_are_sealed(monkeypatch):
    monkeypatch.setattr(config, "shm_free", lambda: 0)
    sealed = Region.create(GEOMETRY)
    length = os.fstat(sealed.fd).st_size
    for other in (0, length - PAGE, length + PAGE):
        with pytest.raises(PermissionError):
            os.truncate(sealed.fd, other)
    with pytest.raises(PermissionError):
        fcntl.fcntl(sealed.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    second = Region.attach(os.dup(sealed.fd))
    second.close()
    sealed.close()
