"""A dask cluster of real processes, each worker on an address of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.helpers.sources import ROOT

QUIET = "error"
COMMON = ["--no-dashboard", "--dashboard-address", ":0"]


class Cluster:
    """A scheduler and workers.

    Parameters
    ----------
    hosts : int
        Workers at first, on 127.0.0.2, 127.0.0.3 and so on.
    at : sequence of list of str
        Prefixes of the commands: of the scheduler, then of each worker (for network namespaces).
    addresses : sequence of str
        Of the scheduler, then of each worker.
    protocol : str
        ``"tcp"``, or ``"tls"``.
    settings : dict of str
        Of dask, as variables of the environment.
    """

    def __init__(
        self,
        hosts: int,
        at: Sequence[list[str]] = (),
        addresses: Sequence[str] = (),
        protocol: str = "tcp",
        settings: Mapping[str, str] = {},  # not changed
    ) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="shmengine-cluster-")
        self._file = Path(self._directory.name) / "scheduler.json"
        self._settings = settings
        self._protocol = protocol
        self._at = at or [[]] * 30
        self._addresses = addresses or [f"127.0.0.{number}" for number in range(1, 30)]
        self.workers: list[subprocess.Popen[bytes]] = []
        self.start_scheduler()
        for _ in range(hosts):
            self.add_worker()

    def _start(self, number: int, *command: str) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONFAULTHANDLER": "1",  # for the watchdog
            "DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": QUIET,
            "DASK_TEMPORARY_DIRECTORY": self._directory.name,
            **self._settings,
        }
        return subprocess.Popen(
            [
                *self._at[number],
                sys.executable,
                "-m",
                "dask",
                *command,
                *COMMON,
                "--protocol",
                self._protocol,
            ],
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )

    def start_scheduler(self) -> None:
        """Start it."""
        self._file.unlink(missing_ok=True)
        self.scheduler = self._start(
            0,
            "scheduler",
            *("--host", self._addresses[0], "--port", "0", "--scheduler-file", str(self._file)),
        )
        while not self._file.exists() or not self._file.read_text():
            assert self.scheduler.poll() is None
            time.sleep(0.01)

    def add_worker(self, address: str | None = None) -> subprocess.Popen[bytes]:
        """Start another worker, on the next address."""
        number = len(self.workers) + 1
        worker = self._start(
            number,
            "worker",
            *("--scheduler-file", str(self._file), "--host", address or self._addresses[number]),
            *("--no-nanny", "--nthreads", "1", "--death-timeout", "60", "--memory-limit", "0"),
        )
        self.workers.append(worker)
        return worker

    @property
    def address(self) -> str:
        """Of the scheduler."""
        found: dict[str, Any] = json.loads(self._file.read_text())
        return str(found["address"])

    def refill(self, hosts: int) -> None:
        """Have so many workers alive, and a scheduler."""
        if self.scheduler.poll() is not None:
            for worker in self.alive:
                worker.kill()
                worker.wait()
            self.start_scheduler()
        for _ in range(hosts - len(self.alive)):
            self.add_worker()
        self.wait(hosts)

    @property
    def alive(self) -> list[subprocess.Popen[bytes]]:
        """The workers that have not ended."""
        return [worker for worker in self.workers if worker.poll() is None]

    def wait(self, hosts: int) -> None:
        """Wait until so many workers are there."""
        from distributed import Client

        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(hosts, timeout=60)

    def close(self) -> None:
        """End all of it."""
        for process in (*self.workers, self.scheduler):
            process.kill()  # asked to end, dask's workers look for their scheduler for half a minute
            process.wait()
        self._directory.cleanup()
