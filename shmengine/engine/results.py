"""The iterator that users get for a stream of tasks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, Self

from shmengine.engine.backend import Outcome, TaskOptions, annotate
from shmengine.engine.progress import Reporter

__all__ = ["Results"]


class Results(Iterator[Any]):
    """Iterator over what tasks return. ``close()``, or dropping it, abandons the tasks that are left.

    A class and not a generator, because a generator would keep the last value alive until the next.
    """

    # For `close`, should a Ctrl-C keep `__init__` from setting them.
    _stream: Iterator[Outcome] | None = None
    _report: Reporter | None = None
    _pid = 0

    def __init__(
        self,
        stream: Iterator[Outcome],
        options: TaskOptions,
        check_process: Callable[[], None],
        on_error: str = "raise",
        report: Reporter | None = None,
    ) -> None:
        self._stream = stream
        # A bound method of the engine, which lives as long as its results are asked for.
        self._check_process = check_process
        self._options = options
        self._pid = os.getpid()
        self._on_error = on_error
        self._report = report
        self._taken = 0

    def __next__(self) -> Any:
        while (outcome := self.step()) is not None:
            if outcome.error is None:
                return outcome.value
            if self._on_error == "return":
                return outcome.error
        raise StopIteration

    def step(self) -> Outcome | None:
        """Return the next outcome, or None at the end; raise its error if that was asked for."""
        if self._stream is None:
            return None
        self._check_process()
        try:
            if self._report is not None:
                self._report.reach(self._taken)
            outcome = next(self._stream, None)
            if outcome is not None:
                self._taken += 1
                if self._report is not None:
                    self._report.reach(self._taken)
        except BaseException:
            self.close()
            raise
        if outcome is None:
            self.close()
            return None
        if outcome.error is None:
            return outcome
        error = annotate(outcome.error, self._options, outcome.index)
        if self._on_error != "raise":
            return outcome
        self.close()
        try:
            raise error
        finally:
            del error, outcome  # no cycle of traceback and frame

    def close(self) -> None:
        """Abandon the tasks that are left; further ``next()`` raise StopIteration."""
        stream, self._stream = self._stream, None
        report, self._report = self._report, None
        if stream is None or os.getpid() != self._pid:
            return  # in a forked child the tasks and the bar are not ours
        try:
            stream.close()  # type: ignore[attr-defined]
        finally:
            if report is not None:
                report.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
