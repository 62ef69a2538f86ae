"""Streams of tasks on the process backend: lazy, bounded, batched by what the tasks have been taking."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from shmengine.engine.backend import Call, Outcome, TaskOptions
from shmengine.engine.dispatch import BATCHES_PER_WORKER, Dispatcher
from shmengine.engine.inflight import BATCH_MAX, BATCH_NS, Batch, Job, Task

__all__ = ["room_in_window", "run_stream"]

FILL_NS = 200_000  # a slow iterable must not hold back what it has already given
WINDOW_MIN = 64  # tasks out at once if nobody says otherwise; enough that one slow task stops nobody


def run_stream(
    keep: object,
    core: Dispatcher,
    fn: Callable[..., Any],
    calls: Iterable[Call],
    options: TaskOptions,
    ordered: bool,
) -> Iterator[Outcome]:
    """Run `fn` once for each call; see `Backend.stream`.

    Parameters
    ----------
    keep
        Kept alive as long as the iterator is.
    """
    core.check_open()
    ready: dict[int, Outcome] = {}  # in order
    arrived: deque[Outcome] = deque()  # as they come

    def deliver(task: Task, value: Any, error: BaseException | None) -> None:
        outcome = Outcome(task.index, value, error)
        if ordered:
            ready[task.index] = outcome
        else:
            arrived.append(outcome)

    retries = core.retries if options.retries is None else options.retries
    job = Job(core.encode_function(fn), options, retries, deliver, keep)
    source = iter(calls)
    taken = yielded = options.first
    exhausted = False

    def next_ready() -> bool:
        return yielded in ready if ordered else bool(arrived)

    def something_to_do() -> bool:
        # While a task holds up those after it, these go on, as far as the window reaches.
        return next_ready() or (not exhausted and _room(core, job, taken - yielded) > 0)

    def tell() -> None:
        if options.completed is not None:
            options.completed(yielded + len(ready) + len(arrived))

    try:
        while True:
            while not exhausted:  # keep the workers supplied
                size = _room(core, job, taken - yielded)
                if size == 0:
                    break
                tasks = _take(source, size, taken)
                if not tasks:
                    exhausted = True
                    break
                taken += len(tasks)
                core.dispatch(Batch(job, tasks))
                if next_ready() and job.in_flight >= core.workers:
                    break  # the consumer first: nobody is idle
            if next_ready():
                yielded += 1
                yield ready.pop(yielded - 1) if ordered else arrived.popleft()
            elif exhausted and yielded == taken:
                return
            else:
                core.wait(something_to_do, tell)
    finally:
        core.abandon(job)
        with contextlib.suppress(AttributeError):
            source.close()  # type: ignore[attr-defined]  # a generator of calls ends with its stream


def _take(source: Iterator[Call], size: int, first: int) -> list[Task]:
    """Take up to `size` calls, fewer if the source is slow."""
    tasks: list[Task] = []
    enough = time.perf_counter_ns() + FILL_NS
    for args, kwargs in itertools.islice(source, size):
        tasks.append(Task(first + len(tasks), args, kwargs or None))
        if len(tasks) < size and time.perf_counter_ns() > enough:
            break
    return tasks


def _room(core: Dispatcher, job: Job, out: int) -> int:
    """Return how many tasks may be sent together now, with `out` of them taken and not yet yielded.

    Bounded by batches at the workers, by the window, and by bytes: what is on its way and what waits to be
    yielded each get a quarter of the memory budget.
    """
    limit = BATCHES_PER_WORKER * core.workers + 1
    fair = core.budget // 4
    if job.in_flight and core.later:
        return 0  # memory is short: let what is on its way end
    if job.in_flight and (job.in_flight >= limit or job.bytes_in_flight > fair):
        return 0
    size = 1
    # Alone: a limit is watched task by task, and without retries a death must take none along that had ended.
    if job.options.timeout is None and job.retries and job.task_ns:
        size = max(1, min(BATCH_MAX, int(BATCH_NS / job.task_ns)))
    fitting = int(fair / job.result_bytes) if job.result_bytes else None
    return room_in_window(job.options.window, size, limit, fitting, core.workers, out)


def room_in_window(
    window: int | None, size: int, limit: int, fitting: int | None, least: int, ahead: int
) -> int:
    """Return how many tasks may be sent together when so many are ahead of what was yielded.

    Parameters
    ----------
    window : int or None
        Most that may be ahead; None: by the number of batches.
    size, limit : int
        Tasks of a batch, and batches, that are wanted.
    fitting : int or None
        Results that memory has room for, of which `least` may wait in any case; None: not known.
    """
    if window is None:
        window = max(WINDOW_MIN, 2 * limit * size)
    else:
        size = max(1, min(size, window // limit))
    if fitting is not None:
        window = min(window, max(least, fitting))
    return max(0, min(size, window - ahead))
