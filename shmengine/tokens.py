"""Descriptors on their way to another process of this machine.

A token travels as a pickle. While `multiprocessing` starts a process the descriptor itself goes along; any other
process opens it through the one that made the token, which has to live, and to keep it open, until then.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass, field
from typing import Any

from shmengine.errors import ShmError

__all__ = ["DescriptorToken", "lend", "start_time"]


@dataclass(frozen=True)
class DescriptorToken:
    """What another process needs to have the file behind a descriptor of ours."""

    pid: int
    start_time: str
    fd: int
    identity: tuple[int, int]
    what: str
    advice: str = ""
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
        refusal = (
            f"{self.what} cannot be reached: the process that passed it on (pid {self.pid}) {{}}{self.advice}"
        )
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


_lent: weakref.WeakKeyDictionary[Any, dict[int, Any]] = (
    weakref.WeakKeyDictionary()
)  # to children that are being made


def lend(fd: int, what: str, advice: str = "") -> DescriptorToken:
    """Return a token of a descriptor; `what` says in errors what it is of, and `advice` what to do instead."""
    from multiprocessing import context, reduction

    duplicate = None
    child: Any = context.get_spawning_popen()
    if child is not None:
        # Once a child, who may get several things that share it: a descriptor cannot be passed on twice.
        lent = _lent.setdefault(child, {})
        duplicate = lent.get(fd) or lent.setdefault(fd, reduction.DupFd(fd))
    pid = os.getpid()
    return DescriptorToken(pid, start_time(pid), fd, identity(fd), what, advice, duplicate)


def start_time(pid: int) -> str:
    """Return when a process started, in the kernel's words: it and the pid name one process."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[19].decode()


def identity(fd: int) -> tuple[int, int]:
    """Return device and inode of the file behind a descriptor."""
    info = os.fstat(fd)
    return info.st_dev, info.st_ino
