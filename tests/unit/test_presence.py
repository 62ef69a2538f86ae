"""Who is at the two ends of a channel: every way to come and to go."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading

import pytest

from shmengine.channels.presence import Fate, Presence
from shmengine.errors import ShmError, UseAfterFork
from tests.helpers.scripts import poll_until


@pytest.fixture
def ends():
    left, right = Presence.pair()
    yield left, right
    left.close()
    right.close()


def in_child(work):
    """Fork, work, and die without any clearing up."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    return pid


def reap(pid):
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL


def descriptors():
    return sorted(os.listdir("/proc/self/fd"))


def test_nobody_has_used_it(ends):
    left, right = ends
    assert (left.fate(), right.fate()) == (Fate.UNUSED, Fate.UNUSED)


def test_used_in_this_process(ends):
    left, right = ends
    left.use()
    assert left.in_use
    assert not right.in_use
    assert (left.fate(), right.fate()) == (Fate.UNUSED, Fate.ALIVE)
    right.use()
    right.use()
    assert left.fate() is Fate.ALIVE


@pytest.mark.parametrize("used", [False, True])
def test_closed(ends, used):
    left, right = ends
    if used:
        right.use()
    right.close()
    right.close()
    assert right.closed
    assert left.fate() is Fate.CLOSED


def test_an_end_that_was_used_is_lost_with_its_process(ends):
    left, right = ends
    begin, go_on = os.pipe(), os.pipe()

    def work():
        right.use()
        os.write(begin[1], b".")
        os.read(go_on[0], 1)

    pid = in_child(work)
    os.read(begin[0], 1)
    assert left.fate() is Fate.ALIVE
    with pytest.raises(UseAfterFork, match="for one process"):
        right.use()
    os.write(go_on[1], b".")
    reap(pid)
    assert left.fate() is Fate.LOST
    with pytest.raises(UseAfterFork, match="or was"):
        right.use()  # who was told of the loss would not believe it
    assert left.fate() is Fate.LOST
    for fd in (*begin, *go_on):
        os.close(fd)


def test_an_end_that_was_never_used_is_lost_when_nobody_has_a_copy(ends):
    left, right = ends
    hold = os.pipe()
    pid = in_child(lambda: os.read(hold[0], 1))
    right.close()
    assert left.fate() is Fate.UNUSED
    os.write(hold[1], b".")
    reap(pid)
    assert left.fate() is Fate.LOST
    for fd in hold:
        os.close(fd)


def ask(answers):
    """Wait until a child has written down what it sees."""
    with os.fdopen(answers, closefd=False) as file:
        return file.readline().strip()


def look_until_it_ends(presence, answers):
    presence.use()
    with contextlib.suppress(AssertionError):
        poll_until(lambda: presence.fate() is not Fate.UNUSED, timeout=30)
    os.write(answers, f"{presence.fate().name}\n".encode())


@pytest.mark.parametrize("begun", ["before", "after"])
def test_a_forked_child_does_not_keep_open_what_its_parent_closes_unused(ends, begun):
    """It has inherited both ends, uses one, and cannot close the other one, for which it has no name."""
    left, right = ends
    hold, answers = os.pipe(), os.pipe()

    def work():
        if begun == "before":
            right.use()
            os.write(answers[1], b"used\n")
        os.read(hold[0], 1)
        look_until_it_ends(right, answers[1])

    pid = in_child(work)
    if begun == "before":
        assert ask(answers[0]) == "used"
    left.close()
    os.write(hold[1], b".")
    assert ask(answers[0]) == "CLOSED"
    reap(pid)
    for fd in (*hold, *answers):
        os.close(fd)


def test_a_forked_child_sees_the_death_of_a_parent_that_has_not_used_its_end():
    hold, answers = os.pipe(), os.pipe()

    def work():
        left, right = Presence.pair()
        pid = in_child(lambda: look_until_it_ends(right, answers[1]))
        os.write(answers[1], f"{pid}\n".encode())
        os.read(hold[0], 1)
        poll_until(lambda: left.fate() is Fate.ALIVE)

    pid = in_child(work)
    grandchild = int(ask(answers[0]))
    os.write(hold[1], b".")
    reap(pid)
    assert ask(answers[0]) == "LOST"
    os.waitpid(grandchild, 0)  # the tests' process adopts orphans
    for fd in (*hold, *answers):
        os.close(fd)


def test_a_forked_child_cannot_use_an_end_that_it_has_seen_closed(ends):
    left, right = ends
    hold, answers = os.pipe(), os.pipe()

    def work():
        right.use()
        os.write(answers[1], b"used\n")
        os.read(hold[0], 1)
        os.write(answers[1], f"{right.fate().name}\n".encode())
        os.read(hold[0], 1)
        with pytest.raises(UseAfterFork):
            left.use()
        os.write(answers[1], f"{right.fate().name}\n".encode())

    pid = in_child(work)
    assert ask(answers[0]) == "used"
    copy = os.fork()  # the last one, which dies
    if copy == 0:
        signal.pause()
    left.close()
    os.kill(copy, signal.SIGKILL)
    reap(copy)
    os.write(hold[1], b".")
    assert ask(answers[0]) == "CLOSED"
    os.write(hold[1], b".")
    assert ask(answers[0]) == "CLOSED"
    reap(pid)
    for fd in (*hold, *answers):
        os.close(fd)


def test_a_forked_child_may_use_both_ends(ends):
    left, right = ends
    answers = os.pipe()

    def work():
        right.use()
        fates = [right.fate()]  # the parent has a copy of the other one
        left.use()
        fates += [left.fate(), right.fate()]
        left.close()
        fates += [right.fate()]
        os.write(answers[1], " ".join(fate.name for fate in fates).encode() + b"\n")

    pid = in_child(work)
    assert ask(answers[0]) == "UNUSED ALIVE ALIVE CLOSED"
    reap(pid)
    assert left.fate() is Fate.LOST
    for fd in answers:
        os.close(fd)


def test_the_parent_uses_an_end_and_its_forked_child_does_not(ends):
    left, right = ends
    left.use()

    def work():
        with pytest.raises(UseAfterFork, match="by the parent"):
            left.use()
        left.close()
        assert right.fate() is Fate.ALIVE
        right.use()

    reap(in_child(work))
    assert left.fate() is Fate.LOST
    assert right.fate() is Fate.ALIVE


def test_a_child_does_not_keep_a_dead_parent_alive():
    # The grandchild is forked after its parent used the end, and outlives it.
    left, right = Presence.pair()
    hold = os.pipe()
    said = os.pipe()

    def work():
        right.use()
        pid = os.fork()
        if pid == 0:
            os.read(hold[0], 1)
            os._exit(0)
        os.write(said[1], pid.to_bytes(4, "little"))

    pid = in_child(work)
    grandchild = int.from_bytes(os.read(said[0], 4), "little")
    reap(pid)
    # The grandchild may not yet have come to let go of what it has inherited.
    poll_until(lambda: left.fate() is Fate.LOST)
    os.write(hold[1], b".")
    os.waitpid(grandchild, 0)  # the tests' process adopts orphans
    for fd in (*hold, *said):
        os.close(fd)
    left.close()
    right.close()


def test_a_program_that_was_started_meanwhile_holds_nothing(ends):
    left, right = ends
    right.use()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False) as other:
        right.close()
        assert left.fate() is Fate.CLOSED
        other.communicate(b"\n")


def use_and_say(presence, say, hear):
    presence.use()
    say.set()
    hear.wait()
    os._exit(3)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_passed_on(method):
    context = multiprocessing.get_context(method)
    left, right = Presence.pair()
    said, heard = context.Event(), context.Event()
    process = context.Process(target=_by_token, args=(_Sent(right), said, heard))
    process.start()
    right.close()
    said.wait()
    assert left.fate() is Fate.ALIVE
    heard.set()
    process.join()
    assert left.fate() is Fate.LOST
    left.close()


def test_passed_on_and_not_there_yet():
    # Between the start of a process and its first use of the end there is no moment without a holder.
    context = multiprocessing.get_context("spawn")
    left, right = Presence.pair()
    said, heard = context.Event(), context.Event()
    process = context.Process(target=_by_token, args=(_Sent(right), said, heard))
    process.start()
    right.close()
    while not said.is_set():
        assert left.fate() in (Fate.UNUSED, Fate.ALIVE)
    heard.set()
    process.join()
    left.close()


def _by_token(sent, said, heard):
    use_and_say(Presence.from_token(sent.token), said, heard)


class _Sent:
    """Makes its token when it is pickled, as an end of a channel does."""

    def __init__(self, presence):
        self.presence = presence

    def __getstate__(self):
        return {"token": self.presence.token()}


def test_a_token_outlives_its_maker():
    left, right = Presence.pair()
    token = right.token()
    right.close()
    with pytest.raises(
        ShmError, match=r"an end of a channel cannot be reached: the process .* has closed it"
    ):
        Presence.from_token(token)
    left.close()


def test_many_looks_while_the_other_end_comes_and_goes(ends):
    left, right = ends
    seen = []
    done = threading.Event()

    def look():
        while not done.is_set():
            seen.append(left.fate())

    thread = threading.Thread(target=look)
    thread.start()
    while len(seen) < 100:
        pass
    right.use()
    begun = len(seen)
    while len(seen) < begun + 100:
        pass
    right.close()
    begun = len(seen)
    while len(seen) < begun + 100:
        pass
    done.set()
    thread.join()
    changes = [one for one, before in zip(seen, [None, *seen], strict=False) if one is not before]
    assert changes == [Fate.UNUSED, Fate.ALIVE, Fate.CLOSED]


def test_nothing_stays():
    before = descriptors()
    left, right = Presence.pair()
    left.use()
    left.close()
    right.close()
    del left, right
    gc.collect()
    assert descriptors() == before
