"""The ring by itself: arrays from any number of producers to any number of consumers, in any processes.

    ring.claim ─ fill in place ─ commit ──►  [slot][slot][slot] ──► ring.lease ─ read in place ─ release
          └ an exception aborts                  one word each                        └ block is free again

No copy between filling and reading; crash-safe: a SIGKILL of anyone at any instruction stalls nobody, and what
the dead had leased is delivered again.
"""

from __future__ import annotations

import contextlib
import math
import operator
import os
import weakref
from types import TracebackType
from typing import Any, Self

import numpy as np

from shmengine import arrays
from shmengine._native import ffi, lib
from shmengine._native.status import (
    CLOSED,
    FORKED,
    INTERRUPTED,
    OK,
    TIMEOUT,
    WOULD_BLOCK,
    deadline_of,
    fail,
)
from shmengine.arrays import ArraySpec, Bytes, decode_spec, encode_spec
from shmengine.attached import Attached, read_config
from shmengine.config import format_bytes, parse_bytes
from shmengine.errors import ArrayError, Closed, Corrupt, LayoutMismatch, LeaseError, ShmError, WouldBlock
from shmengine.leases import Claim, End, Layout, Lease, new_block, release_with
from shmengine.region import Region, RegionConfig, RegionToken
from shmengine.stats import RingStats, as_table

__all__ = ["Ring", "deadline_of"]

Array = np.ndarray[Any, np.dtype[Any]]

KIND_ARRAY = 1
KIND_ARRAY_PREFIX = 2  # the spec is longer than a descriptor holds: it begins the payload
SPEC_BYTES = 128
MAX_CACHED = 1024
MOST_BYTES = 1 << 60  # of an array: more than there can be, and numbers up to here are safe to reckon with
NO_REFS = ffi.NULL


class Ring(Attached):
    """A crash-safe ring of arrays in shared memory.

    Any number of producers and consumers, threads and processes. A ring pickles to children (as an argument of
    a `multiprocessing.Process` under any start method); strangers meet by `name`.

    Parameters
    ----------
    capacity : int
        Messages that can be committed and not yet leased; a producer waits beyond it.
    arena_bytes : int or str
        Memory for all blocks together, claimed, committed and leased: bytes or ``"256 MiB"``. It is used as
        far as it is needed, in steps of 2 MiB.
    name : str, optional
        Made if it does not exist, attached to if it does; removed when its creator closes it.
    check : {"frame", "payload"}
        What is verified of every message: sequence, bounds and checksum of its descriptor; or all bytes too.

    Raises
    ------
    ValueError
        A parameter is out of range.
    MemoryBudgetExceeded
        There is not even room for the control part.
    LayoutMismatch
        `name` exists with another capacity or size, or is no ring.
    """

    def __init__(
        self,
        capacity: int,
        arena_bytes: int | str = "256 MiB",
        name: str | None = None,
        *,
        check: str = "frame",
    ) -> None:
        if isinstance(capacity, bool) or not hasattr(capacity, "__index__") or not 1 <= capacity <= 1 << 20:
            raise ValueError(f"capacity must be an int from 1 to {1 << 20} messages, not {capacity!r}")
        capacity = operator.index(capacity)
        size = parse_bytes(arena_bytes)
        if size < 1:
            raise ValueError(f"arena_bytes must be positive, not {arena_bytes!r}")
        if check not in ("frame", "payload"):
            raise ValueError(f"check must be 'frame' or 'payload', not {check!r}")
        if name is not None and (not name or "/" in name or "\0" in name or len(name) > 200):
            raise ValueError(f"a ring's name is a short file name without '/', not {name!r}")
        self._setup(_open_region(_config(capacity, size), name), check)

    _end: Any  # End, or _NoEnd

    def _setup(self, region: Region, check: str) -> None:
        self._attach(region)
        self._check = check
        self._payload_check = int(check == "payload")
        self._forget()
        _rings.add(self)

    # --- producing -------------------------------------------------------------------------------

    def claim(self, shape: int | tuple[int, ...], dtype: Any = float, timeout: float | None = None) -> Claim:
        """Claim a block for an array, to be filled in place.

        Parameters
        ----------
        shape : int or tuple of int
        dtype : dtype-like
            Any but object and StringDType.
        timeout : float, optional
            Seconds to wait for memory now, and again for a slot at the commit; None: for ever.

        Returns
        -------
        Claim
            ``with ring.claim(shape, dtype) as frame: ...``: leaving commits, an exception aborts.

        Raises
        ------
        Timeout, Closed, PeerLost
        MemoryBudgetExceeded
            The array is larger than the whole arena.
        ArrayError
            No array of this dtype can be carried.
        """
        claim: Claim = self._end.claim(shape, dtype, timeout)
        return claim

    def try_claim(self, shape: int | tuple[int, ...], dtype: Any = float) -> Claim | None:
        """Like `claim`, but never wait: None if there is no memory or no slot now."""
        if not lib.shmr_has_room(self._handle(), 0):
            return None
        try:
            return self.claim(shape, dtype, 0)
        except _Nothing:
            return None

    # What the handles (csrc/handles.c) leave to us: whatever waits, and whatever is seen for the first time.

    _deadline = staticmethod(deadline_of)

    def _claim_slowly(self, address: int, need: int, timeout: float | None) -> None:
        deadline = deadline_of(timeout)
        block = ffi.cast("shmr_block *", address)
        block.state = 0
        try:
            while (status := lib.shmr_claim(self._h, need, NO_REFS, 0, -1, deadline, block)) != OK:
                if status != INTERRUPTED:
                    self._refuse(status, "claim from this ring", timeout, need)
        except BaseException:  # a signal's handler, at the end of the wait
            if block.state:
                lib.shmr_abort(self._h, block)
            raise

    def _target(self, layout: Layout, offset: int) -> Array:
        """Return the writable array of this layout at this offset."""
        root = self._region.root(offset, layout.prefix + layout.nbytes, writable=True)
        if layout.prefix:
            root[: 4 + len(layout.spec)] = np.frombuffer(
                len(layout.spec).to_bytes(4, "little") + layout.spec, np.uint8
            )
        return arrays.view(root, ArraySpec(layout.dtype, layout.shape), layout.prefix)

    def _layout(self, shape: Any, dtype: Any) -> Layout:
        """Return the layout of a shape and a dtype that were not asked for before."""
        self._handle()  # who has the end's own `claim` may come after `close`
        try:
            spec = ArraySpec(np.dtype(dtype), _shape(shape))
            # As NumPy counts. No generator, here and below: without memory for one Python 3.12 and 3.13 crash.
            need = math.prod([max(1, n) for n in spec.shape]) * spec.dtype.itemsize
            if need > MOST_BYTES:
                self._refuse_size(need)
            raw = encode_spec(spec)
        except TypeError as error:
            if isinstance(error, ArrayError):
                raise
            raise ArrayError(f"no array has shape {shape!r} and dtype {dtype!r}: {error}") from error
        prefix = 0 if len(raw) <= SPEC_BYTES else -(-(4 + len(raw)) // 64) * 64
        layout = Layout(spec.dtype, spec.shape, raw, prefix, spec.nbytes)
        layouts = self._end.layouts
        with contextlib.suppress(
            TypeError
        ):  # a list as shape, or another unhashable spelling: not remembered
            if len(layouts) >= MAX_CACHED:
                layouts.clear()
            layouts[shape, dtype] = layout
        return layout

    def _refuse_size(self, need: int) -> None:
        self._refuse(lib.SHMR_TOO_LARGE, "claim from this ring", None, need)

    def _commit_slowly(self, address: int, timeout: float | None) -> None:
        block = ffi.cast("shmr_block *", address)
        try:
            status = self._commit(block, deadline_of(timeout))
        except BaseException:  # a signal's handler, while we waited
            lib.shmr_abort(self._h, block)
            raise
        if status == OK:
            return
        lib.shmr_abort(self._h, block)
        if status == WOULD_BLOCK:
            raise WouldBlock("commit to this ring: it is full; the claim was aborted")
        fail(status, "commit to this ring (the claim was aborted)", seconds=timeout)

    def _commit(self, block: Any, deadline: int) -> int:
        while True:
            status: int = lib.shmr_commit(self._h, 0, self._payload_check, -1, deadline, block)
            if status == FORKED:
                raise LeaseError("commit of a claim: it belongs to the parent of this forked process")
            if status == CLOSED:
                self._sleep_at_exit()
            if status != INTERRUPTED:
                return status

    def send(self, array: Any, timeout: float | None = None) -> None:
        """Copy an array into a block and commit it.

        Parameters
        ----------
        array : array_like
            In any layout; the receiver gets it C-contiguous.
        timeout : float, optional
            Seconds to wait for memory and a slot; None: for ever.

        Raises
        ------
        Timeout, Closed, PeerLost, MemoryBudgetExceeded, ArrayError
            As for `claim`.
        """
        source = np.asarray(array)
        claim = self.claim(source.shape, source.dtype, timeout)
        with claim as target:
            if source.flags.c_contiguous:
                lib.shmr_copy(
                    ffi.cast("void *", arrays.address_of(target)),
                    ffi.cast("void *", arrays.address_of(source)),
                    source.nbytes,
                )
            else:
                np.copyto(target, source)

    # --- consuming -------------------------------------------------------------------------------

    def lease(self, timeout: float | None = None) -> Lease:
        """Lease the oldest message, to be read in place.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait for a message; None: for ever.

        Returns
        -------
        Lease
            ``with ring.lease() as frame: ...``: leaving releases.

        Raises
        ------
        Timeout, Closed
        PeerLost
            The ring is empty and the last other participant died.
        Corrupt
            The message failed a check; it is discarded, the ring goes on.
        """
        lease: Lease = self._end.lease(timeout)
        return lease

    def try_lease(self) -> Lease | None:
        """Like `lease`, but never wait: None if the ring is empty."""
        try:
            return self.lease(0)
        except _Nothing:
            return None

    def _lease_slowly(self, address: int, timeout: float | None, status: int, deadline: int) -> None:
        if status not in (WOULD_BLOCK, INTERRUPTED):
            self._refuse(status, "lease from this ring", timeout, 0)
        self._take(ffi.cast("shmr_block *", address), timeout, deadline)

    def _take(self, block: Any, timeout: float | None, deadline: int) -> None:
        block.state = 0
        try:
            if self._take_kept(block):
                return
            while (status := lib.shmr_lease(self._h, 0, self._payload_check, deadline, block)) != OK:
                if status != INTERRUPTED:
                    self._refuse(status, "lease from this ring", timeout, 0)
        except BaseException:
            self._keep(block)
            raise

    def _read(self, address: int) -> tuple[Any, Array]:
        """Return the root and the array of a leased message; a message that is no array is given back."""
        block = ffi.cast("shmr_block *", address)
        try:
            root = self._region.root(block.offset, block.length)
            return root, self._array(root, block)
        except (ShmError, MemoryError):
            lib.shmr_release(self._region.handle, block)
            raise
        except BaseException:  # a signal's handler
            self._keep(block)
            raise

    def _array(self, root: Bytes, block: Any) -> Array:
        """Return the array whose message these bytes are."""
        if block.kind == KIND_ARRAY:
            return arrays.view(root, decode_spec(ffi.buffer(block.spec, block.spec_bytes)[:]))
        if block.kind == KIND_ARRAY_PREFIX and block.length >= 4:
            length = int.from_bytes(root[:4].tobytes(), "little")
            spec = decode_spec(root[4 : 4 + length].tobytes())
            return arrays.view(root, spec, -(-(4 + length) // 64) * 64)
        raise Corrupt(f"a message of kind {block.kind} is no array", "kind")

    def receive(self, timeout: float | None = None) -> Array:
        """Take the oldest message as an array; the lease ends when the last view of it dies.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait for a message; None: for ever.

        Returns
        -------
        ndarray
            Read-only; no copy.

        Raises
        ------
        Timeout, Closed, PeerLost, Corrupt
            As for `lease`.
        """
        self._handle()
        block = new_block()
        watched = False
        try:
            self._take(block, timeout, deadline_of(timeout))
            root, array = self._read(int(ffi.cast("uintptr_t", block)))
            release_with(root, self._region, block)
            watched = True
        except BaseException:
            if not watched:
                self._keep(block)
            raise
        return array

    def _release_late(self, array: Array, raw: bytes) -> None:
        """A lease has ended whose array is still in use: the block is released with the last view."""
        block = new_block()
        ffi.memmove(block, raw, len(raw))
        lib.shmr_count_late_release(self._h)
        release_with(array.base, self._region, block)

    # --- everything else ---------------------------------------------------------------------------

    def approx_fill(self) -> int:
        """Messages committed and not yet leased; may be stale when it returns, never above the capacity."""
        return int(lib.shmr_approx_fill(self._handle(), 0))

    @property
    def capacity(self) -> int:
        """Messages that can be committed and not yet leased."""
        return self._capacity

    @property
    def name(self) -> str | None:
        """The name for strangers, if it has one."""
        return self._region.name

    @property
    def closed(self) -> bool:
        """Whether this end was closed here."""
        return self._closed

    def stats(self) -> RingStats:
        """Counters of all participants together."""
        self._handle()
        c = self._region.counters()
        return RingStats(
            capacity=self._capacity,
            approx_fill=self.approx_fill(),
            committed=c.committed,
            leased=c.leased,
            aborted=c.aborted,
            late_releases=c.late_releases,
            rescued_wakeups=c.rescued_wakeups,
            participants=c.participants,
            deaths=c.deaths,
            memory_budget=c.budget,
            memory_used=c.reserved,
            bytes_committed=c.bytes_committed,
            leases_held=tuple(self._region.leases().items()),
        )

    def close(self) -> None:
        """End this process's part in the ring; arrays that are alive stay valid. Others go on."""
        if not self._closed:
            self._end.forget()
            self._put_end(_NoEnd(self))
            self._detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._closed:
            return "<shmengine.Ring closed>"
        config = read_config(self._region)
        name = f" name={self.name!r}" if self.name else ""
        return f"<shmengine.Ring capacity={self._capacity} arena={format_bytes(config.arena_bytes)}{name}>"

    def _repr_html_(self) -> str:
        stats = None
        with contextlib.suppress(ShmError):  # closed, or a forked child's copy
            stats = self.stats()
        return as_table(repr(self).strip("<>"), stats)

    def __reduce__(self) -> tuple[Any, ...]:
        self._handle()
        return _from_token, (type(self), self._region.token(), self._check)

    def _forget(self) -> None:
        handle = int(ffi.cast("uintptr_t", self._h))
        self._put_end(End(self, self._region, handle, bool(self._payload_check), self._kept))

    def _put_end(self, end: Any) -> None:
        """Let `claim` and `lease` be the end's own: a Python frame costs as much as the rest of a message."""
        self._end = end
        self.__dict__.update(claim=end.claim, lease=end.lease)

    def _after_fork(self) -> None:
        """In a forked child: the first use joins anew."""
        if not self._closed:
            self._put_end(_NoEnd(self))

    def _refusal(self) -> Closed:
        return Closed("this ring is closed")

    def _refuse(self, status: int, what: str, seconds: float | None, need: int) -> None:
        if status == WOULD_BLOCK:
            raise _Nothing
        if status == CLOSED:
            self._sleep_at_exit()
            raise self._refusal()
        if status == lib.SHMR_TOO_LARGE:
            what = f"{what}: {format_bytes(need)} of {format_bytes(read_config(self._region).arena_bytes)}"
        if status == TIMEOUT:
            what += f" ({self.approx_fill()} of {self._capacity} slots are full)"
        fail(status, what, seconds=seconds)


class _NoEnd:
    """Stands for the end of a ring that is closed, or has to be joined first (after a fork)."""

    def __init__(self, ring: Ring) -> None:
        self._ring = weakref.ref(ring)

    def _real(self) -> End:
        ring = self._ring()
        if ring is None:
            raise Closed("this ring is closed")
        ring._handle()  # joins, and makes an end; or raises
        end: End = ring._end
        return end

    def claim(self, shape: Any, dtype: Any = float, timeout: float | None = None) -> Claim:
        return self._real().claim(shape, dtype, timeout)

    def lease(self, timeout: float | None = None) -> Lease:
        return self._real().lease(timeout)

    def forget(self) -> None:
        """Nothing is kept here."""


_rings: weakref.WeakSet[Ring] = weakref.WeakSet()


def _after_fork() -> None:
    for ring in list(_rings):
        ring._after_fork()


os.register_at_fork(after_in_child=_after_fork)


class _Nothing(Exception):
    """A try_ call found nothing to do."""


def _shape(shape: Any) -> tuple[int, ...]:
    sizes = tuple(map(operator.index, shape)) if np.iterable(shape) else (operator.index(shape),)
    if min(sizes, default=0) < 0:
        raise ArrayError(f"a shape has no negative dimensions: {shape!r}")
    return sizes


def _config(capacity: int, size: int) -> RegionConfig:
    return RegionConfig(arena_bytes=size, capacities=(capacity,))


def _open_region(settings: RegionConfig, name: str | None) -> Region:
    if name is None:
        return Region.create(settings)
    while True:
        try:
            return Region.create(settings, name)
        except FileExistsError:
            pass
        try:
            region = Region.attach_name(name)
            break
        except FileNotFoundError:  # gone meanwhile
            continue
    found, wanted = read_config(region), settings.to_c()
    if (found.capacity[0], found.arena_bytes) != (wanted.capacity[0], wanted.arena_bytes):
        region.close()
        raise LayoutMismatch(
            f"the ring named {name!r} exists with capacity {found.capacity[0]} and"
            f" {format_bytes(found.arena_bytes)}; asked for are {wanted.capacity[0]} and"
            f" {format_bytes(wanted.arena_bytes)}"
        )
    return region


def _from_token(cls: type[Ring], token: RegionToken, check: str) -> Ring:
    ring = cls.__new__(cls)
    ring._setup(Region.from_token(token), check)
    return ring
