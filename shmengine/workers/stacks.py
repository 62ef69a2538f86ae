"""The Python stack of a worker, from itself, whatever it is in the middle of.

A first signal makes it write its stack to a pipe as soon as the interpreter is between two of its steps. A worker that
has the signal and does not answer is in C, asleep or computing: a second one makes `faulthandler` write the stack there
and then, without the GIL, unless it has answered meanwhile (csrc/stack.c). At the first signal it could be in a step of
the interpreter that makes a frame, or clears one, and there that crashes. System calls are restarted (SA_RESTART);
those that never are (`sleep`, `poll`) end early with EINTR, which Python's own retry.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shmengine._native import lib
from shmengine._native._handles import guard_stacks, tell_stack
from shmengine._native.status import OK
from shmengine.descriptors import Descriptor

__all__ = ["Question", "answer", "answers", "await_standstill", "thread_stack"]

ANSWER_SECONDS = 2.0  # a worker that can answer takes milliseconds
MOMENT_SECONDS = 0.5  # that it may block signals for: the C library does, to make threads and processes
SLICE_MS = 5
# So long it computes without an answer if it is in C: the interpreter answers at the next call, or turn of a loop.
# (Not in a generator that only yields from another: C that asks for its next items looks for no signals either.)
MOST_CPU_TICKS = 3

_HEADER = "Stack (most recent call first):\n"
_END = "\0"
_FRAME = re.compile(r'  File (?:"(.*)"|\?\?\?), line (\d+|\?\?\?) in (.*)')
_ESCAPED = re.compile(r"\\x([0-9a-f]{2})|\\u([0-9a-f]{4})|\\U([0-9a-f]{8})")
_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep
_THREADING = os.path.join(os.path.dirname(os.__file__), "threading.py")

ENDED = "(it has ended)"
STOPPED = "(no answer: it is stopped)"
BLOCKED = "(no answer: it blocks signals)"
STARTING = "(no answer: it is starting)"
CLOSED = "(no answer: its descriptors were closed by other code)"
NO_ANSWER = "(no answer)"


# Signals that have no use of their own, away from both ends, where others begin.
_ASK = int(signal.SIGRTMAX) - 10
_TELL = _ASK + 1
_TELL_AND_DIE = _ASK + 2
_ALL = {_ASK, _TELL, _TELL_AND_DIE}


def answer(pipe: int) -> None:
    """From now on this worker says what its main thread is doing, when it is asked."""
    os.set_inheritable(pipe, False)
    signal.signal(_ASK, tell_stack)
    signal.siginterrupt(_ASK, False)
    faulthandler.register(_TELL, file=pipe, all_threads=False)
    # What the handler then goes on to is what the signal does without one: it ends the process.
    faulthandler.register(_TELL_AND_DIE, file=pipe, all_threads=False, chain=True)
    guard_stacks(_ASK, _TELL, _TELL_AND_DIE, pipe, faulthandler.dump_traceback)


class Question:
    """A worker is asked where it is; it must not be waited for (as a child) while it is sent a signal.

    One question at a time for each worker.

    Parameters
    ----------
    pid : int
    pipe : Descriptor
        What it answers by, here.
    end : int
        The same there: the number that its end has.
    is_waited_for : callable
        Whether it has been waited for: its number may be another process's.
    last : bool
        It was stopped: it says where it is, and ends without a step in between. (One that cannot answer goes on
        to stand still.)
    """

    def __init__(
        self, pid: int, pipe: Descriptor, end: int, is_waited_for: Callable[[], bool], *, last: bool = False
    ) -> None:
        self.pid = pid
        self._is_waited_for = is_waited_for
        self.pipe = pipe
        self.end = end
        self.text = ""
        while _read(pipe):  # of an earlier answer that came too late
            pass
        self._insisted = last
        self._due = 0  # the signal that it has not been sent, as it blocked it
        self._due_until = time.monotonic() + (0.0 if last else MOMENT_SECONDS)
        self.why = "" if last else _at_rest(pid)  # it says no more
        if not self.why:
            self._ask(_TELL_AND_DIE if last else _ASK)
        self._ticks: int | None = None  # of the processor, that it had used when it got the signal
        if last and not self.why:
            lib.shmr_signal_main_thread(pid, signal.SIGCONT)

    def _ask(self, number: int) -> None:
        """Send it a signal: now, later, or not at all, and note why."""
        why = self._send(number)
        self._due = number if why == BLOCKED and time.monotonic() < self._due_until else 0
        self.why = "" if self._due else why

    def _send(self, number: int) -> str:
        """Ask; or say why not: a signal without a handler would kill it, one that waits would come too late."""
        masks = _signal_masks(self.pid)
        if number not in _signals(masks["SigCgt"]):
            return STARTING
        if not self._can_answer():
            return CLOSED
        blocked = _signals(masks["SigBlk"])
        if number in blocked and blocked - _ALL:  # without others it is about to return from a handler
            return BLOCKED
        # To its main thread, which runs tasks: others that a library has started could take it.
        return "" if lib.shmr_signal_main_thread(self.pid, number) == OK else ENDED

    def _can_answer(self) -> bool:
        """Tell whether both ends are still the pipe's; else it would write to somebody else's file."""
        with contextlib.suppress(OSError):
            end = os.stat(f"/proc/{self.pid}/fd/{self.end}")
            return self.pipe.is_ours() and (end.st_dev, end.st_ino) == self.pipe.identity
        return False

    def insist(self) -> None:
        """Ask again if it blocked the signal; if it does not answer because it is in C, let it answer from there."""
        if self._is_waited_for():
            return
        if self._due:
            self._ask(self._due)
        elif not self._insisted and self._is_in_c():
            self._insisted = True
            self._ask(_TELL)

    def _is_in_c(self) -> bool:
        if _ASK in _signals(_signal_masks(self.pid)["SigPnd"]):
            return False
        state, *fields = _stat(self.pid, f"task/{self.pid}/stat")
        if len(fields) < 12:
            return False
        ticks = int(fields[10]) + int(fields[11])
        if self._ticks is None:
            self._ticks = ticks
        return state in "SD" or ticks - self._ticks >= MOST_CPU_TICKS

    def read(self) -> bool:
        """Take in what there is; tell whether that is all."""
        while piece := _read(self.pipe):
            self.text += piece
        return self._whole() is not None

    def _whole(self) -> str | None:
        # What does not begin with a header is what was left of an earlier one.
        return next((each for each in self.text.split(_END)[:-1] if each.startswith(_HEADER)), None)

    def answer(self) -> str:
        """Return the stack; in parentheses, why there is none."""
        told = self._whole() or self.text.rpartition(_HEADER)[2]
        return readable(frames_of(told)) or self.why or NO_ANSWER


def answers(questions: list[Question], lock: contextlib.AbstractContextManager[Any]) -> list[str]:
    """Wait for the answers, or for reasons why there are none; nobody is waited for (as a child) under the lock."""
    poll = select.poll()
    waiting = [question for question in questions if not question.why]
    for question in waiting:
        poll.register(question.pipe.number, select.POLLIN)
    deadline = time.monotonic() + ANSWER_SECONDS
    while waiting and time.monotonic() < deadline:
        poll.poll(SLICE_MS)
        for question in list(waiting):
            question.why = question.why or _at_rest(question.pid)  # before the last look at what it has said
            if question.read() or question.why:
                poll.unregister(question.pipe.number)
                waiting.remove(question)
            else:
                with lock:
                    question.insist()
    return [question.answer() for question in questions]


def _at_rest(pid: int) -> str:
    """Say why a process runs no more, for now or for ever."""
    state = _state(pid)
    return ENDED if state in "XZ" else STOPPED if state in "Tt" else ""


def _state(pid: int) -> str:
    return _stat(pid)[0]


def _stat(pid: int, name: str = "stat") -> list[str]:
    """Return what the kernel says of a process, or a thread, from its state on."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read().rpartition(b")")[2].decode().split()
    return ["X"]


def _signal_masks(pid: int) -> dict[str, int]:
    """Return which signals the main thread of a process catches, blocks, and has not taken yet."""
    text = b""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/status", "rb") as file:
        text = file.read()  # with a name, which may be anything
    return dict.fromkeys(("SigCgt", "SigBlk", "SigPnd"), 0) | {
        name.decode(): int(mask, 16)
        for name, mask in re.findall(rb"^(Sig\w\w\w):\s*(\w+)$", text, re.MULTILINE)
    }


def _signals(mask: int) -> set[int]:
    return {number for number in range(1, mask.bit_length() + 1) if mask >> (number - 1) & 1}


def await_standstill(pid: int, seconds: float = 1.0) -> None:
    """Wait until a process that was sent SIGSTOP stands still, or has ended, or is deep in the kernel."""
    deadline = time.monotonic() + seconds
    while _state(pid) in "RS" and time.monotonic() < deadline:
        time.sleep(0.0005)


def _read(pipe: Descriptor) -> str:
    try:
        return pipe.read(1 << 16).decode(errors="replace")
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
