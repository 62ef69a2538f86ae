"""Batches that are held up: one of their tasks takes long, and the others must neither wait for it nor be kept by it.

Tasks may depend on each other, through a file or a queue. So what a batch has returned is sent, and what it has not
begun is given back, as soon as one of its tasks takes longer than batches should.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["HeldUp"]

HELD_SECONDS = 0.02


class _Batch(NamedTuple):
    tag: int
    todo: deque[Any]
    results: list[Any]
    size: int


class HeldUp:
    """Watches the batch that a worker runs, from a thread, which starts with the first batch of several tasks.

    Parameters
    ----------
    hand_over : callable
        ``hand_over(tag, results, rest)``: send the results of the first tasks of a batch, and say how many of the
        last ones will not be run here; False if there is no room for the results. Called in the thread.
    """

    def __init__(self, hand_over: Callable[[int, list[Any], int], bool]) -> None:
        self._hand_over = hand_over
        self._batch: _Batch | None = None
        self._several = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def watch(self, tag: int, todo: deque[Any], results: list[Any]) -> None:
        """Watch a batch: tasks are taken from the left of `todo`, what they return is appended to `results`."""
        self._batch = _Batch(tag, todo, results, len(todo))
        if not self._several.is_set():
            self._several.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shmengine-held", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """The batch has ended; what it has handed over, if anything, has been sent when this returns."""
        self._batch = None
        with self._lock:
            return

    def _run(self) -> None:
        while True:
            self._several.wait()
            batch = self._batch
            if batch is None:
                self._several.clear()
                if self._batch is not None:  # begun meanwhile
                    self._several.set()
                continue
            time.sleep(HELD_SECONDS)
            with self._lock:
                if self._batch is batch:
                    self._batch = None
                    self._relieve(batch)
            del batch

    def _relieve(self, batch: _Batch) -> None:
        rest = 0
        while batch.todo:
            try:
                batch.todo.pop()
            except IndexError:
                break
            rest += 1
        # From here on the worker begins nothing more. One task is left to it, to be answered as usual.
        done = batch.results[: batch.size - rest - 1]
        del batch.results[: len(done)]
        if (done or rest) and not self._hand_over(batch.tag, done, rest):
            batch.results[:0] = done
            self._hand_over(batch.tag, [], rest)
