"""What an engine asks of a backend: run tasks, keep objects, hand out memory. One contract, four backends.

A *task* is one call of the user's function. `Engine` checks arguments, cuts blocks and puts results
together; a backend only runs tasks, so that all backends behave alike and the serial one is the oracle.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np

from shmengine.codec import encode
from shmengine.errors import SerializationError, TaskTimeout
from shmengine.pickling import Place
from shmengine.workers.messages import task_rng

if TYPE_CHECKING:
    from concurrent.futures import Future
    from contextlib import AbstractContextManager

    from shmengine.engine.blocks import Cut
    from shmengine.engine.stalls import Stalls
    from shmengine.stats import EngineStats

__all__ = [
    "CLOSED_TEXT",
    "PLACED",
    "Backend",
    "Call",
    "Entropy",
    "Outcome",
    "Ref",
    "Submit",
    "TaskOptions",
    "Writable",
    "annotate",
    "argument_error",
    "block_calls",
    "function_name",
    "make_backend",
    "ship_keywords",
    "task_rng",
    "timed_out",
]

CLOSED_TEXT = "this engine is closed; make a new one"

Writable: TypeAlias = 'bool | Literal["private", "shared"]'
"""How a function gets ndarrays: read-only (False), as a private copy (True, "private"), in place."""

Entropy: TypeAlias = int | Sequence[int]
"""A seed as `numpy.random.SeedSequence` takes it."""


class Call(NamedTuple):
    """Arguments of one task."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = {}


Submit: TypeAlias = "Callable[[tuple[Any, ...], Mapping[str, Any]], Future[Any]]"
"""Takes args and kwargs of one task."""


class Outcome(NamedTuple):
    """What became of one task: a value, or the error that ended it."""

    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here
    """Position of its call among all calls of the stream, from 0."""
    value: Any
    error: BaseException | None = None


PLACED: Any = object()
"""The value of an outcome whose result has been written to its place."""


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """How the tasks of one stream (or one `submit`) are run."""

    timeout: float | None = None
    """Seconds that one task may run; None: no limit."""
    retries: int | None = None
    """Restarts after a worker died; None: the engine's; 0 where running twice would be wrong."""
    writable: Writable = False
    """How ndarray arguments (top level of args and kwargs) appear to the function."""
    rng: Entropy | None = None
    """If given, task *i* is called with ``rng=task_rng(rng, i)``."""
    window: int | None = None
    """Most tasks taken from the calls and not yet yielded; None: the backend's choice."""
    place: Place | None = None
    """What goes in place of arrays in arguments, see `shmengine.codec.encode`. With it, tasks write in place to files
    that are mapped writable, and results have no memory in common with arguments."""
    label: str = ""
    """For error texts, e.g. ``map(<lambda>)``."""
    completed: Callable[[int], object] | None = None
    """Told, in the thread that iterates, how many tasks have completed; also of results that wait for their turn."""
    first: int = 0
    """Number of the first task, where a stream is a part of a longer one."""


class Ref(ABC):
    """A reference to an object that `Engine.put` keeps where every worker can read it.

    Pass it to a task, in whatever its arguments or its function contain: the function gets the object itself.
    The object is freed when the last reference dies. Arrays in it are read-only.
    """

    __slots__ = ("__weakref__",)

    alive: ClassVar[weakref.WeakSet[Ref]] = weakref.WeakSet()
    """All references of this process."""

    def __init__(self) -> None:
        Ref.alive.add(self)

    @abstractmethod
    def get(self) -> Any:
        """Return the object."""


class Backend(Protocol):
    """Runs tasks. All methods may be called from any thread; only `stream` iterators have one user."""

    kind: str

    @property
    def workers(self) -> int:
        """How many there are now."""
        ...

    def stream(
        self, fn: Callable[..., Any], calls: Iterable[Call], options: TaskOptions, *, ordered: bool
    ) -> Iterator[Outcome]:
        """Run `fn` once for each call; yield outcomes in order of calls, or as they complete.

        Lazy: takes from `calls` only while fewer than ``options.window`` tasks are out (taken and not yet
        yielded), in the thread that iterates. Errors of tasks come as ``Outcome.error``; what
        `calls` itself raises, a failure to pickle and `Closed` are raised by ``next()``. Closing the
        iterator (a generator) abandons the rest: queued tasks are dropped.
        """
        ...

    def submitter(self, fn: Callable[..., Any], options: TaskOptions) -> Submit:
        """Return a function that runs `fn` once for each of its calls; errors (after `annotate`) are set on futures."""
        ...

    def withdraw(self, *futures: Future[Any], kill: bool) -> None:
        """Keep tasks that were sent, too late to be cancelled, from running, or (`kill`) end their processes."""
        ...

    def put(self, obj: Any) -> Ref:
        """Keep `obj` for all tasks."""
        ...

    def empty(self, shape: Any, dtype: Any, order: Literal["C", "F"]) -> np.ndarray:
        """Return an uninitialised array that tasks get by reference."""
        ...

    def is_shared(self, array: np.ndarray) -> bool:
        """Tell whether tasks get `array` by reference (always, where there is no process to cross)."""
        ...

    def allocator(self) -> AbstractContextManager[None]:
        """Within it, NumPy's new arrays (of this thread) are born shared."""
        ...

    def copy_into(self, target: np.ndarray, source: np.ndarray) -> None:
        """``np.copyto(target, source, casting="same_kind")``, as fast and as parallel as the backend can."""
        ...

    def empty_result(self, shape: Any, dtype: Any, order: Literal["C", "F"]) -> np.ndarray:
        """Return an uninitialised array for a result, where workers can write to it if there is room."""
        ...

    def stream_blocks(
        self,
        fn: Callable[..., Any],
        cut: Cut,
        target: Callable[[], tuple[np.ndarray, int] | None],
        options: TaskOptions,
        kwargs: Mapping[str, Any],
        *,
        ordered: bool,
    ) -> Iterator[Outcome]:
        """Run ``fn(*blocks, **kwargs)`` once for each block of a cut; like `stream`.

        A result may be written to its place: its outcome then has the value `PLACED` (and no index).

        Parameters
        ----------
        target : callable
            `Gather.target`; what returns None where results are to be values.
        """
        ...

    def stats(self) -> EngineStats:
        """Return a snapshot of the counters."""
        ...

    def stalls(self, after: float) -> Stalls:
        """Return the tasks that have been running for so many seconds; see `shmengine.engine.stalls`."""
        ...

    def close(self, *, wait: bool = True) -> None:
        """End; pending tasks are dropped. `wait`: until running tasks have ended (idempotent)."""
        ...


def block_calls(cut: Cut, kwargs: Mapping[str, Any]) -> Iterator[Call]:
    """Return the calls for the blocks of a cut."""
    return (Call(cut.blocks(index), kwargs) for index in range(cut.count))


def make_backend(kind: str, *, workers: int | None, **settings: Any) -> Backend:
    """Return the backend of this name; `settings` are those of `Engine`, checked."""
    if kind == "cluster":
        try:
            from shmengine.engine.cluster import ClusterBackend
        except ModuleNotFoundError as error:
            raise ImportError(
                "cluster= needs distributed: pip install 'shmengine[dask]'", name=error.name
            ) from error
        return ClusterBackend(workers=workers, **settings)
    if kind == "process":
        from shmengine.engine.process import ProcessBackend

        assert workers is not None

        return ProcessBackend(workers=workers, **settings)
    from shmengine.engine import local

    assert workers is not None
    return local.ThreadBackend(workers, **settings) if kind == "thread" else local.SerialBackend(**settings)


PUT_BYTES = 1 << 16
"""Keyword arrays of this size or more travel once for all blocks, not once for each."""


def ship_keywords(backend: Backend, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], list[Ref]]:
    """Put large keyword arrays where all workers read them; the references keep them there."""
    shipped = dict(kwargs)
    refs = []
    for name, value in kwargs.items():
        if not isinstance(value, np.ndarray) or isinstance(value, np.memmap) or value.nbytes < PUT_BYTES:
            continue
        if not value.dtype.hasobject and not backend.is_shared(value):
            refs.append(backend.put(value))
            shipped[name] = refs[-1]
    return shipped, refs


def function_name(fn: Callable[..., Any]) -> str:
    """Return a short name for error texts (``functools.partial`` shows what it wraps)."""
    while hasattr(fn, "func") and not hasattr(fn, "__name__"):
        fn = fn.func
    return getattr(fn, "__name__", None) or type(fn).__name__


READ_ONLY_NOTE = (
    "arrays reach the function read-only; writable='private' gives it a private copy,"
    " writable='shared' lets it write into the caller's array in place"
)


def annotate(error: BaseException, options: TaskOptions, index: int | None = None) -> BaseException:
    """Add notes to the error of a task: which task it was, and the cure where there is a usual one.

    Called once for each failed task, in the main process, by `Engine` for streams and by the backend for
    `submit` (`index` is None), so the texts are the same everywhere.
    """
    error.add_note(_task_text(options, index))
    if isinstance(error, ValueError) and options.writable is False and "read-only" in str(error):
        error.add_note(READ_ONLY_NOTE)
    return error


def argument_error(error: SerializationError, tasks: Iterable[Any]) -> SerializationError:
    """Point into the arguments of a task (anything with ``args`` and ``kwargs``) instead of into our envelope."""
    for task in tasks:
        for label, value in (("args", task.args), ("kwargs", task.kwargs)):
            try:
                encode(value, label=label)
            except SerializationError as better:
                return better
    return error


def timed_out(options: TaskOptions, index: int | None = None, stack: str = "") -> TaskTimeout:
    """Return the error of a task that ran longer than its ``timeout``, with where it was then as a note."""
    error = TaskTimeout(f"{_task_text(options, index)} did not end", options.timeout)
    if stack:
        error.add_note(f"where it was then:\n{stack}")
    return error


def _task_text(options: TaskOptions, index: int | None) -> str:
    return options.label if index is None else f"task {index} of {options.label}"
