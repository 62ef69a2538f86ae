"""The short ways of small messages over a socket (csrc/small.c): what goes there, and what is left to the long ones."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
import weakref
from collections import deque
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import zmq

from shmengine._native._handles import Stream, Wire, connect_loans, connect_zeromq
from shmengine.channels import loans, zeromq
from shmengine.channels.frames import aligned_empty
from shmengine.channels.link import Counts
from shmengine.channels.loans import Lender
from shmengine.channels.sessions import LENT_BYTES, PREFIX, PREFIX_BYTES, Kind, Session
from shmengine.channels.small import UNKNOWN, beginning_of, decode_small, encode_small
from shmengine.channels.socket import SMALL_BYTES
from shmengine.channels.zeromq import wire_of
from shmengine.codec import HEADER_BYTES, decode, encode, number_of
from tests.helpers.arrays import same

WINDOW = 1 << 20
LARGE = 1 << 20
CHECKED = 1 << 17
LOANS = 504  # at once
SMALL = [
    b"x" * 64,
    b"",
    "text",
    7,
    None,
    np.arange(8.0),
    np.array(5, "i2"),
    np.arange(6, dtype=">u4").reshape(2, 3),
    np.zeros((1, 2, 1, 3, 1), "u1"),
    {"a": 1, "b": 2.5, "c": "three", "d": None, "e": True},
]


class Hub:
    """As far as it is looked at."""

    _awake = True


class Side:
    """A session over one of two sockets, which takes itself to be connected."""

    def __init__(
        self,
        socket,
        *,
        encoder=None,
        decoder=decode_small,
        make=aligned_empty,
        begin=beginning_of,
        as_is=True,
        pickles=True,
        checks_all=False,
        raw=None,
        acknowledge_bytes=WINDOW,
    ):
        self.socket = socket
        self.wire = wire_of(socket)
        self.session = Session(b"k" * 16, Counts(), WINDOW)
        self.lock, self.armed, self.hub = threading.Lock(), set(), Hub()
        self.raw = deque() if raw is None else raw
        self.expected = {0: 0}
        self.session.use(
            *(self.wire, self.lock, self.armed, self.raw, self.hub, np.ndarray, begin),
            encoder or partial(encode_small, allow_pickle=pickles, most_bytes=SMALL_BYTES),
            *(self.expected, decoder, UNKNOWN, make, checks_all, pickles, as_is, SMALL_BYTES, 100),
        )
        self.session.acknowledge_bytes = acknowledge_bytes
        self.session.peer = b""
        self.session.offered = True

    def send(self, obj):
        looked = time.monotonic_ns() + 10**12  # just now, however long this process has to wait for a core
        return self.session.send_small(obj, looked)

    def take(self):
        """Return the next message in a list, or an empty one."""
        box = []
        assert self.session.take_small(box) is bool(box)
        return box

    def post(self, kind, number, taken=0, body=b""):
        """Send what the other end may say."""
        self.socket.send(PREFIX.pack(kind, number, taken) + body)


@pytest.fixture
def sockets():
    context = zmq.Context()
    pair = [context.socket(zmq.PAIR) for _ in range(2)]
    pair[0].bind("inproc://wire")
    pair[1].connect("inproc://wire")
    yield pair
    for socket in pair:
        socket.close(0)
    context.term()


@pytest.fixture
def sides(sockets):
    return [Side(socket) for socket in sockets]


def frame(obj, number=0, **options):
    return b"".join(encode(obj, memmap_mode=None).pieces(sequence=number, **options))


# --- sending ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("checks_all", [False, True])
@pytest.mark.parametrize("obj", SMALL, ids=repr)
def test_what_is_sent_is_a_frame_as_any_other(sockets, obj, checks_all):
    """The first one of a kind, and those that are made from it."""
    side = Side(sockets[0], checks_all=checks_all)
    for number in range(3):
        assert side.send(obj)
        part = sockets[1].recv()
        assert PREFIX.unpack_from(part) == (Kind.DATA, number, 0)
        assert part[PREFIX_BYTES:] == frame(obj, number, checksum=checks_all)
        assert memoryview(side.session._kept[-1][2]) == part
    assert side.session.messages == side.session.next_number == side.session.quick_sent == 3
    assert side.session.quick_sent_bytes == 3 * len(frame(obj))


def test_objects_that_differ_in_anything_but_their_bytes(sides, sockets):
    """None is made from the frame of another kind, shape or length."""
    array = np.arange(8.0)
    several = [
        array,
        array.copy(),
        array.astype("f4"),
        array.reshape(2, 4),
        array[:4],
        array[:5],
        array.reshape(2, 4).T.copy(),
        b"12345678",
        b"123",
        b"abc",
        "abc",
        array.astype(">f8"),
        array,
    ]
    for number, obj in enumerate(several):
        assert sides[0].send(obj)
        raw = np.frombuffer(bytearray(sockets[1].recv()[PREFIX_BYTES:]), np.uint8)
        assert same(decode(raw), obj)
        assert number_of(raw) == (number, 0)


@pytest.mark.parametrize(
    "obj",
    [
        b"x" * 10_000,
        np.zeros(10_000),
        np.arange(8)[::2],
        np.arange(6).reshape(2, 3).T,
        np.zeros(0),
        np.zeros(2, dtype=[("a", "i4")]),
        np.ma.zeros(3),
        [1, 2],
        {"a": []},
        {"a": b"x" * 10_000},
        dict.fromkeys(range(100)),
        10**10_000,
    ],
    ids=lambda obj: type(obj).__name__,
)
def test_what_is_not_small_goes_the_long_way(sides, obj):
    assert sides[0].send(np.arange(8))
    assert not sides[0].send(obj)
    assert len(sides[0].session._kept) == 1


def no_peer(side):
    side.session.peer = None


def named_peer(side):
    side.session.peer = b"name"


def locked(side):
    side.lock.acquire()


def somebody_waits(side):
    side.armed.add(side)


def asleep(side):
    side.hub._awake = False


def no_hub(side):
    side.hub.__class__ = type("Other", (), {})


def on_the_long_way(side):
    side.session.sends = side.session.receives = False


def closed(side):
    side.wire.close()


UNUSUAL = [no_peer, locked, somebody_waits, asleep, no_hub, on_the_long_way, closed]


@pytest.mark.parametrize("change", UNUSUAL, ids=lambda change: change.__name__)
def test_nothing_is_sent_where_that_is_not_simple(sides, sockets, change):
    assert sides[0].send(1)
    change(sides[0])
    assert not sides[0].send(2)
    assert len(sides[0].session._kept) == 1
    assert sockets[1].recv()
    with pytest.raises(zmq.Again):
        sockets[1].recv(zmq.DONTWAIT)


@contextmanager
def named():
    """A socket whose peers have names, and the one whose name it knows."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
        router.router_mandatory = True
        router.bind("inproc://wire")
        dealer.routing_id = b"name"
        dealer.connect("inproc://wire")
        dealer.send(b"hello")
        assert router.recv_multipart() == [b"name", b"hello"]
        yield router, dealer


def test_a_peer_with_a_name_gets_that_first():
    with named() as (router, dealer):
        side = Side(router)
        named_peer(side)
        side.session.keep([side.session.prefix(Kind.DATA, 0) + frame(0)])
        side.session.handed_over(0)
        for number in range(1, 64):
            assert side.send(number)
            assert dealer.recv() == PREFIX.pack(Kind.DATA, number, 0) + frame(number, number)
        assert not side.send(64), "the long way looks what was acknowledged"
        side.session.let_go(63)
        side.session.keep([b"x"])
        side.session.handed_over(64)
        side.wire.half = True
        assert not side.send(65)
        side.wire.half = False
        side.session.peer = b"nobody"
        assert side.send(65), "it is kept for the next connection"
        assert side.session._kept[-1][0] == 65
        assert side.session._handed_over == 65
        assert not side.send(66)


def test_nothing_is_sent_without_a_look_at_the_other_end_lately(sides):
    assert not sides[0].session.send_small(1, time.monotonic_ns() - 10**9)


def test_nothing_is_sent_before_what_the_connection_has_not_got(sides):
    session = sides[0].session
    session.keep([session.prefix(Kind.DATA, 0) + frame(1)])
    assert not sides[0].send(2)


def test_nothing_is_sent_beyond_the_window(sides):
    sent = 0
    while sides[0].send(b"x" * 700):
        sent += 1
    kept = sides[0].session._kept
    assert len(kept) == sent
    assert kept[-1][1] <= WINDOW < kept[-1][1] + kept[0][1]


def test_nothing_is_sent_beyond_what_the_other_end_has_room_for(sides):
    session = sides[0].session
    session.pace = 2000
    while sides[0].send(1):
        pass
    assert session._kept[-1][1] <= 2000


def test_what_has_to_be_counted_goes_the_long_way(sides):
    left, right = sides
    left.send(1)
    right.session._look_at = 100
    assert right.take() == []
    [part] = right.raw
    assert right.session.feed(part) == (Kind.DATA, True, False)
    assert right.session._look_at > WINDOW
    assert right.session._waiting > len(part)


def test_what_comes_after_the_goodbye_is_dropped(sides):
    left, right = sides
    right.session.feed(right.session.prefix(Kind.GOODBYE, 0))
    left.session.keep([left.session.prefix(Kind.GOODBYE, 0)])
    left.session._handed_over = 1
    assert left.send(1)
    right.wire.receive(right.raw, -1, right.session)
    [part] = right.raw
    assert right.session.feed(part) == (Kind.DATA, False, False)


def test_room_is_for_what_was_kept_first(sides):
    left, right = sides
    assert left.send(1)
    left.session.keep([left.session.prefix(Kind.DATA, 1)])  # for which there was no room
    right.post(Kind.ACKNOWLEDGE, 0, 1)
    assert left.take() == []
    assert len(left.raw) == 1


def test_a_sender_sees_now_and_then_what_was_acknowledged(sides):
    """Whatever he sends, without ever receiving."""
    left, right = sides
    for number in range(1000):
        assert left.send(number)
        right.post(Kind.ACKNOWLEDGE, 0, number)
    assert len(left.session._kept) < 200
    assert left.session.answers
    assert left.session.next_number == left.session.messages == 1000


def test_an_error_of_the_encoder_is_the_senders(sockets):
    def broken(obj):
        raise ValueError("no")

    side = Side(sockets[0], encoder=broken)
    with pytest.raises(ValueError, match="no"):
        side.send(1)
    assert not side.session._kept


def test_what_the_encoder_returns_is_looked_at(sockets):
    for wrong in (bytearray(100), b"short", 5):
        assert not Side(sockets[0], encoder=lambda obj, wrong=wrong: wrong).send(1)


def test_a_frame_without_the_bytes_of_its_object_is_no_template(sockets):
    frames = iter([bytes(200), bytes(64), bytes(100)])
    side = Side(sockets[0], encoder=lambda obj: next(frames))
    for nbytes in (200, 64, 100):
        assert side.send(b"x" * 60)
        assert len(sockets[1].recv()) == PREFIX_BYTES + nbytes


def test_an_encoder_may_go_the_long_way(sockets):
    def encode(obj):
        on_the_long_way(side)
        return frame(obj)

    side = Side(sockets[0], encoder=encode)
    assert not side.send(1)
    assert not side.session._kept


class NoDeque(deque):
    def append(self, part):
        raise ArithmeticError("no")


def test_what_pumping_raises_is_raised(sockets):
    left, right = Side(sockets[0]), Side(sockets[1], raw=NoDeque())
    left.post(Kind.REPEAT, 0)
    with pytest.raises(ArithmeticError):
        right.take()
    left.post(Kind.REPEAT, 0)
    with pytest.raises(ArithmeticError):
        right.send(1)
    assert right.send(1)


# --- receiving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("obj", SMALL, ids=repr)
def test_what_was_sent_is_taken(sides, obj):
    left, right = sides
    for _ in range(3):
        assert left.send(obj)
    for _ in range(3):
        (got,) = right.take()
        assert same(got, obj)
        if isinstance(got, np.ndarray):
            assert got.flags.writeable
    assert right.take() == []
    assert right.expected == {0: 3}
    assert right.session._taken == right.session.received == right.session.quick_received == 3
    assert right.session.quick_received_bytes == 3 * len(frame(obj))


def test_all_in_their_order(sides):
    left, right = sides
    for number in range(90):
        assert left.send(number)
    assert [right.take() for _ in range(91)] == [[number] for number in range(90)] + [[]]


def acknowledged(side):
    """Look what has come; return how many messages were acknowledged."""
    side.wire.receive(side.raw, -1, side.session)
    assert not side.raw
    return side.session._acknowledged


def test_an_acknowledgement_goes_when_it_falls_due(sides):
    left, right = sides
    for number in range(250):
        assert left.send(number)
    for number in range(250):
        assert right.take() == [number]
        assert acknowledged(left) == right.session._told == (number + 1) // 100 * 100


def test_so_does_one_for_many_bytes(sockets):
    left, right = Side(sockets[0]), Side(sockets[1], acknowledge_bytes=1200)
    told = []
    for _ in range(6):
        assert left.send(b"x" * 400)
        assert right.take() == [b"x" * 400]
        told.append(acknowledged(left))
    assert told == [0, 0, 3, 3, 3, 6]


def test_an_acknowledgement_that_the_connection_does_not_take_is_still_owed():
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.router_mandatory = True
        side = Side(router, acknowledge_bytes=1)
        with context.socket(zmq.PUSH) as push, context.socket(zmq.PULL) as pull:
            pull.bind("inproc://parts")
            push.connect("inproc://parts")
            push.send(PREFIX.pack(Kind.DATA, 0, 0) + frame(7))
            wire_of(pull).receive(side.raw, 1, None)
        side.session.feed(side.raw.popleft())
        side.session.peer = b"nobody"
        assert side.take() == [7]
        assert side.session.is_behind
        assert side.session.owes_acknowledgement


@pytest.mark.parametrize("change", UNUSUAL, ids=lambda change: change.__name__)
def test_nothing_is_taken_where_that_is_not_simple(sides, change):
    left, right = sides
    assert left.send(1)
    change(right)
    assert right.take() == []
    assert right.session._taken == 0


def test_a_peer_with_a_name_shares_the_socket(sides):
    """What has come for it is taken; the socket is left alone."""
    left, right = sides
    assert left.send(1)
    assert left.send(2)
    assert right.take() == [1]
    named_peer(right)
    assert right.take() == [2]
    assert left.send(3)
    assert right.take() == []


BAD = {
    "damaged": lambda good: good[:-1] + bytes([good[-1] ^ 1]),
    "short": lambda good: good[: HEADER_BYTES - 1],
    "longer": lambda good: good + b"x",
    "magic": lambda good: b"SHMX" + good[4:],
    "version": lambda good: good[:8] + b"\x02" + good[9:],
    "kind": lambda good: good[:9] + b"\x02" + good[10:],
    "flags": lambda good: good[:10] + b"\x01" + good[11:],
    "in band": lambda good: good[:16] + b"\xff" * 8 + good[24:],
    "prefix": lambda good: good[:52] + b"\xff" * 4 + good[56:],
    "checked": lambda good: good[:32] + b"\xff" * 8 + good[40:],
    "number": lambda good: frame(1, 5),
    "large": lambda good: frame(b"x" * 80_000),
    "empty": lambda good: b"",
}


@pytest.mark.parametrize("damage", BAD.values(), ids=BAD)
def test_what_is_not_sound_is_left_to_the_long_way(sides, damage):
    left, right = sides
    left.post(Kind.DATA, 0, 0, damage(frame(1)))
    assert right.take() == []
    assert right.session._taken == 0
    assert len(right.session._inbox) + len(right.raw) == 1
    assert right.expected == {0: 0}


@pytest.mark.parametrize(
    ("kind", "body"), [(Kind.DATA, frame(1)), (Kind.DATA, frame(b"x" * 80_000)), (Kind.GOODBYE, b"")]
)
def test_what_the_long_way_has_taken_in_is_left_to_it(sides, kind, body):
    """If it is bytes, large, or no message."""
    right = sides[1]
    if len(body) > 70_000:
        sides[0].post(kind, 0, 0, body)
        right.wire.receive(right.raw, 1, None)
        right.session.feed(right.raw.popleft())
    else:
        right.session.feed(PREFIX.pack(kind, 0, 0) + body)
    assert right.take() == []
    assert len(right.session._inbox) == 1


def test_what_was_taken_before_is_left_to_the_long_way(sides):
    left, right = sides
    assert left.send(1)
    assert right.wire.receive(right.raw, 1, right.session)
    right.session._taken = 1
    assert right.take() == []


def test_a_decoder_may_go_the_long_way(sockets):
    def decode(*args):
        on_the_long_way(right)
        return decode_small(*args)

    left, right = Side(sockets[0]), Side(sockets[1], decoder=decode)
    assert left.send(1)
    assert right.take() == []
    assert right.session._taken == 0


def test_the_first_number_is_nought(sides):
    left, right = sides
    right.expected.clear()
    assert left.send(1)
    assert right.take() == [1]
    assert right.expected == {0: 1}


def test_pickles_only_where_they_are_allowed(sockets):
    left, right = Side(sockets[0]), Side(sockets[1], pickles=False)
    assert left.send(np.arange(3))
    assert left.send("text")
    assert same(right.take()[0], np.arange(3))
    assert right.take() == []


@pytest.mark.parametrize(
    ("kind", "number", "body"),
    [
        (Kind.DATA, 7, frame(1)),
        (Kind.GOODBYE, 0, b""),
        (Kind.BEGINNING, 0, frame(1)),
        (Kind.HELLO, 0, b""),
        (Kind.REPEAT, 0, b""),
        (77, 0, b""),
    ],
)
def test_other_parts_and_all_behind_them_wait_for_the_long_way(sides, kind, number, body):
    left, right = sides
    left.post(kind, number, 0, body)
    assert left.send(1)
    assert right.take() == []
    assert len(right.raw) == 2
    assert right.take() == []
    assert len(right.raw) == 2


def test_parts_of_one_message_wait_too(sides, sockets):
    sockets[0].send(PREFIX.pack(Kind.DATA, 0, 0) + frame(1), zmq.SNDMORE)
    sockets[0].send(b"x")
    assert sides[1].take() == []
    assert [part.more for part in sides[1].raw] == [True, False]


def test_what_decoding_raises_leaves_the_message(sockets):
    """As a signal's handler may."""
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return decode_small(*args)

    left, right = Side(sockets[0]), Side(sockets[1], decoder=interrupted)
    assert left.send(1)
    with pytest.raises(KeyboardInterrupt):
        right.take()
    assert right.session._taken == 0
    assert right.take() == [1]


def test_what_nobody_knows_is_left_to_the_long_way(sockets):
    left, right = Side(sockets[0]), Side(sockets[1], decoder=lambda *args: UNKNOWN)
    assert left.send(1)
    assert right.take() == []
    assert right.session._taken == 0


def test_a_message_that_another_takes_meanwhile_is_his(sockets):
    """While one is decoded other threads run."""
    others = []

    def slow(*args):
        if not others:
            others.append(None)
            others[:] = right.take()
        return decode_small(*args)

    left, right = Side(sockets[0]), Side(sockets[1], decoder=slow)
    assert left.send(1)
    assert left.send(2)
    assert right.take() == []
    assert others == [1]
    assert right.take() == [2]


def test_a_message_that_cannot_be_acknowledged_now_is_left_as_it_is(sockets):
    """Decoding it may do what can be done once, such as to take over a descriptor."""
    decoded = []

    def counting(*args):
        decoded.append(args)
        return decode_small(*args)

    left, right = Side(sockets[0]), Side(sockets[1], decoder=counting, acknowledge_bytes=300)
    assert left.send(b"x" * 100)
    assert left.send(b"y" * 100)
    assert right.take() == [b"x" * 100]
    right.wire.half = True
    assert right.take() == []
    assert len(decoded) == 1


class Finalized:
    """In a cycle, until it is collected."""

    def __init__(self, finalize):
        self.cycle = self
        self.finalize = finalize

    def __del__(self):
        self.finalize()


@pytest.fixture
def collections_at_will():
    """Tests turn the collector on, and set its threshold."""
    threshold = gc.get_threshold()
    gc.collect()
    gc.disable()
    yield
    gc.set_threshold(*threshold)
    gc.enable()


@pytest.mark.parametrize("allocations", range(1, 6))
@pytest.mark.usefixtures("collections_at_will")
def test_nothing_is_taken_out_of_a_socket_that_a_finalizer_has_locked(sides, allocations):
    """Python 3.11 collects wherever something is allocated: whatever threads run then, they find the port as it is."""
    left, right = sides
    for number in range(40):
        assert left.send(number)
    received = []

    def lock():
        if right.lock.acquire(blocking=False):
            received.append(right.session.received)

    unfree = [(number, number, number) for number in range(5000)]  # the next tuples are allocated
    Finalized(lock)
    box = []
    gc.set_threshold(gc.get_count()[0] + allocations)
    gc.enable()
    right.session.take_small(box)
    gc.disable()
    assert len(unfree) == 5000
    assert not received or right.session.received == received[0]


# --- what was acknowledged --------------------------------------------------------------------------


def test_an_answer_lets_go_of_what_it_answers(sides):
    left, right = sides
    for number in range(3):
        assert left.send(number)
        assert right.take() == [number]
        assert right.send(-number)
        assert left.take() == [-number]
        assert not left.session._kept
    assert left.session._released > 0


def test_whoever_waits_for_room_is_woken_by_the_long_way(sides):
    left, right = sides
    assert left.send(1)
    right.post(Kind.ACKNOWLEDGE, 0, 1)
    left.armed.add(left)
    assert left.wire.receive(left.raw, -1, left.session) is False
    assert len(left.raw) == len(left.session._kept) == 1


@pytest.mark.parametrize("where", ["first", "last"])
def test_memory_that_is_used_again_is_put_aside_by_the_long_way(sides, where):
    left, right = sides
    session = left.session
    large = bytearray(session.prefix(Kind.DATA, 0 if where == "first" else 1) + frame(1))
    if where == "first":
        session.keep([large])
        session.handed_over(0)
    assert left.send(2)
    if where == "last":
        session.keep([large])
        session.handed_over(1)
    right.post(Kind.ACKNOWLEDGE, 0, 2)
    left.wire.receive(left.raw, -1, session)
    assert len(left.raw) == 1
    assert len(session._kept) == 2
    assert session.let_go(2) is large
    assert session.let_go(2) is None
    assert not session._kept


def test_all_that_was_acknowledged_goes_what_lies_between_small_ones_too(sides):
    """Else nobody would say so again, and who waits for the room would wait for ever.

    But not among what nobody interrupts: who lets go of a frame of pyzmq's lets go of the GIL, and looks for signals.
    """
    left, right = sides
    session = left.session
    assert left.send(0)
    for number in (1, 2, 3):
        session.keep([bytearray(session.prefix(Kind.DATA, number) + frame(number))])
        session.handed_over(number)
    assert left.send(4)
    right.post(Kind.ACKNOWLEDGE, 0, 5)
    assert left.wire.receive(left.raw, -1, session) is False
    assert [number for number, _, _, _ in session._kept] == [1, 2, 3, 4]
    assert session.feed(left.raw.popleft()) == (Kind.ACKNOWLEDGE, False, True)
    assert not session._kept
    assert session._acknowledged == session.messages == 5


def test_memory_of_what_may_still_be_on_its_way_is_not_used_again(sides, sockets):
    """The other end may ask twice: a signal's handler can keep it from noting that it has asked."""
    session = sides[0].session

    def send(number, fill):
        data = np.full(100_000, fill, "u1")
        data[:PREFIX_BYTES] = np.frombuffer(PREFIX.pack(Kind.DATA, number, 0), "u1")
        part = session.spare(data.nbytes) or zmq.Frame(memoryview(data), copy=True)
        np.frombuffer(part, "u1")[:] = data
        session.keep([part])

    def hand_over():
        for number, part in session.to_hand_over():
            sockets[0].send(part, copy=False)
            session.handed_over(number)

    send(0, 7)
    hand_over()
    for _ in range(2):
        session.feed(PREFIX.pack(Kind.REPEAT, 0, 0))
        hand_over()
    session.feed(PREFIX.pack(Kind.ACKNOWLEDGE, 0, 1))
    send(1, 8)
    assert session.counts.resent == 2
    for _ in range(3):
        assert sockets[1].recv()[PREFIX_BYTES:] == bytes([7]) * (100_000 - PREFIX_BYTES)
    hand_over()
    session.feed(PREFIX.pack(Kind.ACKNOWLEDGE, 0, 2))
    assert session.spare(100_000) is not None


def test_acknowledgements_of_what_was_never_sent_do_no_harm(sides):
    left, right = sides
    assert left.send(1)
    right.post(Kind.ACKNOWLEDGE, 0, (1 << 64) - 1)
    left.take()
    assert not left.session._kept
    assert left.session.next_number == 1
    assert left.send(2)
    left.armed.add(left)
    for taken in ((1 << 63) - 1, 1 << 63, (1 << 64) - 1):  # the long way
        left.session.keep([left.session.prefix(Kind.DATA, left.session.next_number)])
        right.post(Kind.ACKNOWLEDGE, 0, taken)
        left.wire.receive(left.raw, -1, left.session)
        assert left.session.feed(left.raw.popleft()) == (Kind.ACKNOWLEDGE, False, True)
        assert not left.session.outstanding
    assert left.session.let_go(-(1 << 64)) is None


# --- wires and parts --------------------------------------------------------------------------------


def test_a_part_is_a_writable_buffer(sides, sockets):
    sockets[0].send(b"hello")
    raw = deque()
    assert sides[1].wire.receive(raw, 1, None) is True
    assert sides[1].wire.receive(raw, 1, None) is False
    (part,) = raw
    assert (len(part), bytes(part), part.more, part.source) == (5, b"hello", False, -1)
    memoryview(part)[0] = ord("j")
    assert bytes(part) == b"jello"


def test_a_closed_wire_says_so(sides):
    sides[0].wire.close()
    with pytest.raises(OSError, match="socket"):
        sides[0].wire.receive(deque(), -1, None)


def test_wrong_arguments_are_refused(sides):
    session, wire = sides[0].session, sides[0].wire
    for call in (
        lambda: session.send_small(1),
        lambda: session.send_small(1, "now"),
        lambda: session.take_small(()),
        lambda: session.let_go("all"),
        lambda: session.use(wire),
        lambda: wire.receive(deque()),
        lambda: wire.receive(deque(), 1, 5),
        lambda: Wire("socket"),
        lambda: connect_zeromq(1),
        type(next(iter(_parts(sides)))),
    ):
        with pytest.raises(TypeError):
            call()


def _parts(sides):
    sides[0].socket.send(b"x")
    raw = deque()
    sides[1].wire.receive(raw, 1, None)
    return raw


def test_numbers_below_nought_are_early(sides):
    assert sides[0].send(1)
    assert sides[0].session.let_go(-1) is None
    assert not sides[0].session.send_small(1, -1)


def test_parts_that_are_none_wait_for_the_long_way(sides):
    left, right = sides
    left.socket.send(b"short")
    right.wire.receive(right.raw, -1, right.session)
    assert bytes(right.raw.popleft()) == b"short"
    no_peer(right)
    left.post(Kind.ACKNOWLEDGE, 0)
    right.wire.receive(right.raw, -1, right.session)
    assert len(right.raw) == 1
    left.post(Kind.ACKNOWLEDGE, 0)
    right.wire.receive(right.raw, -1, right.session)
    assert len(right.raw) == 2


def test_a_session_before_its_use_lets_nothing_go(sides):
    session = Session(b"k" * 16, Counts(), WINDOW)
    session.peer = b""
    session.keep([session.prefix(Kind.DATA, 0)])
    session._handed_over = 1
    sides[0].post(Kind.ACKNOWLEDGE, 0, 1)
    sides[1].wire.receive(sides[1].raw, -1, session)
    assert len(session._kept) == len(sides[1].raw) == 1


def test_a_lock_that_is_none_is_locked(sides):
    side = sides[0]
    side.session.use(
        *(side.wire, None, side.armed, side.raw, side.hub, np.ndarray, beginning_of, encode_small, {0: 0}),
        *(decode_small, UNKNOWN, aligned_empty, False, True, True, SMALL_BYTES, 100),
    )
    assert side.take() == []


def test_a_pyzmq_that_hides_what_is_needed_is_an_import_error(monkeypatch):
    monkeypatch.setattr(zeromq, "_FUNCTIONS", ("zmq_no_such_function",))
    with pytest.raises(ImportError, match="zmq_no_such_function"):
        zeromq._connect()


def test_a_raw_that_takes_nothing_is_an_error(sides):
    sides[0].socket.send(b"x")
    with pytest.raises(AttributeError):
        sides[1].wire.receive((), 1, None)


def test_a_stream_before_its_use_goes_no_short_way():
    stream = Stream()
    assert not stream.send_small(1, 0)
    assert not stream.take_small([])
    assert stream.let_go(5) is None


def test_a_stream_in_a_cycle_is_collected(sides):
    alive = weakref.ref(sides[0].session)
    sides[0].session.owner = sides[0]
    sides.clear()
    gc.collect()
    assert alive() is None


# --- what is lent --------------------------------------------------------------------------------------


@pytest.fixture
def lending(sides):
    """Two sides, of which the left one lends."""
    lend(*sides, 4 * LARGE)
    yield sides
    for side in sides:
        side.session.end_loans()
        side.session._inbox.clear()


def lend(left, right, nbytes):
    lender = Lender(nbytes)
    borrower = loans.accept(os.getpid(), lender.offer)
    assert borrower is not None
    left.session._lender, left.session.lends = lender, True
    left.session.lend_from(lender, lender.address, lender.loan_address)
    right.session._borrowed = borrower
    right.session.borrow_from(borrower, borrower.address)
    left.session.lent_pace = right.session._look_at = 1 << 40


def waits(side):
    """Let what has come be taken in; return the kinds of the parts that wait for `take`."""
    side.wire.receive(side.raw, -1, side.session)
    assert not side.raw
    return [type(part).__name__ for _, _, part in side.session._inbox]


@pytest.mark.parametrize("checks_all", [False, True])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(512.0),
        np.arange(20_000, dtype=">i4").reshape(2, 50, 200),
        np.arange(LARGE // 2, dtype="u1"),
        np.arange(1024).astype("M8[s]"),
    ],
    ids=lambda array: f"{array.dtype}-{array.shape}",
)
def test_an_array_is_lent(sockets, array, checks_all):
    left, right = Side(sockets[0], checks_all=checks_all), Side(sockets[1], checks_all=checks_all)
    lend(left, right, 4 * LARGE)
    short = not checks_all or array.nbytes < CHECKED
    for number in range(5):
        assert left.send(array.copy()) is short
        if not short:
            return
        assert waits(right) == ["Borrowed"]
        assert right.session._waiting >= array.nbytes
        [got] = right.take()
        assert same(got, array)
        assert got.flags.writeable
        assert got.flags.aligned
        got[:] = array[::-1]  # it is the receiver's own
        assert right.expected[0] == number + 1
    assert left.session.quick_sent == right.session.quick_received == 5
    assert left.session.quick_sent_bytes == right.session.quick_received_bytes > 5 * array.nbytes


@pytest.mark.parametrize(
    ("array", "goes"),
    [
        (np.zeros(LENT_BYTES - 1, "u1"), True),
        (np.zeros(LENT_BYTES // 2, "u2")[::2], True),
        (np.zeros((1,) * 5 + (LENT_BYTES,), "u1"), True),
        (np.zeros((64, 128)).T, False),
        (np.zeros(LENT_BYTES, [("a", "u1")]), False),
        (np.zeros(LARGE + 1, "u1"), False),
        (np.zeros(LENT_BYTES, object), False),
    ],
    ids=["short", "not contiguous", "many dimensions", "transposed", "with names", "large", "objects"],
)
def test_what_is_not_lent_travels(lending, array, goes):
    """In the short way, if it is small and simple."""
    left, right = lending
    goes = goes and array.flags.c_contiguous
    assert left.send(array) is goes
    assert waits(right) == ["Part"] * goes


def test_arrays_travel_where_there_is_no_room_for_them(lending):
    """In order with the others; and those that are too large for that wait."""
    left, right = lending
    left.session.pace = 1 << 40
    sizes = [LARGE - 4096, 40_000, LARGE // 2, 5_000]
    sent = [np.full(sizes[number % 4], number % 251, "u1") for number in range(40)]
    kinds, got, number, waited = set(), [], 0, 0
    while len(got) < len(sent):
        while number < len(sent) and left.send(sent[number]):
            number += 1
        waited += number < len(sent)
        assert sent[min(number, 39)].nbytes > SMALL_BYTES or number == 40
        kinds.update(waits(right))
        got += right.take()
    assert waited > 5
    assert kinds == {"Borrowed", "Part"}
    assert all(map(same, got, sent))


def test_as_many_loans_as_there_can_be(lending):
    left, right = lending
    left.session.pace = 1 << 40
    array = np.arange(LENT_BYTES, dtype="u1")
    for _ in range(3):
        for number in range(LOANS + 96):
            array[0] = number % 251
            assert left.send(array)
        assert waits(right) == ["Borrowed"] * LOANS + ["Part"] * 96
        for number in range(LOANS + 96):
            assert right.take()[0][0] == number % 251


def sent_at_once(side):
    """How many arrays of 4,500 bytes go, while nobody takes any."""
    return next(number for number in itertools.count() if not side.send(np.zeros(4_500, "u1")))


def test_nothing_is_lent_beyond_the_pace_of_that(lending):
    left, right = lending
    left.session.lent_pace = 4 * 5_000
    assert sent_at_once(left) == 4
    assert waits(right) == ["Borrowed"] * 4


def test_who_sends_looks_what_was_acknowledged_before_he_waits(lending):
    left, right = lending
    left.session.lent_pace = 4 * 5_000
    for number in range(50):
        assert left.send(np.full(4_500, number, "u1"))
        assert right.take()[0][0] == number
        right.post(Kind.ACKNOWLEDGE, 0, number + 1)
    assert left.session.next_number == 50


def test_memory_is_offered_before_an_array_travels(sides):
    left, right = sides
    left.session.offered = False
    assert left.send(np.zeros(LENT_BYTES - 1, "u1"))
    assert not left.send(np.zeros(LENT_BYTES, "u1"))
    left.session.offered = True
    assert left.send(np.zeros(LENT_BYTES, "u1"))
    assert waits(right) == ["Part"] * 2


@pytest.mark.parametrize("every", [2, LOANS + 1])
def test_what_is_lent_in_either_way_is_given_back_once(lending, every):
    """The long way takes back what it has lent and a handler of a signal has kept from being sent, and nothing else."""
    left, right = lending
    session = left.session
    nbytes = LARGE // 4
    assert session.lend(0, [bytes(nbytes)], nbytes) is not None  # and there the handler raises
    assert not left.send(np.zeros(nbytes, "u1"))
    for number in range(2000):
        if number % every:
            assert left.send(np.zeros(nbytes, "u1"))
        else:
            part = session.lend(number, [bytes(nbytes)], nbytes)
            assert part is not None
            session.keep([part])
            session.handed_over(number)
            left.socket.send(part.reference)
        assert waits(right) == ["Borrowed"]
        assert right.session.next_message() is not None
        right.session.take()
        right.post(Kind.ACKNOWLEDGE, 0, number + 1)
        left.wire.receive(left.raw, -1, session)
        while left.raw:
            session.feed(left.raw.popleft())


@pytest.mark.parametrize(
    "change",
    [
        lambda array: array.resize(10, refcheck=False),
        lambda array: setattr(array, "shape", (30, 10)),
        lambda array: setattr(array, "shape", (300,)),
        lambda array: setattr(array, "dtype", "i8"),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting the shape:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Setting the dtype:DeprecationWarning")
def test_an_array_that_somebody_changes_meanwhile_is_no_pattern_for_others(sockets, change):
    def begin(array):
        beginning = beginning_of(array)
        if armed:
            armed.pop()
            change(array)
        return beginning

    left, right = Side(sockets[0], begin=begin), Side(sockets[1])
    for others in (np.arange(10.0), np.arange(300.0).reshape(30, 10), np.arange(300.0), np.arange(300)):
        armed = [True]
        assert left.send(np.arange(300.0).reshape(10, 30).copy()) in (True, False)
        for _ in range(2):
            assert left.send(others)
        got = []
        while more := right.take():
            got += more
        assert same(got[-1], others)
        assert same(got[-2], others)


@pytest.mark.parametrize(
    "beginning",
    [None, b"x" * 10, b"x" * 100, bytearray(100), frame(np.zeros(300)), b"x" * 2000],
    ids=["none", "short", "rubbish", "no bytes", "another length", "long"],
)
def test_a_beginning_that_does_not_suit_is_none(sockets, beginning):
    left = Side(sockets[0], begin=lambda array: beginning)
    assert left.send(np.arange(4.0)), "as a whole frame, of the encoder"
    assert same(decode(np.frombuffer(bytearray(sockets[1].recv()[PREFIX_BYTES:]), np.uint8)), np.arange(4.0))


def test_an_error_of_who_begins_is_the_senders(sockets):
    def broken(array):
        raise ValueError("no")

    left = Side(sockets[0], begin=broken)
    with pytest.raises(ValueError, match="no"):
        left.send(np.arange(4.0))
    assert not left.session._kept


def test_compressed_sessions_lend_no_arrays_as_they_are(sockets):
    left, right = Side(sockets[0], as_is=False), Side(sockets[1])
    lend(left, right, 4 * LARGE)
    assert left.send(np.zeros(LENT_BYTES, "u1"))
    assert waits(right) == ["Part"]
    assert not left.send(np.zeros(SMALL_BYTES + 1, "u1"))


def test_a_peer_with_a_name_borrows_too():
    with named() as (router, dealer):
        left, right = Side(router), Side(dealer)
        named_peer(left)
        lend(left, right, LARGE)
        left.session.keep([left.session.prefix(Kind.DATA, 0) + frame(0)])
        left.session.handed_over(0)
        right.session.received = right.session._taken = right.expected[0] = 1
        array = np.arange(LENT_BYTES)
        assert left.send(array)
        assert waits(right) == ["Borrowed"]
        assert same(right.take()[0], array)


def test_the_last_number_that_there_is(sides):
    """Who says so is not believed, but it has to be expected after it."""
    left, right = sides
    for number in (2**63 - 1, 2**63, 2**64 - 1, 2**64):
        right.expected[0] = number
        left.post(Kind.DATA, right.session.received, 0, frame(1, number % 2**64))
        assert right.take() == [1] * (number < 2**64)
        if number == 2**64:
            assert right.session.next_message() is not None


def test_a_reference_to_nothing_is_left_to_the_long_way(lending):
    left, right = lending
    for body in (b"", bytes(23), bytes(24), b"\xff" * 24, bytes(25)):
        left.post(Kind.LOAN, 0, 0, body)
        assert right.take() == []
        assert len(right.raw) == 1
        right.raw.clear()


def test_a_reference_before_any_offer_is_left_to_the_long_way(sides):
    left, right = sides
    left.post(Kind.LOAN, 0, 0, bytes(24))
    assert right.take() == []
    assert len(right.raw) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: b"",
        lambda good: good[:40],
        lambda good: good[:-1],
        lambda good: good[:20] + b"x" + good[21:],
        lambda good: frame(np.arange(LENT_BYTES), 1),
        lambda good: frame([np.arange(LENT_BYTES)]),
        lambda good: frame(b"x" * 100_000),
    ],
    ids=["nothing", "no header", "short", "damaged", "another number", "parts", "a large pickle"],
)
def test_what_is_lent_and_not_sound_is_left_to_the_long_way(lending, damage):
    left, right = lending
    raw = damage(frame(np.arange(LENT_BYTES)))
    lent = left.session.lend(0, [raw], len(raw))
    left.socket.send(lent.reference)
    assert right.take() == []
    assert waits(right) == ["Borrowed"]
    assert right.session.next_message() is not None


@pytest.mark.parametrize("error", [MemoryError, ValueError])
def test_where_there_is_no_memory_for_what_is_lent_the_long_way_says_so(sockets, error):
    def fails(nbytes):
        raise error

    left, right = Side(sockets[0]), Side(sockets[1], make=fails)
    lend(left, right, LARGE)
    assert left.send(np.arange(LENT_BYTES, dtype="u1"))
    assert right.take() == []
    assert waits(right) == ["Borrowed"]


def test_a_handler_that_raises_while_memory_is_made_loses_nothing(sockets):
    def interrupted(nbytes):
        if calls:
            calls.pop()
            raise KeyboardInterrupt
        return aligned_empty(nbytes)

    calls = [1, 2]
    left, right = Side(sockets[0]), Side(sockets[1], make=interrupted)
    lend(left, right, LARGE)
    array = np.arange(LENT_BYTES, dtype="u1")
    assert left.send(array)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            right.take()
    assert same(right.take()[0], array)


@pytest.mark.parametrize("made", [lambda nbytes: bytearray(nbytes - 1), lambda nbytes: None])
def test_memory_that_does_not_suit_is_not_written_to(lending, made):
    left, right = lending
    lent = left.session.lend(0, [b"x" * 5000], 5000)
    borrowed = loans.borrow(right.session._borrowed, PREFIX_BYTES, lent.reference[PREFIX_BYTES:])
    with pytest.raises((ValueError, TypeError)):
        borrowed.copy(made)


def test_another_array_of_many_bytes_has_memory_of_its_own(sides):
    """It is used where ZeroMQ has read it to."""
    left, right = sides
    got = []
    for number in range(10):
        assert left.send(np.full(3_000, number))
        got += right.take()
    assert all((array == number).all() and array.flags.writeable for number, array in enumerate(got))
    got[3][:] = 77
    assert all((array == number).all() for number, array in enumerate(got) if number != 3)


def test_memory_that_a_handler_has_made_meanwhile_is_the_one(lending):
    left, right = lending
    lent = left.session.lend(0, [b"x" * 5000], 5000)
    borrowed = loans.borrow(right.session._borrowed, PREFIX_BYTES, lent.reference[PREFIX_BYTES:])
    made = []

    def make(nbytes):
        made.append(borrowed.copy(aligned_empty))
        return aligned_empty(nbytes)

    assert borrowed.copy(make) is made[0]
    assert bytes(made[0]) == b"x" * 5000


def test_what_is_lent_in_a_file_that_other_code_has_closed_is_an_error():
    lender = Lender(LARGE)
    part = lender.lend(0, bytes(PREFIX_BYTES), [b"x" * 100], 100)
    file = loans.new_file(LARGE)
    unmapped = loans.use(file)
    borrowed = loans.borrow(unmapped, PREFIX_BYTES, part.reference[PREFIX_BYTES:])
    number = file.number
    with open(os.devnull) as other:
        os.dup2(other.fileno(), number)
    with pytest.raises(OSError, match="lent: its file was closed by other code"):
        borrowed.copy(aligned_empty)
    borrowed.give_back()
    os.close(number)


def test_an_array_for_which_nothing_can_be_lent_keeps_to_the_pace_of_others(lending):
    left, right = lending
    nbytes = 4 * LARGE - 4096
    assert left.session.lend(0, [bytes(nbytes)], nbytes) is not None
    left.session._lender.kept()
    left.session.pace = 3 * 5_000
    assert sent_at_once(left) == 3
    assert waits(right) == ["Part"] * 3


def test_a_lent_frame_with_much_to_check_is_left_to_the_long_way(lending):
    left, right = lending
    raw = frame(np.arange(CHECKED, dtype="u1"), checksum=True)
    left.socket.send(left.session.lend(0, [raw], len(raw)).reference)
    assert right.take() == []
    assert waits(right) == ["Borrowed"]


@pytest.mark.parametrize(
    "call",
    [
        lambda side: connect_loans(1),
        lambda side: side.session.lend_from(1),
        lambda side: side.session.borrow_from(1),
        lambda side: loans.Borrowed(1),
    ],
)
def test_what_is_no_argument(sides, call):
    with pytest.raises(TypeError):
        call(sides[0])
