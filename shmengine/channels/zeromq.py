"""ZeroMQ's Python module, or an error that says how to get it; and its functions in C, for the sockets of that."""

from __future__ import annotations

import ctypes

from shmengine._native import ffi, lib
from shmengine._native._handles import Wire, connect_zeromq

try:
    import zmq
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "channels over sockets need pyzmq: pip install 'shmengine[socket]'", name=error.name
    ) from None

__all__ = ["wire_of", "zmq"]

_FUNCTIONS = (
    "zmq_msg_init",
    "zmq_msg_close",
    "zmq_msg_more",
    "zmq_msg_get",
    "zmq_msg_size",
    "zmq_msg_data",
    "zmq_msg_recv",
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
