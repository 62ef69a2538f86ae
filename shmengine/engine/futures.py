"""Futures of the process backend: as many run at once as keep the workers busy; the others wait here."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Any

from shmengine.engine.backend import Submit, TaskOptions, annotate
from shmengine.engine.inflight import BATCH_MAX, BATCH_NS, Batch, Job, Task
from shmengine.errors import Closed
from shmengine.pickling import goes_by_reference

if TYPE_CHECKING:
    from shmengine.engine.dispatch import Dispatcher

__all__ = ["FutureTask", "Futures"]


class _Sent:
    """Tasks that were sent together, until the last of them has ended."""

    __slots__ = ("left", "nbytes")

    def __init__(self, left: int, nbytes: int) -> None:
        self.left = left
        self.nbytes = nbytes


class FutureTask(Task):
    """The call that a future stands for."""

    __slots__ = ("future", "job", "nbytes", "quick", "sent")

    def __init__(self, job: Job, future: Future[Any], args: tuple[Any, ...], kwargs: Any) -> None:
        super().__init__(0, args, kwargs)
        self.job = job
        self.future = future
        self.nbytes = 0  # of its message, once that is known
        self.quick = False  # it may go together with others
        self.sent: _Sent | None = None


class Futures:
    """Those that run, and those that nobody has begun; under the dispatcher's lock."""

    def __init__(self, core: Dispatcher, limit: int) -> None:
        self._core = core
        self._limit = limit
        self._bytes = 0  # of the arguments of those that run
        self.running = 0  # batches
        self._unfinished = 0  # tasks of these
        self.pending: deque[FutureTask] = deque()
        self._latest: Job | None = None  # for more calls of its function

    def submitter(self, fn: Callable[..., Any], options: TaskOptions) -> Submit:
        """Return what runs `fn` once for each of its calls; see `shmengine.engine.backend.Backend.submitter`."""
        core = self._core
        core.check_open()
        retries = core.retries if options.retries is None else options.retries
        function = core.encode_function(fn)
        job = self._latest
        if job is None or (
            job.function is not function and (job.function, job.options) != (function, options)
        ):
            job = Job(function, options, retries, self._deliver)
            self._latest = job if core.policy.pickles_late and type(function) is bytes else None
        return functools.partial(self._submit, job)

    def _submit(self, job: Job, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Future[Any]:
        core = self._core
        task = FutureTask(job, core.policy.make_future(), tuple(args), dict(kwargs) if kwargs else None)
        core.provide_workers()
        if core.policy.pickles_late and core.policy.tasks_per_worker is None:
            task.quick = _is_atomic(task.args) and not task.kwargs
        encoded = batch = None
        forgotten = False
        if not (core.policy.pickles_late and (self.pending or self._full(task))):
            core.check_open()
            # Here, so that what cannot be pickled is raised here.
            encoded = core.encode_batch(Batch(job, [task]))
            task.nbytes = encoded.nbytes
        with core.lock:
            core.check_open()  # what is added later would wait for ever
            if encoded is None or self.pending or self._full(task):
                self.pending.append(task)
                forgotten = self.running == 0  # what it was to wait for has just ended
            else:
                batch = self._begin([task])
                if batch is not None and core.drainer == threading.get_ident():
                    core.outbox.append(batch)  # in a callback, whose future still holds its result
                    batch = None
        if batch is not None:
            try:
                core.dispatch(batch, encoded)
            except BaseException as error:
                self._ended(task)
                self.send_pending()
                if isinstance(error, Closed):
                    core.check_open()  # says why
                raise
        if core.drainer != threading.get_ident():  # who drains sends what is due afterwards
            if forgotten:
                core.flush()
            core.collector.wake()
        return task.future

    def _full(self, task: FutureTask) -> bool:
        """Tell whether a task has to wait, because enough messages are on their way, by number or by bytes.

        With one message for each worker on its way, quick tasks are better sent together, when one is back.
        """
        limit = self._limit
        if task.quick and 0 < task.job.task_ns < BATCH_NS:
            limit = self._core.workers
        return self.running > 0 and (
            self.running >= limit or self._bytes + task.nbytes > self._core.budget // 4
        )

    def _begin(self, tasks: list[FutureTask]) -> Batch | None:
        """Count tasks as running, without those that were cancelled, and return them; None if none is left."""
        tasks = [task for task in tasks if task.future.set_running_or_notify_cancel()]
        if not tasks:
            return None
        sent = _Sent(len(tasks), sum(task.nbytes for task in tasks))
        for task in tasks:
            task.sent = sent
        self.running += 1
        self._unfinished += len(tasks)
        self._bytes += sent.nbytes
        return Batch(tasks[0].job, [*tasks])

    def _deliver(self, task: FutureTask, value: Any, error: BaseException | None) -> None:
        self._ended(task)
        if error is None:
            task.future.set_result(value)
        else:
            task.future.set_exception(self._core.policy.failed(annotate(error, task.job.options)))

    def _ended(self, task: FutureTask) -> None:
        """One has ended: there may be room for those that wait, see `send_pending`."""
        core = self._core
        with core.lock:
            sent, task.sent = task.sent, None
            if sent is None:  # an interrupt while it was sent came when its result was already here
                return
            self._unfinished -= 1
            sent.left -= 1
            if sent.left:
                return
            self.running -= 1
            self._bytes -= sent.nbytes

    def send_pending(self) -> None:
        """Put those that wait into the outbox, as far as there is room for them.

        When a message's results have all been delivered: what they have let others submit may then go together.
        """
        if not self.pending:
            return
        core = self._core
        with core.lock:
            while self.pending and not self._full(self.pending[0]):
                batch = self._begin(self._next())
                if batch is not None:
                    core.outbox.append(batch)

    def _next(self) -> list[FutureTask]:
        """Take the next of those that wait, or as many of the same function as are soon done, if they may go together.

        No more than each worker's share.
        """
        first = self.pending.popleft()
        job = first.job
        size = 1
        if first.quick and job.task_ns:
            size = min(BATCH_MAX, int(BATCH_NS / job.task_ns), -(-(self.count() + 1) // self._core.workers))
        tasks = [first]
        while len(tasks) < size and self.pending and self.pending[0].job is job and self.pending[0].quick:
            task = self.pending.popleft()
            task.index = len(tasks)
            tasks.append(task)
        return tasks

    def count(self) -> int:
        """Return how many are at the workers or wait."""
        return self._unfinished + len(self.pending)

    def withdraw(self, unwanted: AbstractSet[Future[Any]], *, kill: bool) -> None:
        """Keep the tasks of these futures from running, or (`kill`) end the workers that run them."""
        core = self._core
        core.check_open()
        for batch in core.recall():
            others = []
            for task in batch.tasks:
                if isinstance(task, FutureTask) and task.future in unwanted:
                    core.conclude(batch.job, task, None, CancelledError())
                else:
                    others.append(task)
            if others:
                core.outbox.append(Batch(batch.job, others))
        if kill:
            for batch in core.in_flight.batches():
                for task in batch.tasks:
                    if isinstance(task, FutureTask) and task.future in unwanted:
                        task.unwanted = True
                        core.pool.watch_time()
        core.flush()
        core.collector.wake()

    def cancel_pending(self) -> None:
        """Cancel those that nobody has begun."""
        with self._core.lock:
            dropped = list(self.pending)
            self.pending.clear()
        for task in dropped:
            task.future.cancel()
            task.future.set_running_or_notify_cancel()

    def fail_pending(self, make_error: Callable[[], BaseException]) -> None:
        """Give those that nobody has begun, and that were not cancelled, an error each."""
        with self._core.lock:
            dropped = list(self.pending)
            self.pending.clear()
        for task in dropped:
            if task.future.set_running_or_notify_cancel():
                task.future.set_exception(make_error())


_ATOMS = frozenset(
    {int, float, complex, bool, str, bytes, type(None), type}
)  # a class is one for all tasks anyway


def _is_atomic(args: tuple[Any, ...]) -> bool:
    """Tell whether nothing in these arguments can be changed.

    Tasks that go together are pickled together, so that one would see what another has done to an object of both.
    """
    for arg in args:  # a loop: `all` takes three times as long
        kind = type(arg)
        if kind not in _ATOMS and not (_is_atomic(arg) if kind is tuple else goes_by_reference(arg)):
            return False
    return True
