"""A connection between two that a test can delay, break and cut: a TCP proxy in threads."""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import threading
import time
from typing import Self


class Proxy:
    """Listens at `address`, and passes all on to another address.

    Parameters
    ----------
    target : str
        ``"tcp://host:port"``.
    delay : float, optional
        Seconds that everything takes on its way to the target.
    bytes_per_second : float, optional
        That pass in each direction; can be changed.
    """

    def __init__(self, target: str, *, delay: float = 0.0, bytes_per_second: float = math.inf) -> None:
        host, _, port = target.removeprefix("tcp://").rpartition(":")
        self.target = host, int(port)
        self.delay = delay
        self.bytes_per_second = bytes_per_second
        self.connections = 0
        self.bytes_passed = 0
        self._flowing = threading.Event()
        self._flowing.set()
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        self._port = 0
        self.open()

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self._port}"

    def open(self) -> None:
        """Let in connections, again at the same port."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._narrow(listener)
        listener.bind(("127.0.0.1", self._port))
        listener.listen()
        self._port = listener.getsockname()[1]
        self._listener = listener
        self._start(self._accept, listener)

    def _narrow(self, end: socket.socket) -> None:
        """Have little wait here, if not all passes at once: it would seem to have passed."""
        if self.bytes_per_second < math.inf:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)

    def shut(self) -> None:
        """Refuse new connections."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None

    def drop(self) -> None:
        """Break all connections now, in the middle of whatever they carry."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Pass nothing on any more, and tell nobody: a cut cable."""
        self._flowing.clear()

    def mend(self) -> None:
        """Pass on again."""
        self._flowing.set()

    def close(self) -> None:
        self.shut()
        self.drop()
        self.mend()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, function, *args) -> None:
        thread = threading.Thread(target=function, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near = listener.accept()[0]
            except OSError:
                return
            try:
                far = socket.create_connection(self.target)
            except OSError:
                near.close()
                continue
            self._narrow(far)
            with self._lock:
                self._pairs.append((near, far))
            self.connections += 1
            left = [2]
            self._start(self._pass, near, far, self.delay, left)
            self._start(self._pass, far, near, 0.0, left)

    def _pass(self, source: socket.socket, target: socket.socket, delay: float, left: list[int]) -> None:
        try:
            while data := source.recv(1 << 16):
                if pause := delay + len(data) / self.bytes_per_second:
                    time.sleep(pause)
                self._flowing.wait()
                target.sendall(data)
                self.bytes_passed += len(data)
        except OSError:
            pass
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        with self._lock:
            left[0] -= 1
            last = left[0] == 0
        if last:
            source.close()
            target.close()
