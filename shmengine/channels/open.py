"""Making channels: `channel` for two ends on one machine; `listen` and `connect` between machines are in socket.py."""

from __future__ import annotations

import importlib
from typing import Any

from shmengine.channels.end import End
from shmengine.channels.link import Link, Options
from shmengine.config import parse_bytes
from shmengine.errors import ShmError

__all__ = ["MECHANISMS", "channel", "check_options"]

MECHANISMS = {
    "pipe": "shmengine.channels.pipe",
    "mqueue": "shmengine.channels.mqueue",
    "shm": "shmengine.channels.shm",
    "socket": "shmengine.channels.socket",
}
"""The module of each mechanism: it has ``pair(options)``, which returns the links of both ends."""

COMPRESSIONS = (None, "auto", "lz4", "zstd")


def channel(
    mechanism: str = "auto",
    *,
    duplex: bool = True,
    check: str = "frame",
    allow_pickle: bool = True,
    compression: str | None = None,
    buffer_bytes: int | str = "64 MiB",
    message_bytes: int | str | None = None,
) -> tuple[End, End]:
    """Make a channel and return its two ends, each for one process (or thread).

    Parameters
    ----------
    mechanism : {"auto", "pipe", "mqueue", "shm", "socket"}
        What carries the messages. With ``"auto"`` shared memory, or a pipe where messages are too large for half of
        `buffer_bytes`, are to be compressed, or this machine has no shared memory to give.
    duplex : bool, optional
        Whether both ends send and receive. Else the left one sends, and the right one receives.
    check : {"frame", "payload"}
        What is verified of every message: its header, number, bounds and all but array data; or all bytes.
    allow_pickle : bool, optional
        False: only arrays, NumPy's scalars, None, bool, int, float, complex, str, bytes, list, tuple and dict pass, in
        both directions.
    compression : {None, "auto", "lz4", "zstd"}
        Of array data that is sent, with its bytes sorted by significance. ``"auto"`` compresses where it pays. Not over
        shared memory. What comes compressed is taken in any case, up to 256 times its size, or 64 MiB.
    buffer_bytes : int or str, optional
        How much of messages in one direction may wait for the other end, as far as the mechanism can be told; a sender
        waits beyond it. Bytes, or text such as ``"64 MiB"``.
    message_bytes : int or str, optional
        How large messages usually are: helps ``"auto"`` to choose.

    Returns
    -------
    left, right : End

    Raises
    ------
    ValueError
        There is no such mechanism or option, or the mechanism does not have it.
    MemoryBudgetExceeded
        There is no room for `buffer_bytes`.
    ModuleNotFoundError
        A package that the mechanism needs is not installed; the text says which.
    """
    options = check_options(
        check=check,
        allow_pickle=allow_pickle,
        compression=compression,
        buffer_bytes=buffer_bytes,
        duplex=duplex,
    )
    if mechanism == "auto":
        left, right = _pair_of_the_best(
            options, None if message_bytes is None else parse_bytes(message_bytes)
        )
    elif mechanism in MECHANISMS:
        left, right = _pair(mechanism, options)
    else:
        raise ValueError(
            f"mechanism must be 'auto' or one of {', '.join(map(repr, MECHANISMS))}, not {mechanism!r}"
        )
    return left.end(options, receives=duplex), right.end(options, sends=duplex)


def check_options(
    *, check: str, allow_pickle: bool, compression: str | None, buffer_bytes: int | str, duplex: bool = True
) -> Options:
    """Return the options of a channel, checked.

    Raises
    ------
    ValueError
        One of them cannot be.
    """
    if check not in ("frame", "payload"):
        raise ValueError(f"check must be 'frame' or 'payload', not {check!r}")
    if compression not in COMPRESSIONS:
        raise ValueError(
            f"compression must be one of {', '.join(map(repr, COMPRESSIONS))}, not {compression!r}"
        )
    size = parse_bytes(buffer_bytes)
    if size < 1:
        raise ValueError(f"buffer_bytes must be positive, not {buffer_bytes!r}")
    return Options(check, bool(allow_pickle), compression, size, bool(duplex))


def _pair(mechanism: str, options: Options) -> tuple[Link, Link]:
    module: Any = importlib.import_module(MECHANISMS[mechanism])
    pair: tuple[Link, Link] = module.pair(options)
    return pair


def _pair_of_the_best(options: Options, message_bytes: int | None) -> tuple[Link, Link]:
    fits = message_bytes is None or message_bytes <= options.buffer_bytes // 2
    if options.compression in (None, "auto") and fits:
        try:
            return _pair("shm", options)
        except (ShmError, OSError):
            pass  # no shared memory here: a pipe is always to be had
    return _pair("pipe", options)
