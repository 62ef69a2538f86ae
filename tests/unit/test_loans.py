"""Large messages within a machine lie in memory that is lent: when they do, when they travel, and what is left."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket as sockets
import threading
import time

import numpy as np
import pytest

import shmengine as shm
from shmengine.channels import loans, ports, sessions
from shmengine.channels import socket as socket_module
from shmengine.channels.greetings import Greeting
from shmengine.channels.link import Counts
from shmengine.channels.loans import Borrowed, Lender, Lent
from shmengine.channels.local import process_behind
from shmengine.channels.sessions import PREFIX, PREFIX_BYTES, Kind, Session
from shmengine.errors import Corrupt, PeerLost
from tests.helpers import poll_until, run_script
from tests.helpers.channels import sending
from tests.helpers.limits import message_queues
from tests.helpers.partners import FOREVER

LENDING = ["pipe", "mqueue", "socket"]
LARGE = 1 << 20


@pytest.fixture(autouse=True)
def queues():
    with message_queues():
        yield


@pytest.fixture(params=LENDING)
def ends(request, queues):
    left, right = shm.channel(request.param)
    yield left, right
    left.close()
    right.close()


def block(number, nbytes=LARGE):
    return np.arange(number, number + nbytes // 8)


def maps():
    """The files of loans that this process has mapped."""
    with open("/proc/self/maps") as file:
        return [line for line in file if "shmengine-loans" in line]


def memory_of(descriptor):
    return os.stat(f"/proc/self/fd/{descriptor}").st_blocks * 512


def files():
    """Descriptors of this process, of files of loans."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if "shmengine-loans" in os.readlink(f"/proc/self/fd/{name}"):
                found.append(int(name))
        except FileNotFoundError:
            continue
    return found


def lend_from_now_on(left, right):
    """The ends of a socket know after some messages whether one can open what the other lends."""
    for number in range(1000):
        with sending(left, [block(number)]):
            assert right.receive(FOREVER)[0] == number
        session = getattr(left._link, "_session", None)
        if session is None or session.lends:
            return
        time.sleep(0.01)
    raise AssertionError("nothing is lent")


def lent_bytes():
    return max(map(memory_of, files()), default=0)


# --- what is lent ----------------------------------------------------------------------------------


def test_large_messages_are_lent_and_small_ones_are_not(ends):
    left, right = ends
    for nbytes in (8, 1000, 15_000):
        with sending(left, [block(1, nbytes)]):
            assert np.array_equal(right.receive(FOREVER), block(1, nbytes))
    assert lent_bytes() <= 4096
    lend_from_now_on(left, right)
    left.send(block(7), FOREVER)
    assert lent_bytes() > LARGE
    assert np.array_equal(right.receive(FOREVER), block(7))


def test_what_arrives_is_the_receivers_own(ends):
    left, right = ends
    lend_from_now_on(left, right)
    kept = []
    for number in range(60):
        with sending(left, [block(number)]):
            kept.append(right.receive(FOREVER))
        kept[-1][1] = -number  # and writable
    for number, array in enumerate(kept):
        assert array[0] == number
        assert array[1] == -number
        assert np.array_equal(array[2:], block(number)[2:])


def test_an_array_may_be_changed_when_send_has_returned(ends):
    left, right = ends
    lend_from_now_on(left, right)
    array = block(5)
    left.send(array, FOREVER)
    array[:] = 0
    assert np.array_equal(right.receive(FOREVER), block(5))


@pytest.mark.parametrize("nbytes", [70_000, LARGE, 5 << 20])
def test_more_than_can_be_lent_at_once(ends, nbytes):
    """The rest travels, in its place between the others."""
    left, right = ends
    lend_from_now_on(left, right)
    count = (160 << 20) // nbytes
    with sending(left, (block(number, nbytes) for number in range(count))):
        time.sleep(0.3)  # until there is no more room
        for number in range(count):
            array = right.receive(FOREVER)
            assert array[0] == number
            assert array[-1] == number + nbytes // 8 - 1
    assert left.stats().messages_sent == right.stats().messages_received


@pytest.mark.parametrize("mechanism", LENDING)
def test_a_message_larger_than_all_that_can_be_lent(mechanism):
    left, right = shm.channel(mechanism, buffer_bytes="1 MiB")
    with left, right:
        for number in range(3):
            with sending(left, [block(number, 3 << 20), block(number, 100_000)]):
                assert np.array_equal(right.receive(FOREVER), block(number, 3 << 20))
                assert np.array_equal(right.receive(FOREVER), block(number, 100_000))


def test_priorities_overtake_what_is_lent():
    left, right = shm.channel("mqueue")
    with left, right:
        for priority in (0, 3, 1, 3):
            left.send(block(priority), priority=priority)
        assert [right.receive(FOREVER)[0] for _ in range(4)] == [3, 3, 1, 0]


def test_both_directions_at_once(ends):
    left, right = ends

    def talk(end, first):
        with sending(end, (block(first + number) for number in range(100))):
            found.append([end.receive(FOREVER)[0] for _ in range(100)])

    found: list[list[int]] = []
    threads = [threading.Thread(target=talk, args=args) for args in ((left, 0), (right, 1000))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [list(range(100)), list(range(1000, 1100))]


@pytest.mark.parametrize("check", ["frame", "payload"])
@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("mechanism", LENDING)
def test_checks_and_compression_are_of_what_is_lent(check, compression, mechanism):
    left, right = shm.channel(mechanism, check=check, compression=compression)
    with left, right:
        obj = {"one": block(3), "two": [b"x" * 100_000, np.random.default_rng(1).random(100_000)]}
        for _ in range(5):
            with sending(left, [obj]):
                got = right.receive(FOREVER)
            assert np.array_equal(got["one"], obj["one"])
            assert got["two"][0] == obj["two"][0]
            assert np.array_equal(got["two"][1], obj["two"][1])


class Interrupted(BaseException):
    """As KeyboardInterrupt."""


@pytest.mark.parametrize("mechanism", LENDING)
def test_a_receive_that_is_interrupted_time_and_again_ends(mechanism):
    """Also if what is lent takes longer to copy than from one signal to the next."""
    large = 48 << 20
    left, right = shm.channel(mechanism)
    with left, right:
        lend_from_now_on(left, right)
        left.send(block(5, large), FOREVER)

        def handle(number, frame):
            raise Interrupted

        before = signal.signal(signal.SIGALRM, handle)
        array = None
        try:
            while array is None:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.001)
                    array = right.receive(FOREVER)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except Interrupted:
                    pass
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert np.array_equal(array, block(5, large))


# --- other processes -------------------------------------------------------------------------------


def send_blocks(end, count):
    for number in range(count):
        end.send(block(number), FOREVER)
    end.receive(FOREVER)  # who waits until all was taken is not one who dies before
    end.close()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_another_process_lends(ends, start):
    left, right = ends
    count = 150  # more than a socket keeps before it is connected, and has made its offer
    child = multiprocessing.get_context(start).Process(target=send_blocks, args=(right, count))
    child.start()
    right.close()
    for number in range(count):
        assert np.array_equal(left.receive(FOREVER), block(number))
    if hasattr(left._link, "_session"):
        assert left._link._session._borrowed is not None
    left.send("done")
    child.join()


def send_and_sleep(end, count):
    for number in range(count):
        end.send(block(number), FOREVER)
    time.sleep(1000)


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("mechanism", ["pipe", "mqueue"])
def test_what_was_lent_outlives_its_sender(mechanism, start):
    left, right = shm.channel(mechanism)
    child = multiprocessing.get_context(start).Process(target=send_and_sleep, args=(right, 8))
    child.start()
    right.close()
    assert np.array_equal(left.receive(FOREVER), block(0))
    poll_until(lambda: child_sleeps(child.pid))
    child.kill()
    child.join()
    for number in range(1, 8):
        assert np.array_equal(left.receive(FOREVER), block(number))
    with pytest.raises(PeerLost):
        left.receive(FOREVER)
    left.close()


def child_sleeps(pid):
    with open(f"/proc/{pid}/wchan") as file:
        return "nanosleep" in file.read()


def test_a_program_that_connects_lends_and_borrows(tmp_path):
    with shm.listen(f"ipc://{tmp_path}/s") as server:
        script = f"""
        import numpy as np, shmengine as shm
        end = shm.connect({server.address!r}, timeout=20)
        for array in end:
            end.send(array + 1)
        """
        thread = threading.Thread(target=run_script, args=(script,), kwargs={"check": True})
        thread.start()
        with server.accept(20) as end:
            for number in range(30):
                end.send(block(number), FOREVER)
                assert np.array_equal(end.receive(FOREVER), block(number) + 1)
            session = end._link._session
            assert session.lends
            assert session._borrowed is not None
        thread.join()


# --- where that cannot be done -----------------------------------------------------------------------


def test_who_cannot_open_what_is_offered_is_sent_the_bytes(monkeypatch):
    monkeypatch.setattr(sessions, "accept", lambda pid, offer: None)
    left, right = shm.channel("socket")
    with left, right:
        for number in range(20):
            with sending(left, [block(number)]):
                assert np.array_equal(right.receive(FOREVER), block(number))
        assert not left._link._session.lends
        assert left._link._session._lender is None
        assert not files()


def test_where_no_file_can_be_made_all_travels(monkeypatch):
    real = loans.lib
    monkeypatch.setattr(loans, "lib", WithoutFiles(real))
    for mechanism in LENDING:
        left, right = shm.channel(mechanism)
        with left, right:
            for number in range(5):
                with sending(left, [block(number)]):
                    assert np.array_equal(right.receive(FOREVER), block(number))
            assert not files()


class WithoutFiles:
    def __init__(self, lib):
        self._lib = lib

    def __getattr__(self, name):
        return getattr(self._lib, name)

    def shmr_loans_file(self, nbytes):
        return -1

    def shmr_loans_make(self, handle, nbytes):
        return 0


def test_over_tcp_nothing_is_offered():
    with shm.listen("tcp://127.0.0.1:0") as server:
        mine = shm.connect(server.address, timeout=20)
        with mine, server.accept(20) as theirs:
            with sending(mine, [block(1)] * 5):
                for _ in range(5):
                    assert np.array_equal(theirs.receive(FOREVER), block(1))
            assert mine._link._session._lender is None


def test_a_connection_that_breaks_again_and_again_loses_and_doubles_nothing():
    left, right = shm.channel("socket")
    with left, right:
        lend_from_now_on(left, right)
        count, breaks = 400, 0
        with sending(left, (block(number) for number in range(count))):
            for number in range(count):
                assert np.array_equal(right.receive(FOREVER), block(number))
                if number % 20 == 0:
                    try:
                        with sockets.fromfd(right._link._session.fd, sockets.AF_UNIX, 0) as connection:
                            connection.shutdown(sockets.SHUT_RDWR)
                            breaks += 1
                    except OSError:  # there is none at this moment
                        pass
        assert breaks > 5
        assert right.stats().reconnects + left.stats().reconnects > 0
        assert right.stats().gaps == 0


def test_who_closes_whatever_it_finds(ends):
    """Then no more memory can be had than there is: what finds no room travels."""
    left, right = ends
    lend_from_now_on(left, right)
    mine = files()
    kept = [os.dup(fd) for fd in mine]
    for fd in mine:
        os.close(fd)
    try:
        with sending(left, (block(number, 3 << 20) for number in range(30))):
            time.sleep(0.1)
            for number in range(30):
                assert np.array_equal(right.receive(FOREVER), block(number, 3 << 20))
    finally:
        for fd, copy in zip(mine, kept, strict=True):
            os.dup2(copy, fd)
            os.close(copy)


@pytest.mark.parametrize("mechanism", LENDING)
def test_more_room_than_there_can_be(mechanism):
    left, right = shm.channel(mechanism, buffer_bytes="100 TiB")
    with left, right:
        for number in range(5):
            with sending(left, [number, block(number)]):
                assert right.receive(FOREVER) == number
                assert np.array_equal(right.receive(FOREVER), block(number))


def test_a_message_for_which_a_receiver_has_no_memory_is_dropped(monkeypatch):
    left, right = shm.channel("socket")
    with left, right:
        lend_from_now_on(left, right)
        with monkeypatch.context() as patch:
            patch.setattr(socket_module, "aligned_empty", no_memory)
            left.send(block(1, 2 * LARGE), FOREVER)
            with pytest.raises(MemoryError, match="dropped"):
                right.receive(FOREVER)
        left.send(block(2), FOREVER)
        assert right.receive(FOREVER)[0] == 2


def no_memory(nbytes):
    raise MemoryError


def test_offers_over_tcp_are_not_looked_at():
    with shm.listen("tcp://127.0.0.1:0") as server:
        mine = shm.connect(server.address, timeout=20)
        with mine, server.accept(20) as theirs:
            lender, _ = make_lender()
            session = mine._link._session
            with mine._link._port.lock:
                mine._link._port.post(session.peer, session.prefix(Kind.OFFER) + lender.offer)
            mine.send("after")
            assert theirs.receive(FOREVER) == "after"
            assert theirs._link._session._borrowed is None


# --- what is left ------------------------------------------------------------------------------------


def test_nothing_stays_when_both_ends_are_closed(ends):
    left, right = ends
    lend_from_now_on(left, right)
    assert maps()
    left.close()
    right.close()
    poll_until(lambda: not files())
    del left, right, ends
    poll_until(lambda: not maps())


def test_an_idle_socket_keeps_no_memory():
    left, right = shm.channel("socket")
    with left, right:
        lend_from_now_on(left, right)
        left.send(block(1), FOREVER)
        assert lent_bytes() > LARGE
        assert np.array_equal(right.receive(FOREVER), block(1))
        poll_until(lambda: lent_bytes() <= 4096)
        with sending(left, [block(3)]):
            assert np.array_equal(right.receive(FOREVER), block(3))


def test_a_port_rests_under_its_lock(monkeypatch):
    """Else somebody would lend, meanwhile, what is taken away."""
    rested = threading.Event()
    rest = ports.Port.rest

    def look(port):
        assert not port.lock.acquire(blocking=False)
        rest(port)
        rested.set()

    monkeypatch.setattr(ports.Port, "rest", look)
    left, right = shm.channel("socket")
    with left, right:
        with sending(left, [block(1)]):
            right.receive(FOREVER)
        assert rested.wait(FOREVER)


@pytest.mark.parametrize("mechanism", LENDING)
def test_a_program_ends_while_a_thread_sends(mechanism):
    script = f"""
    import threading, time
    import numpy as np, shmengine as shm
    left, right = shm.channel({mechanism!r}, buffer_bytes="1 GiB")
    array = np.ones(600 << 17)
    threading.Thread(target=left.send, args=(array,), daemon=True).start()
    time.sleep(0.1)
    """
    for _ in range(3):
        assert run_script(script).returncode == 0


def test_a_forked_child_keeps_no_memory_of_closed_ends():
    for mechanism in LENDING:
        left, right = shm.channel(mechanism)
        lend_from_now_on(left, right)
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,))
        child.start()
        try:
            left.close()
            right.close()
            del left, right
            poll_until(lambda: not files())

            def kept(pid=child.pid):
                sizes = []
                for name in os.listdir(f"/proc/{pid}/fd"):
                    path = f"/proc/{pid}/fd/{name}"
                    with contextlib.suppress(
                        FileNotFoundError
                    ):  # it is only just starting, and closes others
                        if "shmengine-loans" in os.readlink(path):
                            sizes.append(os.stat(path).st_blocks * 512)
                assert sizes, "the child has copies of the descriptors"
                return max(sizes)

            poll_until(lambda: kept() <= 4096)
        finally:
            child.kill()
            child.join()


@pytest.mark.parametrize("mechanism", LENDING)
def test_a_forked_child_that_ends_takes_nothing_away(mechanism):
    left, right = shm.channel(mechanism)
    with left, right:
        lend_from_now_on(left, right)
        with sending(left, [block(7)]):
            assert right.receive(FOREVER)[0] == 7
        child = multiprocessing.get_context("fork").Process(target=collect, args=())
        left.send(block(8), FOREVER)
        child.start()
        child.join()
        assert child.exitcode == 0
        assert np.array_equal(right.receive(FOREVER), block(8))


def collect():
    import gc

    for obj in gc.get_objects():
        if isinstance(obj, shm.channels.end.End):
            obj.__dict__.clear()
    gc.collect()


# --- the pieces --------------------------------------------------------------------------------------


def make_lender(nbytes=4 * LARGE):
    lender = Lender(nbytes)
    borrower = loans.accept(os.getpid(), lender.offer)
    assert borrower is not None
    return lender, borrower


def copy_of(borrower, part):
    borrowed = loans.borrow(borrower, PREFIX_BYTES, part.reference[PREFIX_BYTES:])
    target = borrowed.copy(lambda nbytes: np.empty(nbytes, np.uint8))
    assert borrowed.copy(no_memory) is target  # it is made once
    return borrowed, target


def test_a_part_is_as_long_as_what_it_stands_for():
    lender, borrower = make_lender()
    part = lender.lend(3, bytes(PREFIX_BYTES), [b"abc", memoryview(b"defg")], 7)
    assert len(part) == PREFIX_BYTES + 7
    assert part.number == 3
    borrowed, target = copy_of(borrower, part)
    assert len(borrowed) == len(part)
    assert bytes(target) == b"abcdefg"


def test_the_last_loan_can_be_taken_back():
    lender, borrower = make_lender(LARGE)
    assert lender.last is None
    lender.take_back()  # nothing
    for _ in range(600):  # more than there can be at once
        assert lender.lend(1, b"", [bytes(LARGE)], LARGE) is not None
        lender.take_back()
        lender.take_back()
    part = lender.lend(2, b"", [b"x" * 10], 10)
    assert lender.last is part
    borrowed, target = copy_of(borrower, Lent(2, 10, 0, bytes(PREFIX_BYTES) + part.reference))
    assert bytes(target) == b"x" * 10
    borrowed.give_back()
    assert lender.lend(3, b"", [bytes(LARGE)], LARGE) is not None
    assert lender.lend(4, b"", [b"y"], 1) is None
    assert lender.last is not None


@pytest.mark.parametrize("offer", [b"", b"x" * 20, b"\xff" * 20, b"x" * 21])
def test_offers_that_make_no_sense(offer):
    assert loans.accept(os.getpid(), offer) is None


@pytest.mark.parametrize("pid", [-1, 0, 1 << 22])
def test_offers_of_nobody(pid):
    lender, _ = make_lender()
    assert loans.accept(pid, lender.offer) is None


@pytest.mark.parametrize("reference", [b"", bytes(23), bytes(24), b"\xff" * 24, bytes(25)])
def test_references_that_make_no_sense(reference):
    _, borrower = make_lender()
    with pytest.raises(Corrupt, match="memory that"):
        loans.borrow(borrower, 0, reference)


def test_the_process_behind_a_connection():
    left, right = sockets.socketpair()
    with left, right:
        assert process_behind(left.fileno()) == os.getpid()
    with open(os.devnull) as file:
        assert process_behind(file.fileno()) == -1
    assert process_behind(-1) == -1


def part(kind, number, body=b""):
    return PREFIX.pack(kind, number, 0) + body


def connected_session():
    session = Session(b"k" * 16, Counts(), LARGE)
    greeting = Greeting(b"k" * 16, b"n" * 16, b"p" * 32, LARGE, "other")
    session.connected(b"", part(Kind.WELCOME, 0), greeting)
    return session


@pytest.mark.parametrize("opened", [False, True])
def test_a_session_that_is_sent_nonsense_is_refused(opened):
    session = connected_session()
    if opened:
        lender, _ = make_lender()
        session.borrow(part(Kind.OFFER, 0, lender.offer), os.getpid())
    session.feed(part(Kind.LOAN, 0, b"\xff" * 24))
    assert "makes no sense" in session.refusal
    assert session.counts.corrupt == 1
    assert session.next_message() is None


def test_the_answer_to_an_offer_says_whether_it_could_be_opened():
    session = connected_session()
    assert session.borrow(part(Kind.OFFER, 0, b"rubbish"), os.getpid())[:16] == part(Kind.BORROWS, 0)[:16]
    lender, _ = make_lender()
    assert session.borrow(part(Kind.OFFER, 0, lender.offer), os.getpid())[:16] == part(Kind.BORROWS, 1)[:16]


def lend(session, number=None, nbytes=70_000):
    return session.lend(session.next_number if number is None else number, [bytes(nbytes)], nbytes)


def test_a_session_lends_once_the_other_end_has_it():
    session = connected_session()
    assert lend(session) is None
    session.feed(part(Kind.BORROWS, 1))  # of what nobody has offered
    assert not session.lends
    assert session.offer() is not None
    assert lend(session) is None
    session.feed(part(Kind.BORROWS, 0))
    assert session._lender is None
    session.offered = True
    session.connected(b"", part(Kind.WELCOME, 0), Greeting(b"k" * 16, b"n" * 16, b"p" * 32, LARGE, "other"))
    assert not session.offered  # the answer may be lost, or another one this time
    assert session.offer() is not None
    session.feed(part(Kind.BORROWS, 1))
    assert lend(session) is not None
    session.feed(part(Kind.BORROWS, 0))  # it has it, whatever it says
    assert lend(session, nbytes=100) is not None


@pytest.mark.parametrize("step", ["__len__", "give_back"])
@pytest.mark.parametrize("before", [True, False])
def test_what_was_taken_is_given_back_whenever_a_handler_raises(monkeypatch, step, before):
    session = connected_session()
    lender, _ = make_lender(LARGE)
    session.borrow(part(Kind.OFFER, 0, lender.offer), os.getpid())
    for number in range(2):
        nbytes = LARGE // 2
        session.feed(lender.lend(number, part(Kind.LOAN, number), [bytes(nbytes)], nbytes).reference)
    real = getattr(Borrowed, step)

    def raises(borrowed):
        if not before:
            real(borrowed)
        raise KeyboardInterrupt

    assert session.next_message() is not None
    with monkeypatch.context() as patch:
        patch.setattr(Borrowed, step, raises)
        with pytest.raises(KeyboardInterrupt):
            session.take()
    session.take()
    assert session.next_message() is not None
    session.take()
    assert session.next_message() is None
    assert lender.lend(2, b"", [bytes(LARGE)], LARGE) is not None


@pytest.mark.parametrize("after", ["nothing", "small", "large", "lent", "taken"])
def test_what_nobody_has_kept_is_lent_again(after):
    """A handler of a signal may raise between any two steps of a sender."""
    session = connected_session()
    session.offer()
    session.lends = True
    for _ in range(600):  # more than there can be at once
        assert lend(session, nbytes=LARGE // 2 + 1) is not None  # and there the handler raises
        if after == "small":
            session.keep([part(Kind.DATA, session.next_number)])
        elif after == "large":
            session.keep([bytearray(part(Kind.DATA, session.next_number))])
        elif after in ("lent", "taken"):
            lent = lend(session)
            session.keep([lent])
            borrower = loans.accept(os.getpid(), session._lender.offer)
            loans.borrow(borrower, PREFIX_BYTES, lent.reference[PREFIX_BYTES:]).give_back()
        if after == "taken":
            session.feed(PREFIX.pack(Kind.ACKNOWLEDGE, 0, session.next_number))


def test_what_was_kept_is_lent_until_it_is_given_back():
    session = connected_session()
    session.offer()
    session.lends = True
    first = lend(session, nbytes=LARGE // 2 + 1)
    session.keep([first])
    assert lend(session, nbytes=LARGE // 2 + 1) is None
    assert lend(session, nbytes=LARGE // 4) is not None
    session.feed(PREFIX.pack(Kind.ACKNOWLEDGE, 0, 1))  # it has taken that, and says so before it does
    borrower = loans.accept(os.getpid(), session._lender.offer)
    loans.borrow(borrower, PREFIX_BYTES, first.reference[PREFIX_BYTES:]).give_back()
    assert lend(session, nbytes=LARGE // 2 + 1) is not None


def test_pace_allows_for_what_is_lent():
    session = Session(b"k" * 16, Counts(), 64 * LARGE)
    assert session.pace_of(LARGE) == session.pace_of(100) == 8 * LARGE
    session.lends = True
    assert session.pace_of(100) == 8 * LARGE
    assert session.pace_of(LARGE) == 16 * LARGE
    assert session.pace_of(16 * LARGE) == 48 * LARGE
    assert session.pace_of(1 << 40) == 64 * LARGE
