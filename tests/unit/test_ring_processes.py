"""Rings between processes: children, forks, tokens, names; and what the checks find."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import multiprocessing
import os
import pickle
import secrets
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from shmengine import region
from shmengine._native import ffi, lib
from shmengine.arrays import ArraySpec, encode_spec
from shmengine.errors import (
    Closed,
    Corrupt,
    LayoutMismatch,
    LeaseError,
    ShmError,
)
from shmengine.region import Region, _path
from shmengine.ring import Ring
from tests.helpers.memory import assert_memory_is_whole
from tests.helpers.scripts import run_script

FOREVER = 30
METHODS = ["fork", "spawn", "forkserver"]


@pytest.fixture
def ring():
    with Ring(4, "8 MiB") as made:
        yield made


@pytest.fixture(params=METHODS)
def ctx(request):
    return multiprocessing.get_context(request.param)


@pytest.fixture
def name():
    return f"test-{secrets.token_hex(8)}"


def in_fork(function):
    """Run in a forked child; its exit code."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- checks ----------------------------------------------------------------------------------------


def commit_ones(ring):
    """Commit 1000 bytes; where they are in the region's memory."""
    with ring.claim(1000, "u1") as frame:
        frame[:] = 1
        start = np.frombuffer(ring._region.readable, "u1", 1).ctypes.data
        return frame.ctypes.data - start


def test_payload_check_finds_a_flipped_bit():
    with Ring(4, "8 MiB", check="payload") as ring:
        ring._region.memory[commit_ones(ring) + 500] = 0
        ring.send([2])
        with pytest.raises(Corrupt, match="payload"):
            ring.lease()
        assert ring.receive()[0] == 2  # the ring goes on
        assert_memory_is_whole(ring)


def test_frame_check_does_not_look_at_the_payload(ring):
    ring._region.memory[commit_ones(ring) + 500] = 0
    assert ring.receive().sum() == 999


def test_frame_check_finds_a_changed_descriptor(ring):
    commit_ones(ring)
    spec = encode_spec(ArraySpec(np.dtype("u1"), (1000,)))
    at = bytes(ring._region.memory[: 1 << 22]).index(spec)
    ring._region.memory[at] ^= 0xFF
    with pytest.raises(Corrupt):
        ring.lease()
    ring.send([2])
    assert ring.receive()[0] == 2


def test_a_message_that_is_no_array(ring):
    block = ffi.new("shmr_block *")
    assert lib.shmr_claim(ring._region.handle, 10, ffi.NULL, 0, -1, 0, block) == 0
    block.length, block.kind = 10, 77
    assert lib.shmr_commit(ring._region.handle, 0, 0, -1, 0, block) == 0
    with pytest.raises(Corrupt, match="kind 77"):
        ring.lease()
    assert_memory_is_whole(ring)


# --- other processes -------------------------------------------------------------------------------


def double_until_empty(incoming, outgoing):
    while True:
        with incoming.lease(timeout=FOREVER) as frame:
            if frame.size == 0:
                return
            with outgoing.claim(frame.shape, frame.dtype, timeout=FOREVER) as answer:
                np.multiply(frame, 2, out=answer)


def test_a_ring_pickles_to_children(ctx):
    with Ring(4, "8 MiB") as there, Ring(4, "8 MiB") as back:
        process = ctx.Process(target=double_until_empty, args=(there, back))
        process.start()
        for i in range(50):
            there.send(np.full(1000 * i + 1, i))
            with back.lease(timeout=FOREVER) as frame:
                assert frame.shape == (1000 * i + 1,)
                assert (frame == 2 * i).all()
        assert there.stats().participants == 2
        there.send([])
        process.join()
        assert process.exitcode == 0
        assert there.stats().rescued_wakeups == 0


def test_in_the_same_process_a_token_leads_to_the_same_region(ring):
    again = pickle.loads(pickle.dumps(ring))
    assert again._region is ring._region
    again.send([3])
    assert ring.receive()[0] == 3


def test_one_that_shares_a_region_may_be_closed_without_the_other(ring):
    again = pickle.loads(pickle.dumps(ring))
    again.send([3])
    again.close()
    for use in (again.lease, again.try_lease, lambda: again.send([1])):
        with pytest.raises(Closed):
            use()
    assert ring.receive()[0] == 3
    third = pickle.loads(pickle.dumps(ring))
    ring.send([4])
    del third
    ring.close()
    assert ring._region.closed


def test_a_token_sent_later(ring):
    receiver, sender = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            receiver.recv().send([os.getpid()])
            status = 0
        finally:
            os._exit(status)
    sender.send(ring)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert ring.receive(timeout=FOREVER)[0] == pid
    receiver.close()
    sender.close()


STRANGER = """
import pickle, sys
try:
    pickle.loads(sys.stdin.buffer.read()).send([42])
except Exception as error:
    print(type(error).__name__, error)
else:
    print("sent")
"""


def run_stranger(source, stdin=b"", *args):
    done = subprocess.run(
        [sys.executable, "-c", source, *args],
        input=stdin,
        capture_output=True,
        timeout=60,
        check=False,
        start_new_session=True,
    )
    assert done.stderr == b""
    return done.stdout.decode().strip()


def test_a_token_works_while_its_maker_lives(ring):
    assert run_stranger(STRANGER, pickle.dumps(ring)) == "sent"
    assert ring.receive(timeout=FOREVER)[0] == 42


def with_file(token, **changes):
    return dataclasses.replace(token, file=dataclasses.replace(token.file, **changes))


def test_a_token_of_one_who_is_gone_or_another(ring):
    token = ring._region.token()
    unknown = dataclasses.replace(token, number=token.number ^ 1)  # so that it is looked up
    with pytest.raises(ShmError, match=r"has ended.*name="):
        Region.from_token(with_file(unknown, start_time="1"))
    with pytest.raises(ShmError, match="has closed it"):
        Region.from_token(with_file(unknown, identity=(0, 0)))
    gone = with_file(unknown, pid=2**22 - 1)
    with pytest.raises(ShmError, match=r"has ended.*name="):
        Region.from_token(gone)


def test_after_a_fork_the_child_is_a_participant_of_its_own(ring):
    ring.send([1])

    def child():
        assert ring.receive(timeout=FOREVER)[0] == 1
        assert ring.stats().participants == 2
        ring.send([os.getpid()])
        ring.close()

    assert in_fork(child) == 0
    assert ring.receive(timeout=FOREVER)[0] > 1
    ring.send([2])
    assert ring.receive()[0] == 2


def test_what_the_parent_claimed_and_leased_is_not_the_childs(ring):
    ring.send([1])
    lease, claim = ring.lease(), ring.claim(3)

    def child():
        nonlocal lease, claim
        with pytest.raises(LeaseError, match=r"parent|no longer"):
            claim.commit()
        with pytest.raises(LeaseError, match=r"parent|no longer"):
            lease.release()
        ring.send([2])

    assert in_fork(child) == 0
    claim.array[:] = 3
    claim.commit()
    assert lease.array[0] == 1
    lease.release()
    assert sorted([int(ring.receive(timeout=FOREVER)[0]), int(ring.receive(timeout=FOREVER)[0])]) == [2, 3]
    assert_memory_is_whole(ring)


def test_a_fork_while_other_threads_make_and_close_rings():
    """The lock of multiprocessing's resource tracker is nobody's in the child."""
    run_script(
        """
        import os, threading
        from shmengine.ring import Ring

        def make_one():
            Ring(4, 1 << 21, f"{os.getpid()}-{threading.get_ident()}").close()

        def make_many():
            while not done:
                make_one()

        done = False
        make_one()  # all is imported
        threads = [threading.Thread(target=make_many) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(100):
            pid = os.fork()
            if pid == 0:
                make_one()
                os._exit(0)
            assert os.waitpid(pid, 0) == (pid, 0)
        done = True
        for thread in threads:
            thread.join()
        """,
        flags=("-W", "ignore::DeprecationWarning"),  # of threads and fork, since 3.12
        check=True,
    )


def test_the_childs_garbage_releases_nothing_of_the_parents(ring):
    ring.send([1])
    ring.send([2])
    array = ring.receive()
    lease = ring.lease()

    def child():
        nonlocal array, lease
        del array, lease

    assert in_fork(child) == 0
    with ring.claim(1) as frame:
        frame[0] = 9
    assert array[0] == 1
    assert lease.array[0] == 2
    assert ring._region.counters().pins == 2
    lease.release()


def test_a_ring_that_was_closed_before_the_fork_is_closed_in_the_child(ring):
    ring.close()

    def child():
        with pytest.raises(Closed):
            ring.send([1])

    assert in_fork(child) == 0


# --- strangers -------------------------------------------------------------------------------------

BY_NAME = """
import sys, numpy as np
from shmengine.ring import Ring
try:
    ring = Ring(int(sys.argv[2]), sys.argv[3], sys.argv[1])
    with ring.lease(timeout=30) as frame:
        ring.send(frame + 1)
    ring.close()
except Exception as error:
    print(type(error).__name__, error)
else:
    print("answered")
"""


def test_strangers_meet_by_name(name):
    with Ring(4, "8 MiB", name) as ring:
        assert ring.name == name
        assert repr(ring) == f"<shmengine.Ring capacity=4 arena=8 MiB name={name!r}>"
        assert os.stat(_path(name)).st_mode & 0o777 == 0o600
        ring.send(np.arange(4))
        assert run_stranger(BY_NAME, b"", name, "4", "8 MiB") == "answered"
        assert ring.receive(timeout=FOREVER).tolist() == [1, 2, 3, 4]
        assert os.path.exists(_path(name))  # the stranger went; the name is its creator's
    assert not os.path.exists(_path(name))


def test_the_name_goes_when_its_creator_is_collected(name):
    Ring(4, "8 MiB", name)
    assert not os.path.exists(_path(name))


def test_a_named_ring_lives_on_without_its_name(name):
    creator = Ring(4, "8 MiB", name)
    other = Ring(4, "8 MiB", name)
    creator.close()
    other.send([1])
    assert other.receive()[0] == 1
    other.close()


@pytest.mark.parametrize(("capacity", "arena"), [("5", "8 MiB"), ("4", "16 MiB")])
def test_another_geometry(name, capacity, arena):
    with Ring(4, "8 MiB", name):
        said = run_stranger(BY_NAME, b"", name, capacity, arena)
    assert said.startswith(f"LayoutMismatch the ring named '{name}' exists with capacity 4 and 8 MiB")


def test_a_symbolic_link_is_not_followed(name, tmp_path):
    with Ring(4, "8 MiB", name):
        link = name + "-link"
        os.symlink(_path(name), _path(link))
        try:
            with pytest.raises((OSError, LayoutMismatch)):
                Ring(4, "8 MiB", link)
        finally:
            os.unlink(_path(link))


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o602])
def test_a_file_that_others_may_open_is_refused(name, mode):
    with Ring(4, "8 MiB", name):
        os.chmod(_path(name), mode)
        with pytest.raises(LayoutMismatch, match="0600"):
            Ring(4, "8 MiB", name)


@pytest.mark.parametrize("content", [b"x" * 100_000, b"\xff" * 5_000_000])
def test_a_file_that_is_no_region(name, content):
    fd = os.open(_path(name), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.write(fd, content)
        with pytest.raises(LayoutMismatch):
            Ring(4, "8 MiB", name)
    finally:
        os.close(fd)
        os.unlink(_path(name))


def test_a_token_of_a_name_that_another_ring_has_by_now(name):
    first = Ring(4, "8 MiB", name)
    token = first._region.token()
    first.close()
    with Ring(4, "8 MiB", name) as second:
        del first  # its end is not the end of the other one's name
        with pytest.raises(LayoutMismatch, match="replaced"):
            Region.from_token(token)
        assert os.path.exists(_path(name))
        second.send([1])


@pytest.mark.parametrize("end", ["pass", "ring.close()", "del ring"])
def test_a_named_ring_leaves_nothing_for_the_resource_tracker_to_complain_about(name, end):
    assert run_stranger(f"from shmengine.ring import Ring\nring = Ring(4, '8 MiB', {name!r})\n{end}") == ""
    assert not os.path.exists(_path(name))


def test_where_every_file_must_have_a_name_a_memory_file_takes_its_place(monkeypatch):
    opened = os.open

    def refuse(path, flags, *args, **kwargs):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)
        return opened(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with Ring(4, "8 MiB") as ring:
        assert "/memfd:shmengine" in os.readlink(f"/proc/self/fd/{ring._region.fd}")
        ring.send([1])
        assert ring.receive(timeout=FOREVER)[0] == 1


# --- other code closes all descriptors ---------------------------------------------------------------

NUMBERS_TAKEN = """
import os
from shmengine.errors import ShmError
from shmengine.ring import Ring
ring = Ring(4, "8 MiB")
ring.send([1])
os.closerange(3, 200)
theirs = [os.open("/dev/null", os.O_RDONLY) for _ in range(9)]
assert ring.receive()[0] == 1
try:
    ring._region.fd
except ShmError as error:
    print(error)
{end}
for fd in theirs:
    os.fstat(fd)
"""


@pytest.mark.parametrize("end", ["ring.close()", "del ring", ""])
def test_files_that_have_our_numbers_by_now_are_left_alone(end):
    assert "closed by other code" in run_stranger(NUMBERS_TAKEN.format(end=end))


def inherited():
    """Count what a process has of regions: descriptors, mappings."""
    with open("/proc/self/maps") as file:
        mappings = sum("/dev/shm/#" in line for line in file)
    files = []
    for number in os.listdir("/proc/self/fd"):  # other libraries may close some of theirs in a forked child
        with contextlib.suppress(FileNotFoundError):  # that of the list itself
            files.append(os.readlink(f"/proc/self/fd/{number}"))
    return sum(name.startswith("/dev/shm/#") or "pidfd" in name for name in files), mappings


def test_a_chain_of_forks_collects_nothing_of_its_ancestors(ring):
    ring.approx_fill()
    gc.collect()  # of earlier tests: views in cycles may still hold their regions' mappings
    ours = inherited()

    def child(generation=1):
        ring.approx_fill()
        gc.collect()
        assert inherited() == ours
        if generation < 4:
            assert in_fork(lambda: child(generation + 1)) == 0

    assert in_fork(child) == 0


def test_views_outlive_what_the_child_gives_back(ring):
    ring.send(np.arange(1000))
    view = ring.receive()

    def child():
        ring.approx_fill()
        gc.collect()
        assert view.sum() == 499500
        ring.close()
        assert view.sum() == 499500

    assert in_fork(child) == 0
    assert view.sum() == 499500


# --- names of regions that nobody has finished creating -------------------------------------------------


@pytest.fixture
def soon(monkeypatch):
    """A creator that is alive is not waited for much longer than it takes to see that it is."""
    monkeypatch.setattr(region, "ATTACH_SECONDS", 3 * region.GRACE_SECONDS)


def half_made(name):
    fd = os.open(_path(name), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.truncate(fd, 1 << 20)
    os.close(fd)


@pytest.mark.usefixtures("soon")
def test_a_name_is_blocked_only_while_its_creator_lives(name):
    ready, told = os.pipe()
    creator = os.fork()
    if creator == 0:
        region._make_file(1 << 20, 1 << 20, 1 << 20, name)
        os.write(told, b"x")
        signal.pause()
    try:
        os.read(ready, 1)
        with pytest.raises(LayoutMismatch, match="nobody has finished"):
            Ring(4, "8 MiB", name)
        assert name not in region.abandoned_names()
        assert os.path.exists(_path(name))
    finally:
        os.kill(creator, signal.SIGKILL)
        os.waitpid(creator, 0)
        os.close(ready)
        os.close(told)
    with Ring(4, "8 MiB", name) as ring:
        ring.send([1])
        assert ring.receive()[0] == 1


def test_many_who_want_a_half_made_name_at_once(name):
    half_made(name)
    with ThreadPoolExecutor(4) as threads:
        rings = list(threads.map(lambda _: Ring(4, "8 MiB", name), range(4)))
    assert len({ring._region.inode for ring in rings}) == 1
    rings[0].send([1])
    assert rings[3].receive(timeout=FOREVER)[0] == 1
    for ring in rings:
        ring.close()


@pytest.mark.usefixtures("soon")
def test_half_made_regions_are_cleaned_up(name):
    half_made(name)
    assert name in region.abandoned_names()
    assert not os.path.exists(_path(name))


def test_what_was_finished_meanwhile_is_not_removed(name):
    with Ring(4, "8 MiB", name) as ring:
        assert not region._remove_unfinished(ring._region.fd, name)
        assert os.path.exists(_path(name))
