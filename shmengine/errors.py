"""Every exception of the package: one class per cause, its fields kept as attributes.

The failures are kept apart because the cure differs: `Closed` (you closed it) is not
`PeerLost` (the other side died), is not `EndOfStream` (orderly end), is not `WouldBlock`
(a ``try_`` call found nothing), is not `Timeout`.
"""

from __future__ import annotations

import signal as _signal
from typing import Any

__all__ = [
    "ArrayError",
    "BlockError",
    "Closed",
    "Corrupt",
    "EndOfStream",
    "Full",
    "LayoutMismatch",
    "LeaseError",
    "MemoryBudgetExceeded",
    "PeerLost",
    "RemoteError",
    "RemoteTraceback",
    "SerializationError",
    "ShmError",
    "StaleReference",
    "TaskTimeout",
    "Timeout",
    "UseAfterFork",
    "WorkerDied",
    "WouldBlock",
]


class ShmError(Exception):
    """Base class of every error that shmengine itself raises."""


class WouldBlock(ShmError):
    """A call that must not wait found nothing to do."""


class Timeout(ShmError, TimeoutError):
    """A deadline passed before the operation could complete.

    Attributes
    ----------
    seconds : float or None
        The timeout that was given.
    """

    def __init__(self, what: str, seconds: float | None = None) -> None:
        self.what = what
        self.seconds = seconds
        after = "" if seconds is None else f" within {seconds:g} s"
        super().__init__(f"{what}{after}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.seconds)


class TaskTimeout(Timeout):
    """A task ran longer than its ``timeout=``; with processes its worker was killed and replaced."""


class Closed(ShmError, ValueError):
    """You closed this object (or left its ``with`` block) and then used it."""


class PeerLost(ShmError, ConnectionError):
    """The other side died, and nobody is left who could answer."""


class EndOfStream(ShmError, EOFError):
    """The other side finished in an orderly way: nothing more will come."""


class UseAfterFork(ShmError, RuntimeError):
    """An object that belongs to the parent process was used in a forked child."""


class LeaseError(ShmError, ValueError):
    """A claim or lease was used after it ended, ended twice, or belongs to somebody else."""


class StaleReference(LeaseError):
    """A reference names shared memory that has been freed, or that belongs to another engine."""


class LayoutMismatch(ShmError):
    """A region was made by another version or with another geometry, or is no region at all."""


class Corrupt(ShmError):
    """A consistency check failed: bytes in shared memory are not what the protocol allows.

    Attributes
    ----------
    field : str
        What was checked.
    """

    def __init__(self, message: str, field: str = "") -> None:
        self.field = field
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.field)


class MemoryBudgetExceeded(ShmError, MemoryError):
    """Shared memory is short and nothing can relieve it.

    Attributes
    ----------
    asked, budget, used : int or None
        Bytes.
    """

    def __init__(
        self,
        message: str,
        asked: int | None = None,
        budget: int | None = None,
        used: int | None = None,
    ) -> None:
        self.asked = asked
        self.budget = budget
        self.used = used
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.asked, self.budget, self.used)


class ArrayError(ShmError, TypeError):
    """An array (or array-like) cannot be carried or cut as asked."""


class BlockError(ShmError, ValueError):
    """A block function returned something that does not fit its block."""


class SerializationError(ShmError, TypeError):
    """An object cannot be pickled; ``path`` leads to the culprit.

    Attributes
    ----------
    path : str
        For instance ``args[0]['lock']``.
    """

    def __init__(self, message: str, path: str = "") -> None:
        self.path = path
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.path)


class RemoteTraceback(Exception):
    """The traceback of a worker, as text; found on ``__cause__`` of what a task raised."""

    def __init__(self, text: str) -> None:
        self.text = text
        super().__init__(text)

    def __str__(self) -> str:
        return f"\n{self.text.rstrip()}"


class RemoteError(ShmError, RuntimeError):
    """A task raised an exception that cannot itself travel; its name, text and traceback can.

    Attributes
    ----------
    type_name : str
        Qualified name of the original exception class.
    """

    def __init__(self, message: str, type_name: str = "") -> None:
        self.type_name = type_name
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.type_name)


class WorkerDied(ShmError, RuntimeError):
    """A worker process ended while it ran a task, more often than ``retries`` allows.

    Attributes
    ----------
    pid : int
        The (last) worker that died; 0: no worker is left, and none can be started.
    returncode : int or None
        As in `subprocess`: the exit code, or minus the signal number.
    task : str
        What it was doing.
    attempts : int
        How often the task was tried.
    cause : str
        The likely reason, as far as it was measured.
    stderr_tail : str
        The last lines that the worker wrote to standard error.
    """

    def __init__(
        self,
        pid: int,
        returncode: int | None,
        task: str = "",
        attempts: int = 1,
        cause: str = "",
        stderr_tail: str = "",
    ) -> None:
        self.pid = pid
        self.returncode = returncode
        self.task = task
        self.attempts = attempts
        self.cause = cause
        self.stderr_tail = stderr_tail
        text = f"worker {pid} {describe_exit(returncode)}" if pid else "no worker is left"
        if cause:
            text += f" ({cause})"
        if task:
            text += f" while it ran {task}"
        if attempts > 1:
            text += f"; tried {attempts} times"
        if stderr_tail:
            text += f"\nlast lines of its stderr:\n{stderr_tail.rstrip()}"
        super().__init__(text)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (
            self.pid,
            self.returncode,
            self.task,
            self.attempts,
            self.cause,
            self.stderr_tail,
        )


def describe_exit(returncode: int | None) -> str:
    """Say how a process ended: ``was killed by SIGKILL``, ``exited with code 3``."""
    if returncode is None:
        return "disappeared"
    if returncode < 0:
        try:
            name = _signal.Signals(-returncode).name
        except ValueError:
            name = f"signal {-returncode}"
        return f"was killed by {name}"
    return f"exited with code {returncode}"


def __getattr__(name: str) -> Any:
    # queue.Full is also ours, but importing queue costs more than most programs need.
    if name == "Full":
        import queue

        class Full(queue.Full, ShmError):
            """A queue stayed full; the text says why nothing could relieve it."""

        Full.__module__ = __name__
        globals()["Full"] = Full
        return Full
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
