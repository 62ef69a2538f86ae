"""Frames from one process to another, written and read in place: no copy between commit and lease."""

from __future__ import annotations

import multiprocessing

import numpy as np

import shmengine as shm

FRAMES = 100


def produce(ring: shm.Ring) -> None:
    for number in range(FRAMES):
        with ring.claim((480, 640), "u1") as frame:  # leaving commits; an exception would abort
            frame[:] = number


if __name__ == "__main__":  # multiprocessing wants this line; an Engine does not
    ring = shm.Ring(capacity=8, arena_bytes="16 MiB")
    producer = multiprocessing.get_context("spawn").Process(target=produce, args=(ring,))
    producer.start()
    total = 0
    for _ in range(FRAMES):
        with ring.lease(timeout=60) as frame:  # read-only; leaving releases
            total += int(frame[0, 0]) + int(np.max(frame))
    producer.join()
    ring.close()
    print(f"{FRAMES} frames, checksum {total}")
