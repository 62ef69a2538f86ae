"""Descriptors on their way to another process of this machine.

A token travels as a pickle. While `multiprocessing` starts a process the descriptor itself goes along; any other
process opens it through the one that made the token, which has to live, and to keep it open, until then.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from shmengine.errors import ShmError
from shmengine.region import start_time

__all__ = ["DescriptorToken", "lend"]


@dataclass(frozen=True)
class DescriptorToken:
    """What another process needs to have the file behind a descriptor of ours."""

    pid: int
    start_time: str
    fd: int
    identity: tuple[int, int]
    what: str
    duplicate: Any = field(default=None, compare=False)  # multiprocessing's DupFd, while it spawns

    def open(self, flags: int) -> int:
        """Return a descriptor of that file.

        Parameters
        ----------
        flags : int
            How to open it anew, unless the descriptor itself came along: ``os.O_RDONLY`` and its like.

        Raises
        ------
        ShmError
            The process that made the token has ended, has closed it, or may not be looked into.
        """
        if self.duplicate is not None:
            return int(self.duplicate.detach())
        refusal = f"{self.what} cannot be reached: the process that passed it on (pid {self.pid}) {{}}"
        try:
            if start_time(self.pid) != self.start_time:
                raise ShmError(refusal.format("has ended"))
            fd = os.open(f"/proc/{self.pid}/fd/{self.fd}", flags | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ShmError(refusal.format("has ended, or has closed it")) from None
        except PermissionError:
            raise ShmError(refusal.format("does not let this one open its descriptors")) from None
        if identity(fd) != self.identity:
            os.close(fd)
            raise ShmError(refusal.format("has closed it"))
        return fd


def lend(fd: int, what: str) -> DescriptorToken:
    """Return a token of a descriptor; `what` says in errors what it is of."""
    from multiprocessing import context, reduction

    duplicate = reduction.DupFd(fd) if context.get_spawning_popen() is not None else None
    pid = os.getpid()
    return DescriptorToken(pid, start_time(pid), fd, identity(fd), what, duplicate)


def identity(fd: int) -> tuple[int, int]:
    """Return device and inode of the file behind a descriptor."""
    info = os.fstat(fd)
    return info.st_dev, info.st_ino
