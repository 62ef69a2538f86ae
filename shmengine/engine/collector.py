"""The thread that takes results when only futures wait for them."""

from __future__ import annotations

import functools
import os
import sys
import threading
from typing import TYPE_CHECKING

from shmengine import config
from shmengine.errors import Closed, ShmError
from shmengine.threads import Service

if TYPE_CHECKING:
    from shmengine.engine.dispatch import Dispatcher

__all__ = ["Collector"]


class Collector:
    """Drains for futures, and for streams that were abandoned; ends the dispatcher when that was asked for.

    Its thread starts when it is first needed.
    """

    def __init__(self, core: Dispatcher) -> None:
        self._core = core
        self._finishing = False
        self.thread: threading.Thread | None = None

    def wake(self) -> None:
        """Make sure that somebody drains."""
        core = self._core
        with core.turn_lock:
            if self.thread is None:
                self.thread = Service(self._run, config.RESULTS_THREAD)
                self.thread.start()
            else:
                core.turn.notify_all()

    def finish(self, *, now: bool = False) -> None:
        """End the dispatcher as soon as all futures have ended, or (`now`) at once."""
        core = self._core
        if core.region.pid != os.getpid() or core.has_ended():
            return
        self._finishing = True
        if now or self.thread is None:  # without it nothing was submitted
            core.end(wait=not now)
        else:
            self.wake()

    def join(self) -> None:
        """Wait until the thread has ended, unless it is the caller itself."""
        thread = self.thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _finished(self) -> bool:
        """Tell whether it is time to end."""
        core = self._core
        if core.broken is not None and core.policy.fragile:
            return True
        return self._finishing and not core.futures.running and not core.futures.pending

    def _nobody_waits(self) -> bool:
        """Tell whether every result that will come has a stream that drains for it."""
        core = self._core
        return (
            core.futures.count() == 0
            and not core.in_flight.any_abandoned()
            and not (core.policy.fragile and core.deaths.announced)
        )

    def _run(self) -> None:
        core = self._core
        while not (core.has_ended() or self._finished()):
            with core.turn_lock:
                while not (core.has_ended() or self._finished()) and (
                    core.drainer is not None or self._nobody_waits()
                ):
                    core.turn.wait()
            try:
                if not core.drain(core.look()):
                    core.shortage.deny_if_stuck()
            except Closed:
                return
            except ShmError as error:
                core.fail_all(functools.partial(_same, error))
                if not core.policy.fragile:
                    return
            except BaseException:
                # A callback's, or a failure to send a future that has been told: others go on.
                threading.excepthook(threading.ExceptHookArgs([*sys.exc_info(), threading.current_thread()]))
        core.end(wait=core.broken is None)


def _same(error: BaseException) -> BaseException:
    return error
