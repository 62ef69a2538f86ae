"""Threads of ours."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable

__all__ = ["Service"]


class Service(threading.Thread):
    """A daemon thread, whose output belongs to what runs at the moment, and not to what has started it.

    Notebooks take what a thread prints for output of the cell that started the thread. An engine's threads outlive
    that cell, and print for whichever cell runs.

    Parameters
    ----------
    target : callable
        What it runs.
    name : str
    """

    def __init__(self, target: Callable[[], object], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._job: Callable[[], object] | None = target

    def run(self) -> None:
        """Run the target."""
        # Not the inherited `run`, in whose place ipykernel 6 puts one of its own that notes the cell; and in an empty
        # context, as ipykernel 7 notes it in the context, which threads of Python 3.14 can inherit.
        job, self._job = self._job, None
        assert job is not None
        contextvars.Context().run(job)
