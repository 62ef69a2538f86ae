"""Channels through POSIX message queues, one for each direction, with priorities.

A queue has its name only from one system call to the next. The name tells whose it is, so that one that was left there
by a process killed in between can be found and removed (``shmengine clean``).
"""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import sys
import weakref
from typing import ClassVar, NoReturn

import posix_ipc

from shmengine._native import lib
from shmengine.channels.link import Capabilities, Link, Options
from shmengine.channels.stream import StreamLink, pair_of, reopened
from shmengine.config import format_bytes
from shmengine.descriptors import Descriptor
from shmengine.errors import ShmError
from shmengine.tokens import start_time

__all__ = ["abandoned_queues", "are_listed", "pair", "remove_queue"]

PREFIX = "shmengine-"
LIMITS = "/proc/sys/fs/mqueue"
LEAST_FRAGMENT_BYTES = 512
SHARE = 8  # of the bytes that a user's queues may still have: the part for one queue
GOOD_COUNT = 8  # messages in a queue, rather than larger ones
COST = 64  # bytes that the kernel reckons for a message beside its own


class _TooMuchError(Exception):
    """The kernel has no room for another queue so large."""


class MessageQueueLink(StreamLink):
    """A link over two message queues, or over one."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        mechanism="mqueue",
        between_hosts=False,
        in_place=False,
        compresses=True,
        priorities=lib.SHMR_PRIORITIES,
        reconnects=False,
        writable=True,
        at_once_in_asyncio=True,
        outlives_sender=True,
    )

    def close(self) -> None:
        """Say goodbye, if this process uses this end, and let all go."""
        _queue_bytes.pop(self, None)
        super().close()


_queue_bytes: weakref.WeakKeyDictionary[MessageQueueLink, int] = weakref.WeakKeyDictionary()


def pair(options: Options) -> tuple[Link, Link]:
    """Return the links of both ends of a new channel.

    Raises
    ------
    ShmError
        The kernel's limits do not allow another queue.
    """
    fragment_bytes, room = _limit("msgsize_max"), _room()
    while fragment_bytes * GOOD_COUNT > room and fragment_bytes > LEAST_FRAGMENT_BYTES:
        fragment_bytes //= 2
    while True:
        fitting = max(GOOD_COUNT, room // (fragment_bytes + COST))
        count = min(_limit("msg_max"), options.buffer_bytes // fragment_bytes, fitting)
        try:
            return _pair(options, max(1, count), fragment_bytes)
        except _TooMuchError as refusal:
            # All queues of a user have a number of bytes together: smaller ones may still be had.
            fragment_bytes //= 2
            if fragment_bytes < LEAST_FRAGMENT_BYTES:
                why = f"there is no room for another one, not even for {count} messages of {LEAST_FRAGMENT_BYTES} bytes"
                _explain(why, refusal.__cause__)


def _room() -> int:
    """Return how many bytes a queue may have: a part of what is left, so that many more can be made.

    What queues of other processes have nobody can see.
    """
    together = resource.getrlimit(resource.RLIMIT_MSGQUEUE)[0]
    if together < 0:
        return sys.maxsize
    links = [reference() for reference in _queue_bytes.keyrefs()]  # others make and close some meanwhile
    made = sum(_queue_bytes.get(link, 0) for link in links if link is not None)
    return max(0, together - made) // SHARE


def _pair(options: Options, count: int, fragment_bytes: int) -> tuple[Link, Link]:
    links = pair_of(MessageQueueLink, options, lambda: _queue(count, fragment_bytes), fragment_bytes)
    for link in links:
        _queue_bytes[link] = count * (fragment_bytes + COST) * (1 + options.duplex) // 2
    return links


def _queue(count: int, fragment_bytes: int) -> tuple[Descriptor, Descriptor]:
    """Return a descriptor of a new queue for each of the two ends."""
    pid = os.getpid()
    name = f"/{PREFIX}{pid}-{start_time(pid)}-{secrets.token_hex(16)}"
    try:
        queue = posix_ipc.MessageQueue(
            name, posix_ipc.O_CREX, mode=0o600, max_messages=count, max_message_size=fragment_bytes
        )
    except OSError as error:  # without an errno, which would tell what there is too much of
        raise _TooMuchError from error
    except (posix_ipc.Error, ValueError) as error:
        _explain(str(error), error)
    try:
        posix_ipc.unlink_message_queue(name)
        first = reopened(queue.mqd)
        try:
            return first, reopened(queue.mqd)
        except BaseException:
            first.close()
            raise
    finally:
        queue.close()


def _limit(name: str) -> int:
    try:
        with open(f"{LIMITS}/{name}") as file:
            return int(file.read())
    except FileNotFoundError:
        raise ShmError("this kernel has no POSIX message queues: use another mechanism") from None


def _explain(why: str, error: BaseException | None) -> NoReturn:
    """Raise what says which limits there are."""
    together = resource.getrlimit(resource.RLIMIT_MSGQUEUE)[0]
    raise ShmError(
        f"no message queue can be made: {why}. A user's queues may have"
        f" {'any number of bytes' if together < 0 else format_bytes(together)} together (RLIMIT_MSGQUEUE: raise it by"
        f" ulimit -q), and there may be {_limit('queues_max')} queues ({LIMITS}/queues_max), each of up to"
        f" {_limit('msg_max')} messages ({LIMITS}/msg_max) of {_limit('msgsize_max')} bytes ({LIMITS}/msgsize_max)."
        " Close channels that are not needed, raise the limits, or use another mechanism"
    ) from error


# --- names that were left behind ------------------------------------------------------------------


def abandoned_queues() -> list[str]:
    """Return the names of queues whose maker was killed before it had unlinked them.

    The kernel lists queues only where their file system is mounted, commonly at ``/dev/mqueue``.
    """
    found: set[str] = set()
    for directory in _mounts():
        for name in os.listdir(directory):
            maker, _, rest = name.removeprefix(PREFIX).partition("-")
            if (
                name.startswith(PREFIX)
                and maker.isdigit()
                and not _is_alive(int(maker), rest.partition("-")[0])
            ):
                found.add(f"/{name}")
    return sorted(found)


def remove_queue(name: str) -> None:
    """Remove the name of a queue; those who have it open go on."""
    with contextlib.suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_message_queue(name)


def are_listed() -> bool:
    """Whether `abandoned_queues` can see any: whether the kernel's list of queues is mounted here."""
    return bool(_mounts())


def _mounts() -> list[str]:
    with open("/proc/self/mounts") as mounts:
        fields = [line.split() for line in mounts]
    return [place for _, place, kind, *_ in fields if kind == "mqueue"]


def _is_alive(pid: int, started: str) -> bool:
    try:
        return start_time(pid) == started
    except (FileNotFoundError, ProcessLookupError):
        return False
