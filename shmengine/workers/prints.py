"""What a worker prints: line by line, each in one piece, and all of it before the result of its task."""

from __future__ import annotations

import io
import sys

from shmengine._native import lib

__all__ = ["LONGEST_LINE", "flush_prints", "print_lines"]

LONGEST_LINE = 1 << 20  # bytes; what is longer comes in pieces
_MOST_KEPT = "_CHUNK_SIZE"  # by a stream of text, until a line ends; bytes


def print_lines() -> None:
    """Make what is printed here go home line by line: not by some KiB, as is usual for pipes, nor in pieces.

    Lines of several workers would get into each other in pieces: those that `PYTHONUNBUFFERED` asks for, or those that
    Python makes of the arguments of a `print` if one of them is long.
    """
    lib.shmr_print_lines()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)
            setattr(stream, _MOST_KEPT, LONGEST_LINE)


def flush_prints() -> None:
    """Send home what was printed and is no whole line: it is to be there before the result."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # the task's own stream, or none
            pass
    lib.shmr_flush_prints()
