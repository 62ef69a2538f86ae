"""Ways to get arrays from one process to another: ours and the rivals, all behind the same four methods.

A link is made in the main process, pickled to two children, and opened there. `produce` fills each message
with the low byte of its number; `consume` looks at one element a page of each and counts the right ones.
"""

from __future__ import annotations

import multiprocessing
import os
import uuid
from multiprocessing.shared_memory import SharedMemory
from typing import Any, Self

import numpy as np
import posix_ipc

import shmengine as shm

PAGE = 4096
SLOTS = 16
PATIENCE = 120.0  # seconds until a hanging bench fails

spawn = multiprocessing.get_context("spawn")


class Link:
    """One direction, one producer, one consumer; SLOTS messages of `nbytes` bytes fit."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def open(self) -> None:
        """Get ready, in a child."""

    def leave(self) -> None:
        """Let go, in a child."""

    def close(self) -> None:
        """Clean up, in the main process."""

    def produce(self, count: int) -> int:
        raise NotImplementedError

    def consume(self, count: int) -> int:
        raise NotImplementedError

    def expected(self) -> list[bytes]:
        """What one element a page must read, by the low byte of the message's number."""
        pages = -(-self.nbytes // PAGE)
        return [bytes([low]) * pages for low in range(256)]


class RingLink(Link):
    """Ours: `shmengine.Ring`, filled and read in place; each claim and lease ended by a call."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self.ring = shm.Ring(capacity=SLOTS, arena_bytes=(SLOTS + 4) * max(nbytes, 1 << 16))

    def close(self) -> None:
        self.ring.close()

    def produce(self, count: int) -> int:
        claim, shape = self.ring.claim, (self.nbytes,)
        for number in range(count):
            frame = claim(shape, "u1", PATIENCE)
            frame.array.fill(number & 255)
            frame.commit()
        return count

    def consume(self, count: int) -> int:
        lease, expected, right = self.ring.lease, self.expected(), 0
        for number in range(count):
            frame = lease(PATIENCE)
            right += frame.array[::PAGE].tobytes() == expected[number & 255]
            frame.release()
        return right


class RingWithLink(RingLink):
    """The same, claims and leases as context managers."""

    def produce(self, count: int) -> int:
        ring, shape = self.ring, (self.nbytes,)
        for number in range(count):
            with ring.claim(shape, "u1", PATIENCE) as frame:
                frame.fill(number & 255)
        return count

    def consume(self, count: int) -> int:
        ring, expected, right = self.ring, self.expected(), 0
        for number in range(count):
            with ring.lease(PATIENCE) as frame:
                right += frame[::PAGE].tobytes() == expected[number & 255]
        return right


class HandWrittenLoop(Link):
    """SharedMemory cut into slots, and two counting semaphores: no checks, no recovery, one size, two processes."""

    def __init__(self, nbytes: int, semaphores: str) -> None:
        super().__init__(nbytes)
        self.memory = SharedMemory(create=True, size=nbytes * SLOTS)
        self._names: tuple[str, ...] = ()
        if semaphores == "posix_ipc":
            self._names = (f"/bench-{uuid.uuid4().hex[:12]}", f"/bench-{uuid.uuid4().hex[:12]}")
            for name, value in zip(self._names, (SLOTS, 0), strict=True):
                posix_ipc.Semaphore(name, posix_ipc.O_CREX, initial_value=value).close()
        else:
            self.free, self.full = spawn.Semaphore(SLOTS), spawn.Semaphore(0)

    def open(self) -> None:
        if self._names:
            self.free, self.full = (posix_ipc.Semaphore(name) for name in self._names)
        whole = np.frombuffer(self.memory.buf, np.uint8)
        self.slots = [whole[i * self.nbytes : (i + 1) * self.nbytes] for i in range(SLOTS)]
        for slot in self.slots:
            slot[::PAGE].sum()

    def leave(self) -> None:
        self.slots.clear()

    def close(self) -> None:
        self.memory.close()
        self.memory.unlink()
        for name in self._names:
            posix_ipc.unlink_semaphore(name)

    def produce(self, count: int) -> int:
        acquire, release = self.free.acquire, self.full.release
        slots = self.slots
        for number in range(count):
            acquire()
            slots[number % SLOTS].fill(number & 255)
            release()
        return count

    def consume(self, count: int) -> int:
        acquire, release = self.full.acquire, self.free.release
        slots, expected, right = self.slots, self.expected(), 0
        for number in range(count):
            acquire()
            right += slots[number % SLOTS][::PAGE].tobytes() == expected[number & 255]
            release()
        return right


class QueueLink(Link):
    """`multiprocessing.Queue`: a fresh array is filled and put."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self.queue: Any = spawn.Queue(SLOTS)

    def close(self) -> None:
        self.queue.close()

    def produce(self, count: int) -> int:
        for number in range(count):
            self.queue.put(np.full(self.nbytes, number & 255, np.uint8), timeout=PATIENCE)
        return count

    def consume(self, count: int) -> int:
        expected, right = self.expected(), 0
        for number in range(count):
            right += self.queue.get(timeout=PATIENCE)[::PAGE].tobytes() == expected[number & 255]
        return right


class PipeLink(Link):
    """`multiprocessing.Pipe` as fast as it goes: bytes, received into a buffer."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self.reader, self.writer = spawn.Pipe(duplex=False)

    def close(self) -> None:
        self.reader.close()
        self.writer.close()

    def produce(self, count: int) -> int:
        frame = np.empty(self.nbytes, np.uint8)
        for number in range(count):
            frame.fill(number & 255)
            self.writer.send_bytes(frame)
        return count

    def consume(self, count: int) -> int:
        frame, expected, right = np.empty(self.nbytes, np.uint8), self.expected(), 0
        for number in range(count):
            self.reader.recv_bytes_into(frame)
            right += frame[::PAGE].tobytes() == expected[number & 255]
        return right


# --- round trips --------------------------------------------------------------------------------


class RingPingPong(Link):
    """Two rings, one each way; the default wait."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self.there, self.back = (shm.Ring(capacity=4, arena_bytes=1 << 20) for _ in range(2))

    def close(self) -> None:
        self.there.close()
        self.back.close()

    def produce(self, count: int) -> int:
        shape, right = (self.nbytes,), 0
        there, back = self.there, self.back
        for number in range(count):
            with there.claim(shape, "u1", PATIENCE) as frame:
                frame[0] = number & 127
            with back.lease(PATIENCE) as frame:
                right += frame[0] == (number & 127) + 1
        return right

    def consume(self, count: int) -> int:
        shape, there, back = (self.nbytes,), self.there, self.back
        for _ in range(count):
            with there.lease(PATIENCE) as frame:
                value = frame[0]
            with back.claim(shape, "u1", PATIENCE) as frame:
                frame[0] = value + 1
        return count


class PipePingPong(Link):
    """A duplex `multiprocessing.Pipe`, bytes each way."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self.left, self.right = spawn.Pipe()

    def close(self) -> None:
        self.left.close()
        self.right.close()

    def produce(self, count: int) -> int:
        end, rest, right = self.left, bytes(self.nbytes - 1), 0
        for number in range(count):
            end.send_bytes(bytes([number & 127]) + rest)
            right += end.recv_bytes()[0] == (number & 127) + 1
        return right

    def consume(self, count: int) -> int:
        end, rest = self.right, bytes(self.nbytes - 1)
        for _ in range(count):
            end.send_bytes(bytes([end.recv_bytes()[0] + 1]) + rest)
        return count


# --- two processes at work ----------------------------------------------------------------------


def _serve(link: Link, side: str, commands: Any, cpu: int | None) -> None:
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    link.open()
    commands.send("ready")
    while count := commands.recv():
        commands.send(getattr(link, side)(count))
    link.leave()


class Pair:
    """A producer and a consumer process, each on a core of its own, with a link between them; a context manager."""

    def __init__(self, link: Link, cpus: tuple[int, int] | None) -> None:
        self._link = link
        self._children = []
        self._commands = []
        for side, cpu in zip(("produce", "consume"), cpus or (None, None), strict=True):
            here, there = spawn.Pipe()
            child = spawn.Process(target=_serve, args=(link, side, there, cpu), daemon=True)
            child.start()
            there.close()
            self._children.append(child)
            self._commands.append(here)
        for commands in self._commands:
            assert commands.poll(PATIENCE)
            assert commands.recv() == "ready"

    def run(self, count: int) -> int:
        """Send `count` messages through; both sides must have found all of them right."""
        for commands in self._commands:
            commands.send(count)
        for commands in self._commands:
            assert commands.poll(PATIENCE), "the bench hangs"
            right = commands.recv()
            assert right == count, f"{right} of {count} messages were right"
        return count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for commands, child in zip(self._commands, self._children, strict=True):
            try:
                commands.send(0)
            except OSError:
                pass  # it is gone already
            child.join(10)
            if child.is_alive():
                child.kill()
                child.join()
            commands.close()
        self._link.close()
