"""Messages as frames, where bytes pass through the kernel or a network: numbered, checked, compressed if asked."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from shmengine.arrays import Bytes, address_of
from shmengine.channels.compression import Compressor, decompress, is_compressed
from shmengine.channels.end import End
from shmengine.channels.link import END, NOTHING, Blame, Counts, Link, Options
from shmengine.codec import FRAME_ALIGNMENT, decode, encode, number_of
from shmengine.errors import Corrupt, ShmError, StaleReference

__all__ = ["GOODBYE", "FrameLink", "aligned_empty"]

GOODBYE: Final = object()
"""What `FrameLink.read` returns for the last message of an end that was closed."""


class FrameLink(Link):
    """A link that carries runs of bytes, each a whole frame.

    A frame's header has its number among those of its sender and priority, from 0: the receiver sees a gap, a
    repetition, another order.

    Parameters
    ----------
    options : Options
    measure : callable, optional
        For compression, as `Compressor` has it, where `write` does not wait until a message has gone.
    """

    def __init__(self, options: Options, measure: Callable[[], float | None] | None = None) -> None:
        self.options = options
        self.counts = Counts()
        method = options.compression
        self._compressor = Compressor(method, measure=measure) if method else None
        self._expected: defaultdict[int, int] = defaultdict(int)  # the next number, by priority
        # The object that was received and is not settled; its priority, and the number that is expected then.
        self._current: tuple[Any, int, int] | None = None
        self._number_unknown = False
        self._blame = Blame()

    # --- what a mechanism does -------------------------------------------------------------------

    @abstractmethod
    def next_sequence(self, priority: int) -> int:
        """Return the number of the next message: how many of this priority `write` has wholly written."""

    @abstractmethod
    def write(self, pieces: list[Any], nbytes: int, priority: int, deadline: int) -> bool:
        """Write a message, or go on with it; True: it is written wholly.

        Parameters
        ----------
        pieces : list of bytes or memoryview
            Flat. The same ones in each call for one message.
        nbytes : int
            Of all of them.
        priority : int
        deadline : int
            In nanoseconds of the monotonic clock; 0: do not wait.
        """

    @abstractmethod
    def read(self, deadline: int) -> Bytes | bytes | object:
        """Return the next message, in memory of its own (see `aligned_empty`), `NOTHING` or `GOODBYE`.

        The same one is returned again until `taken`.
        """

    @abstractmethod
    def taken(self) -> None:
        """Forget the message that `read` has returned; another call does no harm."""

    # --- what follows ------------------------------------------------------------------------------

    def end(self, options: Options, *, sends: bool = True, receives: bool = True) -> End:
        """Return the end over this link."""
        return End(self, options, sends=sends, receives=receives)

    def encode(self, obj: Any) -> Any:
        """Make an object ready for `send`: its frame, and later the pieces of that and their bytes."""
        return [encode(obj, allow_pickle=self.options.allow_pickle, memmap_mode=None), None, 0]

    def send(self, message: Any, priority: int, deadline: int) -> bool:
        """Send a message that was encoded."""
        frame, pieces, nbytes = message
        if pieces is None:
            pieces = frame.pieces(
                sequence=self.next_sequence(priority),
                producer=priority,
                checksum=self.options.check == "payload",
            )
            nbytes = frame.nbytes
            if self._compressor is not None:
                pieces, nbytes = self._compressor.compress(pieces, nbytes, frame.item_bytes())
            message[1:] = pieces, nbytes
        if not self.write(pieces, nbytes, priority, deadline):
            return False
        if self._compressor is not None:
            self._compressor.written(nbytes)
        counts = self.counts
        counts.messages_sent += 1
        counts.bytes_sent += frame.nbytes
        counts.wire_bytes_sent += nbytes
        return True

    def receive(self, deadline: int) -> Any:
        """Return the next message, `NOTHING` or `END`; the same one again until `settle`."""
        if self._current is not None:
            return self._current[0]
        wire: Any = self.read(deadline)
        if wire is NOTHING:
            return NOTHING
        if wire is GOODBYE:
            return END
        try:
            return self._open(wire)
        except BaseException as error:
            if self._blame.is_the_messages(error) and self._current is None:
                self._number_unknown = self._number_unknown or not isinstance(error, ShmError)
                self._blame.clear()
                self.taken()
            raise

    def settle(self) -> None:
        """Let go of the message that `receive` has returned."""
        if self._current is not None:
            _, priority, following = self._current
            self._expected[priority] = following
            self._number_unknown = False
            self._blame.clear()
            self.taken()
            self._current = None

    def _open(self, wire: Bytes) -> Any:
        """Check a message and make it the current one. One that follows a gap is so, too, for the next call."""
        frame = wire
        counts = self.counts
        try:
            if is_compressed(wire):
                frame = decompress(wire, aligned_empty)
            obj = decode(frame, allow_pickle=self.options.allow_pickle)
        except Corrupt:
            counts.corrupt += 1
            self._number_unknown = True  # so that it is not said to be missing, too
            raise
        except MemoryError:
            self._number_unknown = True
            raise
        except ShmError as error:
            number, priority = number_of(frame)
            self._expected[priority] = number + 1
            if isinstance(error, StaleReference):
                counts.corrupt += 1
                raise Corrupt(f"a message refers to what no channel carries: {error}", "parts") from error
            raise
        number, priority = number_of(frame)
        self._accept(obj, number, priority, len(frame), len(wire))
        return obj

    def _accept(self, obj: Any, number: int, priority: int, nbytes: int, wire_bytes: int) -> None:
        """Make an object the current one, if it is the next of its sender and priority, or follows a gap."""
        counts = self.counts
        expected = self._expected[priority]
        if self._number_unknown:
            expected = max(expected, number)
        if number < expected:
            counts.duplicates += 1
            raise Corrupt(
                f"message {number} came again, or late: {expected} was next; it is dropped", "sequence"
            )
        counts.messages_received += 1
        counts.bytes_received += nbytes
        counts.wire_bytes_received += wire_bytes
        if number > expected:
            counts.gaps += number - expected
        self._current = (obj, priority, number + 1)
        if number > expected:
            raise Corrupt(f"messages {expected} to {number - 1} of the other end are missing", "sequence")


def aligned_empty(nbytes: int) -> Bytes:
    """Return new memory that begins at a multiple of 64, as frames like it: uint8, of this many bytes."""
    memory = np.empty(nbytes + FRAME_ALIGNMENT - 1, np.uint8)
    start = -address_of(memory) % FRAME_ALIGNMENT
    return memory[start : start + nbytes]
