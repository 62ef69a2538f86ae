"""Pipes: what is taken back, what others write into them, what becomes of their descriptors."""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import threading

import numpy as np
import pytest

from shmengine import channel
from shmengine.channels import stream
from shmengine.channels.small import encode_small
from shmengine.codec import decode, encode
from shmengine.errors import Corrupt, ShmError, Timeout, WouldBlock
from tests.helpers.leftovers import open_fds
from tests.helpers.scripts import poll_until

LARGE = np.arange(3_000_000, dtype="u1")


@pytest.fixture
def ends():
    left, right = channel("pipe", buffer_bytes="64 KiB")
    yield left, right
    left.close()
    right.close()


@pytest.fixture
def raw(ends):
    """Writes into the pipe behind the back of the left end."""
    left, right = ends
    left.send("first")
    assert right.receive(30) == "first"
    return lambda data: os.write(left._link.write_fd, data)


@pytest.mark.parametrize("asked", [1 << 16, 1 << 18, 1 << 30])
def test_a_pipe_holds_as_much_as_the_machine_allows(asked):
    with open("/proc/sys/fs/pipe-max-size") as file:
        most = int(file.read())
    left, right = channel("pipe", buffer_bytes=asked)
    with left, right:
        left.send(1)
        assert fcntl.fcntl(left._link.write_fd, fcntl.F_GETPIPE_SZ) == min(asked, most)


def test_nothing_is_left():
    before = open_fds()
    for mechanism_options in ({}, {"duplex": False}):
        left, right = channel("pipe", **mechanism_options)
        left.send(LARGE[:10])
        right.receive()
        left.close()
        right.close()
        unused, other = channel("pipe", **mechanism_options)
        unused.close()
        del other
    assert open_fds() == before


def test_what_was_not_sent_in_time_is_never_seen(ends):
    left, right = ends
    left.send("before")
    for _ in range(3):
        with pytest.raises(Timeout):
            left.send(LARGE, 0.01)
    with pytest.raises(WouldBlock):
        left.try_send(LARGE)
    assert right.receive(30) == "before"
    with pytest.raises(WouldBlock):
        right.try_receive()
    sender = threading.Thread(target=left.send, args=("after",))  # what is owed for the other ones goes first
    sender.start()
    assert right.receive(30) == "after"
    sender.join()
    assert left.stats().messages_sent == right.stats().messages_received == 2


def test_exactly_what_was_sent_in_time_arrives(ends):
    left, right = ends
    got = []
    reader = threading.Thread(target=lambda: got.extend(int(each[0]) for each in right))
    reader.start()
    choose = random.Random(3)
    sent = []
    for number in range(200):
        block = np.full(choose.choice([1, 600, 9_000, 300_000]), number, "i8")
        try:
            left.send(block, choose.choice([0, 1e-5, 1e-4, 1e-3, None]))
        except (Timeout, WouldBlock):
            continue
        sent.append(number)
    left.close()
    reader.join()
    assert got == sent
    assert 0 < len(sent) < 200


def test_both_send_more_than_the_pipes_hold_and_go_on(ends):
    left, right = ends
    for end in ends:
        with pytest.raises(Timeout):
            end.send(LARGE, 0.05)
    for end in ends:
        with pytest.raises(WouldBlock):
            end.try_receive()
    for sender, receiver in ((left, right), (right, left)):
        thread = threading.Thread(target=sender.send, args=(LARGE,))
        thread.start()
        assert np.array_equal(receiver.receive(30), LARGE)
        thread.join()


@pytest.mark.parametrize(
    "data",
    [
        ((1 << 48) + 1).to_bytes(8, "little"),  # an absurd length
        (3).to_bytes(8, "little") + b"abc\2",  # a mark that is none
        (20_000).to_bytes(8, "little") + bytes(20_000) + b"\2",
    ],
)
def test_bytes_of_others_are_corrupt_for_ever(ends, raw, data):
    left, right = ends
    raw(data)
    for count in (1, 2):
        with pytest.raises(Corrupt, match="pipe"):
            right.receive(30)
        assert right.stats().corrupt == count
    left.send(1)
    with pytest.raises(Corrupt, match="nobody knows where a message begins"):
        right.receive(30)


def test_a_message_that_is_no_frame_is_dropped(ends, raw):
    left, right = ends
    raw((100).to_bytes(8, "little") + bytes(100) + b"\1")
    with pytest.raises(Corrupt):
        right.receive(30)
    left.send("on")
    assert right.receive(30) == "on"


def test_a_message_for_which_there_is_no_memory_is_dropped(ends, monkeypatch):
    left, right = ends
    sender = threading.Thread(target=left.send_many, args=([1, LARGE, 2],))
    sender.start()
    assert right.receive(30) == 1

    def refuse(nbytes):
        raise MemoryError(nbytes)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "aligned_empty", refuse)
        with pytest.raises(MemoryError, match=r"2\.86 MiB"):
            right.receive(30)
    with pytest.raises(Corrupt, match="missing"):
        right.receive(30)
    assert right.receive(30) == 2
    sender.join()


@pytest.mark.parametrize("which", ["read_fd", "write_fd"])
def test_a_descriptor_that_is_another_files_is_let_alone(ends, which, tmp_path):
    left, right = ends
    left.send(1)
    right.receive(30)
    number = getattr(left._link, which)
    with open(tmp_path / "other", "wb+") as file:
        file.write(b"mine")
        file.flush()
        os.dup2(file.fileno(), number)

        def is_refused():
            try:
                left.try_send(2) if which == "write_fd" else left.try_receive()
            except WouldBlock:
                return False
            except ShmError as error:
                return "closed by other code" in str(error)
            return False

        before = (tmp_path / "other").read_bytes()
        poll_until(is_refused)
        left.close()
        assert (tmp_path / "other").read_bytes()[: len(before)] == before
        assert os.fstat(number).st_ino == os.fstat(file.fileno()).st_ino, "the number is not ours to close"
        os.close(number)


def test_what_was_read_ahead_is_received_without_the_descriptor(ends):
    """Many small messages come by one system call; the loop's selector knows nothing of those."""
    left, right = ends
    for number in range(50):
        left.send(number)

    async def receive_all():
        return [await right.areceive(30) for _ in range(50)]

    assert asyncio.run(receive_all()) == list(range(50))


@pytest.mark.parametrize(
    "obj",
    [
        *(None, True, 7, -1 << 70, 2.5, 1j, "", "text", "ж" * 700, b"", b"x" * 768, {}, {"a": 1, 2: None}),
        *(np.arange(8), np.zeros((2, 3), ">f4"), np.array(5), np.array(["a", "bc"]), np.ones(384)),
        np.array(["2026-01-01"], "M8[D]"),
    ],
    ids=lambda obj: repr(obj)[:20],
)
def test_a_small_frame_is_the_one_of_the_codec(obj, ends):
    left, right = ends
    for _ in range(2):  # the second one is made from what was remembered of the first
        small, frame = encode_small(obj, allow_pickle=True), encode(obj, memmap_mode=None).to_bytes()
        assert small[:4] + small[8:] == frame[:4] + frame[8:]  # but for the checksum, which is filled in
        left.send(obj)
        got = right.receive(30)
        assert type(got) is type(obj)
        assert np.array_equal(got, obj)
        if isinstance(obj, np.ndarray):
            assert got.dtype == obj.dtype
            assert got.shape == obj.shape
            assert got.flags.writeable


@pytest.mark.parametrize(
    "obj",
    [
        *(
            [1],
            {1: [2]},
            {"x": "x" * 1000},
            dict.fromkeys(range(17)),
            {(): 1},
            b"x" * 4000,
            "x" * 4000,
            1 << 30_000,
            np.float64(1),
            np.zeros(0),
            np.zeros(1000),
        ),
        *(np.arange(8)[::2], np.array([None]), np.zeros(2, [("a", "i4")])),
    ],
    ids=lambda obj: type(obj).__name__,
)
def test_all_else_is_none_of_the_small_ones(obj):
    assert encode_small(obj, allow_pickle=True) is None
    assert same_after(obj)


def same_after(obj):
    return np.array_equal(decode(encode(obj, memmap_mode=None).to_bytes()), obj)


def test_plain_values_are_not_pickled_where_that_is_not_allowed():
    left, right = channel("pipe", allow_pickle=False)
    with left, right:
        assert encode_small(1, allow_pickle=False) is None
        for obj in (1, "text", b"bytes", None):
            left.send(obj)
            assert right.receive(30) == obj
        left.send(np.arange(3))
        assert right.receive(30).tolist() == [0, 1, 2]


def test_a_pickle_that_came_all_the_same_is_refused():
    left, right = channel("pipe", allow_pickle=False)
    with left, right:
        left.send(1)
        assert right.receive(30) == 1
        frame = encode_small("text", allow_pickle=True)
        assert left._link.send(frame, 0, -1)
        with pytest.raises(ShmError, match="allow_pickle"):
            right.receive(30)
