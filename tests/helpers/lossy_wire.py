"""A wire between two network namespaces that delays, reorders and loses packets, as netem does where a kernel has it.

    python -m tests.helpers.lossy_wire NAMESPACE DEVICE NAMESPACE DEVICE

Carries packets between the two TUN devices, which are there already, until it is ended. Needs root, and /dev/net/tun.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import sys
import time

__all__ = ["carry", "open_device"]

TUNSETIFF = 0x400454CA  # linux/if_tun.h
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
CLONE_NEWNET = 0x40000000  # linux/sched.h

DELAY_SECONDS = (0.005, 0.015)
LOST = 0.03


def open_device(namespace: str, device: str) -> int:
    """Return a descriptor that reads and writes the packets of a TUN device; this process moves to its namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), namespace)
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH", device.encode(), IFF_TUN | IFF_NO_PI))
    return tun


def carry(one: int, other: int) -> None:
    """Carry packets both ways, for ever."""
    chance = random.Random(77)
    underway: list[
        tuple[float, int, int, bytes]
    ] = []  # when, a number that decides between equals, to where, what
    number = 0
    while True:
        wait = max(underway[0][0] - time.monotonic(), 0) if underway else None
        readable, _, _ = select.select([one, other], [], [], wait)
        for source in readable:
            packet = os.read(source, 1 << 16)
            if chance.random() >= LOST:
                number += 1
                arrives = time.monotonic() + chance.uniform(*DELAY_SECONDS)
                heapq.heappush(underway, (arrives, number, other if source == one else one, packet))
        while underway and underway[0][0] <= time.monotonic():
            _, _, target, packet = heapq.heappop(underway)
            os.write(target, packet)


if __name__ == "__main__":
    ends = [open_device(*sys.argv[i : i + 2]) for i in (1, 3)]
    print("carrying", flush=True)
    carry(*ends)
