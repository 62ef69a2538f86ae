"""What is at the workers: tasks in batches, and blocks that are scattered; each under the tag of its message."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from shmengine.engine.backend import TaskOptions
from shmengine.workers.messages import WHOLE_BATCH

__all__ = ["BATCH_MAX", "BATCH_NS", "Batch", "InFlight", "Job", "ScatteredBlocks", "Task"]

BATCH_MAX = 128
BATCH_NS = 500_000  # aim: half a millisecond of work a batch, so that messages cost little beside it


class Task:
    """One call."""

    __slots__ = ("args", "attempts", "index", "kwargs", "unwanted")

    def __init__(self, index: int, args: tuple[Any, ...], kwargs: Any) -> None:
        self.index = index
        self.args = args
        self.kwargs = kwargs
        self.attempts = 0
        self.unwanted = False  # who runs it is to be killed


class Batch:
    """Tasks that travel together, until their results are back."""

    __slots__ = ("job", "nbytes", "tasks")

    def __init__(self, job: Job, tasks: list[Task]) -> None:
        self.job = job
        self.tasks = tasks
        self.nbytes = 0


class Job:
    """One stream, or the futures of one function: the function, and where outcomes go."""

    __slots__ = (
        "abandoned",
        "bytes_in_flight",
        "deliver",
        "function",
        "in_flight",
        "keep",
        "options",
        "result_bytes",
        "retries",
        "task_ns",
    )

    def __init__(
        self,
        function: Any,
        options: TaskOptions,
        retries: int,
        deliver: Callable[..., None],
        keep: object = None,
    ) -> None:
        self.function = function  # bytes, or the frame of a put function
        self.options = options
        self.retries = retries
        self.deliver = deliver  # deliver(task, value, error), by the drainer
        self.abandoned = False
        self.in_flight = 0  # batches
        self.bytes_in_flight = 0
        self.task_ns = 0.0  # what a task takes, smoothed; 0: not known
        self.result_bytes = 0.0  # of one task, smoothed
        self.keep = keep


class ScatteredBlocks(Protocol):
    """Blocks of one call, sent without a `Batch` each."""

    job: Job
    first_tag: int
    count: int

    @property
    def out(self) -> int:
        """How many are at the workers."""
        ...

    def settle(self, tag: int) -> Task | None:
        """One is back, or given up: return it as a task (None: it was not out)."""
        ...

    def accept(self, block: Any) -> bool:
        """Put the result in a leased message to its place and release it; False if it is no such message."""
        ...


class InFlight:
    """Tags, and what is out under them. Its lock is also the dispatcher's."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._next = 1
        self._batches: dict[int, Batch] = {}
        self._scattered: list[ScatteredBlocks] = []

    def __bool__(self) -> bool:
        return bool(self._batches) or any(scattered.out for scattered in self._scattered)

    def reserve(self, count: int = 1) -> int:
        """Return the first of so many fresh tags."""
        with self.lock:
            first = self._next
            self._next += count
            return first

    def add(self, batch: Batch, tag: int | None = None) -> int:
        """A batch is about to be sent: return its tag, a fresh one if it has none yet."""
        with self.lock:
            if tag is None:
                tag = self._next
                self._next = tag + 1
            self._batches[tag] = batch
            job = batch.job
            job.in_flight += 1
            job.bytes_in_flight += batch.nbytes
            return tag

    def take(self, tag: int) -> Batch | None:
        """Return, and forget, what was out under a tag; None if it is not any more."""
        with self.lock:
            batch = self._batches.pop(tag, None)
            if batch is not None:
                batch.job.in_flight -= 1
                batch.job.bytes_in_flight -= batch.nbytes
                return batch
        scattered = self.scattered(tag)
        if scattered is None:
            return None
        task = scattered.settle(tag)
        if scattered.job.abandoned:
            self.remove_scattered(scattered)
        return None if task is None else Batch(scattered.job, [task])

    def take_part(self, tag: int, done: int, rest: int) -> tuple[Batch | None, list[Batch]]:
        """Take so many of the first tasks out of a batch, and of the last ones, each alone; some other is left."""
        with self.lock:
            batch = self._batches.get(tag)
            if batch is None or done + rest >= len(batch.tasks):
                return None, []
            tasks, end = batch.tasks, len(batch.tasks) - rest
            batch.tasks = tasks[done:end]
            return Batch(batch.job, tasks[:done]), [Batch(batch.job, [task]) for task in tasks[end:]]

    def take_all(self) -> list[Batch]:
        """Return, and forget, all batches; those who scatter blocks find out by themselves."""
        return [batch for tag in list(self._batches) if (batch := self.take(tag)) is not None]

    def add_scattered(self, scattered: ScatteredBlocks) -> None:
        """Blocks are about to be sent."""
        with self.lock:
            self._scattered = [*self._scattered, scattered]

    def remove_scattered(self, scattered: ScatteredBlocks) -> None:
        """Nothing more will be sent; while some are out they stay known."""
        with self.lock:
            if not scattered.out:
                self._scattered = [s for s in self._scattered if s is not scattered]

    def scattered(self, tag: int) -> ScatteredBlocks | None:
        """Return what a tag is a block of."""
        for scattered in self._scattered:
            if 0 <= tag - scattered.first_tag < scattered.count:
                return scattered
        return None

    def accept(self, block: Any) -> bool:
        """Take in a leased message that says where a block's result is, and release it; False if it is unwanted."""
        scattered = self.scattered(block.tag)
        if scattered is None:
            return False
        taken = scattered.accept(block)
        if scattered.job.abandoned:
            self.remove_scattered(scattered)
        return taken

    def batches(self) -> list[Batch]:
        """Return the batches that are out."""
        return list(self._batches.values())

    def limit(self, tag: int, index: int) -> float | None:
        """Return the seconds that a task may run; None: there is no limit."""
        batch = self._batches.get(tag)
        if batch is not None:
            alone = index == WHOLE_BATCH and len(batch.tasks) == 1
            unwanted = any(task.unwanted for task in batch.tasks if alone or task.index == index)
            return 0.0 if unwanted else batch.job.options.timeout
        scattered = self.scattered(tag)
        return None if scattered is None else scattered.job.options.timeout

    def whose(self, tag: int, index: int) -> tuple[str, int | None]:
        """Return the call that a tag belongs to, and which of its tasks: the one of this index, or the only one."""
        batch = self._batches.get(tag)
        if batch is not None:
            if index == WHOLE_BATCH:
                return batch.job.options.label, batch.tasks[0].index if len(batch.tasks) == 1 else None
            return batch.job.options.label, index
        scattered = self.scattered(tag)
        return ("", None) if scattered is None else (scattered.job.options.label, tag - scattered.first_tag)

    def any_abandoned(self) -> bool:
        """Tell whether results will come that nobody waits for."""
        return any(batch.job.abandoned for batch in list(self._batches.values())) or any(
            scattered.job.abandoned and scattered.out for scattered in self._scattered
        )

    def tasks(self) -> int:
        """Return the number of tasks that are out."""
        with self.lock:
            batches = sum(len(batch.tasks) for batch in self._batches.values())
        return batches + sum(scattered.out for scattered in self._scattered)
