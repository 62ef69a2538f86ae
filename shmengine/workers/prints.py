"""What a worker prints: line by line, each in one piece, and all of it before the result of its task."""

from __future__ import annotations

import io
import sys

from shmengine._native import lib

__all__ = ["LONGEST_LINE", "flush_prints", "print_lines"]

LONGEST_LINE = 1 << 20  # bytes; what is longer comes in pieces


def print_lines() -> None:
    """Make what is printed here go home line by line: not by some KiB, as is usual for pipes, nor in pieces.

    Lines of several workers would get into each other in pieces: those that `PYTHONUNBUFFERED` asks for, or those that
    Python's usual buffer makes of an argument of `print` that is longer than it.
    """
    lib.shmr_print_lines()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.flush()
            file = io.FileIO(stream.fileno(), "w", closefd=False)
            file.name = f"<{name}>"  # as Python's own
            lines = io.TextIOWrapper(
                io.BufferedWriter(file, LONGEST_LINE), stream.encoding, stream.errors, line_buffering=True
            )
            lines.mode = "w"  # type: ignore[misc]
            setattr(sys, name, lines)
            setattr(sys, f"__{name}__", lines)


def flush_prints() -> None:
    """Send home what was printed and is no whole line: it is to be there before the result."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # the task's own stream, or none
            pass
    lib.shmr_flush_prints()
