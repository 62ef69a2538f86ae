"""Message queues: priorities, fragments, the kernel's limits, names."""

from __future__ import annotations

import ctypes
import os
import resource
import threading

import numpy as np
import pytest

from shmengine import channel
from shmengine.channels import mqueue
from shmengine.errors import Corrupt, Timeout, WouldBlock
from tests.helpers.leftovers import open_fds
from tests.helpers.limits import message_queues
from tests.helpers.scripts import run_script

LARGE = np.arange(300_000, dtype="u4")


@pytest.fixture
def ends():
    left, right = channel("mqueue")
    yield left, right
    left.close()
    right.close()


@pytest.fixture
def narrow():
    """Ends with so little room that what is large is sent in parts."""
    left, right = channel("mqueue", buffer_bytes="64 KiB")
    yield left, right
    left.close()
    right.close()


def test_higher_priorities_overtake_and_order_holds_within_each(ends):
    left, right = ends
    for number, priority in enumerate([0, 3, 0, 31, 3, 31]):
        left.send((priority, number), priority=priority)
    got = [right.receive(30) for _ in range(6)]
    assert got == [(31, 3), (31, 5), (3, 1), (3, 4), (0, 0), (0, 2)]


def test_a_priority_that_there_is_not(ends):
    left, _ = ends
    assert left.capabilities.priorities == 32
    for priority in (-1, 32):
        with pytest.raises(ValueError, match="from 0 to 31"):
            left.send(1, priority=priority)


def test_messages_larger_than_the_limit(ends):
    left, right = ends
    for nbytes in (7_000, 8_110, 8_111, 8_112, 8_113, 8_192, 16_384, 1_000_000):
        block = np.arange(nbytes).astype("u1")
        thread = threading.Thread(target=left.send, args=(block,))
        thread.start()
        assert np.array_equal(right.receive(30), block)
        thread.join()


def test_what_was_not_sent_in_time_is_never_seen(narrow):
    left, right = narrow
    left.send("before")
    for priority in (0, 1, 0):
        with pytest.raises(Timeout):
            left.send(LARGE, 0.01, priority=priority)
        with pytest.raises(WouldBlock):
            [right.try_receive() for _ in range(2)]
    left.send("after", 30)
    assert right.receive(30) == "after"
    assert left.stats().messages_sent == right.stats().messages_received == 2


def test_both_send_more_than_the_queues_hold_and_go_on(narrow):
    left, right = narrow
    for end in narrow:
        with pytest.raises(Timeout):
            end.send(LARGE, 0.05)
    for end in narrow:
        with pytest.raises(WouldBlock):
            end.try_receive()
    for sender, receiver in ((left, right), (right, left)):
        thread = threading.Thread(target=sender.send, args=(LARGE,))
        thread.start()
        assert np.array_equal(receiver.receive(30), LARGE)
        thread.join()


def test_what_others_put_into_the_queue_is_corrupt_once(ends):
    left, right = ends
    left.send(1)
    assert right.receive(30) == 1
    assert ctypes.CDLL(None).mq_send(left._link.write_fd, b"rubbish", 7, 0) == 0
    with pytest.raises(Corrupt, match="no fragment"):
        right.receive(30)
    left.send(2)
    assert right.receive(30) == 2
    assert right.stats().corrupt == 1


def test_nothing_is_left():
    before = open_fds()
    for duplex in (True, False):
        left, right = channel("mqueue", duplex=duplex)
        left.send(1)
        right.receive()
        left.close()
        right.close()
    assert open_fds() == before


class ClosedMeanwhile(int):
    """Bytes of a queue that another thread closes while they are added up."""

    def __new__(cls, nbytes, end):
        self = super().__new__(cls, nbytes)
        self.end = end
        return self

    def __radd__(self, other):
        self.end.close()
        return other + int(self)


def test_others_make_and_close_queues_meanwhile():
    before = resource.getrlimit(resource.RLIMIT_MSGQUEUE)
    ends = [end for _ in range(3) for end in channel("mqueue")]
    for end in ends:
        nbytes = mqueue._queue_bytes[end._link]
        mqueue._queue_bytes[end._link] = ClosedMeanwhile(nbytes, end)
    resource.setrlimit(resource.RLIMIT_MSGQUEUE, (819_200, before[1]))
    try:
        left, right = channel("mqueue")
    finally:
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, before)
    with left, right:
        left.send(1)
        assert right.receive(30) == 1
    for end in ends:
        assert end.closed
        end.close()


LIMITS = """
import resource
import shmengine as shm

resource.setrlimit(resource.RLIMIT_MSGQUEUE, (100_000, 100_000))
kept = []
try:
    while True:
        kept.append(shm.channel("mqueue"))
        left, right = kept[-1]
        left.send(b"x" * 2000, 10)
        assert right.receive(10) == b"x" * 2000
        print("made")
except shm.ShmError as error:
    print(error)
"""


def test_the_limits_of_the_kernel_are_respected_and_explained():
    alone = ["unshare", "--map-root-user"]  # a user without queues
    with message_queues(alone=True):
        *made, text = run_script(LIMITS, prefix=alone, check=True).stdout.splitlines()
    assert made  # with smaller fragments, since those of the usual size do not fit
    for part in ("97.7 KiB", "RLIMIT_MSGQUEUE", "ulimit -q", "queues_max", "msg_max", "msgsize_max", "Close"):
        assert part in text


NAMES = """
import os
import sys
import posix_ipc
from shmengine.channels import mqueue
from shmengine.cli import main
import shmengine as shm

directory = sys.argv[1]
left, right = shm.channel("mqueue")
assert os.listdir(directory) == [], "unlinked at birth"

def make(name):
    posix_ipc.MessageQueue(name, posix_ipc.O_CREX, max_messages=1, max_message_size=64).close()

mine = f"/shmengine-{os.getpid()}-{mqueue.start_time(os.getpid())}-00"
make(mine)                                  # in a moment its maker will unlink it
make(f"/shmengine-{os.getpid()}-1-00")      # of another process that had this number
make("/shmengine-4194304-1-00")             # of one that is gone
make("/others")
assert mqueue.are_listed()
main(["clean"])
assert sorted(os.listdir(directory)) == sorted([mine[1:], "others"]), os.listdir(directory)
"""


def test_names_are_unlinked_at_birth_and_those_left_behind_are_removed(tmp_path):
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    shell = 'mount -t mqueue none "$0" && exec "$@"'
    prefix = [
        "unshare",
        *user,
        "--ipc",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        shell,
        str(tmp_path),
    ]
    done = run_script(NAMES, args=[str(tmp_path)], prefix=prefix, check=True)
    assert "/shmengine-4194304-1-00 (message queue)" in done.stdout
    assert "not looked for" not in done.stdout


MANY = """
import resource
import shmengine as shm

resource.setrlimit(resource.RLIMIT_MSGQUEUE, (819_200, 819_200))  # as on most machines
kept = []
try:
    while True:
        kept.append(shm.channel("mqueue"))
except shm.ShmError as error:
    assert "not even for" in str(error), error
for left, right in kept:
    left.send("there")
    assert right.receive(20) == "there"
print(len(kept), kept[0][0]._link._fragment_bytes)
for left, right in kept:
    left.close()
    right.close()
with shm.channel("mqueue")[0] as again:
    print(again._link._fragment_bytes)
"""


def test_many_channels_fit_into_what_a_user_may_have():
    alone = ["unshare", "--map-root-user"]  # a user without queues
    with message_queues(alone=True):
        count, first, again = map(int, run_script(MANY, prefix=alone, check=True).stdout.split())
    assert count >= 15
    assert first == again, "closed ones take nothing"
