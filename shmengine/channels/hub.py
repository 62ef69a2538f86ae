"""What a process has once for all its socket channels: ZeroMQ's context, and the thread that serves their ports.

The thread greets, sees connections end, sends what others have left over, and finishes channels that were closed. It
sleeps while nothing of that is to be done, and both end with the last channel.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from shmengine.channels.zeromq import end_context, uninterrupted, zmq
from shmengine.region import call_at_process_end

if TYPE_CHECKING:
    from shmengine.channels.listening import ListenPort
    from shmengine.channels.ports import Port
    from shmengine.channels.socket import SocketLink

__all__ = ["EXIT_SECONDS", "THREAD", "Hub", "enter"]

THREAD = "shmengine-sockets"
PAUSE_SECONDS = (1e-3, 50e-3)  # between two looks while something is left to do; growing
LOOK_SECONDS = (
    1.0  # between two looks otherwise: what nobody takes out of a socket piles up in ZeroMQ, without limit
)
REST_LOOKS = 20  # in vain, before it sleeps: waking it costs more than these
EXIT_SECONDS = 5.0  # that the end of the process waits for the other ends to take what was sent
HURRY_SECONDS = 3.0
DESCRIPTORS = 24  # of a hub and a port, and to spare
MOST_SOCKETS = 1 << 16
ZAP = "inproc://zeromq.zap.01"  # where ZeroMQ asks who may come in


@contextlib.contextmanager
def _one_alone(port: Port) -> Iterator[None]:
    """Let an error end one port, and not the thread that serves all. Under the port's lock."""
    try:
        yield
    except Exception:
        _report()
        port.close()


def _report() -> None:
    threading.excepthook(threading.ExceptHookArgs([*sys.exc_info(), threading.current_thread()]))


class Hub:
    """That of one process; `enter` returns it.

    Attributes
    ----------
    context : zmq.Context
    """

    def __init__(self) -> None:
        self.context = zmq.Context(1)
        self.context.set(zmq.MAX_SOCKETS, MOST_SOCKETS)
        self.members: set[Port] = set()
        self._allowed: dict[bytes, frozenset[bytes]] = {}
        self._ports: dict[int, Port] = {}  # by the descriptor of their monitors
        self._new: deque[Port] = deque()
        self._closing: deque[SocketLink | ListenPort] = deque()
        self._hurry = False
        self._awake = False
        self._waking = threading.RLock()  # a finalizer may call `wake` in the middle of it
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._zap = self.context.socket(zmq.REP)
        uninterrupted(self._zap.bind, ZAP)
        self._zap_fd = int(self._zap.fd)
        self._epoll = select.epoll()
        self._epoll.register(self._event, select.EPOLLIN)
        self._epoll.register(self._zap_fd, select.EPOLLIN)
        self._thread = threading.Thread(target=self._serve, name=THREAD, daemon=True)
        self._finalizer = weakref.finalize(self, _end_process, os.getpid())
        call_at_process_end(self._finalizer)
        self._thread.start()

    def watch(self, port: Port) -> None:
        """See from now on what happens to the connections of a port."""
        fd = int(port.monitor.fd)
        self._ports[fd] = port
        self._epoll.register(fd, select.EPOLLIN)
        self._new.append(port)
        self.wake()

    def forget(self, port: Port) -> None:
        """Let a port go."""
        for fd, other in list(self._ports.items()):
            if other is port:
                del self._ports[fd]
                self._epoll.unregister(fd)
        with _lock:
            self.members.discard(port)
        self.wake()

    def wake(self) -> None:
        """Have the thread look what is to be done. Waits for nothing; any thread may call it at any moment."""
        self._awake = True
        with self._waking:
            if self._event >= 0:
                os.eventfd_write(self._event, 1)

    def notice(self) -> None:
        """See to it that what is left over now will be done."""
        if not self._awake:
            self.wake()

    def finish(self, link: SocketLink | ListenPort) -> None:
        """Close a channel (when the other end has taken all) or a server. Waits for nothing, as `wake`."""
        self._closing.append(link)
        self.wake()

    def allow(self, domain: bytes, keys: frozenset[bytes]) -> None:
        """Let only those who have one of these keys (32 bytes) connect to servers of a domain."""
        self._allowed[domain] = keys

    def end(self) -> None:
        """At the end of the process: wait for what has been sent to be taken, but not for ever."""
        self.wake()
        self._thread.join(EXIT_SECONDS)
        if self._thread.is_alive():
            self._hurry = True
            self.wake()
            self._thread.join(HURRY_SECONDS)

    def _serve(self) -> None:
        finishing: list[SocketLink | ListenPort] = []
        first, longest = PAUSE_SECONDS
        pause, idle = first, 0
        while not self._is_over(finishing):
            self._awake = False
            busy = bool(finishing or self._closing or any(port.busy for port in list(self._ports.values())))
            idle = 0 if busy else idle + 1
            self._awake = self._awake or idle < REST_LOOKS
            if idle >= REST_LOOKS:
                for port in list(self._ports.values()):
                    if port.lock.acquire(blocking=False):
                        try:
                            with _one_alone(port):
                                port.rest()
                        finally:
                            port.lock.release()
            ready = self._epoll.poll(pause if self._awake else LOOK_SECONDS)
            pause = first if ready else min(longest, pause * 1.5)
            for fd, _ in ready:
                if fd == self._event:
                    os.eventfd_read(fd)
                elif fd == self._zap_fd:
                    self._say_who_may_come_in()
                elif (watched := self._ports.get(fd)) is not None:
                    with watched.lock, _one_alone(watched):
                        watched.read_events()
            while self._new:
                port = self._new.popleft()
                # The descriptor of its monitor tells nothing before somebody has looked in vain.
                with port.lock, _one_alone(port):
                    port.read_events()
            for port in list(self._ports.values()):
                # Who has the lock does what is to be done, or the next round will.
                if (port.busy or not ready) and port.lock.acquire(blocking=False):
                    try:
                        if not port.closed:
                            with _one_alone(port):
                                port.serve()
                    finally:
                        port.lock.release()
            while self._closing:
                finishing.append(self._closing.popleft())
            finishing = [link for link in finishing if not self._finish(link)]

    def _finish(self, link: SocketLink | ListenPort) -> bool:
        """Tell whether a link or a server is done with."""
        try:
            return link.finish(hurry=self._hurry)
        except Exception:
            _report()
            return True

    def _is_over(self, finishing: list[SocketLink | ListenPort]) -> bool:
        """End if nobody is left."""
        global _hub
        with _lock:
            if self.members or finishing or self._closing:
                return False
            _ending.add(self)
            if _hub is self:
                _hub = None
        self._epoll.close()
        with self._waking:
            event, self._event = self._event, -1
            os.close(event)
        self._zap.close(0)
        end_context(self.context)  # which waits, but not for long, until what was handed over is sent
        self._finalizer.detach()
        with _lock:
            _ending.discard(self)
        return True

    def _say_who_may_come_in(self) -> None:
        """Answer ZeroMQ's questions (RFC 27): only known keys, and only of domains that have any."""
        while True:
            try:
                question: list[bytes] = self._zap.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            version, number, domain, _, _, mechanism, *credentials = question
            known = (
                mechanism == b"CURVE"
                and len(credentials) == 1
                and credentials[0] in self._allowed.get(domain, ())
            )
            code, text = (b"200", b"OK") if known else (b"400", b"unknown key")
            self._zap.send_multipart([version, number, code, text, b"", b""])


def _check_descriptors() -> None:
    """Raise if there are not enough for ZeroMQ, which ends the process where it cannot have one."""
    taken: list[int] = []
    try:
        taken.extend(os.eventfd(0, os.EFD_CLOEXEC) for _ in range(DESCRIPTORS))
    except OSError as error:
        what = (
            f"{error.strerror}: a socket channel needs {DESCRIPTORS}; close some, or allow more (ulimit -n)"
        )
        raise OSError(error.errno, what) from None
    finally:
        for fd in taken:
            os.close(fd)


_hub: Hub | None = None
_ending: set[Hub] = set()  # nobody's any more, and not quite done
_lock = threading.Lock()
_of_parents: list[Any] = []  # in a forked child: never to be touched, nor collected


def enter(port: Port) -> Hub:
    """Return the hub of this process, which lives on for this port.

    Raises
    ------
    OSError
        There are not enough descriptors.
    """
    global _hub
    _check_descriptors()
    with _lock:
        if _hub is None:
            _hub = Hub()
        _hub.members.add(port)
        return _hub


def _end_process(pid: int) -> None:
    if pid != os.getpid():
        return
    with _lock:
        hubs = [hub for hub in {*_ending, _hub} if hub is not None]
    for hub in hubs:
        for port in list(hub.members):
            port.end()
        hub.end()


def _after_fork() -> None:
    global _hub, _lock
    _of_parents.extend(_ending)
    _ending.clear()
    if _hub is not None:
        _of_parents.append(_hub)
        for port in _hub.members:
            port.after_fork()
    _hub = None
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
