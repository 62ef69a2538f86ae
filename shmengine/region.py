"""Regions: one sparse piece of shared memory, and this process's place in it.

A region with a user's name is a `multiprocessing.shared_memory.SharedMemory`. All others are files in the same
``/dev/shm`` that never have a name, so that even a SIGKILL of everybody leaves nothing there, and nobody has to
keep track of them; where that file system is too small (containers give it 64 MiB) an anonymous memory file takes
its place. The C core maps a region once a process; views hold the mapping, not the `Region`, so nothing is ever
unmapped under them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from shmengine import config
from shmengine._native import ffi, lib
from shmengine._native.status import OK, PLACES, WOULD_BLOCK, fail
from shmengine.arrays import Bytes
from shmengine.descriptors import Descriptor
from shmengine.errors import LayoutMismatch, MemoryBudgetExceeded, ShmError, UseAfterFork
from shmengine.tokens import DescriptorToken, lend

__all__ = ["EXTENT_BYTES", "Region", "RegionConfig", "RegionToken"]

EXTENT_BYTES = config.EXTENT_BYTES
SHM_DIRECTORY = "/dev/shm"  # where POSIX shared memory is on Linux
NAME_PREFIX = "shmengine."
RECORD_BYTES = 256  # struct shmr_record; few of those that there could be are ever used
GROUP = 256  # records that change hands together (SHMR_GROUP)
ADVICE = "; give the ring a name= for strangers"
ATTACH_SECONDS = 5.0  # a creator that is alive takes milliseconds from the file to the magic
GRACE_SECONDS = 0.25  # and no time at all from the file to its lock
MOST_ARENA_BYTES = 1 << 41  # shmr_region.c knows it too


@dataclass(frozen=True)
class RegionConfig:
    """Geometry of a region; see ``shmr_config`` in csrc/shmr.h."""

    arena_bytes: int
    capacities: tuple[int, ...]
    participants: int = PLACES
    doorbells: int = 512
    blocks: int = 0
    start: int = 0
    creator_recovers: bool = False
    wait_alone: bool = False

    def to_c(self) -> Any:
        """Return a ``shmr_config``, rounded to what the core takes."""
        arena = max(1, -(-self.arena_bytes // EXTENT_BYTES)) * EXTENT_BYTES
        # Each producer takes records by groups, so there must be some for every participant.
        blocks = self.blocks or min(1 << 20, max(2 * GROUP * self.participants, arena // 1024))
        c = ffi.new("shmr_config *")
        c.participants = self.participants
        c.doorbells = self.doorbells
        c.rings = len(self.capacities)
        c.blocks = -(-blocks // GROUP) * GROUP
        c.arena_bytes = arena
        c.start = self.start
        c.flags = (lib.SHMR_CREATOR_RECOVERS if self.creator_recovers else 0) | (
            lib.SHMR_WAIT_ALONE if self.wait_alone else 0
        )
        for i, capacity in enumerate(self.capacities):
            c.capacity[i] = capacity
        return c


@dataclass(frozen=True)
class RegionToken:
    """What another process needs to find a region."""

    number: int
    name: str | None
    file: DescriptorToken


_attached: weakref.WeakValueDictionary[int, Region] = weakref.WeakValueDictionary()
_attaching = threading.Lock()
# Held in each call that takes the lock of multiprocessing's resource tracker: a fork by another thread in between would
# leave that one locked in the child for ever.
_tracking = threading.RLock()


def _after_fork() -> None:
    global _attaching
    _attaching = threading.Lock()
    _attached.clear()  # the parent's places in its regions are not ours
    _tracking.release()


os.register_at_fork(before=_tracking.acquire, after_in_parent=_tracking.release, after_in_child=_after_fork)


class Region:
    """This process's attachment to a region: a place among its participants, and its memory.

    Not made directly: `create`, `attach`, `attach_name`, `from_token`.

    Attributes
    ----------
    handle : cdata
        ``shmr *`` for the C core.
    number : int
        63 random bits that name the region in references.
    memory, readable : memoryview
        All of the region, writable and read-only; whoever holds one holds the mapping.
    """

    def __init__(self, handle: Any, fd: int, name: str | None, *, creator: bool) -> None:
        self.handle = handle
        self._file = Descriptor(fd, "this region")
        self.name = name
        self.creator = creator
        self.pid = os.getpid()
        self.closed = False
        self.exiting = False
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()  # rings and queues of this process that share it
        device, self.inode = self._file.identity
        self.number = (self.inode * 0x9E3779B97F4A7C15 ^ device) & (1 << 63) - 1
        mapping = lib.shmr_mapping_retain(handle)
        base = ffi.gc(
            ffi.cast("char *", lib.shmr_base(handle)),
            lambda _, release=lib.shmr_mapping_release, mapping=mapping: release(mapping),
        )
        self.memory = memoryview(ffi.buffer(base, lib.shmr_mapped_bytes(handle)))
        self.readable = self.memory.toreadonly()
        self._names = [name] if creator and name is not None else []  # to be removed by us, and once
        self._finalizer = weakref.finalize(
            self, _end, weakref.ref(self), handle, self._file, self._names, self.pid
        )
        call_at_process_end(self._finalizer)

    # --- making and finding ------------------------------------------------------------------

    @classmethod
    def create(cls, settings: RegionConfig, name: str | None = None) -> Region:
        """Make a region and join it as its first participant.

        Raises
        ------
        MemoryBudgetExceeded
            Neither ``/dev/shm`` nor an anonymous memory file can hold it.
        FileExistsError
            The name is taken.
        """
        if settings.arena_bytes > MOST_ARENA_BYTES:
            raise MemoryBudgetExceeded(
                f"a memory budget of {config.format_bytes(settings.arena_bytes)} is more than a region can have,"
                f" {config.format_bytes(MOST_ARENA_BYTES)}",
                settings.arena_bytes,
                MOST_ARENA_BYTES,
            )
        c = settings.to_c()
        total = lib.shmr_region_bytes(c)
        if total == 0:
            raise ValueError(f"no region can have this geometry: {settings}")
        fd = _make_file(total, int(c.arena_bytes), total - int(c.blocks) * RECORD_BYTES, name)
        out = ffi.new("shmr **")
        status = lib.shmr_create(fd, c, out)
        if status != OK:
            os.close(fd)
            if name is not None:
                _unlink(name)
            if status == lib.SHMR_NO_MEMORY:
                raise MemoryBudgetExceeded(
                    f"no room for the control part of a region ({config.format_bytes(total - int(c.arena_bytes))}"
                    f" of {config.format_bytes(total)}): /dev/shm has {config.format_bytes(config.shm_free())} free",
                    total,
                )
            _check_address_space(status, total)
            fail(status, "create a region")
        if name is not None:
            fcntl.flock(fd, fcntl.LOCK_UN)
        region = cls(out[0], fd, name, creator=True)
        _attached[region.number] = region
        return region

    @classmethod
    def attach(cls, fd: int, name: str | None = None) -> Region:
        """Join the region behind a descriptor, which the new object owns from then on (on failure too)."""
        out = ffi.new("shmr **")
        begin = time.monotonic()
        try:
            while (status := lib.shmr_attach(fd, out)) == WOULD_BLOCK:
                waited = time.monotonic() - begin
                if name is not None and waited > GRACE_SECONDS and _remove_unfinished(fd, name):
                    raise _Unfinished(errno.ENOENT, "its creator died before it was finished", _path(name))
                if waited > ATTACH_SECONDS:
                    raise LayoutMismatch("attach to a region: nobody has finished creating it")
                time.sleep(0.001)
            if status != OK:
                _check_address_space(status, os.fstat(fd).st_size)
                fail(status, "attach to a region")
        except BaseException:
            os.close(fd)
            raise
        region = cls(out[0], fd, name, creator=False)
        _attached[region.number] = region
        return region

    @classmethod
    def attach_name(cls, name: str) -> Region:
        """Join the region of this name.

        Raises
        ------
        FileNotFoundError
            There is none (any more: one whose creator died over it is removed).
        LayoutMismatch
            It is no region of ours: another owner, open to others, another version.
        """
        must = "it must be a plain file of this user with mode 0600"
        refusal = f"{_path(name)} is not safe to attach to: {must}, and {{}}"
        try:
            fd = os.open(_path(name), os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise
        except OSError as error:  # a symbolic link, a directory, a socket, or somebody else's
            raise LayoutMismatch(refusal.format(f"it cannot be opened: {error.strerror}")) from error
        info = os.fstat(fd)
        wrong = None
        if not stat.S_ISREG(info.st_mode):
            wrong = "it is not a plain file"
        elif info.st_uid != os.geteuid():
            wrong = f"it belongs to user {info.st_uid}"
        elif stat.S_IMODE(info.st_mode) & 0o077:
            wrong = f"its mode is {stat.S_IMODE(info.st_mode):04o}"
        if wrong:
            os.close(fd)
            raise LayoutMismatch(refusal.format(wrong))
        return cls.attach(fd, name)

    @classmethod
    def from_token(cls, token: RegionToken) -> Region:
        """Join the region that a token names; the same process gets the same object."""
        with _attaching:
            known = _attached.get(token.number)
            if known is not None and not known.closed:
                return known
            if token.name is not None and token.file.duplicate is None:
                region = cls.attach_name(token.name)
                if region.inode != token.file.identity[1]:
                    region.close()
                    raise LayoutMismatch(f"the region named {token.name!r} has been replaced by another one")
                return region
            return cls.attach(token.file.open(os.O_RDWR), token.name)

    @staticmethod
    def is_joined(number: int) -> bool:
        """Tell whether this process has joined that region."""
        return number in _attached

    def token(self) -> RegionToken:
        """Return what another process needs to join; inside a multiprocessing spawn the descriptor goes along."""
        return RegionToken(self.number, self.name, lend(self.fd, "this region", ADVICE))

    def rejoin(self) -> Region:
        """In a forked child: join once more, as a participant of its own."""
        with _attaching:
            known = _attached.get(self.number)
            if known is not None and known.pid == os.getpid() and not known.closed:
                return known
            return Region.attach(self._file.duplicate().detach(), self.name)

    @property
    def fd(self) -> int:
        """Descriptor of the region's file, for children.

        Raises
        ------
        ShmError
            Other code has closed it.
        """
        return self._file.fileno()

    # --- memory --------------------------------------------------------------------------------

    def root(self, offset: int, nbytes: int, *, writable: bool = False) -> Bytes:
        """Return the flat bytes at an offset of the region; everything derived from them keeps the mapping."""
        return np.frombuffer(self.memory if writable else self.readable, np.uint8, nbytes, offset)

    def counters(self) -> Any:
        """Return a fresh ``shmr_counters``."""
        out = ffi.new("shmr_counters *")
        lib.shmr_read_counters(self.handle, out)
        return out

    def leases(self) -> dict[int, int]:
        """Return how many messages each process has leased and not yet released."""
        pids, counts = ffi.new("uint32_t[]", PLACES), ffi.new("uint64_t[]", PLACES)
        lib.shmr_leases(self.handle, pids, counts)
        held: dict[int, int] = {}
        for pid, leases in zip(pids, counts, strict=True):
            if pid and leases:
                held[pid] = held.get(pid, 0) + leases
        return held

    def is_abandoned(self) -> bool:
        """Tell whether nobody else is attached any more (the dead are cleared up after first)."""
        lib.shmr_check_deaths(self.handle)
        return int(lib.shmr_live_participants(self.handle)) <= 1

    # --- end -----------------------------------------------------------------------------------

    def check_fork(self) -> None:
        """Raise `UseAfterFork` in a forked child."""
        if self.pid != os.getpid():
            raise UseAfterFork("it belongs to the parent of this forked process")

    def stay(self) -> None:
        """Never leave: only the end of the process ends this part in the region, as a death."""
        self._finalizer.detach()

    def close(self, *, force: bool = False) -> None:
        """Leave: at once if nothing is held here, else with the last view (`force`: at once anyway)."""
        self.closed = True
        if self.pid != os.getpid():
            return
        lib.shmr_close(self.handle, int(force))
        self._file.close()
        while self._names:
            _unlink(self._names.pop())
            self.name = None


def call_at_process_end(finalizer: weakref.finalize[Any, Any], priority: int = 0) -> None:
    """Have a finalizer called in forked children of `multiprocessing` too, which end without `atexit`.

    Without that, everybody who ends would look as if killed.
    """
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        from multiprocessing import util

        entry = util.Finalize(None, _finalize_unless_busy, (finalizer,), exitpriority=priority)
        alive = finalizer.peek()
        if alive is not None:  # a process may come and go often
            weakref.finalize(alive[0], entry.cancel).atexit = False


def _finalize_unless_busy(finalizer: weakref.finalize[Any, Any]) -> None:
    # At this moment threads have not been joined yet; then the end does look like a death after all.
    if all(thread.daemon or thread is threading.current_thread() for thread in threading.enumerate()):
        finalizer()


class _Unfinished(FileNotFoundError):
    pass


def _end(region: weakref.ref[Region], handle: Any, file: Descriptor, names: list[str], pid: int) -> None:
    """Finalize a region: when it is collected, or at exit."""
    if pid != os.getpid():
        file.close()
        if region() is None:  # else this is the exit
            lib.shmr_forget(handle)
        return
    # At exit views may still be alive; what they lease is done with, and must not be delivered again. A collected
    # region can only be needed by arrays that NumPy made in it, and is left with the last one.
    left = region()
    if left is not None:  # this is the exit: views, leases and waiting daemon threads still use the handle
        left.exiting = True
    lib.shmr_close(handle, int(left is not None))
    if left is None:
        lib.shmr_free(handle)
    file.close()
    while names:
        _unlink(names.pop())


def _check_address_space(status: int, total: int) -> None:
    """Say in numbers that a region could not be mapped."""
    if status != lib.SHMR_SYSTEM or lib.shmr_last_errno() != errno.ENOMEM:
        return
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    allowed = (
        "is not limited" if limit < 0 else f"may have {config.format_bytes(limit)} (RLIMIT_AS, ulimit -v)"
    )
    raise MemoryBudgetExceeded(
        f"no address space to map a region of {config.format_bytes(total)}: this process {allowed};"
        " give a smaller memory=",
        total,
    )


def _path(name: str) -> str:
    return f"{SHM_DIRECTORY}/{NAME_PREFIX}{name}"  # where POSIX shared memory is on Linux


def abandoned_names() -> list[str]:
    """Return the names of this user's regions whose participants are all dead or gone.

    Those whose creator died before they were finished are removed by the look at them.
    """
    found = []
    for file in sorted(os.listdir(SHM_DIRECTORY)):
        if not file.startswith(NAME_PREFIX):
            continue
        name = file.removeprefix(NAME_PREFIX)
        try:
            region = Region.attach_name(name)
        except _Unfinished:
            found.append(name)
            continue
        except (OSError, ShmError):
            continue  # somebody else's, or gone meanwhile, or not to be judged
        if region.is_abandoned():
            found.append(name)
        region.close()
    return found


def remove_name(name: str) -> None:
    """Remove the name of a region; those who are attached go on."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_path(name))


def _unlink(name: str) -> None:
    """Remove the name of a region of ours, as `SharedMemory.unlink` would."""
    import _posixshmem  # type: ignore[import-not-found]  # CPython's own, without a stub
    from multiprocessing import resource_tracker

    with contextlib.suppress(FileNotFoundError):
        _posixshmem.shm_unlink(f"/{NAME_PREFIX}{name}")
    with contextlib.suppress(Exception), _tracking:
        resource_tracker.unregister(f"/{NAME_PREFIX}{name}", "shared_memory")


def _has_name(fd: int, name: str) -> bool:
    try:
        info = os.stat(_path(name), follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(info, os.fstat(fd))


def _remove_unfinished(fd: int, name: str) -> bool:
    """Remove the name of a region whose creator died over it; tell whether it was such a one."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # its creator's, or of somebody who looks as we do
        return False
    try:
        if any(os.pread(fd, 8, 0)):  # the magic: it was finished just now
            return False
        if _has_name(fd, name):
            os.unlink(_path(name))
        return True
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)


def _make_file(total: int, arena: int, needed: int, name: str | None) -> int:
    """Return a descriptor of a new sparse file of `total` bytes, of which `needed` may really be used."""
    if name is not None:
        return _make_named(name, total, arena)
    free = config.shm_free()
    refused = f"it has {config.format_bytes(free)} free"
    if free >= needed:
        flags = os.O_TMPFILE | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
        try:
            return _sized(os.open(SHM_DIRECTORY, flags, 0o600), total)
        except OSError as error:  # not every kernel and file system has files without a name
            if error.errno is None:  # a signal's handler has raised
                raise
            refused = f"it refuses a file ({error.strerror})"
    try:
        fd = os.memfd_create("shmengine", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # Memory is reserved within this length; who cut it would kill us by SIGBUS.
        return _sized(fd, total, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as error:
        if error.errno is None:
            raise
        raise MemoryBudgetExceeded(
            f"{config.format_bytes(total)} are asked for. /dev/shm cannot give them: {refused}. And an anonymous memory"
            f" file is refused ({error}); give a smaller memory=, or more to /dev/shm (docker run --shm-size)",
            total,
        ) from error


def _sized(fd: int, total: int, seals: int = 0) -> int:
    """Give a new file its length, and seals; close it if that is not possible."""
    try:
        os.truncate(fd, total)
        if seals:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _make_named(name: str, total: int, arena: int) -> int:
    """Return a descriptor of a new file with a name, locked until the region in it is finished or we die."""
    from multiprocessing import resource_tracker
    from multiprocessing.shared_memory import SharedMemory

    with _tracking:
        # Starting it takes a while, in which a SIGKILL would leave the name behind.
        resource_tracker.ensure_running()
        while True:
            try:
                memory = SharedMemory(f"{NAME_PREFIX}{name}", create=True, size=total)
            except FileExistsError:
                raise
            except OSError as error:
                raise MemoryBudgetExceeded(
                    f"/dev/shm cannot hold a region of {config.format_bytes(arena)}: {error}", total
                ) from error
            try:
                fd = os.dup(memory._fd)  # type: ignore[attr-defined]
            finally:
                memory.close()
            fcntl.flock(fd, fcntl.LOCK_EX)
            if _has_name(fd, name):
                return fd
            os.close(fd)  # we stood still so long that somebody took us for dead
