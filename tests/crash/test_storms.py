"""Kills, stops, signals and low limits at random moments, under load: nothing is lost, torn, doubled or stuck.

Some seconds each; as long as one asks for with ``SHMENGINE_SOAK_MINUTES``. ``SHMENGINE_TEST_SEED`` repeats a run's
choices, as far as they are ours.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import resource
import signal
import threading
import time

import numpy as np
import pytest

from shmengine.errors import MemoryBudgetExceeded, PeerLost, Timeout
from shmengine.queues import JoinableQueue
from shmengine.ring import Ring
from tests.helpers import children, descendants, mount_namespace_run, run_script, shm_names, start_script
from tests.helpers.fault_points import SEED, Victim
from tests.helpers.scripts import poll_until, soak_seconds

pytestmark = pytest.mark.watchdog(120 + 2 * soak_seconds(0))

FOREVER = 5
MIB = 1 << 20


# --- low limits ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_descriptors():
    """Within it this process can open no file."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("reaped", [True, False])
def test_who_has_no_descriptors_learns_of_deaths_too(reaped):
    """No pidfd can be opened: the kernel still tells whether there is such a process, and a parent, whether it ended."""
    with Ring(4, "8 MiB") as ring:
        ring.send([7])
        victims = [
            Victim(lambda say: (ring.lease(), say(1), signal.pause())),
            Victim(lambda say: (ring._handle(), say(1), signal.pause())),
        ]
        for victim in victims:
            assert victim.hear() == 1
        with no_descriptors():
            for victim in victims:
                victim.kill()
                if reaped:
                    victim.end()
            with ring.lease(timeout=FOREVER) as frame:
                assert frame[0] == 7
            del frame
            with pytest.raises(PeerLost):
                ring.lease(timeout=FOREVER)
        if not reaped:
            for victim in victims:
                victim.end()
