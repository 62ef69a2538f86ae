"""One worker process as the main process sees it: how it is started, watched, signalled and listened to.

What we have of it are descriptors: its pidfd, and pipes of what it prints, logs and answers. Where other code has
closed them, they are opened anew: the worker still has its ends.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import fcntl
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from shmengine.descriptors import Descriptor, pipe
from shmengine.errors import ShmError
from shmengine.region import Region
from shmengine.tokens import start_time
from shmengine.workers import logs
from shmengine.workers.inheritance import Inheritance
from shmengine.workers.prints import LONGEST_LINE
from shmengine.workers.stacks import Question

__all__ = ["WorkerProcess"]

PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
# Not `-m`: the package may be importable for the main process only. -P: the working directory must not shadow it.
BOOTSTRAP = "import sys; sys.path.append({root!r}); from shmengine.workers.child import main; main({fds})"
STDERR_LINES = 20
PIECE = 1 << 16

_Decoder = codecs.getincrementaldecoder("utf-8")

STACK = "stack"
OUTPUTS = ("stdout", "stderr", "log")


class WorkerProcess:
    """A worker that was started.

    Parameters
    ----------
    region : Region
        What it works on.
    setup : Descriptor
        File with what it is told.
    inheritance : Inheritance
        Descriptors for its initializer.
    environment : dict
        Variables set before exec, over the main process's.

    Attributes
    ----------
    pid : int
    process : subprocess.Popen
    pidfd : Descriptor
    started : int
        Monotonic nanoseconds.
    tail : deque of str
        The last lines that it wrote to stderr.
    killed_for : tuple of int or None
        Task that took too long, as (tag, index).
    stack : str
        Where it was then.
    """

    def __init__(
        self, region: Region, setup: Descriptor, inheritance: Inheritance, environment: dict[str, str]
    ) -> None:
        self.started = time.monotonic_ns()
        self.tail: deque[str] = deque(maxlen=STDERR_LINES)
        self.killed_for: tuple[int, int] | None = None
        self.stack = ""
        self._partial: dict[str, str] = {}  # lines that were begun
        self._begun = 0.0  # when the latest of them was
        self._capacities: dict[str, int] = {}
        self._crowded: set[str] = set()  # pipes that may have been full when they were last read
        self._decoders = {name: _Decoder(errors="replace") for name in OUTPUTS}
        self._outputs: select.poll | None = None  # None: what can be read has changed
        self._names: dict[int, str] = {}
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            self._pipes: dict[str, Descriptor] = {}
            ends = {}
            for name in (*OUTPUTS, STACK):
                self._pipes[name], ends[name] = pipe(f"a worker's {name}")
                ours.enter_context(self._pipes[name])
                theirs.enter_context(ends[name])
                os.set_blocking(self._pipes[name].number, False)
                self._capacities[name] = fcntl.fcntl(self._pipes[name].number, fcntl.F_GETPIPE_SZ)
            os.set_blocking(ends[STACK].number, False)
            main = theirs.enter_context(Descriptor(os.pidfd_open(os.getpid()), "this process"))
            inherited = [region.fd, main.number, setup.fileno(), ends[STACK].number, ends["log"].number]
            self.process = _execute(
                inherited, inheritance.filenos(), ends["stdout"].number, ends["stderr"].number, environment
            )
            self.pid = self.process.pid
            try:
                self._start_time = start_time(self.pid)
                self.pidfd = self._open_pidfd()
            except OSError:
                self.process.kill()
                self.process.wait()
                raise
            self._ends = {"stdout": 1, "stderr": 2, "log": ends["log"].number, STACK: ends[STACK].number}
            ours.pop_all()

    # --- descriptors -----------------------------------------------------------------------------

    def watched(self) -> Iterator[tuple[str, Descriptor]]:
        """Yield what tells of its end (named "pidfd"), and where its output comes from (by name)."""
        yield "pidfd", self.pidfd
        for name in OUTPUTS:
            if name in self._pipes:
                yield name, self._pipes[name]

    def regain(self) -> bool:
        """Open anew what other code has closed, as far as that is possible; tell whether there was anything.

        Raises
        ------
        ProcessLookupError
            It has ended, and other code has waited for it.
        """
        lost = [name for name, file in self._pipes.items() if not file.is_ours()]
        if alone := not self.pidfd.is_ours():
            self.pidfd = self._open_pidfd()
        for name in lost:
            with contextlib.suppress(OSError):
                self._pipes[name] = self._reopened(name)
                self._outputs = None
        return alone or bool(lost)

    def _open_pidfd(self) -> Descriptor:
        pidfd = Descriptor(os.pidfd_open(self.pid), f"worker {self.pid}")
        try:
            if start_time(self.pid) == self._start_time:
                return pidfd
        except FileNotFoundError:
            pass
        except BaseException:
            pidfd.close()
            raise
        pidfd.close()
        raise ProcessLookupError(errno.ESRCH, "it has ended, and other code has waited for it")

    def _reopened(self, name: str) -> Descriptor:
        """Return our end of a pipe, opened by way of the worker's."""
        lost, path = self._pipes[name], f"/proc/{self.pid}/fd/{self._ends[name]}"
        info = os.stat(path)
        if (info.st_dev, info.st_ino) != lost.identity:  # it was closed there, too
            raise FileNotFoundError(errno.ENOENT, "it is another file's end", path)
        return Descriptor.open(path, os.O_RDONLY | os.O_NONBLOCK, lost.what)

    # --- signals and questions -------------------------------------------------------------------

    def send_signal(self, number: int) -> None:
        """Send a signal to this very process.

        Raises
        ------
        ProcessLookupError
            It has ended.
        """
        if self.pidfd.is_ours():
            signal.pidfd_send_signal(self.pidfd.number, number)
        else:
            self.process.send_signal(number)

    def ask(self, files: contextlib.ExitStack) -> Question:
        """Ask where it is; `files` closes what is needed for that, whatever becomes of the worker meanwhile."""
        pipe = self._pipes[STACK]
        with contextlib.suppress(ShmError):
            pipe = files.enter_context(pipe.duplicate())
        return Question(self.pid, pipe, self._ends[STACK], self._is_waited_for)

    def ask_at_last(self) -> Question:
        """Ask where it is, as the last thing that it does: it was stopped."""
        return Question(self.pid, self._pipes[STACK], self._ends[STACK], self._is_waited_for, last=True)

    def _is_waited_for(self) -> bool:
        return self.process.returncode is not None

    # --- output ----------------------------------------------------------------------------------

    def forward(self, name: str) -> bool:
        """Pass on what it printed, whole lines at a time; False at the end."""
        if name not in self._pipes:
            return False
        try:
            piece = self._pipes[name].read(PIECE)
        except BlockingIOError:
            return True
        if not piece:
            self._pass_on(name, b"", whole=True, final=True)
            self._pipes.pop(name).close()
            self._outputs = None
            return False
        if 2 * len(piece) >= self._capacities[name]:  # two pages in a row of a pipe hold more than one page
            self._crowded.add(name)
        else:
            self._crowded.discard(name)
        self._pass_on(name, piece)
        return True

    def forward_all(self) -> bool:
        """Pass on the lines that it has printed so far; tell whether it has begun another one, and there is no more."""
        names = self._readable()
        for name in names:  # once: it may be printing on, and whoever calls has other things to do
            self.forward(name)
        if names and self._readable():
            return False
        return bool(self._partial.keys() - {"log"})

    def has_written_in_part(self) -> bool:
        """Tell whether a line that it has begun may be the first part of what it writes.

        Only what is long leaves it in parts, and what finds too little room.
        """
        return any(
            name in self._crowded or len(text) >= select.PIPE_BUF
            for name, text in self._partial.items()
            if name != "log"
        )

    def forward_begun(self, after: float = 0.0) -> float:
        """Pass on lines that were begun and have not gone on for some seconds; return how long until the next look."""
        begun = [name for name in self._partial if name != "log"]  # records are always whole
        if not begun:
            return math.inf
        left = self._begun + after - time.monotonic()
        if left > 0:
            return left
        for name in begun:
            self._pass_on(name, b"", whole=True)
        return math.inf

    def _readable(self) -> list[str]:
        """Return the names of the pipes that there is something in."""
        poll = self._outputs
        if poll is None:
            self._outputs = poll = select.poll()
            self._names = {self._pipes[name].number: name for name in OUTPUTS if name in self._pipes}
            for fd in self._names:
                poll.register(fd, select.POLLIN)
        return [self._names[fd] for fd, _ in poll.poll(0) if self._pipes[self._names[fd]].is_ours()]

    def _pass_on(self, name: str, piece: bytes, *, whole: bool = False, final: bool = False) -> None:
        text = self._partial.pop(name, "") + self._decoders[name].decode(piece, final)
        if not whole and len(text) - (end := text.rfind("\n") + 1) <= LONGEST_LINE:
            if end < len(text):
                self._partial[name], self._begun = text[end:], time.monotonic()
            text = text[:end]
        if not text:
            return
        if name == "log":
            logs.deliver(text)
            return
        if name == "stderr":
            self.tail.extend(text.splitlines())
        stream = sys.stdout if name == "stdout" else sys.stderr
        with contextlib.suppress(Exception):  # the user's stream may be anything, or closed
            stream.write(text)
            stream.flush()

    # --- end -------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Pass on what it has left in its pipes; a grandchild may hold them open, so never wait."""
        for name in OUTPUTS:
            pieces = []
            with contextlib.suppress(BlockingIOError):
                while name in self._pipes and (piece := self._pipes[name].read(PIECE)):
                    pieces.append(piece)
            self._pass_on(name, b"".join(pieces), whole=True, final=True)

    def wait(self) -> int:
        """Wait for its end; return its exit code, or minus the signal that ended it (0: other code has waited)."""
        return self.process.wait()

    def close(self) -> None:
        """Close what we have of it."""
        self.pidfd.close()
        for file in self._pipes.values():
            file.close()


def _execute(
    fds: list[int], more_fds: list[int], stdout: int, stderr: int, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    source = BOOTSTRAP.format(root=PACKAGE_ROOT, fds=", ".join(map(str, fds)))
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    flags = [flag for flag in flags if flag != "-i"]
    return subprocess.Popen(
        [sys.executable, *flags, "-P", "-c", source],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        pass_fds=[*fds, *more_fds],
        env={**os.environ, **environment},
        process_group=0,  # Ctrl-C at the terminal reaches main alone
    )
