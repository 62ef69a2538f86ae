"""`await engine.asubmit(...)` and ``async for result in engine.amap(...)``: an engine's part for `asyncio`.

No thread waits for a call: the engine's own one, which completes its futures, tells the event loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from shmengine.engine.backend import Backend, TaskOptions, Writable, function_name
from shmengine.engine.checks import check_callable, check_choice, check_iterables, task_options

if TYPE_CHECKING:
    from shmengine.engine.awaitable import TaskFuture

__all__ = ["Asynchronous"]

T = TypeVar("T")


class Asynchronous:
    """What an engine offers to coroutines: its part of `Engine`."""

    _backend: Backend

    def _check_usable(self) -> None:
        raise NotImplementedError

    def asubmit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> TaskFuture[T]:
        """Run ``fn(*args, **kwargs)`` once: ``await engine.asubmit(fn, ...)``.

        Cancelling it (or the coroutine that awaits it) reaches the task. One that nobody has begun never runs;
        what one that runs returns is dropped, unless ``await engine.asubmit(...).kill_on_cancel()`` asks to end it.

        Returns
        -------
        asyncio.Future
            Of the running event loop.

        Raises
        ------
        SerializationError
            `fn` or an argument cannot be sent.
        RuntimeError
            No event loop runs in this thread.
        """
        from shmengine.engine.awaitable import TaskFuture

        self._check_usable()
        check_callable("fn", fn)
        submit = self._backend.submitter(fn, TaskOptions(label=f"asubmit({function_name(fn)})"))
        return TaskFuture(self._backend, submit, args, kwargs)

    def amap(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        on_error: str = "raise",
        window: int | None = None,
        writable: Writable = False,
        kill: bool = False,
    ) -> AsyncIterator[Any]:
        """Return an asynchronous iterator over ``fn(*items)`` in input order, like `map` for ``async for``.

        At most `window` tasks are taken from the iterables ahead of what you have consumed. The first is
        started by the first step. Leaving the loop and ``aclose()``, or cancelling the coroutine, cancels the
        tasks that are left.

        Parameters
        ----------
        fn, *iterables, on_error, writable
            As in `map`.
        timeout : float, optional
            Seconds that one task may run; with worker processes only.
        window : int, optional
            Most tasks in flight; by default four for each worker.
        kill : bool
            Whether to end the worker of a cancelled task that runs. (A thread cannot be ended.)

        Raises
        ------
        TaskTimeout, WorkerDied, or what `fn` raised
            By a step; the traceback of a worker process is the exception's ``__cause__``.
        SerializationError
            By a step: `fn` or an argument cannot be sent.
        """
        from shmengine.engine.awaitable import ordered_results

        self._check_usable()
        check_iterables("amap", iterables)
        if timeout is not None and self._backend.kind not in ("process", "cluster"):
            raise ValueError("amap has a timeout with worker processes only: nothing can end a thread")
        check_choice("on_error", on_error, ("raise", "return", "skip"))
        options = task_options("amap", fn, timeout, window, None, writable)
        submit = self._backend.submitter(fn, options)
        return ordered_results(
            self._backend, submit, zip(*iterables, strict=False), options.window, on_error, kill
        )
