"""What sets apart the pools of workers that are built on the process backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Literal

__all__ = ["Policy"]


class Policy:
    """An engine's: it outlives its workers. `shmengine.futures` has a stricter one."""

    workers_name = "workers"
    """What callers know the number of workers by."""

    start: Literal["now", "first task", "on demand"] = "now"
    """When workers start: with the engine, with the first future, or with a future that finds none idle."""

    fragile = False
    """A worker's death ends everything; nothing is run again, and nobody is replaced."""

    tasks_per_worker: int | None = None
    """Tasks after which a worker leaves and is replaced."""

    pickles_late = False
    """A future that has to wait is pickled when its turn comes, with others of its function if they are quick; what
    then fails is its outcome."""

    environment: Mapping[str, str] = {}
    """What workers find in theirs, whatever is in this process's."""

    finishes = False
    """Forgotten by its owner, it still does what was submitted, and ends then."""

    make_future: Callable[[], Future[Any]] = Future
    """What stands for a task that was submitted."""

    def setup(self) -> dict[str, Any]:
        """Return what else workers are told (`child.Worker`)."""
        return {}

    def make_room(self) -> None:
        """Let go of shared memory that is kept only to be found again; memory is short."""

    def broken(self, error: BaseException) -> BaseException:
        """Return the error for what died with a worker, or could not be unpickled on the other side."""
        return error

    def failed(self, error: BaseException) -> BaseException:
        """Return the exception for a future whose task failed with this one."""
        return error
