"""Tasks as futures of an event loop; imported with `asyncio` when an engine is first used from a coroutine."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, Self, TypeVar

from shmengine.engine.backend import Backend, Submit
from shmengine.errors import Closed

__all__ = ["TaskFuture", "ordered_results"]

WINDOW_PER_WORKER = 4
T = TypeVar("T")


class TaskFuture(asyncio.Future[T]):
    """A task, for ``await``."""

    def __init__(
        self,
        backend: Backend,
        submit: Submit,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        kill: bool = False,
    ) -> None:
        super().__init__(loop=asyncio.get_running_loop())
        self._kill = kill
        self._backend = backend
        self._task = submit(args, kwargs)
        self._task.add_done_callback(self._tell)

    def kill_on_cancel(self) -> Self:
        """Let cancellation end the worker process that runs the task, and return the future itself.

        The worker is replaced, and the task not run again. Where workers are threads nothing can end them.
        """
        self._kill = True
        return self

    def cancel(self, msg: Any = None) -> bool:
        """Cancel: a task that has not begun never runs; what a running one returns is dropped."""
        if not super().cancel(msg):
            return False
        if not self._task.cancel():
            with contextlib.suppress(Closed):
                self._backend.withdraw(self._task, kill=self._kill)
        return True

    def _tell(self, task: Future[Any]) -> None:
        # In whichever thread has completed the task; the loop may have been closed meanwhile.
        with contextlib.suppress(RuntimeError):
            self.get_loop().call_soon_threadsafe(self._take, task)

    def _take(self, task: Future[Any]) -> None:
        del self._task  # it refers to us
        if self.done():
            return
        if task.cancelled():
            super().cancel()
        elif (error := task.exception()) is None:
            self.set_result(task.result())
        elif isinstance(error, (StopIteration, asyncio.CancelledError)):
            # Raised in a coroutine these would mean something else.
            raised = RuntimeError(f"the task raised {type(error).__name__}")
            raised.__cause__ = error
            self.set_exception(raised)
        else:
            self.set_exception(error)


async def ordered_results(
    backend: Backend,
    submit: Submit,
    calls: Iterator[tuple[Any, ...]],
    window: int | None,
    on_error: str,
    kill: bool,
) -> AsyncIterator[Any]:
    """Run the calls, at most a window of them ahead, and yield what they return in their order."""
    window = window or WINDOW_PER_WORKER * backend.workers
    out: deque[TaskFuture[Any]] = deque()
    try:
        while True:
            for args in itertools.islice(calls, window - len(out)):
                out.append(TaskFuture(backend, submit, args, {}, kill=kill))
            if not out:
                return
            try:
                outcome = [await out[0]]
            except Exception as error:
                if on_error == "raise":
                    raise
                outcome = [error] if on_error == "return" else []
            out.popleft()
            if outcome:
                yield outcome.pop()
    finally:
        for future in out:
            future.cancel()
