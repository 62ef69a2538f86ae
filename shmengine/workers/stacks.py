"""The Python stack of a worker, from itself, whatever it is in the middle of.

A first signal makes it write its stack to a pipe as soon as the interpreter is between two of its steps. A worker that
has the signal and does not answer is in C, asleep or computing: a second one makes `faulthandler` write the stack there
and then, without the GIL. (At the first signal it could be in a step of the interpreter that makes a frame, or clears
one, and there that crashes.) System calls are restarted (SA_RESTART); those that never are (`sleep`, `poll`) end early
with EINTR, which Python's own retry.
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

from shmengine._native import lib
from shmengine._native.status import OK
from shmengine.descriptors import Descriptor

__all__ = ["Question", "answer", "answers", "await_standstill", "thread_stack"]

ANSWER_SECONDS = 2.0  # a worker that can answer takes milliseconds
SLICE_MS = 5
# So long it computes without an answer if it is in C: the interpreter answers at the next call, or turn of a loop.
MOST_CPU_TICKS = 3

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
CLOSED = "(no answer: its descriptors were closed by other code)"
NO_ANSWER = "(no answer)"


# Signals that have no use of their own, away from both ends, where others begin.
_ASK = int(signal.SIGRTMAX) - 10
_TELL = _ASK + 1
_TELL_AND_DIE = _ASK + 2


def answer(pipe: int) -> None:
    """From now on this worker says what its main thread is doing, when it is asked."""
    os.set_inheritable(pipe, False)

    def _tell(*_: object) -> None:
        with contextlib.suppress(RecursionError):
            faulthandler.dump_traceback(pipe, all_threads=False)

    signal.signal(_ASK, _tell)
    signal.siginterrupt(_ASK, False)
    faulthandler.register(_TELL, file=pipe, all_threads=False)
    # What the handler then goes on to is what the signal does without one: it ends the process.
    faulthandler.register(_TELL_AND_DIE, file=pipe, all_threads=False, chain=True)


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
    last : bool
        It was stopped: it says where it is, and ends without a step in between. (One that cannot answer goes on
        to stand still.)
    """

    def __init__(self, pid: int, pipe: Descriptor, end: int, *, last: bool = False) -> None:
        self.pid = pid
        self.pipe = pipe
        self.end = end
        self.text = ""
        while _read(pipe):  # of an earlier answer that came too late
            pass
        self.why = "" if last else _at_rest(pid)  # it says no more
        self.why = self.why or self._send(_TELL_AND_DIE if last else _ASK)
        self._insisted = last
        self._ticks: int | None = None  # of the processor, that it had used when it got the signal
        if last and not self.why:
            lib.shmr_signal_main_thread(pid, signal.SIGCONT)

    def _send(self, number: int) -> str:
        """Ask; or say why not: a signal without a handler would kill it, one that waits would come too late."""
        status = {}
        with contextlib.suppress(OSError), open(f"/proc/{self.pid}/status") as file:
            status = dict(line.split(":", 1) for line in file)
        caught, blocked = int(status.get("SigCgt", "0"), 16), int(status.get("SigBlk", "0"), 16)
        bit = 1 << (number - 1)
        if not caught & bit:
            return STARTING
        if not self._can_answer():
            return CLOSED
        if blocked & bit and blocked != bit:  # blocked alone: it is about to return from the handler
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
        """If it has the signal and does not answer, because it is in C: let it answer from there."""
        if not self._insisted and self._is_in_c():
            self._insisted = True
            self.why = self._send(_TELL)

    def _is_in_c(self) -> bool:
        task = f"/proc/{self.pid}/task/{self.pid}/"
        try:
            status = Path(task, "status").read_text()
            state, *fields = Path(task, "stat").read_text().rpartition(")")[2].split()
        except OSError:
            return False
        pending = re.search(r"^SigPnd:\s*(\w+)", status, re.MULTILINE)
        if pending is None or int(pending[1], 16) & (1 << (_ASK - 1)):
            return False
        ticks = int(fields[10]) + int(fields[11])
        if self._ticks is None:
            self._ticks = ticks
        return state in "SD" or ticks - self._ticks >= MOST_CPU_TICKS

    def read(self) -> bool:
        """Take in what there is; tell whether that is all."""
        while piece := _read(self.pipe):
            self.text += piece
        return _END.search(self.text) is not None

    def answer(self) -> str:
        """Return the stack; in parentheses, why there is none."""
        end = _END.search(self.text)
        return readable(frames_of(self.text[: end.end()] if end else self.text)) or self.why or NO_ANSWER


def answers(questions: list[Question]) -> list[str]:
    """Wait for the answers, or for reasons why there are none."""
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
                question.insist()
    return [question.answer() for question in questions]


def _at_rest(pid: int) -> str:
    """Say why a process runs no more, for now or for ever."""
    state = _state(pid)
    return ENDED if state in "XZ" else STOPPED if state in "Tt" else ""


def _state(pid: int) -> str:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0].decode()
    return "X"


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
        if filename != __file__:  # the handler's own
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
