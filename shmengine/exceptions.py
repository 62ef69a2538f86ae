"""Exceptions on their way between processes: whatever becomes of their class, the text arrives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shmengine.codec import decode, encode
from shmengine.errors import RemoteError, RemoteTraceback

__all__ = ["EncodedException", "decode_exception", "encode_exception"]


class _AsDefined:
    """Pickles exceptions as their classes say: tblib, which dask installs, drops what is not in their ``__dict__``."""

    def get(self, cls: type, /) -> Callable[[Any], Any] | None:
        """Return the reducer of exceptions."""
        return _reduce if issubclass(cls, BaseException) else None


def _reduce(error: BaseException) -> Any:
    return error.__reduce_ex__(5)


EncodedException = tuple[str, str, str, bytes | None, list[str]]
"""Name of the class, message, traceback, a frame (if any) and notes: see `encode_exception`."""


def encode_exception(error: BaseException) -> EncodedException:
    """Make an exception ready to travel, whatever its class.

    Returns
    -------
    type_name : str
        Qualified name of its class.
    message : str
    traceback : str
        Formatted, with causes and context.
    frame : bytes or None
        The exception itself; None if it cannot be pickled, or becomes one of another class; empty if it can be
        pickled, and not be unpickled again.
    notes : list of str
    """
    import traceback

    cls = type(error)
    type_name = cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    try:
        message = str(error)
    except Exception:
        message = f"<the text of this {type_name} cannot be made>"
    try:
        text = "".join(traceback.format_exception(error))
    except Exception:
        text = f"{type_name}: {message}\n"
    notes = getattr(error, "__notes__", None)
    notes = [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []
    return type_name, message, text, _frame_of(error), notes


def _frame_of(error: BaseException) -> bytes | None:
    try:
        frame = encode(error, memmap_mode=None, reducers=_AsDefined()).to_bytes()
    except Exception:
        return None
    try:
        loaded = decode(frame)
    except Exception:
        return b""
    if not isinstance(loaded, BaseException):
        return b""
    return frame if type(loaded).__qualname__ == type(error).__qualname__ else None


def _as_it_is(error: RemoteError) -> BaseException:
    return error


def decode_exception(
    encoded: EncodedException, unreadable: Callable[[RemoteError], BaseException] = _as_it_is
) -> BaseException:
    """Return the exception from `encode_exception`, with the remote traceback as ``__cause__``.

    Parameters
    ----------
    unreadable : callable
        Makes of the `RemoteError` what stands for an exception that was pickled and cannot be unpickled.

    Returns
    -------
    BaseException
        Of the original class if that could travel, otherwise a `RemoteError`.
    """
    type_name, message, text, frame, notes = encoded
    error: BaseException | None = None
    if frame:
        try:
            loaded = decode(frame, copy=True)
            error = loaded if isinstance(loaded, BaseException) else None
        except Exception:  # its class cannot be had in this process
            error = None
    if error is None:
        told = RemoteError(f"{type_name}: {message}" if message else type_name, type_name)
        error = told if frame is None else unreadable(told)
    present = getattr(error, "__notes__", [])
    for note in notes:
        if note not in present:
            error.add_note(note)
    error.__cause__ = RemoteTraceback(text)
    return error
