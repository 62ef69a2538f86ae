"""Numbers that are believed only while the file behind them is ours."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading

import pytest

from shmengine.descriptors import Descriptor, pipe
from shmengine.errors import ShmError


@pytest.fixture
def file(tmp_path):
    (tmp_path / "ours").write_text("ours")
    with Descriptor.open(str(tmp_path / "ours"), os.O_RDONLY, "this file") as file:
        yield file


@pytest.fixture(params=["closed", "another's"])
def lost(request, tmp_path, file):
    """A descriptor that other code has closed; its number is free, or another file's."""
    number = file.number
    os.close(number)
    if request.param == "closed":
        yield file
        return
    other = os.open(tmp_path / "theirs", os.O_RDWR | os.O_CREAT)
    if other != number:
        os.dup2(other, number)
        os.close(other)
    os.pwrite(number, b"theirs", 0)
    yield file
    assert os.pread(number, 10, 0) == b"theirs"
    assert os.lseek(number, 0, os.SEEK_CUR) == 0
    os.close(number)


def test_a_descriptor_is_ours_until_it_is_closed(file):
    number = file.number
    assert file.is_ours()
    assert file.fileno() == number
    assert file.identity == (os.fstat(number).st_dev, os.fstat(number).st_ino)
    assert repr(file) == f"<Descriptor {number} of this file>"
    file.close()
    assert not file.is_ours()
    assert file.number == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_a_closed_one_says_so_and_stays_closed(file):
    number = file.number
    file.close()
    other = os.dup2(0, number)
    file.close()
    os.fstat(other)
    os.close(other)
    for use in (file.fileno, file.duplicate, file.detach):
        with pytest.raises(ShmError, match="the descriptor of this file is closed"):
            use()
    assert file.read(10) == b""


def test_no_program_inherits_what_is_opened(file):
    for one in (file, *(ends := pipe("a pipe"))):
        assert not os.get_inheritable(one.number)
    for end in ends:
        end.close()


def test_what_is_not_open_is_refused():
    with pytest.raises(OSError, match="-1 is no open descriptor, as that of a file must be") as caught:
        Descriptor(-1, "a file")
    assert caught.value.errno == errno.EBADF


def test_one_that_other_code_has_closed_is_not_used(lost):
    assert not lost.is_ours()
    for use in (lost.fileno, lost.duplicate, lost.detach):
        with pytest.raises(ShmError, match=r"the descriptor of this file was closed by other code"):
            use()
    assert lost.read(10) == b""


def test_one_that_other_code_has_closed_is_not_closed_again(lost):
    lost.close()
    assert lost.number == -1


def test_another_descriptor_of_the_same_file_is_as_good(file):
    """Whoever opens the file again under this number cannot be told from us, and does no harm."""
    number = file.number
    copy = os.dup(number)
    os.dup2(copy, number)
    os.close(copy)
    assert file.is_ours()


def test_reading(file):
    assert file.read(2) == b"ou"
    assert file.read(100) == b"rs"
    assert file.read(100) == b""


def test_a_pipe_without_anything_does_not_wait():
    read, write = pipe("a pipe", os.O_NONBLOCK)
    with read, write:
        with pytest.raises(BlockingIOError):
            read.read(10)
        os.write(write.fileno(), b"x")
        assert read.read(10) == b"x"


def test_a_duplicate_lives_on_its_own(file):
    with file.duplicate() as copy:
        assert copy.number != file.number
        assert copy.identity == file.identity
        file.close()
        assert copy.read(10) == b"ours"


def test_what_is_given_away_is_not_closed(file):
    number = file.detach()
    file.close()
    os.fstat(number)
    os.close(number)


def test_processes_are_told_apart():
    """The kernel has one inode for all pidfds until 6.9."""
    children = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2)]
    first, second = (Descriptor(os.pidfd_open(child.pid), f"process {child.pid}") for child in children)
    number = first.number
    assert first.is_ours()
    os.dup2(second.number, number)
    assert not first.is_ours()
    first.close()
    os.fstat(number)
    os.close(number)
    for child in children:
        child.communicate(b"\n")
    assert second.is_ours(), "although nobody can ask for its process any more"
    second.close()


def test_of_many_who_close_one_does():
    """The others must not close what has the number by then."""
    for _ in range(200):
        file = Descriptor(os.open("/dev/null", os.O_RDONLY), "a file")
        begin = threading.Barrier(3)

        def close(begin=begin, file=file):
            begin.wait()
            file.close()

        closers = [threading.Thread(target=close) for _ in range(2)]
        for closer in closers:
            closer.start()
        begin.wait()
        others = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
        for closer in closers:
            closer.join()
        for other in others:
            os.fstat(other)
            os.close(other)
