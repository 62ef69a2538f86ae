"""Two ends of a channel at work: what they say to each other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from shmengine import EndOfStream, channel
from shmengine.channels.hub import THREAD
from shmengine.channels.open import MECHANISMS
from tests.helpers.arrays import same
from tests.helpers.partners import FOREVER

__all__ = [
    "FOREVER",
    "MECHANISMS",
    "drain",
    "echo",
    "fill",
    "is_message",
    "make_pair",
    "message",
    "nobody_serves",
    "number_of",
    "sending",
    "there_and_back",
    "trip",
]

SIZES = (0, 1, 63, 64, 65, 1000, 4032, 4096, 4097, 65_536, 70_001)
LARGE = (300_001, 1 << 20, 3_000_000)


def make_pair(mechanism: str, **options: Any):
    """A channel with little room, so that it is full soon."""
    return channel(mechanism, **{"buffer_bytes": "8 MiB", **options})


def message(number: int, *, large: bool = True) -> Any:
    """The message of this number: of some kind and size, nothing of it like that of another one."""
    nbytes = LARGE[number // 20 % len(LARGE)] if large and number % 20 == 19 else SIZES[number % len(SIZES)]
    data = (np.arange(nbytes) * 7 + number).astype("u1")
    match number % 4:
        case 0:
            return np.concatenate([np.array([number], "<i8").view("u1"), data])
        case 1:
            return number.to_bytes(8, "little") + data.tobytes()
        case 2:
            return {"number": number, "data": data, "words": [str(number)] * 3}
        case _:
            return [number, data[::-1], None, data[: nbytes // 2]]


def number_of(obj: Any) -> int:
    """The number of a message."""
    match obj:
        case dict():
            return int(obj["number"])
        case list():
            return int(obj[0])
        case _:
            return int.from_bytes(bytes(obj[:8]), "little")


def is_message(obj: Any, *, large: bool = True) -> bool:
    """Whether every byte of a message is that of its number."""
    return same(obj, message(number_of(obj), large=large))


def nobody_serves() -> bool:
    """Whether all socket channels of this process are done with."""
    return not any(thread.name == THREAD for thread in threading.enumerate())


def fill(end: Any, block: Any, limit: int = 1 << 16) -> int:
    """Send the same thing until the channel is full; return how often."""
    from shmengine.errors import WouldBlock

    for sent in range(limit):
        try:
            end.try_send(block)
        except WouldBlock:
            return sent
    raise AssertionError(f"{limit} times {len(block)} bytes went into a channel, and it is not full")


def drain(end: Any, count: int) -> list[Any]:
    """Receive so many."""
    return [end.receive(FOREVER) for _ in range(count)]


@contextlib.contextmanager
def sending(end: Any, objs: Iterable[Any], *, close: bool = False) -> Iterator[None]:
    """Send in a thread, as a channel may have little room; the end of the block waits until all is sent."""
    failures: list[BaseException] = []

    def send() -> None:
        try:
            for obj in objs:
                end.send(obj, FOREVER)
            if close:
                end.close()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if failures:
        raise failures[0]


def trip(left: Any, right: Any, obj: Any) -> Any:
    """Send an object from one end to the other, and return what comes."""
    with sending(left, [obj]):
        return right.receive(FOREVER)


def echo(end: Any, count: int | None = None) -> None:
    """Send back what comes, so often, or until the other end is closed."""
    received = 0
    while received != count:
        try:
            obj = end.receive(FOREVER)
        except EndOfStream:
            return
        end.send(obj, FOREVER)
        del obj  # over shared memory it takes room
        received += 1


def there_and_back(left: Any, right: Any, obj: Any) -> Any:
    """Send an object to a partner's end, and return what comes back from there."""
    job = right.start(echo, 1)
    left.send(obj, FOREVER)
    try:
        return left.receive(FOREVER)
    finally:
        job.result()
