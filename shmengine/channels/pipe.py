"""Channels through pipes: one for each direction, as `multiprocessing.Pipe` makes them."""

from __future__ import annotations

import fcntl
import multiprocessing
from typing import ClassVar

from shmengine.channels.link import Capabilities, Link, Options
from shmengine.channels.stream import StreamLink, pair_of, reopened
from shmengine.descriptors import Descriptor

__all__ = ["pair"]

SMALLEST_BYTES = 1 << 16  # what a pipe has anyway


class PipeLink(StreamLink):
    """A link over two pipes, or over one."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        mechanism="pipe",
        between_hosts=False,
        in_place=False,
        compresses=True,
        priorities=1,
        reconnects=False,
        writable=True,
        at_once_in_asyncio=True,
        outlives_sender=True,
    )


def pair(options: Options) -> tuple[Link, Link]:
    """Return the links of both ends of a new channel."""
    return pair_of(PipeLink, options, lambda: _pipe(options.buffer_bytes))


def _pipe(buffer_bytes: int) -> tuple[Descriptor, Descriptor]:
    """Return a descriptor of a new pipe for each of the two ends."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    with reader, writer:
        _enlarge(writer.fileno(), buffer_bytes)
        first = reopened(reader.fileno())
        try:
            return first, reopened(writer.fileno())
        except BaseException:
            first.close()
            raise


def _enlarge(fd: int, nbytes: int) -> None:
    """Let a pipe hold so many bytes, or as many as this machine allows."""
    with open("/proc/sys/fs/pipe-max-size") as file:
        nbytes = min(nbytes, int(file.read()))
    while nbytes > SMALLEST_BYTES:
        try:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, nbytes)
        except OSError:  # the user's pipes together have too much (pipe-user-pages-soft)
            nbytes //= 2
        else:
            return
