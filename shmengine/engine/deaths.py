"""What becomes of the tasks of a worker that died: run again, or failed with `WorkerDied`."""

from __future__ import annotations

from concurrent.futures import CancelledError
from typing import TYPE_CHECKING

from shmengine._native import ffi, lib
from shmengine._native.status import OK, WOULD_BLOCK
from shmengine.engine.backend import timed_out
from shmengine.engine.inflight import Batch, Job, Task
from shmengine.errors import WorkerDied
from shmengine.workers.messages import EVENT, RESULT_RING, WHOLE_BATCH
from shmengine.workers.pool import Death

if TYPE_CHECKING:
    from shmengine.engine.dispatch import Dispatcher

__all__ = ["Deaths"]


class Deaths:
    """Deaths that were announced in the result ring, and are settled when their turn comes."""

    def __init__(self, core: Dispatcher) -> None:
        self._core = core
        self.announced: dict[int, Death] = {}
        self._failed_starts_allowed = core.workers + 3
        self.failed_starts = 0  # workers that died before their first task, since the last result

    def announce(self, death: Death) -> bool:
        """Queue a message to ourselves behind the dead worker's last results (in the pool's thread).

        Returns
        -------
        bool
            Whether it is to be replaced.
        """
        core = self._core
        with core.lock:
            self.failed_starts += death.starting
            number = core.in_flight.reserve()
            self.announced[number] = death
        block = ffi.new("shmr_block *")
        status = WOULD_BLOCK
        while status != OK:
            if core.has_ended():
                return False
            status = lib.shmr_claim(core.handle, 64, ffi.NULL, 0, -1, core.look(), block)
        block.kind, block.tag, block.length = EVENT, number, 0
        while (status := lib.shmr_commit(core.handle, RESULT_RING, 0, -1, core.look(), block)) != OK:
            if core.has_ended():
                lib.shmr_abort(core.handle, block)
                return False
        if core.policy.fragile:
            core.collector.wake()
            return False
        # Not drained here: what it makes due may have to wait for room, and the dead must be replaced meanwhile.
        return (
            not core.has_ended() and core.broken is None and self.failed_starts < self._failed_starts_allowed
        )

    def settle(self, number: int) -> None:
        """All results of the dead worker have been received: what it still had is run again, or fails."""
        core = self._core
        death = self.announced.pop(number)
        if core.policy.fragile:
            loss = self._loss(death)
            core.fail_all(lambda: core.policy.broken(loss))
            return
        if death.starting and self.failed_starts >= self._failed_starts_allowed:
            core.fail_all(lambda: self._start_error(death))
            return
        again: list[Batch] = []
        for tag in death.leased:
            batch = core.in_flight.take(tag)
            if batch is None or batch.job.abandoned:
                continue
            again.extend(self._sort_out(batch, death, running=tag == death.tag))
        core.outbox.extend(again)

    def _sort_out(self, batch: Batch, death: Death, *, running: bool) -> list[Batch]:
        """Blame the task that was running; return batches of those that run again."""
        core, job = self._core, batch.job
        again = []
        whole = death.index == WHOLE_BATCH and len(batch.tasks) == 1
        for task in batch.tasks:
            guilty = running and (whole or task.index == death.index)
            if guilty and death.timed_out:
                error: BaseException = timed_out(
                    job.options, task.index if job.options.label else None, death.stack
                )
                core.conclude(job, task, None, error)
                continue
            if task.unwanted:
                core.conclude(job, task, None, CancelledError())
                continue
            if guilty:
                task.attempts += 1
                if task.attempts > job.retries:
                    core.conclude(job, task, None, _death_error(death, job, task))
                    continue
                core.retried += 1
            again.append(Batch(job, [task]))  # alone: if it kills again, it harms no other
        return again

    def _start_error(self, death: Death) -> WorkerDied:
        """Say that workers die before they can do anything."""
        return _worker_died(death, "its start and the initializer" if death.pid else "", self.failed_starts)

    def _loss(self, death: Death) -> WorkerDied:
        """Say which worker is lost, and with what."""
        if death.starting:
            return self._start_error(death)
        return _worker_died(death, self._core.in_flight.whose(death.tag, death.index)[0])


def _worker_died(death: Death, task: str, attempts: int = 1) -> WorkerDied:
    return WorkerDied(death.pid, death.returncode, task, attempts, death.cause, death.stderr_tail)


def _death_error(death: Death, job: Job, task: Task) -> WorkerDied:
    task_name = f"task {task.index} of {job.options.label}" if job.options.label else f"task {task.index}"
    return _worker_died(death, task_name, task.attempts)
