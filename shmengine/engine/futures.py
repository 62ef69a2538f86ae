"""Futures of the process backend: as many run at once as keep the workers busy; the others wait here."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from shmengine.engine.backend import TaskOptions, annotate
from shmengine.engine.inflight import Batch, Job, Task

if TYPE_CHECKING:
    from concurrent.futures import Future

    from shmengine.engine.dispatch import Dispatcher

__all__ = ["Futures"]


class Futures:
    """Those that run, and those that nobody has begun; under the dispatcher's lock."""

    def __init__(self, core: Dispatcher, limit: int) -> None:
        self._core = core
        self._limit = limit
        self._bytes = 0  # of the arguments of those that run
        self.running = 0
        self.pending: deque[Batch] = deque()

    def submit(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], options: TaskOptions
    ) -> Future[Any]:
        """Run one task; see `shmengine.engine.backend.Backend.submit`."""
        from concurrent.futures import Future

        core = self._core
        core.check_open()
        future: Future[Any] = Future()

        counted = [True]

        def end() -> None:
            with core.lock:  # once: an interrupt while it is sent may come when its result is already here
                if counted:
                    counted.clear()
                    self.ended(nbytes)

        def deliver(_: Task, value: Any, error: BaseException | None) -> None:
            end()  # no reference to the job: that would be a cycle, and keep the result
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(annotate(error, options))

        retries = core.retries if options.retries is None else options.retries
        job = Job(core.encode_function(fn), options, retries, deliver)
        job.begin = future.set_running_or_notify_cancel
        batch = Batch(job, [Task(0, tuple(args), dict(kwargs) or None)])
        encoded = core.encode_batch(batch)  # here, so that what cannot be pickled is raised here
        nbytes = job.future_bytes = encoded.nbytes
        with core.lock:
            start = self._may_start(job)
            if not start:
                self.pending.append(batch)
            elif core.drainer == threading.get_ident():  # in a callback, whose future still holds its result
                start = False
                core.outbox.append(batch)
        if start:
            future.set_running_or_notify_cancel()
            try:
                core.dispatch(batch, encoded)
            except BaseException:
                end()
                raise
        core.collect()
        return future

    def _may_start(self, job: Job) -> bool:
        """Count a future as running unless enough of them are, by number or by bytes (lock held)."""
        if self.running and (
            self.running >= self._limit or self._bytes + job.future_bytes > self._core.budget // 4
        ):
            return False
        self.running += 1
        self._bytes += job.future_bytes
        return True

    def ended(self, nbytes: int) -> None:
        """One has ended: those that wait may be sent, as far as there is room for them."""
        core = self._core
        with core.lock:
            self.running -= 1
            self._bytes -= nbytes
            while self.pending and self._may_start(self.pending[0].job):
                core.outbox.append(self.pending.popleft())
