"""What is sent through a channel arrives: all of it, once, in order, as it was; what cannot be sent harms nothing."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import io
import math
import sys
import threading

import numpy as np
import pytest

from shmengine import Closed, SerializationError, WouldBlock, channel
from shmengine.channels import Capabilities, End
from tests.helpers.arrays import DTYPES, LAYOUTS, NO_DTYPES, same, same_bytes
from tests.helpers.channels import FOREVER, drain, is_message, message, number_of, there_and_back, trip

COUNT = 41
NO_PICKLE = [None, True, 3, 2.5, 1j, "text", b"bytes", [1, [2]], (3, "x"), {"a": np.arange(3), 2: None}]
NO_PICKLE += [{"mean": np.arange(5).mean()}, np.str_("text"), [np.datetime64(1, "s")], {10**5000: 10**5000}]


def converse(end, count):
    """Send and receive so many messages, both at once; return the numbers of those that came."""
    sender = threading.Thread(target=lambda: [end.send(message(number), FOREVER) for number in range(count)])
    sender.start()
    got = []
    for _ in range(count):
        obj = end.receive(FOREVER)
        assert is_message(obj)
        got.append(number_of(obj))
    sender.join()
    return got


def test_all_arrive_in_order_in_both_directions_at_once(ends):
    left, right = ends
    job = right.start(converse, COUNT)
    assert converse(left, COUNT) == list(range(COUNT))
    assert job.result() == list(range(COUNT))


OBJECTS = [
    None,
    0,
    2**200,
    math.pi,
    "",
    "tëxt" * 30_000,
    b"",
    b"bytes" * 100_000,
    bytearray(b"xyz"),
    [],
    [1, [2, {"three": (4.5, {6}, frozenset("7"))}]],
    collections.OrderedDict(a=1),
    ValueError("an error"),
    len,
    Capabilities,
    {"array": np.arange(100_000.0), "text": ["a"] * 1000},
    [np.arange(3), np.array(["2020-01-01"], "M8[D]"), np.array([{}, None])],
    np.ma.masked_array([1, 2, 3], [0, 1, 0]),
    np.float32(1.5),
]


def receive_and_rename(end):
    got = end.receive(FOREVER)
    array = got[0] if isinstance(got, list) else got
    names = array.dtype.names
    array.dtype.names = ("mine",)
    return names


def test_whoever_renames_fields_renames_those_of_one_array(ends):
    """NumPy renames them in place, in a dtype that several arrays may have."""
    left, right = ends
    sent = np.zeros(3, [("x", "f8")])
    for number, container in enumerate([lambda array: array, lambda array: [array]] * 2):
        for _ in range(3):
            left.send(container(sent))
            assert right.run(receive_and_rename) == sent.dtype.names
        sent.dtype.names = (f"x{number}",)


def test_any_picklable_object(ends):
    left, right = ends
    for obj in OBJECTS:
        got = there_and_back(left, right, obj)
        assert type(got) is type(obj)
        if isinstance(obj, (ValueError, np.ma.MaskedArray)):
            assert repr(got) == repr(obj)
        else:
            assert same(got, obj) or obj == got


def test_a_function_of_the_script_goes_by_value(ends):
    left, right = ends
    base = 40
    left.send(lambda x: base + x)
    assert right.receive(FOREVER)(2) == 42


@pytest.mark.parametrize("check", ["frame", "payload"])
def test_arrays_of_every_kind_and_layout(make_channel, check):
    left, right = make_channel(check=check)
    for dtype in DTYPES:
        for name, make in LAYOUTS.items():
            array = make(dtype)
            got = there_and_back(left, right, array)
            assert got.dtype == array.dtype
            assert same_bytes(got, array), (dtype, name)


def test_what_no_fast_path_carries(ends):
    left, right = ends
    for dtype in NO_DTYPES:
        array = np.zeros(3, dtype)
        assert there_and_back(left, right, array).tolist() == array.tolist()


@pytest.mark.parametrize("nbytes", [100, 3_000_000])
def test_what_was_sent_may_be_changed(ends, nbytes):
    left, right = ends
    array, many = np.ones(nbytes, "u1"), [np.ones(nbytes, "u1")]
    job = right.start(drain, 2)
    left.send(array, FOREVER)
    array[:] = 2
    left.send(many, FOREVER)
    many[0][:] = 3
    one, (other,) = job.result()
    assert (one == 1).all()
    assert (other == 1).all()


def keep(end):
    kept = []
    for _ in range(40):
        kept.append(end.receive(FOREVER))
        array = end.receive(FOREVER)
        assert array.flags.writeable == end.capabilities.writable
        if array.flags.writeable:
            array[:] = -1
    assert all(is_message(obj, large=False) for obj in kept)
    return [number_of(obj) for obj in kept]


def test_what_was_received_is_the_receivers(ends):
    """It stays what it is while others come, and can be written to unless it lies in shared memory."""
    left, right = ends
    job = right.start(keep)
    for number in range(40):
        left.send(message(number, large=False), FOREVER)
        left.send(np.full(20_000, number), FOREVER)
    assert job.result() == list(range(40))


def test_many_at_once_and_iteration(ends):
    left, right = ends
    assert left.send_many(range(5)) == 5
    assert left.send_many([]) == 0
    assert drain(right, 5) == list(range(5))
    job = right.start(list)
    left.send_many((message(number, large=False) for number in range(50)), FOREVER)
    left.close()
    got = job.result()
    assert [number_of(obj) for obj in got] == list(range(50))
    assert all(is_message(obj, large=False) for obj in got)
    assert list(right) == []


def test_many_up_to_a_timeout(ends):
    left, right = ends
    sent = left.send_many((np.full(5000, number % 128, "u1") for number in range(20_000)), 0.2)
    assert 0 < sent < 20_000
    assert [int(array[0]) for array in drain(right, sent)] == [number % 128 for number in range(sent)]
    assert left.send_many([1, 2], FOREVER) == 2
    assert drain(right, 2) == [1, 2]


def test_stats_add_up(ends):
    left, right = ends
    objects = [message(number) for number in range(30)]
    for obj in objects:
        trip(left, right, obj)
    right.send("back")
    left.receive(FOREVER)
    sent, received = left.stats(), right.stats()
    assert sent.mechanism == left.capabilities.mechanism
    assert (sent.messages_sent, sent.messages_received) == (30, 1)
    assert (received.messages_sent, received.messages_received) == (1, 30)
    assert sent.bytes_sent == received.bytes_received
    assert sent.bytes_received == received.bytes_sent > 0
    payload = sum(len(message(number)) for number in range(0, 30, 4))
    assert sent.bytes_sent > payload
    if sent.mechanism != "shm":
        assert sent.wire_bytes_sent >= sent.bytes_sent
    assert not any(
        (received.gaps, received.duplicates, received.corrupt, received.resent, received.reconnects)
    )
    left.close()
    assert left.stats().messages_sent == 30


# --- one way -------------------------------------------------------------------------------------


def test_one_way(make_channel):
    left, right = make_channel(duplex=False)
    with pytest.raises(io.UnsupportedOperation, match="this end only receives"):
        right.send(1)
    with pytest.raises(io.UnsupportedOperation, match="this end only sends"):
        left.receive(0)
    left.send_many(range(5))
    left.close()
    assert list(right) == list(range(5))


def count_up(end, count):
    return end.send_many(range(count), FOREVER)


def test_one_way_out_of_a_partner(make_channel_here, take):
    left, right = make_channel_here(duplex=False)
    job = take(left).start(count_up, 100)
    assert drain(right, 100) == list(range(100))
    assert job.result() == 100


# --- objects that cannot go ----------------------------------------------------------------------


class Unpicklable:
    def __reduce__(self):
        raise RuntimeError("not me")


class OnlyHere:
    """Pickles, and cannot be unpickled."""

    def __reduce__(self):
        return _refuse, ()


def _refuse():
    raise LookupError("no such thing here")


def test_what_cannot_be_sent_is_an_error_of_send(ends):
    left, right = ends
    left.send(1)
    for obj in (threading.Lock(), [np.ones(3), {"deep": threading.Lock()}], Unpicklable()):
        with pytest.raises(SerializationError):
            left.send(obj)
    with pytest.raises(SerializationError, match="deep"):
        left.send({"deep": threading.Lock()})
    left.send(2)
    assert drain(right, 2) == [1, 2]
    assert left.stats().messages_sent == 2
    assert right.stats().gaps == 0


def test_what_cannot_be_received_is_an_error_of_receive(ends):
    left, right = ends
    left.send_many([1, OnlyHere(), [np.ones(1000), OnlyHere()], 2])
    assert right.receive(FOREVER) == 1
    for _ in range(2):
        with pytest.raises(SerializationError, match="LookupError: no such thing here"):
            right.receive(FOREVER)
    assert right.receive(FOREVER) == 2
    assert right.stats().gaps == right.stats().corrupt == 0
    left.send(3)
    assert right.receive(FOREVER) == 3


class Exits:
    """What a script without a guard may be, when it is imported to unpickle something of it."""

    def __reduce__(self):
        return sys.exit, ("not a module",)


def test_what_ends_the_program_when_it_is_unpickled_is_in_nobodys_way(ends):
    """Twice, because it might as well have been a signal's handler, for which no message is lost."""
    left, right = ends
    left.send_many([1, Exits(), Exits(), 2])
    assert right.receive(FOREVER) == 1
    for _ in range(4):
        with pytest.raises(SystemExit, match="not a module"):
            right.receive(FOREVER)
    assert right.receive(FOREVER) == 2
    assert right.stats().gaps == right.stats().corrupt == 0
    left.send(3)
    assert right.receive(FOREVER) == 3


class Interrupts:
    """What a signal's handler may do, again and again."""

    left = 3

    def __reduce__(self):
        return _interrupt, ()


class Alarmed(BaseException):
    pass


def _interrupt():
    Interrupts.left -= 1
    if Interrupts.left >= 0:
        raise Alarmed
    return "at last"


def three_times(end):
    Interrupts.left = 3


def test_whatever_else_is_raised_keeps_the_message(ends):
    left, right = ends
    right.run(three_times)
    left.send_many([1, Interrupts(), 2])
    assert right.receive(FOREVER) == 1
    for _ in range(3):
        with pytest.raises(Alarmed):
            right.receive(FOREVER)
    assert right.receive(FOREVER) == "at last"
    assert right.receive(FOREVER) == 2
    assert right.stats().gaps == right.stats().corrupt == 0


def iterate(end):
    seen = []
    for array in end:
        seen.append((len(array), int(array[-1])))
        array = None  # or the caller has it
    return seen


def test_a_loop_keeps_nothing_while_it_waits(make_channel):
    """So a message may be larger than half of the buffer."""
    left, right = make_channel(buffer_bytes="16 MiB")
    size = 12 << 20
    job = right.start(iterate)
    for number in range(3):
        left.send(np.full(size, number, "u1"), FOREVER)
    left.close()
    assert job.result() == [(size, 0), (size, 1), (size, 2)]


def iterate_in_a_coroutine(end):
    async def take():
        seen = []
        async for array in end:
            seen.append(int(array[-1]))
            array = None
        return seen

    return asyncio.run(take())


def test_a_coroutines_loop_keeps_nothing_while_it_waits(make_channel):
    left, right = make_channel(buffer_bytes="16 MiB")
    job = right.start(iterate_in_a_coroutine)
    for number in range(3):
        left.send(np.full(12 << 20, number, "u1"), FOREVER)
    left.close()
    assert job.result() == [0, 1, 2]


def test_no_pickles(make_channel):
    left, right = make_channel(allow_pickle=False)
    for obj in NO_PICKLE:
        assert same(there_and_back(left, right, obj), obj)
    for obj in ({1}, ValueError(), len, np.zeros(1, "O"), [bytearray()]):
        with pytest.raises(SerializationError):
            left.send(obj)
        with pytest.raises(SerializationError):
            right.send(obj)
    left.send(np.arange(5))
    assert right.receive(FOREVER).tolist() == [0, 1, 2, 3, 4]


class Loud:
    unpickled = 0

    def __reduce__(self):
        return _count_unpickling, ()


def _count_unpickling():
    Loud.unpickled += 1


def unpickled(end):
    return Loud.unpickled


def test_who_allows_no_pickles_unpickles_none(make_channel):
    """Whatever the other one sends."""
    left, right = make_channel(allow_pickle=False)
    theirs = vars(left._link)  # as if this end were made by somebody else
    name = "options" if "options" in theirs else "_options"
    theirs[name] = dataclasses.replace(theirs[name], allow_pickle=True)
    left.send_many([np.ones(1), Loud(), np.ones(2)])
    assert right.receive(FOREVER).size == 1
    with pytest.raises(SerializationError, match="allow_pickle"):
        right.receive(FOREVER)
    assert right.receive(FOREVER).size == 2
    assert right.run(unpickled) == 0


# --- arguments -----------------------------------------------------------------------------------


def test_priorities(ends):
    left, right = ends
    most = left.capabilities.priorities
    for wrong in (-1, most):
        with pytest.raises(ValueError, match="priorit"):
            left.send(1, priority=wrong)
    with pytest.raises(WouldBlock):
        right.receive(0)
    left.send("low")
    left.send("high", priority=most - 1)
    left.try_send("high, too", priority=most - 1)
    order = ["low", "high", "high, too"] if most == 1 else ["high", "high, too", "low"]
    assert drain(right, 3) == order
    assert right.stats().gaps == 0


@pytest.mark.parametrize("timeout", [-1, math.nan])
def test_impossible_timeouts(ends_here, timeout):
    left, _ = ends_here
    for call in (left.receive, lambda timeout: left.send(1, timeout)):
        with pytest.raises(ValueError, match="timeout must be"):
            call(timeout)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"check": "all"}, "check must be"),
        ({"compression": "gzip"}, "compression must be"),
        ({"buffer_bytes": 0}, "buffer_bytes must be"),
        ({"buffer_bytes": "much"}, "much"),
    ],
)
def test_impossible_options(mechanism, options, said):
    with pytest.raises(ValueError, match=said):
        channel(mechanism, **options)


def test_no_such_mechanism():
    with pytest.raises(ValueError, match="'pipe', 'mqueue', 'shm', 'socket'"):
        channel("pigeon")


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, "shm"),
        ({"message_bytes": "1 KiB"}, "shm"),
        ({"message_bytes": "4 MiB"}, "shm"),
        ({"message_bytes": "5 MiB"}, "pipe"),
        ({"compression": "auto"}, "shm"),
        ({"compression": "lz4"}, "pipe"),
    ],
)
def test_the_best_mechanism(options, chosen):
    left, right = channel(buffer_bytes="8 MiB", **options)
    with left, right:
        assert left.capabilities.mechanism == right.capabilities.mechanism == chosen
        left.send(b"x")
        assert right.receive(FOREVER) == b"x"


def test_what_an_end_says_of_itself(ends, mechanism):
    left, right = ends
    assert isinstance(left, End)
    for end in ends:
        assert end.capabilities.mechanism == mechanism
        assert mechanism in repr(end)
        assert not end.closed
    left.close()
    assert left.closed
    assert "closed" in repr(left)
    assert not right.closed
    with pytest.raises(Closed):
        left.send(1)
