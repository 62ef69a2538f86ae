"""One mechanism's way to the other end of a channel, as `End` uses it, and what all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

from shmengine.channels.presence import Fate
from shmengine.errors import ShmError

if TYPE_CHECKING:
    from shmengine.channels.end import End

__all__ = ["END", "LOOK_NS", "NOTHING", "Blame", "Capabilities", "Counts", "Link", "Options"]

LOOK_NS = 50_000_000  # how often whoever waits looks what has become of the other end

NOTHING: Final = object()
"""What `Link.receive` returns when no message came in time."""
END: Final = object()
"""What `Link.receive` returns when the other end has closed, after all that it has sent."""


class Capabilities(NamedTuple):
    """What a mechanism can do, where the mechanisms differ."""

    mechanism: str
    between_hosts: bool
    """Whether the two ends may be on two machines."""
    in_place: bool
    """Whether a message can be filled and read where it lies (`claim` and `lease`)."""
    compresses: bool
    """Whether ``compression=`` is possible."""
    priorities: int
    """How many there are; a higher one overtakes."""
    reconnects: bool
    """Whether the channel outlives an interruption of its connection."""
    writable: bool
    """Whether arrays arrive writable, as the receiver's own."""
    at_once_in_asyncio: bool
    """Whether `areceive` sleeps until something comes; else it looks now and then, at longer and longer intervals."""
    outlives_sender: bool
    """Whether all that was sent arrives also if its sender is killed right after; else what had left him by then."""


@dataclass(frozen=True)
class Options:
    """What was asked of a channel."""

    check: str = "frame"
    allow_pickle: bool = True
    compression: str | None = None
    buffer_bytes: int = 64 << 20
    duplex: bool = True


@dataclass
class Counts:
    """What one end has done so far."""

    messages_sent: int = 0
    messages_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    wire_bytes_sent: int = 0
    wire_bytes_received: int = 0
    gaps: int = 0
    duplicates: int = 0
    corrupt: int = 0
    resent: int = 0
    reconnects: int = 0


class Blame:
    """Who is to blame for a message that cannot be opened: itself, and it is dropped, or a signal's handler, and not.

    What unpickling raises is `SerializationError`, but for `SystemExit`: that comes from either, and is the message's
    when it comes again. Whatever else is no error of ours is a handler's.
    """

    def __init__(self) -> None:
        self._failed = False

    def is_the_messages(self, error: BaseException) -> bool:
        """Tell whether this error is the message's."""
        if isinstance(error, SystemExit) and not self._failed:
            self._failed = True
            return False
        return isinstance(error, (SystemExit, ShmError, MemoryError, ImportError))

    def clear(self) -> None:
        """It could be opened."""
        self._failed = False


class Link(ABC):
    """One mechanism's way to the other end, in one process.

    `End` calls `send` and `give_up`, `receive` and `settle` under a lock of each direction. Whatever a signal's handler
    raises in them must leave the link sound: a message is returned again until it is settled, and one of which only
    a part was sent is taken back by `give_up`.
    """

    capabilities: ClassVar[Capabilities]
    counts: Counts

    read_fd: int | None = None
    """Becomes readable when `receive` may succeed; None: there is no such descriptor."""
    write_fd: int | None = None
    """Becomes writable when `send` may go on."""

    @abstractmethod
    def start(self) -> None:
        """Become this process's: called once, before anything is sent or received.

        Raises
        ------
        UseAfterFork
            Another process uses this end.
        """

    @abstractmethod
    def encode(self, obj: Any) -> Any:
        """Make an object ready for `send`. May run in several threads at once."""

    @abstractmethod
    def send(self, message: Any, priority: int, deadline: int) -> bool:
        """Send a message that was encoded; False: not (wholly) done by the deadline, call again or `give_up`.

        Parameters
        ----------
        message
            From `encode`. Its arrays do not change before the call that returns True, or `give_up`.
        priority : int
        deadline : int
            In nanoseconds of the monotonic clock; 0: do not wait.
        """

    @abstractmethod
    def give_up(self) -> None:
        """Take back a message of which only a part was sent: the other end never sees it."""

    @abstractmethod
    def receive(self, deadline: int) -> Any:
        """Return the next message, `NOTHING` if there is none by the deadline, or `END`.

        The same message is returned again until `settle`. One that raises is gone.
        """

    @abstractmethod
    def settle(self) -> None:
        """Let go of the message that `receive` has returned, if there is one."""

    @abstractmethod
    def fate(self) -> Fate:
        """Say what has become of the other end. Not called often."""

    def loss(self) -> str:
        """Say what is known of an end that is lost."""
        return "the process of the other end died"

    @abstractmethod
    def end(self, options: Options, *, sends: bool = True, receives: bool = True) -> End:
        """Return the end over this link."""

    @abstractmethod
    def token(self) -> Any:
        """Return what another process needs: something that, called there, returns a link that is not started."""

    @abstractmethod
    def close(self) -> None:
        """Tell the other end, if this process uses this one, and let all go. Never waits; may be called twice."""
