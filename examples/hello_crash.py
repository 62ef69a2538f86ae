"""A worker that dies is replaced and its task tried again; a task that always kills is reported."""

from __future__ import annotations

import os
import signal
import tempfile

import shmengine as shm


def fragile(number: int, flag: str) -> int:
    if number == 3 and not os.path.exists(flag):
        open(flag, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def poison() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


with tempfile.TemporaryDirectory() as directory, shm.Engine(workers=2) as engine:
    print(list(engine.map(fragile, range(6), [os.path.join(directory, "flag")] * 6)))
    try:
        engine.submit(poison).result()
    except shm.WorkerDied as error:
        print(f"after {error.attempts} attempts: killed by {signal.Signals(-(error.returncode or 0)).name}")
    print(engine.submit(fragile, 7, "").result())
