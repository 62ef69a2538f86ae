"""The Python stack of a worker, from itself, whatever it is in the middle of.

A signal makes `faulthandler` write it to a pipe: in C, without the GIL, so a worker answers that sleeps, computes
in Python, or holds the interpreter in somebody's C code. Its system calls are restarted (SA_RESTART); those that
never are (`sleep`, `poll`) end early with EINTR, which Python's own retry.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

__all__ = ["Asked", "answer", "ask", "await_standstill", "thread_stack"]

ANSWER_SECONDS = 2.0  # a worker that can answer takes milliseconds
SLICE_MS = 50

# All of the dump: it ends with where every worker begins (or, of a very deep stack, with dots).
_END = re.compile(
    r'child\.py", line \d+ in main\n  File "<string>", line \d+ in <module>\n|^  \.\.\.\n', re.MULTILINE
)
_FRAME = re.compile(r'  File (?:"(.*)"|\?\?\?), line (\d+|\?\?\?) in (.*)')
_ESCAPED = re.compile(r"\\x([0-9a-f]{2})|\\u([0-9a-f]{4})|\\U([0-9a-f]{8})")
_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep
_THREADING = os.path.join(os.path.dirname(os.__file__), "threading.py")

ENDED = "(it has ended)"
STOPPED = "(no answer: it is stopped)"
BLOCKED = "(no answer: it blocks signals)"
STARTING = "(no answer: it is starting)"
NO_ANSWER = "(no answer)"


class Asked(NamedTuple):
    """A worker: how to signal it, where to read what it says."""

    pid: int
    pidfd: int
    pipe: int


def signal_number() -> int:
    """Return the signal that workers answer: one that has no use of its own, away from where others begin."""
    return int(signal.SIGRTMAX) - 9


def answer(pipe: int) -> None:
    """From now on this worker says what its main thread is doing, when it is asked."""
    os.set_inheritable(pipe, False)
    faulthandler.register(signal_number(), file=pipe, all_threads=False, chain=False)


def ask(workers: list[Asked], seconds: float = ANSWER_SECONDS) -> list[str]:
    """Return the stack of each worker as text; in parentheses, why there is none.

    One caller at a time for each worker.
    """
    said = [""] * len(workers)
    waiting: dict[int, int] = {}  # pipe -> position
    for i, worker in enumerate(workers):
        while _read(worker.pipe):  # of an earlier answer that came too late
            pass
        said[i] = _obstacle(worker.pid)
        if not said[i]:
            try:
                signal.pidfd_send_signal(worker.pidfd, signal_number())
                waiting[worker.pipe] = i
            except ProcessLookupError:
                said[i] = ENDED
    poll = select.poll()
    for pipe in waiting:
        poll.register(pipe, select.POLLIN)
    deadline = time.monotonic() + seconds
    while waiting:
        for pipe, _ in poll.poll(SLICE_MS):
            i = waiting[pipe]
            said[i] += _read(pipe)
            if end := _END.search(said[i]):
                said[i] = said[i][: end.end()]
                poll.unregister(pipe)
                del waiting[pipe]
        for pipe, i in list(waiting.items()):
            why = _at_rest(workers[i].pid)
            if not why and time.monotonic() > deadline:
                why = NO_ANSWER
            if why:
                said[i] = said[i] or why
                poll.unregister(pipe)
                del waiting[pipe]
    return [text if text.startswith("(") else readable(frames_of(text)) or NO_ANSWER for text in said]


def _at_rest(pid: int) -> str:
    """Say why a process runs no more, for now or for ever."""
    state = _state(pid)
    return ENDED if state in "XZ" else STOPPED if state in "Tt" else ""


def _obstacle(pid: int) -> str:
    """Say why a process must not be asked: a signal without a handler would kill it, one that waits comes too late."""
    status = {}
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
        status = dict(line.split(":", 1) for line in file)
    if why := _at_rest(pid):
        return why
    bit = 1 << (signal_number() - 1)
    if not int(status.get("SigCgt", "0"), 16) & bit:
        return STARTING
    return BLOCKED if int(status["SigBlk"], 16) & bit else ""


def _state(pid: int) -> str:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0].decode()
    return "X"


def await_standstill(pid: int, seconds: float = 1.0) -> None:
    """Wait until a process that was sent SIGSTOP stands still, or has ended, or is deep in the kernel."""
    deadline = time.monotonic() + seconds
    while _state(pid) in "RS" and time.monotonic() < deadline:
        time.sleep(0.0005)


def _read(pipe: int) -> str:
    try:
        return os.read(pipe, 1 << 16).decode(errors="replace")
    except BlockingIOError:
        return ""


def frames_of(dump: str) -> list[traceback.FrameSummary]:
    """Return the frames in what `faulthandler` has written, the outermost first."""
    frames = []
    for name, line, function in _FRAME.findall(dump):
        filename = _ESCAPED.sub(lambda m: chr(int(m[m.lastindex or 0], 16)), name) or "?"
        frames.append(traceback.FrameSummary(filename, int(line) if line.isdigit() else None, function))
    return frames[::-1]


def thread_stack(ident: int | None) -> str:
    """Return the stack of a thread of this process."""
    frame = None if ident is None else sys._current_frames().get(ident)
    return ENDED if frame is None else readable(list(traceback.extract_stack(frame)))


def readable(frames: list[traceback.FrameSummary]) -> str:
    """Return the frames as in a traceback, from the first on that is not the package's own, if there is one."""
    outer = 0
    while outer < len(frames) and _is_ours(frames[outer].filename):
        outer += 1
    shown = frames[outer:] or frames
    return "".join(traceback.StackSummary.from_list(shown).format()).rstrip()


def _is_ours(filename: str) -> bool:
    return filename == "<string>" or filename.startswith(_PACKAGE) or filename == _THREADING
