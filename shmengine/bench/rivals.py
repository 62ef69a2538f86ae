"""The ways of others, each written as fast as its Python interface allows; imported when they are measured."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, ClassVar

import numpy as np

from shmengine.bench.plan import Mode
from shmengine.bench.target import (
    PRIME,
    Array,
    End,
    Link,
    OneWay,
    Put,
    Side,
    Take,
    TwoWays,
    checks,
    putting_copies,
    taking,
)

__all__ = [
    "FasterQueueLink",
    "Iceoryx2Link",
    "Iceoryx2PollingLink",
    "KickmsgLink",
    "KickmsgSpinningLink",
    "PipeLink",
    "PyzmqLink",
    "QueueLink",
]

fork = multiprocessing.get_context("fork")
LONG = 1e6  # seconds: the watchdog is nearer
PICKLED = 4096  # beyond an array's bytes, at most


class PipeLink(Link):
    """A duplex `multiprocessing.Pipe`: ``send(array)``, ``recv()``."""

    def __init__(self, nbytes: int, slots: int) -> None:
        super().__init__(nbytes, slots)
        self.ends = dict(zip(("left", "right"), fork.Pipe(), strict=True))

    def open(self, side: Side) -> End:
        end = self.ends[side]
        return End(
            {"copy": putting_copies(self.nbytes, end.send)},
            {"copy": taking(self.nbytes, end.recv)},
        )

    def close(self) -> None:
        for end in self.ends.values():
            end.close()


class QueueWay(OneWay):
    """`multiprocessing.Queue`: its thread pickles later, so that each message is an array of its own."""

    def __init__(self, nbytes: int, slots: int) -> None:
        super().__init__(nbytes, slots)
        self.queue: Any = fork.Queue(slots)

    def sender(self) -> dict[Mode, Put]:
        return {"copy": putting_copies(self.nbytes, self.queue.put, reuse=False)}

    def receiver(self) -> dict[Mode, Take]:
        return {"copy": taking(self.nbytes, self.queue.get)}

    def leave(self) -> None:
        self.queue.cancel_join_thread()  # nobody reads what is left after a failure

    def close(self) -> None:
        self.queue.close()


class QueueLink(TwoWays):
    """Two `multiprocessing.Queue`."""

    way = QueueWay


class FasterQueueWay(OneWay):
    """`faster_fifo.Queue`: arrays, pickled."""

    def __init__(self, nbytes: int, slots: int) -> None:
        import faster_fifo

        super().__init__(nbytes, slots)
        self.queue = faster_fifo.Queue(max_size_bytes=slots * (nbytes + PICKLED))

    def sender(self) -> dict[Mode, Put]:
        put = self.queue.put
        return {"copy": putting_copies(self.nbytes, lambda array: put(array, timeout=LONG))}

    def receiver(self) -> dict[Mode, Take]:
        return {"copy": taking(self.nbytes, partial(self.queue.get, timeout=LONG))}

    def close(self) -> None:
        self.queue.close()


class FasterQueueLink(TwoWays):
    """Two `faster_fifo.Queue`."""

    way = FasterQueueWay


class PyzmqWay(OneWay):
    """PUSH to PULL over ``ipc://``: two parts, the array's bytes not copied by pyzmq where that pays."""

    HEADER = b"h" * 64  # shape and dtype would be here

    def __init__(self, nbytes: int, slots: int) -> None:
        super().__init__(nbytes, slots)
        self.directory = tempfile.mkdtemp(prefix="shmengine-bench-")
        self.address = f"ipc://{self.directory}/socket"
        self.socket: Any = None

    def _open(self, kind: str) -> Any:
        import zmq

        socket: Any = zmq.Context.instance().socket(getattr(zmq, kind))
        socket.setsockopt(zmq.SNDHWM, self.slots)
        socket.setsockopt(zmq.RCVHWM, self.slots)
        socket.setsockopt(zmq.LINGER, 0)
        if kind == "PUSH":
            socket.bind(self.address)
        else:
            socket.connect(self.address)
        self.socket = socket
        return socket

    def sender(self) -> dict[Mode, Put]:
        send, header = self._open("PUSH").send_multipart, self.HEADER

        def put(array: Array) -> None:
            send((header, array), copy=False)

        # libzmq's thread reads it later, if it is not so small that pyzmq copies it.
        return {"copy": putting_copies(self.nbytes, put, reuse=False)}

    def receiver(self) -> dict[Mode, Take]:
        receive = self._open("PULL").recv_multipart

        def get() -> Array:
            return np.frombuffer(receive(copy=False)[1].buffer, np.uint8)

        return {"copy": taking(self.nbytes, get)}

    def leave(self) -> None:
        self.socket.close()

    def close(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


class PyzmqLink(TwoWays):
    """Two pairs of pyzmq sockets."""

    way = PyzmqWay


# --- in shared memory -----------------------------------------------------------------------------


class KickmsgWay(OneWay):
    """kickmsg, which overwrites what is not read in time: so the receiver tells in a shared word how far it is."""

    spins: ClassVar[bool] = False

    def __init__(self, nbytes: int, slots: int) -> None:
        import kickmsg

        super().__init__(nbytes, slots)
        self.name = f"/shmengine-bench-{uuid.uuid4().hex[:12]}"
        config = kickmsg.Config()
        config.max_subscribers = 1
        config.sub_ring_capacity = 1 << (slots - 1).bit_length()
        config.pool_size = config.sub_ring_capacity + 2  # one that is filled, one that is read
        config.max_payload_size = nbytes
        self.region = kickmsg.SharedRegion.create(self.name, kickmsg.ChannelType.PubSub, config, "bench")
        self.taken = np.frombuffer(mmap.mmap(-1, 8), np.uint64)

    def sender(self) -> dict[Mode, Put]:
        import kickmsg

        publisher = kickmsg.Publisher(self.region)
        allocate, nbytes, asarray = publisher.allocate, self.nbytes, np.asarray
        taken, slots, pause = self.taken, self.slots, os.sched_yield
        sent = 0
        limit = slots

        def send(value: Any) -> None:
            nonlocal sent, limit
            while sent >= limit:
                limit = int(taken[0]) + slots
                if sent >= limit:
                    pause()
            slot: Any = allocate()
            asarray(slot)[:] = value
            slot.publish(nbytes)
            sent += 1

        def fill(number: int) -> None:
            send(number % PRIME)

        return {"copy": putting_copies(nbytes, send), "block": fill}

    def receiver(self) -> dict[Mode, Take]:
        import kickmsg

        subscriber = kickmsg.Subscriber(self.region)
        where, expected = checks(self.nbytes)
        nbytes, asarray, taken = self.nbytes, np.asarray, self.taken
        done = 0
        receive: Callable[[], Any]
        if self.spins:
            receive = subscriber.try_receive_view
        else:
            receive = partial(subscriber.receive_view, timedelta(seconds=100))

        def take(number: int) -> bool:
            nonlocal done
            while (view := receive()) is None:
                pass
            array = asarray(view)
            right = array.nbytes == nbytes and array[where].tobytes() == expected[number % PRIME]
            view.release()
            done += 1
            taken[0] = done
            return bool(right)

        return {"copy": take, "block": take}

    def close(self) -> None:
        self.region.unlink()


class KickmsgSpinningWay(KickmsgWay):
    """The same; the receiver never sleeps."""

    spins = True


class KickmsgLink(TwoWays):
    """Two kickmsg regions; who waits for a message sleeps."""

    way = KickmsgWay
    modes = ("copy", "block")
    shares_memory = True


class KickmsgSpinningLink(KickmsgLink):
    """Two kickmsg regions; who waits for a message spins."""

    way = KickmsgSpinningWay


class Iceoryx2Way(OneWay):
    """iceoryx2: publish and subscribe, with an event for the one who sleeps."""

    polls: ClassVar[bool] = False

    def __init__(self, nbytes: int, slots: int) -> None:
        import iceoryx2  # noqa: F401 - whether it is there

        super().__init__(nbytes, slots)
        self.directory = tempfile.mkdtemp(prefix="shmengine-bench-")
        self.prefix = os.path.basename(self.directory) + "_"
        self.node: Any = None

    def _service(self) -> tuple[Any, Any, Any]:
        import iceoryx2 as iox2

        iox2.set_log_level(iox2.LogLevel.Error)
        if self.node is None:
            config = iox2.config.default()
            config.global_cfg.prefix = iox2.FileName.new(self.prefix)
            config.global_cfg.root_path = iox2.Path.new(self.directory)
            builder = iox2.NodeBuilder.new().config(config)
            builder = builder.signal_handling_mode(iox2.SignalHandlingMode.Disabled)
            self.node = builder.create(iox2.ServiceType.Ipc)
        messages = self.node.service_builder(iox2.ServiceName.new("messages"))
        messages = messages.publish_subscribe(iox2.Slice[ctypes.c_uint8]).enable_safe_overflow(False)
        messages = messages.history_size(0).subscriber_max_buffer_size(self.slots)
        messages = messages.subscriber_max_borrowed_samples(1).open_or_create()
        event = self.node.service_builder(iox2.ServiceName.new("event")).event().open_or_create()
        return iox2, messages, event

    def sender(self) -> dict[Mode, Put]:
        iox2, messages, event = self._service()
        builder = messages.publisher_builder().initial_max_slice_len(self.nbytes).max_loaned_samples(1)
        publisher = builder.backpressure_strategy(iox2.BackpressureStrategy.RetryUntilDelivered).create()
        notify = (lambda: None) if self.polls else event.notifier_builder().create().notify
        nbytes, loan, pause = self.nbytes, publisher.loan_slice_uninit, os.sched_yield
        at: Any = (ctypes.c_uint8 * nbytes).from_address

        def send(value: Any) -> None:
            while True:
                sample = loan(nbytes)
                np.frombuffer(at(sample.payload_ptr), np.uint8)[:] = value
                if sample.assume_init().send():
                    break
                pause()  # the subscriber's buffer was full after all, and nobody has got it
            notify()

        def fill(number: int) -> None:
            send(number % PRIME)

        return {"copy": putting_copies(nbytes, send), "block": fill}

    def receiver(self) -> dict[Mode, Take]:
        iox2, messages, event = self._service()
        receive = messages.subscriber_builder().create().receive
        if self.polls:
            wait: Callable[[], Any] = lambda: None  # noqa: E731 - one of two
        else:
            wait = partial(event.listener_builder().create().timed_wait, iox2.Duration.from_secs(100))
        where, expected = checks(self.nbytes)
        at: Any = (ctypes.c_uint8 * self.nbytes).from_address

        def take(number: int) -> bool:
            while (sample := receive()) is None:
                wait()
            array = np.frombuffer(at(sample.payload_ptr), np.uint8)
            right: bool = array[where].tobytes() == expected[number % PRIME]
            sample.delete()
            return right

        return {"copy": take, "block": take}

    def close(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        for name in os.listdir("/dev/shm"):
            if name.startswith(self.prefix):
                os.unlink(f"/dev/shm/{name}")


class Iceoryx2PollingWay(Iceoryx2Way):
    """The same without the event; the receiver never sleeps."""

    polls = True


class Iceoryx2Link(TwoWays):
    """Two iceoryx2 services; who waits for a message sleeps."""

    way = Iceoryx2Way
    modes = ("copy", "block")
    shares_memory = True


class Iceoryx2PollingLink(Iceoryx2Link):
    """Two iceoryx2 services; who waits for a message polls."""

    way = Iceoryx2PollingWay
