"""Records of `logging` in a worker go to the handlers of the main process, through a pipe, one line each.

A worker's own handlers come first: if a task or the initializer configures any, its records go there and nowhere else.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import pickle
from collections.abc import Callable

from shmengine.descriptors import Descriptor

__all__ = ["deliver", "levels", "send_home"]

_PLAIN = (str, int, float, type(None))


def levels() -> dict[str, int]:
    """Return the levels that were set in this process: the root logger's by the empty name."""
    known = {
        name: logger.level
        for name, logger in list(logging.root.manager.loggerDict.items())
        if isinstance(logger, logging.Logger) and logger.level
    }
    return {"": logging.root.level, **known}


def send_home(fd: int, known: dict[str, int], current_task: Callable[[], int | None]) -> None:
    """Send what has no handler here through the pipe; `known` are the levels of the main process."""
    for name, level in known.items():
        logging.getLogger(name).setLevel(level)
    logging.lastResort = _Home(fd, current_task)


class _Home(logging.Handler):
    """Writes records, made independent of this process, as lines to a pipe."""

    def __init__(self, fd: int, current_task: Callable[[], int | None]) -> None:
        super().__init__()
        self._pipe = Descriptor(fd, "what this worker logs by")
        self._pid = os.getpid()
        self._current_task = current_task

    def emit(self, record: logging.LogRecord) -> None:
        """Write it, with message, arguments and traceback merged into text."""
        try:
            fields = {**record.__dict__, "msg": self.format(record), "message": None, "args": None}
            fields.update(exc_info=None, exc_text=None, stack_info=None)
            fields["task"] = self._current_task() if os.getpid() == self._pid else None
            try:
                raw = pickle.dumps(fields)
            except Exception:  # an "extra" of the caller's
                raw = pickle.dumps({name: v for name, v in fields.items() if type(v) in _PLAIN})
            line = memoryview(base64.b64encode(raw) + b"\n")
            while line:
                line = line[os.write(self._pipe.fileno(), line) :]
        except Exception:
            self.handleError(record)


def deliver(lines: str) -> None:
    """Hand the records in these lines to the loggers of this process."""
    for line in lines.splitlines():
        with contextlib.suppress(Exception):  # handlers are the user's; a worker may have died within a line
            record = logging.makeLogRecord(pickle.loads(base64.b64decode(line)))
            logger = logging.getLogger(record.name)
            if logger.isEnabledFor(record.levelno):
                logger.handle(record)
