"""Rubbish in the cursors of a ring: all users of the region are told, and nobody waits for what cannot come."""

from __future__ import annotations

import os
import struct
import threading
import time

import numpy as np
import pytest

from shmengine.attached import read_config
from shmengine.errors import Corrupt
from shmengine.ring import Ring

FAR_AWAY = 100_000


def spoil(region):
    """Both cursors of each ring where the slots say that they cannot be."""
    geometry = read_config(region)
    rings_at = 4096 + geometry.participants * 1024 + geometry.doorbells * 128
    for ring in range(geometry.rings):
        for cursor in (0, 128):
            os.pwrite(region.fd, struct.pack("<Q", FAR_AWAY), rings_at + 640 * ring + cursor)


def test_a_sleeper_is_told_when_somebody_else_finds_it():
    with Ring(4, "8 MiB") as ring:
        errors = []

        def receive():
            with pytest.raises(Corrupt) as raised:
                ring.receive()
            errors.append(raised.value)

        thread = threading.Thread(target=receive)
        thread.start()
        time.sleep(0.1)  # most likely it sleeps by now
        spoil(ring._region)
        with pytest.raises(Corrupt):
            ring.send(np.arange(3))
        thread.join()
        assert len(errors) == 1


def slowly(seconds):
    time.sleep(seconds)
    return seconds


def test_an_engine_says_so_and_ends(make_engine):
    engine = make_engine()
    assert list(engine.map(slowly, [0, 0])) == [0, 0]
    futures = [engine.submit(slowly, 0.2) for _ in range(4)]
    spoil(engine._backend._core.region)
    for future in futures:
        with pytest.raises(Corrupt):
            future.result()
    with pytest.raises(Corrupt):
        list(engine.map(slowly, [0, 0]))
    engine.close()
