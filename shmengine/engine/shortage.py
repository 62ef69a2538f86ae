"""When main is short of memory, or workers are: who can make room, and who must give up."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from shmengine import config
from shmengine._native import ffi, lib
from shmengine._native.status import CLOSED, INTERRUPTED, ITEM_WAITS, OK, TIMEOUT, fail
from shmengine.engine.backend import CLOSED_TEXT
from shmengine.errors import Closed, MemoryBudgetExceeded
from shmengine.workers.messages import RESULT_RING

if TYPE_CHECKING:
    from shmengine.engine.dispatch import Dispatcher

__all__ = ["LOOK_NS", "Patience", "Shortage"]

LOOK_NS = 250_000_000


class Patience:
    """Workers give back what they keep of objects that were put when they have had nothing to do for a while."""

    LOOKS = 3

    def __init__(self) -> None:
        self.looks = 0

    def left(self) -> bool:
        """Count a look at which nothing was running; tell whether there should be one more."""
        self.looks += 1
        return self.looks < self.LOOKS


class Shortage:
    """What a dispatcher does when a claim or commit does not succeed at once."""

    def __init__(self, core: Dispatcher) -> None:
        self._core = core
        self._stuck: tuple[list[tuple[int, int]], int] = (
            [],
            0,
        )  # who starved at the last look, and when it was

    def make_room(self, nbytes: int, what: str) -> None:
        """Wait until this process has so much memory free, or say that there is none."""
        core = self._core
        block = ffi.new("shmr_block *")
        patience = Patience()
        try:
            while True:
                core.check_open()
                status = lib.shmr_claim(core.handle, nbytes, ffi.NULL, 0, RESULT_RING, core.look(), block)
                if status == OK:
                    return
                self.relieve(status, nbytes, what, patience)
        finally:
            if block.state:
                lib.shmr_abort(core.handle, block)

    def relieve(self, status: int, nbytes: int, what: str, patience: Patience) -> None:
        """A claim or commit of main's did not succeed at once: make room, or say that there is none."""
        core = self._core
        if status == INTERRUPTED:
            return
        if status == ITEM_WAITS:
            if not core.drain(0):
                time.sleep(0.0005)  # another thread is draining
            return
        if status == TIMEOUT:
            if core.broken is not None:
                raise core.broken()
            core.check_open()
            core.crossings.settle()
            core.policy.make_room()
            lib.shmr_trim(core.handle)
            if not core.in_flight:
                if patience.left():
                    return
                c = core.region.counters()
                raise MemoryBudgetExceeded(
                    f"{what}: no room for {config.format_bytes(nbytes)}; the memory budget of"
                    f" {config.format_bytes(core.budget)} is used up: {config.format_bytes(c.used)} by arrays of"
                    " this process that are alive, the rest by workers, and no task is running that could free"
                    " any; give the engine a larger memory=, or let arrays go",
                    nbytes,
                    core.budget,
                    int(c.used),
                )
            self.deny_if_stuck()
            return
        if status == CLOSED:
            raise Closed(CLOSED_TEXT)
        if status == lib.SHMR_TOO_LARGE:
            raise MemoryBudgetExceeded(
                f"{what}: {config.format_bytes(nbytes)} are more than the whole memory budget of"
                f" {config.format_bytes(core.budget)}; give the engine a larger memory=, or smaller blocks",
                nbytes,
                core.budget,
            )
        fail(status, what)

    def deny_if_stuck(self) -> None:
        """If every worker that has work waits for memory, and no result is there to be taken, one must give up.

        Not at the first look: what that gives back may be what they wait for.
        """
        core = self._core
        starving = core.pool.starving()
        if not starving or lib.shmr_approx_fill(core.handle, RESULT_RING):
            self._stuck = ([], 0)
            return
        lib.shmr_trim(core.handle)
        before, since = self._stuck
        if starving != before:
            self._stuck = (starving, time.monotonic_ns())
        elif time.monotonic_ns() - since > LOOK_NS // 2:
            self._stuck = ([], 0)
            core.pool.deny(starving[0][0])
