"""ZeroMQ's Python module, or an error that says how to get it."""

from __future__ import annotations

try:
    import zmq
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "channels over sockets need pyzmq: pip install 'shmengine[socket]'", name=error.name
    ) from None

__all__ = ["zmq"]
