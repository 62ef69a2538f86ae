"""Links over what the kernel keeps for two processes: a pipe or a message queue for each direction.

The bytes are moved by the core (``csrc/shmr_stream.c``), which also keeps how far a message is, so that whatever a
signal's handler raises leaves no half of one.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import numpy as np

from shmengine._native import ffi, lib
from shmengine._native.status import CLOSED, CORRUPT, INTERRUPTED, NO_MEMORY, OK, TIMEOUT, WOULD_BLOCK, fail
from shmengine.arrays import Bytes, address_of
from shmengine.channels.frames import GOODBYE, FrameLink, aligned_empty
from shmengine.channels.link import NOTHING, Options
from shmengine.channels.loans import new_file, use
from shmengine.channels.presence import Fate, Presence, PresenceToken
from shmengine.channels.small import UNKNOWN, decode_small, encode_small
from shmengine.codec import KIND_ARRAY, KIND_PICKLE
from shmengine.config import format_bytes
from shmengine.descriptors import Descriptor
from shmengine.errors import ShmError
from shmengine.tokens import DescriptorToken, lend

__all__ = ["StreamLink", "pair_of", "reopened"]

WHAT = "an end of a channel"
_fields_of = struct.Struct("PQQ6IQ").unpack  # a shmr_message
_unpack = ffi.unpack
_send_frame, _receive = lib.shmr_stream_send_frame, lib.shmr_stream_receive


@dataclass(frozen=True)
class _Token:
    """What another process needs to have a copy of a link: called there, returns it."""

    cls: type[StreamLink]
    options: Options
    presence: PresenceToken
    descriptors: tuple[DescriptorToken | None, ...]
    fragment_bytes: int

    def __call__(self) -> StreamLink:
        opened: list[Descriptor | None] = []
        try:
            opened.extend(
                None if token is None else Descriptor(token.open(os.O_RDWR | os.O_NONBLOCK), WHAT)
                for token in self.descriptors
            )
            presence = Presence.from_token(self.presence)
        except BaseException:
            for descriptor in opened:
                if descriptor is not None:
                    descriptor.close()
            raise
        incoming, outgoing, borrowed, lent = opened
        return self.cls(self.options, presence, incoming, outgoing, self.fragment_bytes, borrowed, lent)


class StreamLink(FrameLink):
    """A link over one descriptor for each direction.

    Parameters
    ----------
    options : Options
    presence : Presence
    incoming, outgoing : Descriptor or None
        Open for both reading and writing, so that neither side sees the other one's end by them (that is what
        `presence` is for); None: nothing goes in this direction.
    fragment_bytes : int, optional
        Of a message queue, what a message of it may have; 0: a pipe.
    borrowed, lent : Descriptor or None
        Files of memory for large messages of the two directions; None: they go like small ones.
    """

    def __init__(
        self,
        options: Options,
        presence: Presence,
        incoming: Descriptor | None,
        outgoing: Descriptor | None,
        fragment_bytes: int = 0,
        borrowed: Descriptor | None = None,
        lent: Descriptor | None = None,
    ) -> None:
        super().__init__(options)
        self._presence = presence
        self._incoming = incoming
        self._outgoing = outgoing
        self._fragment_bytes = fragment_bytes
        self._borrowed = borrowed
        self._lent = lent
        self._source: Any = None
        self._target: Any = None
        self._taken = 0  # the number of the last message that was
        self._message = ffi.new("shmr_message *")
        self._fields = memoryview(ffi.buffer(self._message))  # the same, to be read all at once
        self._memory: dict[int, Bytes] = {}  # of messages that come in parts, by priority
        self._writing: object = None  # the message that the core is at
        self._known = (KIND_ARRAY, KIND_PICKLE) if options.allow_pickle else (KIND_ARRAY,)
        self._checks_all = options.check == "payload"

    def start(self) -> None:
        """Become this process's."""
        for descriptor in self._descriptors():
            self._check(descriptor)
        self._presence.use()
        if self._incoming is not None and self._source is None:
            self._source = self._stream(self._incoming, self._borrowed)
            self.read_fd = self._incoming.number
        if self._outgoing is not None and self._target is None:
            self._target = self._stream(self._outgoing, self._lent)
            self.write_fd = self._outgoing.number

    def _stream(self, descriptor: Descriptor, loans: Descriptor | None) -> Any:
        used = None if loans is None else use(loans)
        stream = lib.shmr_stream_new(descriptor.number, self._fragment_bytes)
        if stream == ffi.NULL:
            raise MemoryError("no memory for a channel")
        if used is None:
            return ffi.gc(stream, lib.shmr_stream_free)
        # They stay for as long as any thread uses the stream, also when the interpreter ends meanwhile.
        stream = ffi.gc(stream, lambda stream, _free=lib.shmr_stream_free, _used=used: _free(stream))
        lib.shmr_stream_lend(stream, used.handle)
        return stream

    # --- sending -----------------------------------------------------------------------------------

    def next_sequence(self, priority: int) -> int:
        """Return how many messages of this priority were wholly written."""
        return lib.shmr_stream_sent(self._target, priority)

    def encode(self, obj: Any) -> Any:
        """Make an object ready for `send`: a small frame in one piece, any other as `FrameLink` does."""
        frame = encode_small(obj, allow_pickle=self.options.allow_pickle)
        return super().encode(obj) if frame is None else frame

    def send(self, message: Any, priority: int, deadline: int) -> bool:
        """Send a message that was encoded."""
        if type(message) is not bytes:
            return super().send(message, priority, deadline)
        if self._writing is not message:
            self._begin(message)
        nbytes = len(message)
        status = INTERRUPTED
        while status == INTERRUPTED:
            status = _send_frame(self._target, message, nbytes, priority, self._checks_all, deadline)
        if status != OK:
            return self._unsent(status)
        self._writing = None
        counts = self.counts
        counts.messages_sent += 1
        counts.bytes_sent += nbytes
        counts.wire_bytes_sent += nbytes
        return True

    def write(self, pieces: list[Any], nbytes: int, priority: int, deadline: int) -> bool:  # noqa: ARG002  the core adds them up
        """Write a message, or go on with it; True: it is written wholly."""
        if self._writing is not pieces:
            self._begin(pieces)
        buffers = [ffi.from_buffer(piece) for piece in pieces]
        parts = ffi.new("shmr_piece[]", [(buffer, len(buffer)) for buffer in buffers])
        status = INTERRUPTED
        while status == INTERRUPTED:
            status = lib.shmr_stream_send(self._target, parts, len(buffers), priority, deadline)
        if status != OK:
            return self._unsent(status)
        self._writing = None
        return True

    def _begin(self, message: object) -> None:
        if self._writing is not None:
            self.give_up()  # a call that was interrupted before it could do that
        self._writing = message

    def _unsent(self, status: int) -> bool:
        if status not in (TIMEOUT, WOULD_BLOCK):
            self._refuse(status, self._outgoing, "send")
        return False

    def give_up(self) -> None:
        """Take back a message of which only a part was sent."""
        if self._writing is not None:
            lib.shmr_stream_give_up(self._target)
            self._writing = None

    # --- receiving ---------------------------------------------------------------------------------

    def read(self, deadline: int) -> Bytes | bytes | object:
        """Return the next message, `NOTHING` or `GOODBYE`: bytes if it is small, and the core has found it sound."""
        message = self._message
        status = _receive(self._source, self._taken, deadline, message)
        if status != OK and (status := self._go_on(status, deadline)) != OK:
            return GOODBYE if status == CLOSED else NOTHING
        if message.kind:
            return _unpack(message.bytes, message.length)
        if message.bytes == ffi.NULL:
            return self._memory[message.priority]
        return np.frombuffer(bytearray(ffi.buffer(message.bytes, message.length)), np.uint8)

    def _open(self, wire: Any) -> Any:
        """Check a message and make it the current one."""
        if type(wire) is not bytes:
            return super()._open(wire)
        _, _, _, _, kind, parts, prefix, in_band, priority, number = _fields_of(self._fields)
        obj = decode_small(wire, kind, parts, prefix, in_band, len(wire)) if kind in self._known else UNKNOWN
        if obj is UNKNOWN:
            return super()._open(np.frombuffer(bytearray(wire), np.uint8))
        nbytes = len(wire)
        self._accept(obj, number, priority, nbytes, nbytes)
        return obj

    def _go_on(self, status: int, deadline: int) -> int:
        """Receive until there is a message (OK), or none in time, or none will be (CLOSED)."""
        while status not in (OK, TIMEOUT, WOULD_BLOCK, CLOSED):
            if status == NO_MEMORY:
                self._give_memory(self._message.priority, self._message.length)
            elif status != INTERRUPTED:
                self._refuse(status, self._incoming, "receive")
            status = _receive(self._source, self._taken, deadline, self._message)
        return status

    def _give_memory(self, priority: int, nbytes: int) -> None:
        try:
            memory = self._memory[priority] = aligned_empty(nbytes)
        except (MemoryError, ValueError):
            lib.shmr_stream_give_memory(self._source, ffi.NULL)
            raise MemoryError(f"no memory for a message of {format_bytes(nbytes)}: it is dropped") from None
        lib.shmr_stream_give_memory(self._source, ffi.cast("void *", address_of(memory)))

    def taken(self) -> None:
        """Forget the message that `read` has returned."""
        self._taken = self._message.number
        if self._memory:
            self._memory.pop(self._message.priority, None)

    # --- both ends ---------------------------------------------------------------------------------

    def _refuse(self, status: int, descriptor: Descriptor | None, what: str) -> NoReturn:
        self._check(descriptor)
        self._check(self._borrowed)
        if status == CORRUPT:
            self.counts.corrupt += 1
        fail(status, f"{what} over a {self.capabilities.mechanism}")

    def _check(self, descriptor: Descriptor | None) -> None:
        """Raise if a descriptor is another file's by now."""
        if descriptor is not None and not descriptor.is_ours():
            raise ShmError(
                f"a descriptor of this end of a channel ({self.capabilities.mechanism}) was closed by other code of"
                " this process: make a new channel"
            )

    def fate(self) -> Fate:
        """Say what has become of the other end."""
        self._check(self._incoming)
        self._check(self._outgoing)
        return self._presence.fate()

    def token(self) -> _Token:
        """Return what another process needs."""
        return _Token(
            type(self),
            self.options,
            self._presence.token(),
            tuple(self._token_of(one) for one in self._descriptors()),
            self._fragment_bytes,
        )

    def _descriptors(self) -> tuple[Descriptor | None, ...]:
        return self._incoming, self._outgoing, self._borrowed, self._lent

    def _token_of(self, descriptor: Descriptor | None) -> DescriptorToken | None:
        self._check(descriptor)
        return None if descriptor is None else lend(descriptor.number, WHAT)

    def close(self) -> None:
        """Say goodbye, if this process uses this end, and let all go."""
        target, self._target, self._source = self._target, None, None
        if target is not None and self._presence.in_use:
            lib.shmr_stream_give_up(target)
            lib.shmr_stream_goodbye(target)
        target = None  # and what was lent with it, while its file is open
        self._presence.close()
        for descriptor in self._descriptors():
            if descriptor is not None:
                descriptor.close()


_L = TypeVar("_L", bound=StreamLink)


def pair_of(
    cls: type[_L],
    options: Options,
    make: Callable[[], tuple[Descriptor, Descriptor]],
    fragment_bytes: int = 0,
) -> tuple[_L, _L]:
    """Return the links of both ends of a new channel.

    Parameters
    ----------
    cls : type
    options : Options
    make : callable
        Returns the descriptors of one direction: of the end that receives, and of the one that sends.
    fragment_bytes : int, optional
        As `StreamLink` has it.
    """
    made: list[Descriptor | None] = []
    try:
        for _ in range(1 + options.duplex):
            made += make()
            made += _loans(options.buffer_bytes)
        left, right = Presence.pair()
    except BaseException:
        for descriptor in made:
            if descriptor is not None:
                descriptor.close()
        raise
    to_right, from_left, borrowed, lent, *back = made
    to_left, from_right, borrowed_back, lent_back = back or (None, None, None, None)
    return (
        cls(options, left, to_left, from_left, fragment_bytes, borrowed_back, lent),
        cls(options, right, to_right, from_right, fragment_bytes, borrowed, lent_back),
    )


def _loans(nbytes: int) -> tuple[Descriptor, Descriptor] | tuple[None, None]:
    """Return descriptors of a file of memory that is lent, for who borrows and who lends; none: there can be none."""
    file = new_file(nbytes)
    if file is None:
        return None, None
    try:
        return file, reopened(file.number)
    except BaseException:
        file.close()
        raise


def reopened(fd: int) -> Descriptor:
    """Return a descriptor of its own for the file behind another one: to read and write, without blocking."""
    return Descriptor(os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC), WHAT)
