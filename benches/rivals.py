"""Rivals that `shmengine bench` does not have: written by hand, in Python and in C; and other ways to use ours."""

from __future__ import annotations

import ctypes
import functools
import mmap
import multiprocessing
import subprocess
import tempfile
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import posix_ipc

from shmengine.bench import registry
from shmengine.bench.compare import Each
from shmengine.bench.measure import Pair
from shmengine.bench.ours import RingWay
from shmengine.bench.plan import Mode
from shmengine.bench.rivals import PipeLink
from shmengine.bench.target import PRIME, End, Link, OneWay, Side, TwoWays, checks, putting_copies

SLOTS = 16
PATIENCE = 120.0  # seconds until a bench that hangs fails

fork = multiprocessing.get_context("fork")


def one_way(
    stack: ExitStack,
    link: Callable[[int, int], Link],
    nbytes: int,
    mode: Mode,
    count: int,
    slots: int = SLOTS,
) -> Any:
    """Return a contestant that sends `count` messages through."""
    pair = stack.enter_context(Pair(link(nbytes, slots), patience=PATIENCE))
    return lambda: pair.one_way(mode, count)


def round_trips(
    stack: ExitStack, link: Callable[[int, int], Link], nbytes: int, mode: Mode, count: int
) -> Any:
    """Return a contestant that sends `count` messages there and back; the median of them counts."""
    pair = stack.enter_context(Pair(link(nbytes, SLOTS), patience=PATIENCE))
    return lambda: Each(float(np.median(pair.run("round trip", mode, count).trips)))


def known(*names: str) -> dict[str, Callable[[int, int], Link]]:
    """Return links of `shmengine bench`, by the names of its table; those that are not installed are left out."""
    return {
        target.name: target.link
        for target in registry.TARGETS
        if target.name in names and registry.missing(target) is None
    }


# --- in Python ------------------------------------------------------------------------------------


class InPlace(TwoWays):
    """Messages that are filled and read where they lie."""

    modes = ("block",)
    shares_memory = True


class RingByWithWay(RingWay):
    """`shmengine.Ring`, claims and leases as context managers."""

    def sender(self) -> dict[Mode, Any]:
        ring, shape = self.ring, (self.nbytes,)

        def put(number: int) -> None:
            with ring.claim(shape, "u1") as frame:
                frame.fill(number % PRIME)

        return {"block": put}

    def receiver(self) -> dict[Mode, Any]:
        ring = self.ring
        where, expected = checks(self.nbytes)

        def take(number: int) -> bool:
            with ring.lease() as frame:
                return frame[where].tobytes() == expected[number % PRIME]

        return {"block": take}


class RingByWith(InPlace):
    way = RingByWithWay


def is_all(array: Any, number: int) -> bool:
    """Whether each byte has the message's number; all of them are read."""
    words = array.view(np.uint64)
    right = number % PRIME * 0x0101010101010101
    return bool(np.bitwise_or.reduce(words) == right and np.bitwise_and.reduce(words) == right)


class RingReadWholeWay(RingWay):
    """`shmengine.Ring`, whose consumer reads every byte."""

    def receiver(self) -> dict[Mode, Any]:
        ring = self.ring

        def take(number: int) -> bool:
            frame = ring.lease()
            right = is_all(frame.array, number)
            frame.release()
            return right

        return {"block": take}


class RingReadWhole(InPlace):
    way = RingReadWholeWay


class HandWrittenWay(OneWay):
    """SharedMemory cut into slots, and two counting semaphores: no checks, no recovery, one size, two processes."""

    def __init__(self, nbytes: int, slots: int) -> None:
        super().__init__(nbytes, slots)
        self.memory = SharedMemory(create=True, size=nbytes * slots)
        self.free, self.full = self._semaphore(slots), self._semaphore(0)

    def _semaphore(self, value: int) -> Any:
        return fork.Semaphore(value)

    def _slots(self) -> list[Any]:
        whole = np.frombuffer(self.memory.buf, np.uint8)
        return [whole[i * self.nbytes : (i + 1) * self.nbytes] for i in range(self.slots)]

    def sender(self) -> dict[Mode, Any]:
        acquire, release, places, slots = self.free.acquire, self.full.release, self._slots(), self.slots

        def put(number: int) -> None:
            acquire()
            places[number % slots].fill(number % PRIME)
            release()

        return {"block": put}

    def receiver(self) -> dict[Mode, Any]:
        acquire, release, places, slots = self.full.acquire, self.free.release, self._slots(), self.slots
        where, expected = checks(self.nbytes)

        def take(number: int) -> bool:
            acquire()
            right = places[number % slots][where].tobytes() == expected[number % PRIME]
            release()
            return right

        return {"block": take}

    def close(self) -> None:
        self.memory.close()
        self.memory.unlink()


class HandReadWholeWay(HandWrittenWay):
    """The same, whose consumer reads every byte."""

    def receiver(self) -> dict[Mode, Any]:
        acquire, release, places, slots = self.full.acquire, self.free.release, self._slots(), self.slots

        def take(number: int) -> bool:
            acquire()
            right = is_all(places[number % slots], number)
            release()
            return right

        return {"block": take}


class HandReadWhole(InPlace):
    way = HandReadWholeWay


class HandWritten(InPlace):
    """With `multiprocessing`'s semaphores."""

    way = HandWrittenWay


class HandWrittenPosixWay(HandWrittenWay):
    def _semaphore(self, value: int) -> Any:
        name = f"/bench-{uuid.uuid4().hex[:12]}"
        semaphore = posix_ipc.Semaphore(name, posix_ipc.O_CREX, initial_value=value)
        posix_ipc.unlink_semaphore(name)
        return semaphore


class HandWrittenPosix(HandWritten):
    """With posix_ipc's."""

    way = HandWrittenPosixWay


class PipeThatKeepsMemory(PipeLink):
    """`multiprocessing.Pipe`, the allocator keeping large blocks, as glibc's does once one was freed."""

    def open(self, side: Side) -> End:
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            done = ctypes.CDLL(None).mallopt(option, 1 << 30)
            assert done == 1, "mallopt refused"
        return super().open(side)


class PipeOfBytes(Link):
    """`multiprocessing.Pipe` as fast as it goes: bytes, received into a buffer."""

    def __init__(self, nbytes: int, slots: int) -> None:
        super().__init__(nbytes, slots)
        self.ends = dict(zip(("left", "right"), fork.Pipe(), strict=True))

    def open(self, side: Side) -> End:
        end, frame = self.ends[side], np.empty(self.nbytes, np.uint8)
        where, expected = checks(self.nbytes)

        def take(number: int) -> bool:
            end.recv_bytes_into(frame)
            return frame[where].tobytes() == expected[number % PRIME]

        return End({"copy": putting_copies(self.nbytes, end.send_bytes)}, {"copy": take})

    def close(self) -> None:
        for end in self.ends.values():
            end.close()


# --- in C -----------------------------------------------------------------------------------------


@functools.cache
def compiled() -> ctypes.CDLL:
    """Compile and load rivals.c."""
    with tempfile.TemporaryDirectory(prefix="shmengine-bench-") as directory:
        library = f"{directory}/rivals.so"
        source = Path(__file__).with_suffix(".c")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-pthread", str(source), "-o", library], check=True)
        loaded = ctypes.CDLL(library)
    loaded.rival_ring_header.restype = ctypes.c_size_t
    pointer, size, number, ns = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_uint64
    for name, arguments in {
        "ring_init": [pointer, number],
        "ring_send": [pointer, pointer, size, number],
        "ring_receive": [pointer, number],
        "ring_release": [pointer],
        "trip_init": [pointer],
        "ping": [pointer, number, ns, pointer],
        "pong": [pointer, number, ns],
    }.items():
        getattr(loaded, f"rival_{name}").argtypes = arguments
    return loaded


class CRingWay(OneWay):
    """A plain ring in C that copies, and whose consumer reads in place."""

    def __init__(self, nbytes: int, slots: int) -> None:
        super().__init__(nbytes, slots)
        self.header = compiled().rival_ring_header()
        self.memory = np.frombuffer(mmap.mmap(-1, self.header + nbytes * slots), np.uint8)
        self.address = self.memory.ctypes.data
        compiled().rival_ring_init(self.address, slots)

    def sender(self) -> dict[Mode, Any]:
        send, address, nbytes, slots = compiled().rival_ring_send, self.address, self.nbytes, self.slots
        return {"copy": putting_copies(nbytes, lambda array: send(address, array.ctypes.data, nbytes, slots))}

    def receiver(self) -> dict[Mode, Any]:
        receive, release = compiled().rival_ring_receive, compiled().rival_ring_release
        address, nbytes, slots = self.address, self.nbytes, self.slots
        places = [self.memory[self.header + i * nbytes :][:nbytes] for i in range(slots)]
        where, expected = checks(nbytes)

        def take(number: int) -> bool:
            right = places[receive(address, slots)][where].tobytes() == expected[number % PRIME]
            release(address)
            return right

        return {"copy": take}


class CRing(TwoWays):
    way = CRingWay
    shares_memory = True
