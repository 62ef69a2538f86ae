# Types of csrc/handles.c and its siblings.
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

class Layout:
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    spec: bytes
    prefix: int
    nbytes: int
    def __init__(
        self, dtype: np.dtype[Any], shape: tuple[int, ...], spec: bytes, prefix: int, nbytes: int
    ) -> None: ...

class Claim:
    @property
    def array(self) -> Array: ...
    def commit(self) -> None: ...
    def abort(self) -> None: ...
    def __enter__(self) -> Array: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None, /
    ) -> None: ...

class Lease:
    @property
    def array(self) -> Array: ...
    @property
    def attempts(self) -> int: ...
    def release(self) -> None: ...
    def __enter__(self) -> Array: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None, /
    ) -> None: ...

class End:
    layouts: dict[Any, Layout]
    leases: int
    bytes_leased: int
    def __init__(
        self, ring: object, region: object, handle: int, payload_check: bool, kept: object
    ) -> None: ...
    def claim(self, shape: Any, dtype: Any = ..., timeout: float | None = None) -> Claim: ...
    def lease(self, timeout: float | None = None) -> Lease: ...
    def forget(self) -> None: ...

class Message:
    def __init__(self, region: object, handle: int, base: int) -> None: ...
    @property
    def address(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Outbox:
    def __init__(self, region: object, handle: int, payload_check: bool) -> None: ...
    @property
    def address(self) -> int: ...
    def open(self, turn: object, /) -> None: ...
    def shut(self) -> None: ...
    def put(self, obj: object, deadline: int, /) -> bool: ...
    def remember(self, array: Array, /) -> None: ...

class Inbox:
    message: Message
    current: Any
    taken: bool
    failed: int
    received: int
    bytes_received: int
    def __init__(self, message: Message, kept: object, nothing: object) -> None: ...
    def open(self, turn: object, ready: object, /) -> None: ...
    def shut(self) -> None: ...
    def take(self, deadline: int, /) -> Any: ...
    def settle(self) -> None: ...
    def drop(self) -> None: ...

def connect(error: type[Exception], *addresses: int) -> None: ...

class Part:
    @property
    def more(self) -> bool: ...
    @property
    def source(self) -> int: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Stream:
    _kept: deque[tuple[int, int, Any, int]]
    """(number, position of its end in the stream, part, messages up to it) of what may have to be sent again."""
    _inbox: deque[tuple[int, int, Any]]
    """(number, kind, part) of what has come and was not taken."""
    peer: bytes | None
    answers: bool
    sends: bool
    receives: bool
    _acknowledged: int  # parts
    _messages: int  # of these
    _released: int  # position in the stream
    _handed_over: int  # the next message that the connection gets
    _handed_over_most: int
    received: int  # the number of the next message to come
    _waiting: int  # bytes in the inbox, and of what was taken from it since they were last counted
    _look_at: int  # from so many on a part goes the long way, which counts them
    pace: int
    acknowledge_bytes: int
    _taken: int
    _taken_bytes: int
    _told: int
    _told_bytes: int
    quick_sent: int
    quick_sent_bytes: int
    quick_received: int
    quick_received_bytes: int
    def use(
        self,
        wire: Wire,
        lock: object,
        armed: set[Any],
        raw: deque[Part],
        hub: object,
        array_type: type,
        encode: Callable[[Any], bytes | None],
        expected: dict[int, int],
        decode: Callable[[bytes, int, int, int, int], object],
        unknown: object,
        checks_all: bool,
        allows_pickle: bool,
        most_told: int,
        /,
    ) -> None: ...
    def send_small(self, obj: Any, looked: int, /) -> bool: ...
    def take_small(self, box: list[Any], /) -> bool: ...
    def let_go(self, until: int, /) -> Any: ...

class Wire:
    half: bool
    def __init__(self, socket: int) -> None: ...
    def receive(self, raw: deque[Part], most: int, stream: Stream | None, /) -> bool: ...
    def close(self) -> None: ...

def connect_zeromq(*addresses: int) -> None: ...
def guard_stacks(
    ask: int, tell: int, tell_and_die: int, pipe: int, dump_traceback: Callable[..., object], /
) -> None: ...
def tell_stack(number: int, frame: object, /) -> None: ...
