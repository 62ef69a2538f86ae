"""What a ring and a queue are alike in: an end of a region with one ring, in this process."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from functools import partial
from typing import Any

from shmengine._native import ffi, lib
from shmengine._native.status import OK
from shmengine.errors import Closed
from shmengine.leases import new_block
from shmengine.region import Region, call_at_process_end

__all__ = ["Attached", "put_back", "read_config"]

BLOCK_BYTES = ffi.sizeof("shmr_block")


class Attached:
    """This process's end of a region with one ring: joined anew in a forked child, closed once."""

    _region: Region
    _h: Any  # its handle
    _capacity: int
    _closed: bool

    def _attach(self, region: Region) -> None:
        self._region = region
        self._h = region.handle
        self._capacity = int(read_config(region).capacity[0])
        self._closed = False
        self._start_keeping()
        region.users.add(self)

    def _handle(self) -> Any:
        """Return the core's handle, joined anew in a forked child."""
        if self._closed:
            raise self._refusal()
        if self._region.pid != os.getpid():
            self._rejoin()
        return self._region.handle

    def _rejoin(self) -> Region:
        """In a forked child: become a participant of its own."""
        if self._closed:
            raise self._refusal()
        if self._region.pid != os.getpid():
            self._region = self._region.rejoin()
            self._h = self._region.handle
            self._region.users.add(self)
            self._start_keeping()
            self._forget()
        return self._region

    def _detach(self) -> None:
        """Use the region no more; it is left when nobody in this process does."""
        self._closed = True
        if self._region.pid == os.getpid():
            put_back(self._region, self._kept)
        users = self._region.users
        users.discard(self)
        if self._region.pid == os.getpid() and not users:
            self._region.close()

    def _start_keeping(self) -> None:
        self._kept: deque[Any] = deque()  # what it has in a forked child is the parent's
        self._puts_back = False

    def _keep(self, block: Any) -> None:
        """Keep a message for the next call: a signal's handler has raised, so that nobody has got it."""
        if isinstance(block, int):
            block = ffi.cast("shmr_block *", block)
        if not block.state:
            return
        if not self._puts_back:
            self._puts_back = True
            # After the region's own finalizer, so that it runs before that one at exit.
            call_at_process_end(weakref.finalize(self, put_back, self._region, self._kept), 1)
        # A second signal may come at any of these steps, and its exception lead here again.
        if not any(kept.block == block.block and kept.state == block.state for kept in self._kept):
            copy = new_block()
            copy[0] = block[0]
            self._kept.append(copy)
        block.state = 0

    def _take_kept(self, block: Any) -> bool:
        """Take the oldest message that was kept, if there is one."""
        if not self._kept or self._region.pid != os.getpid():
            return False
        try:
            # One call of C, in which no signal's handler runs: the message is never nowhere.
            next(map(partial(ffi.memmove, block, n=BLOCK_BYTES), iter(self._kept.popleft, None)))
        except IndexError:
            return False
        return True

    def _sleep_at_exit(self) -> None:
        """Let a daemon thread end with the interpreter, and not with an error, when that closes the region."""
        if self._region.exiting and threading.current_thread().daemon:
            threading.Event().wait()

    def _forget(self) -> None:
        """Drop what belonged to the parent of this forked process."""

    def _refusal(self) -> Closed:
        """Return the error for whoever uses this after `close`."""
        raise NotImplementedError


def put_back(region: Region, messages: deque[Any]) -> None:
    """Put back what was leased and never used: when this process's end is closed or collected, or at exit."""
    if region.pid != os.getpid():
        return
    while messages:
        if lib.shmr_commit(region.handle, 0, 0, -1, 0, messages[0]) != OK:
            # The ring is full. Leaving would drop these messages, dying does not: so do not leave others.
            if lib.shmr_live_participants(region.handle) > 1:
                region.stay()
            return
        messages.popleft()


def read_config(region: Region) -> Any:
    """Return the geometry of a region, a ``shmr_config``."""
    out = ffi.new("shmr_config *")
    lib.shmr_read_config(region.handle, out)
    return out
