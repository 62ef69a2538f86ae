"""Views are safe for as long as they live, whatever becomes of lease, ring and process."""

from __future__ import annotations

import gc
import os
import pickle
import threading

import numpy as np
import pytest

from shmengine.errors import Closed, Timeout
from shmengine.ring import Ring
from tests.helpers import run_script


@pytest.fixture
def ring():
    with Ring(8, "4 MiB") as made:
        yield made


def pins(ring):
    return ring._region.counters().pins


def is_mapped(inode):
    with open("/proc/self/maps") as file:
        return any(line.split()[4] == str(inode) for line in file)


def count_maps():
    with open("/proc/self/maps") as file:
        return sum(1 for _ in file)


def overwrite(ring):
    """Write on every byte of memory that is free."""
    claims = []
    for size in (1 << 20, 1 << 16, 1 << 12, 64):
        while (claim := ring.try_claim(size, "u1")) is not None:
            claim.array[:] = 0xEE
            claims.append(claim)
    for claim in claims:
        claim.abort()


def message(number=0, size=1000):
    return np.arange(size, dtype="i8") + number


# --- close, ring, process ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["receive", "escape", "lease object"])
def test_a_view_outlives_close_and_the_ring(how):
    ring = Ring(8, "4 MiB")
    inode = ring._region.inode
    ring.send(message())
    if how == "receive":
        view = ring.receive()
    elif how == "escape":
        with ring.lease() as frame:
            view = frame[10:]
        del frame
    else:
        lease = ring.lease()
        view = lease.array[::2]
        del lease
    expected = view.copy()
    ring.close()
    gc.collect()
    np.testing.assert_array_equal(view, expected)
    del ring
    gc.collect()
    np.testing.assert_array_equal(view, expected)
    assert is_mapped(inode)
    del view
    gc.collect()
    assert not is_mapped(inode)


def test_a_view_outlives_a_ring_that_was_never_closed():
    def produce():
        ring = Ring(8, "4 MiB")
        ring.send(message(7))
        return ring.receive()

    view = produce()
    gc.collect()
    np.testing.assert_array_equal(view, message(7))


def test_a_lease_outlives_close(ring):
    ring.send(message(3))
    lease = ring.lease()
    ring.close()
    np.testing.assert_array_equal(lease.array, message(3))
    lease.release()


def test_a_claim_at_close_stays_safe_to_write(ring):
    claim = ring.claim(1000)
    array = claim.array
    ring.close()
    array[:] = 1
    with pytest.raises(Closed):
        claim.commit()


def test_exit_with_views_alive():
    done = run_script(
        """
        import numpy as np
        from shmengine.ring import Ring
        ring = Ring(8, "4 MiB")
        for i in range(4):
            ring.send(np.full(1000, i))
        views = [ring.receive(), ring.receive()[::2]]
        lease = ring.lease()
        cycle = [ring.lease().array]
        cycle.append(cycle)
        print(sum(int(view.sum()) for view in views))
        """,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("500\n", "")


def test_exit_while_daemon_threads_wait():
    done = run_script(
        """
        import threading, time
        from shmengine.queues import Queue
        from shmengine.ring import Ring
        ring, queue = Ring(1, "4 MiB"), Queue(memory="4 MiB")
        full = Ring(1, "4 MiB")
        full.send([1])
        for wait in (ring.lease, ring.receive, queue.get, lambda: full.send([2])):
            threading.Thread(target=wait, daemon=True).start()
        time.sleep(0.05)  # most of them are asleep by then; the others must not hurt either
        print("end")
        """,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("end\n", "")


def test_what_an_exiting_process_had_leased_is_not_delivered_again(ring):
    ring.send(message(1))
    ring.send(message(2))
    done = run_script(
        """
        import pickle, sys
        ring = pickle.loads(bytes.fromhex(sys.argv[1]))
        view = ring.receive()
        print(view[0])
        """,
        args=[pickle.dumps(ring).hex()],
        check=True,
    )
    assert done.stdout == "1\n"
    assert ring.receive()[0] == 2
    assert ring.try_lease() is None


# --- what has escaped is found out ------------------------------------------------------------------


def escape_before_close(ring, keep):
    with ring.lease() as frame:
        keep.append(frame)
        ring.close()


def escape_while_the_cache_is_emptied(ring, keep):
    with ring.lease() as frame:
        keep.append(frame[1:])
        ring._end.forget()  # as happens when others take its place
    ring.send(message(5))


def escape_without_a_name(ring, keep):
    with (lease := ring.lease()):
        keep.append(lease.array)


def escape_by_a_forgotten_lease(ring, keep):
    keep.append(ring.lease().array)


def escape_by_release(ring, keep):
    lease = ring.lease()
    keep.append(lease.array)
    lease.release()


@pytest.mark.parametrize(
    "escape",
    [
        escape_before_close,
        escape_while_the_cache_is_emptied,
        escape_without_a_name,
        escape_by_a_forgotten_lease,
        escape_by_release,
    ],
)
def test_memory_of_an_escaped_view_is_not_used_again(escape):
    with Ring(8, "4 MiB") as ring:
        ring.send(message(3))
        keep = []
        escape(ring, keep)
        expected = keep[0].copy()
        assert pins(ring) == 1
        if not ring.closed:
            overwrite(ring)
        np.testing.assert_array_equal(keep[0], expected)
        assert keep[0][-1] == 1002


def test_two_threads_resolve_the_same_reference():
    from shmengine.arena import Arena
    from shmengine.region import Region, RegionConfig

    region = Region.create(RegionConfig(arena_bytes=4 << 20, capacities=(8,)))
    arena = Arena(region)
    array = arena.empty(1000)
    reference = arena.share(array)
    gate = threading.Barrier(2)

    def resolve():
        gate.wait()
        for _ in range(300):
            arena.resolve(reference)

    threads = [threading.Thread(target=resolve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert arena.pinned_bytes == 0
    assert region.counters().pins == 1
    del array
    assert region.counters().pins == 0
    region.close()


def test_an_array_born_in_a_region_outlives_it():
    from shmengine.arena import Arena
    from shmengine.region import Region, RegionConfig

    region = Region.create(RegionConfig(arena_bytes=4 << 20, capacities=(8,)))
    heir = Region.attach(os.dup(region.fd))
    array = Arena(region).empty(100_000)
    array[:] = 1
    del region
    gc.collect()
    third = Region.attach(os.dup(heir.fd))  # would inherit the place and the memory of one who left
    while (other := try_empty(Arena(third))) is not None:
        other[:] = 2
        heir.others = [*getattr(heir, "others", []), other]
    assert array.min() == array.max() == 1
    del heir.others, other
    del array
    third.close()
    heir.close()


def try_empty(arena):
    from shmengine.errors import MemoryBudgetExceeded

    try:
        return arena.empty(10_000)
    except MemoryBudgetExceeded:
        return None


# --- read-only is real ---------------------------------------------------------------------------

VIEWS = {
    "itself": lambda a: a,
    "slice": lambda a: a[1:-1],
    "negative strides": lambda a: a[::-1],
    "reshape": lambda a: a.reshape(10, -1),
    "transpose": lambda a: a.reshape(10, -1).T,
    "other dtype": lambda a: a.view("u1"),
    "field": lambda a: a.view([("x", "i4"), ("y", "i4")])["y"],
    "subclass": lambda a: a.view(np.recarray),
    "ravel": lambda a: a.reshape(10, -1).ravel(),
    "broadcast": lambda a: np.broadcast_to(a, (3, *a.shape)),
    "as_strided": lambda a: np.lib.stride_tricks.as_strided(a, (5,), (16,)),
    "sliding window": lambda a: np.lib.stride_tricks.sliding_window_view(a, 5),
    "asarray of memoryview": lambda a: np.asarray(memoryview(a)),
    "frombuffer": lambda a: np.frombuffer(a, "i8"),
    "base": lambda a: a.base,
    "nested": lambda a: a[5:][::3][2:].reshape(-1, 1)[:, 0],
    "masked": lambda a: np.ma.masked_less(a, 5, copy=False).data,
    "real": lambda a: a.real,
    "split": lambda a: np.split(a, 2)[1],
    "squeeze": lambda a: a[None].squeeze(),
    "array interface": lambda a: np.asarray(Interface(a)),
}


class Interface:
    def __init__(self, array):
        self.array = array  # as the protocol asks: it keeps the memory
        self.__array_interface__ = array.__array_interface__


@pytest.mark.parametrize("derive", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("how", ["lease", "receive"])
def test_no_view_can_be_made_writable(ring, derive, how):
    ring.send(message())
    view = derive(ring.receive() if how == "receive" else ring.lease().array)
    assert not view.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        view.flags.writeable = True
    with pytest.raises(ValueError, match="WRITEABLE"):
        view.setflags(write=True)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        view.fill(1)
    assert memoryview(view).readonly


# --- escaping views ------------------------------------------------------------------------------


@pytest.mark.parametrize("derive", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("keep", ["with", "lease object", "receive"])
def test_a_view_that_escapes_keeps_its_memory(ring, derive, keep):
    ring.send(message())
    ring.send(message(5))
    if keep == "with":
        with ring.lease() as frame:
            view = derive(frame)
        del frame
    elif keep == "lease object":
        lease = ring.lease()
        view = derive(lease.array)
        lease.release()
        del lease
    else:
        view = derive(ring.receive())
    expected = view.copy()
    assert ring.receive()[0] == 5  # the ring goes on
    gc.collect()
    assert pins(ring) == 1
    assert ring.stats().late_releases == (keep != "receive")
    overwrite(ring)
    np.testing.assert_array_equal(view, expected)
    again = view[:1]
    del view
    gc.collect()
    overwrite(ring)
    np.testing.assert_array_equal(again, expected[:1])
    del again
    gc.collect()
    assert pins(ring) == 0
    counters = ring._region.counters()
    assert (counters.used, counters.held) == (0, 0)


@pytest.mark.parametrize(
    "escape",
    [
        memoryview,
        lambda a: memoryview(a)[3:],
        lambda a: a.flat,
        lambda a: iter(a.reshape(10, -1)),
        pickle.PickleBuffer,
        np.nditer,
        lambda a: [[a]],
        lambda a: lambda: a,
    ],
    ids=["memoryview", "part of it", "flat", "iterator", "PickleBuffer", "nditer", "list", "closure"],
)
def test_other_things_that_hold_a_view_keep_its_memory(ring, escape):
    ring.send(message())
    with ring.lease() as frame:
        thing = escape(frame)
    del frame
    assert pins(ring) == 1
    overwrite(ring)
    if isinstance(thing, memoryview):
        assert thing.tolist()[-1] == 999
    del thing
    gc.collect()
    assert pins(ring) == 0


def test_without_an_escape_the_lease_ends_with_the_block(ring):
    for i in range(20):
        ring.send(message(i))
        with ring.lease() as frame:
            assert int(frame.sum()) == int(message(i).sum())
            temporary = frame[5:].reshape(-1, 5)
            del temporary
        assert pins(ring) == 0
        ring.send(message(i))
        lease = ring.lease()
        assert lease.array[0] == i
        lease.release()
        assert pins(ring) == 0
    assert ring.stats().late_releases == 0


def test_a_cycle_is_collected(ring):
    ring.send(message())
    with ring.lease() as frame:
        cycle = [frame]
        cycle.append(cycle)
    del frame, cycle
    gc.collect()
    assert pins(ring) == 0


def test_an_exception_that_keeps_the_frame_keeps_the_memory(ring):
    ring.send(message())

    def look():
        with ring.lease() as frame:
            part = frame[:10]
            raise KeyError(int(part[3]))

    try:
        look()
    except KeyError as error:
        kept = error
    overwrite(ring)
    assert kept.__traceback__.tb_next.tb_frame.f_locals["part"].tolist() == list(range(10))
    del kept
    gc.collect()
    assert pins(ring) == 0


def test_the_last_view_may_die_in_another_thread(ring):
    ring.send(message())
    box = [ring.receive()]
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()
    assert pins(ring) == 0


def test_many_threads_keep_and_drop_views():
    with Ring(64, "16 MiB") as ring:
        failures = []

        def consume():
            kept = []
            for turn in range(300):
                number = None
                with ring.lease(timeout=60) as frame:
                    number = int(frame[0])
                    if turn % 3 == 0:
                        kept.append((number, frame[::7]))
                del frame
                if len(kept) > 10:
                    number, view = kept.pop(0)
                    if (view != number).any():
                        failures.append(number)
                    del view
            failures.extend(number for number, view in kept if (view != number).any())

        consumers = [threading.Thread(target=consume) for _ in range(4)]
        for thread in consumers:
            thread.start()
        for i in range(1200):
            ring.send(np.full(2000, i), timeout=60)
        for thread in consumers:
            thread.join()
        assert not failures
        assert pins(ring) == 0


def test_memory_that_views_pin_is_back_pressure(ring):
    held = []
    with pytest.raises(Timeout):
        for i in range(100):
            ring.send(np.full(100_000, i), timeout=0.05)
            held.append(ring.receive())
    assert len(held) >= 4
    for i, view in enumerate(held):
        assert (view == i).all()
    del view
    held.pop(0)
    ring.send(np.full(100_000, 7), timeout=30)


def test_a_view_dropped_while_a_producer_waits_wakes_it(ring):
    ring.send(np.zeros(3_000_000, "u1"))
    view = ring.receive()
    thread = threading.Thread(target=lambda: ring.send(np.ones(3_000_000, "u1"), timeout=60))
    thread.start()
    assert view.sum() == 0
    del view
    thread.join()
    assert ring.receive().sum() == 3_000_000


def test_100_000_live_small_arrays():
    count = 100_000
    with Ring(count) as ring:  # default memory, one descriptor, one mapping
        descriptors = len(os.listdir("/proc/self/fd"))
        maps = count_maps()
        for i in range(count):
            with ring.claim(3, "i4") as frame:
                frame[:] = i
        assert ring.approx_fill() == count
        arrays = [ring.receive(timeout=0) for _ in range(count)]
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert count_maps() < maps + 100  # Python's own heap may grow
        assert ring.try_lease() is None
        assert [int(array[2]) for array in arrays] == list(range(count))
        addresses = sorted(array.ctypes.data for array in arrays[::7])
        assert min(np.diff(addresses)) >= 12
        del arrays[::2]
        for i in range(count // 2):
            ring.send([i, i])
        assert [int(array[0]) for array in arrays] == list(range(1, count, 2))
        arrays += [ring.receive() for _ in range(count // 2)]
        del arrays
        assert ring._region.counters().used == 0
        assert pins(ring) == 0
