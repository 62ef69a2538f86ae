"""Imported by each interpreter of a run: makes `ProcessPoolExecutor` ours, and finds a test suite that lies elsewhere.

It is on ``PYTHONPATH``, so that scripts which the tests start, and workers, get it as well.
"""

from __future__ import annotations

import os
from concurrent import futures

import test

if directory := os.environ.get("SHMENGINE_PEERS_TESTS"):
    test.__path__.append(directory)

if "SHMENGINE_WORKER" not in os.environ:
    from shmengine.futures import Executor

    class _CallQueue:
        """The queue that the standard's executor has; ours has nothing that could be joined."""

        def join_thread(self) -> None:
            return

    class ProcessPoolExecutor(Executor):
        """Ours, with the parts of the standard's that its tests look at."""

        _call_queue = _CallQueue()

        @property
        def _executor_manager_thread(self):
            return self._backend.service.thread

    futures.ProcessPoolExecutor = ProcessPoolExecutor
