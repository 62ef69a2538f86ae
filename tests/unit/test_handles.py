"""Claims and leases in C (csrc/handles.c): wrong arguments, refusals of the core, memory that runs out."""

from __future__ import annotations

import ctypes
import subprocess
import sysconfig
import uuid
from contextlib import contextmanager

import numpy as np
import pytest

from shmengine._native import ffi, lib
from shmengine._native._handles import End, Layout, Message, connect
from shmengine._native.status import FORKED, STALE, WOULD_BLOCK
from shmengine.arrays import address_of
from shmengine.errors import Closed, Corrupt, LeaseError
from shmengine.ring import Ring
from tests.helpers.memory import assert_memory_is_whole
from tests.helpers.scripts import ROOT

CALLS = ("claim", "announce", "commit", "abort", "lease", "release", "send", "check_payload")


@pytest.fixture
def ring():
    with Ring(4, "8 MiB") as made:
        yield made


@contextmanager
def core_with(**replaced):
    """Let claims and leases call these instead of the core's functions."""
    own = {name: int(ffi.cast("uintptr_t", ffi.addressof(lib, f"shmr_{name}"))) for name in CALLS}
    kept = {name: ffi.callback(signature, made) for name, (signature, made) in replaced.items()}
    connect(
        LeaseError, *{**own, **{name: int(ffi.cast("uintptr_t", f)) for name, f in kept.items()}}.values()
    )
    try:
        yield
    finally:
        connect(LeaseError, *own.values())


def refused(name, status):
    """The core does what it is asked to, and says that it does not."""

    def call(handle, block):
        getattr(lib, f"shmr_{name}")(handle, block)
        return status

    return core_with(**{name: ("int(shmr *, shmr_block *)", call)})


# --- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda end: end.claim(3, "u1", None, 4), "at most 3"),
        (lambda end: end.claim(), "needs a shape"),
        (lambda end: end.claim(dtype="u1"), "needs a shape"),
        (lambda end: end.claim(3, shape=3), "second argument 'shape'"),
        (lambda end: end.claim(3, order="C"), "unexpected .* 'order'"),
        (lambda end: end.lease(1, 2), "one argument"),
        (lambda end: end.lease(1, timeout=2), "one argument"),
        (lambda end: end.lease(seconds=2), "one argument"),
        (lambda end: End(), "ring"),
        (lambda end: End(5, 5, 5, False, ()), "weak reference"),
        (lambda end: Layout(1), "shape"),
        (lambda end: connect(LeaseError), "9 arguments"),
    ],
)
def test_wrong_arguments(ring, call, text):
    with pytest.raises(TypeError, match=text):
        call(ring._end)
    assert_memory_is_whole(ring)


def test_keywords(ring):
    ring._end.claim(dtype="u1", timeout=0, shape=3).commit()
    ring._end.lease(timeout=0).release()
    assert_memory_is_whole(ring)


def test_an_end_without_its_ring():
    ring = Ring(4, "8 MiB")
    end, region = ring._end, ring._region
    assert ring.claim.__self__ is end
    del ring
    for call, arguments in ((end.claim, (3,)), (end.lease, ())):
        with pytest.raises(ReferenceError, match="the ring is gone"):
            call(*arguments)
    region.close()


def test_checksums_are_made_slowly():
    with Ring(4, "8 MiB", check="payload") as ring:
        with ring.claim(3) as frame:
            frame[:] = 5
        with ring.lease() as frame:
            assert (frame == 5).all()
        del frame
        assert_memory_is_whole(ring)


def test_exit_without_arguments_commits(ring):
    ring.claim(3).__exit__()
    ring.lease().release()
    assert_memory_is_whole(ring)


# --- the core refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [STALE, FORKED])
def test_an_abort_is_refused(ring, status):
    with refused("abort", status):
        with pytest.raises(LeaseError, match="no longer"):
            ring.claim(3).abort()
        with pytest.raises(LeaseError, match="no longer"), ring.claim(3):
            raise KeyError
        ring.claim(3)  # forgotten: nobody to tell
    assert_memory_is_whole(ring)


def test_a_release_is_refused(ring):
    for value in range(3):
        ring.send([value])
    with refused("release", STALE):
        with pytest.raises(LeaseError, match="no longer"):
            ring.lease().release()
        with pytest.raises(LeaseError, match="no longer"), ring.lease():
            pass
        ring.lease()
    assert_memory_is_whole(ring)


def test_a_claim_that_has_to_wait(ring):
    signature = "int(shmr *, uint64_t, const shmr_ref *, uint32_t, int, int64_t, shmr_block *)"
    with core_with(claim=(signature, lambda *_: WOULD_BLOCK)):
        ring.claim(3).commit()
    ring.lease().release()
    assert_memory_is_whole(ring)


def test_an_array_cannot_be_made(ring, monkeypatch):
    def fail(*_):
        raise OSError("no")

    with monkeypatch.context() as patch:
        patch.setattr(Ring, "_target", fail)
        with pytest.raises(OSError, match="no"):
            ring.claim(3)
    assert_memory_is_whole(ring)
    ring.send([1])
    with monkeypatch.context() as patch:
        patch.setattr(Ring, "_release_late", fail)
        lease = ring.lease()
        view = lease.array[:1]
        with pytest.raises(OSError, match="no"):
            lease.release()
    assert view[0] == 1


def test_a_message_that_is_no_array(ring):
    block = ffi.new("shmr_block *")
    handle = ring._region.handle
    ring.send([1])
    ring.lease().release()  # its array is remembered by its place
    for kind in (1, 9):
        assert lib.shmr_claim(handle, 8, ffi.NULL, 0, -1, 0, block) == 0
        raw = ring._layout(1, int).spec
        block.kind, block.length, block.spec_bytes = kind, 8, len(raw)
        ffi.memmove(block.spec, raw, len(raw))
        assert lib.shmr_commit(handle, 0, 0, -1, 0, block) == 0
    ring.lease().release()
    with pytest.raises(Corrupt):
        ring.lease()
    assert_memory_is_whole(ring)


# --- what is kept for the next time ---------------------------------------------------------------------


def test_more_at_once_than_are_kept():
    with Ring(64, "8 MiB") as ring:
        for _ in range(2):
            claims = [ring.claim(3) for _ in range(40)]
            for claim in claims:
                claim.commit()
            del claims, claim
            leases = [ring.lease() for _ in range(40)]
            assert {lease.attempts for lease in leases} == {0}
            for lease in leases:
                lease.release()
            del leases, lease
        assert_memory_is_whole(ring)


def test_more_places_than_are_remembered():
    with Ring(600, "8 MiB") as ring:
        for _ in range(2):
            for value in range(600):
                with ring.claim(3) as frame:
                    frame[:] = value
            del frame
            for value in range(600):
                with ring.lease() as frame:
                    assert (frame == value).all()
            del frame
        assert_memory_is_whole(ring)


def test_forgotten_while_in_use(ring):
    claim = ring.claim(3)
    ring._end.forget()
    claim.commit()
    del claim  # the last to know of its layout
    lease = ring.lease()
    ring._end.forget()
    lease.release()
    assert_memory_is_whole(ring)


def test_the_same_place_and_another_array(ring):
    kinds = [np.arange(4), np.arange(4.0), np.arange(4).reshape(2, 2), np.arange(8, dtype="i4"), np.arange(4)]
    for sent in [*kinds, *kinds]:
        ring.send(sent)
        with ring.lease() as got:
            assert got.dtype == sent.dtype
            assert got.shape == sent.shape
            assert (got == sent).all()
        del got
    assert_memory_is_whole(ring)


def test_a_root_that_is_in_use(ring):
    for value in range(2):
        ring.send([value])
    with ring.lease() as frame:
        root = frame.base
    del frame
    with ring.lease() as frame:
        assert frame[0] == 1
    del frame, root
    assert_memory_is_whole(ring)


# --- memory runs out ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def allocator(tmp_path_factory):
    made = tmp_path_factory.mktemp("allocator") / "failing_allocator.so"
    source = ROOT / "tests/c/failing_allocator.c"
    include = sysconfig.get_path("include")
    subprocess.run(["cc", "-shared", "-fPIC", f"-I{include}", source, "-o", made], check=True)
    loaded = ctypes.PyDLL(str(made))
    loaded.arm.argtypes = [ctypes.c_longlong]
    loaded.disarm.restype = ctypes.c_longlong
    loaded.install()
    yield loaded
    loaded.uninstall()


def each_allocation_fails(allocator, prepare, operation, check):
    """Run the operation again and again, and let its first, its second ... allocation fail, until none does."""
    for nth in range(1, 500):
        prepared = prepare()
        try:
            allocator.arm(nth)
            operation(prepared)
        except MemoryError:
            pass
        except Corrupt as error:  # "does not fit"
            if not isinstance(error.__cause__, MemoryError):
                raise
        finally:
            left = allocator.disarm()
        del prepared
        check()
        if left:
            return nth
    raise AssertionError("it allocates without end")


def forget(ring):
    ring._end.forget()
    return ring


def test_a_claim_without_memory(ring, allocator):
    def check():
        assert_memory_is_whole(ring)

    for fresh in (forget, lambda ring: ring):
        each_allocation_fails(allocator, lambda: fresh(ring), lambda ring: ring.claim(3).abort(), check)
    each_allocation_fails(allocator, lambda: ring, lambda ring: [ring.claim((2, 3)) for _ in range(3)], check)


def test_a_lease_without_memory(ring, allocator):
    def prepare():
        ring._forget()  # a fresh end, with nothing kept
        ring.send([1, 2])
        return ring

    def check():
        with ring.lease(0) if ring.approx_fill() else ring.claim(1):
            pass
        while ring.approx_fill():
            ring.lease(0).release()
        assert_memory_is_whole(ring)

    each_allocation_fails(allocator, prepare, lambda ring: ring.lease(0).release(), check)


def test_a_late_release_without_memory(ring, allocator):
    views = []

    def prepare():
        views.clear()
        ring.send([1, 2])
        lease = ring.lease()
        views.append(lease.array[1:])
        return [lease]

    def check():  # not that it is whole: Python itself leaks the arguments of a call that gets no memory
        assert views[0] == 2

    each_allocation_fails(allocator, prepare, lambda leases: leases[0].release(), check)
    each_allocation_fails(allocator, prepare, lambda leases: leases[0].__exit__(), check)


def test_an_end_without_memory(ring, allocator):
    handle = int(ffi.cast("uintptr_t", ring._region.handle))

    def make(ring):
        End(ring, ring._region, handle, False, ())

    each_allocation_fails(allocator, lambda: ring, make, lambda: None)
    each_allocation_fails(
        allocator, lambda: ring, lambda _: Layout(np.dtype("u1"), (3,), b"", 0, 3), lambda: None
    )
    each_allocation_fails(allocator, lambda: ring, lambda ring: Message(ring, handle, 0), lambda: None)


# --- exceptions on the way to whoever leases -------------------------------------------------------


def boom():
    raise KeyboardInterrupt


@pytest.mark.parametrize("check", ["frame", "payload"])
def test_a_lease_that_an_exception_drops_is_kept(check):
    """As a signal's handler does between the return of a call and the name for its result."""
    with Ring(4, "8 MiB", check=check) as ring:
        for i in range(3):
            ring.send(np.full(3, i))
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                (ring.lease(), boom())
        assert ring.approx_fill() == 2
        assert [int(ring.receive()[0]) for _ in range(3)] == [0, 1, 2]
        assert ring.try_lease() is None


def test_a_lease_that_was_looked_at_is_not_kept(ring):
    for i in range(3):
        ring.send(np.full(3, i))

    def looked_at(lease):
        assert lease.array[0] < 3
        return lease

    def entered(lease):
        assert lease.__enter__()[0] < 3
        return lease

    for look in (looked_at, entered):
        with pytest.raises(KeyboardInterrupt):
            (look(ring.lease()), boom())
    lease = ring.lease()
    lease.release()
    with pytest.raises(KeyboardInterrupt):
        (ring.try_lease(), boom())
    del lease
    assert ring.try_lease() is None


def test_a_dropped_lease_is_released(ring):
    ring.send(np.ones(3))
    ring.lease()
    assert ring.try_lease() is None


def test_what_cannot_be_kept_is_forgotten(ring, monkeypatch):
    ring.send(np.ones(3))
    with monkeypatch.context() as patch:
        patch.setattr(ring, "_keep", lambda block: boom())
        with pytest.raises(KeyboardInterrupt):
            (ring.lease(), boom())


# --- messages ----------------------------------------------------------------------------------------


def address(pointer):
    return int(ffi.cast("uintptr_t", pointer))


def test_a_message_is_released_with_the_last_view(ring):
    region = ring._region
    with pytest.raises(TypeError):
        Message(region)
    message = Message(region, address(region.handle), address(lib.shmr_base(region.handle)))
    with pytest.raises(BufferError, match="nothing is leased"):
        memoryview(message)
    ring.send(np.arange(5, dtype="u1"))
    assert lib.shmr_lease(region.handle, 0, 0, 0, ffi.cast("shmr_block *", message.address)) == 0
    view = memoryview(message)[2:]
    assert view.readonly
    del message
    assert view.tolist() == [2, 3, 4]
    assert region.leases()
    del view
    assert_memory_is_whole(ring)


def test_a_message_that_was_released_otherwise(ring):
    region = ring._region
    message = Message(region, address(region.handle), address(lib.shmr_base(region.handle)))
    block = ffi.cast("shmr_block *", message.address)
    ring.send([1])
    assert lib.shmr_lease(region.handle, 0, 0, 0, block) == 0
    assert lib.shmr_release(region.handle, block) == 0
    ring.send([2])
    del message
    assert ring.receive(0)[0] == 2
    assert_memory_is_whole(ring)


@pytest.mark.parametrize("nbytes", [1, 64, 4096])
def test_few_blocks_of_a_size_go_round(nbytes):
    """Each has a record, and arrays made over it: more of them than fit a cache would be cold, and made anew."""
    name = f"shmengine-test-{uuid.uuid4().hex[:12]}"
    places = set()
    with Ring(4, "8 MiB", name) as producer, Ring(4, "8 MiB", name) as consumer:
        for _ in range(1000):
            with producer.claim(nbytes, "u1") as array:
                places.add(address_of(array))
            with consumer.lease():
                pass
    assert len(places) <= 32


@pytest.mark.parametrize("timeout", [0, 1, 2e9])
def test_a_lease_from_a_closed_ring(ring, timeout):
    assert lib.shmr_close_ring(ring._h, 0) == 0
    with pytest.raises(Closed):
        ring.lease(timeout)
