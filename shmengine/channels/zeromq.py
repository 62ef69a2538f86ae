"""ZeroMQ's Python module, or an error that says how to get it; and its functions in C, for the sockets of that."""

from __future__ import annotations

import ctypes
import errno
import signal
from collections.abc import Callable
from typing import Any

from shmengine._native import ffi, lib
from shmengine._native._handles import Wire, connect_zeromq

try:
    import zmq
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "channels over sockets need pyzmq: pip install 'shmengine[socket]'", name=error.name
    ) from None

__all__ = ["end_context", "monitor_of", "uninterrupted", "wire_of", "zmq"]

_FUNCTIONS = (
    "zmq_msg_init",
    "zmq_msg_close",
    "zmq_msg_more",
    "zmq_msg_get",
    "zmq_msg_size",
    "zmq_msg_data",
    "zmq_msg_recv",
    "zmq_msg_send",
    "zmq_msg_init_size",
    "zmq_msg_copy",
    "zmq_send",
)


def _connect() -> None:
    try:
        from zmq.backend.cython import _zmq

        # Of that very library which pyzmq was linked to: its sockets are no other one's.
        library = ctypes.CDLL(_zmq.__file__)
        addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in _FUNCTIONS]
    except (ImportError, AttributeError, OSError) as error:
        raise ImportError(
            f"channels over sockets need a pyzmq that shows ZeroMQ's functions, as its wheels do: {error}"
        ) from error
    connect_zeromq(int(ffi.cast("uintptr_t", ffi.addressof(lib, "shmr_crc32c"))), *addresses)


_connect()


def wire_of(socket: zmq.Socket[bytes]) -> Wire:
    """Return a second way to use a socket, without pyzmq's steps."""
    return Wire(int(socket.underlying))


def uninterrupted(call: Callable[..., Any], *args: Any) -> None:
    """Bind, connect or disconnect a socket, again if a signal came: pyzmq does so only for what sends and receives.

    These look for what other threads want of the socket before they do anything; that is where signals interrupt them.
    """
    while True:
        try:
            call(*args)
            return
        except (InterruptedError, zmq.ZMQError) as error:
            if error.errno != errno.EINTR:
                raise
            # Its handler has been called, and has not raised.


def monitor_of(socket: zmq.Socket[bytes], events: int) -> zmq.Socket[bytes]:
    """Return a new socket that says what becomes of this one's connections."""
    address = f"inproc://shmengine-monitor-{int(socket.fd)}"
    uninterrupted(socket.monitor, address, events)
    monitor: zmq.Socket[bytes] = socket.context.socket(zmq.PAIR)
    try:
        uninterrupted(monitor.connect, address)
    except BaseException:
        monitor.close(0)
        socket.disable_monitor()
        raise
    return monitor


def end_context(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """End a context without sockets, whatever signals come: pyzmq takes an interrupted end for an end.

    The context's threads and descriptors would stay as long as the process.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        context.term()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
