"""Memory that one end of a channel lends to the other: a large message lies there, and what travels says where.

What it is, and who may do what, is in ``csrc/shmr_loan.c``. Ends that are made together share a file of it from the
beginning; sockets find out whether the other end can open one.
"""

from __future__ import annotations

import struct
from typing import Any

from shmengine._native import ffi, lib
from shmengine._native._handles import Borrowed, connect_loans
from shmengine._native.status import fail
from shmengine.descriptors import Descriptor
from shmengine.errors import Corrupt, ShmError

__all__ = ["Borrowed", "Lender", "Lent", "Loans", "accept", "borrow", "new_file", "use"]

connect_loans(
    fail,
    *(
        int(ffi.cast("uintptr_t", ffi.addressof(lib, f"shmr_loans_{name}")))
        for name in ("lend", "has", "copy", "give_back")
    ),
)

_WHAT = "an end of a channel"
_OFFER = struct.Struct("<iQQ")
MOST_BYTES = 1 << 60  # more than a file can have; then there is none


class Loans:
    """What is lent in one direction, as one of the two ends has it; closed with the last reference.

    Attributes
    ----------
    handle
        For the core.
    address : int
        The same.

    Raises
    ------
    MemoryError
    """

    def __init__(self) -> None:
        handle = lib.shmr_loans_new()
        if handle == ffi.NULL:
            raise MemoryError("no memory for a channel")
        self.handle: Any = ffi.gc(handle, lib.shmr_loans_free)
        self.address = int(ffi.cast("uintptr_t", handle))


def new_file(nbytes: int) -> Descriptor | None:
    """Return a new file for so many bytes that are lent in one direction; None: none can be made."""
    fd = lib.shmr_loans_file(min(nbytes, MOST_BYTES))
    return None if fd < 0 else Descriptor(fd, _WHAT)


def use(file: Descriptor) -> Loans:
    """Return what is lent in such a file, for either end; the file stays open as long.

    Raises
    ------
    ShmError
        It is another file by now.
    """
    loans = Loans()
    if not lib.shmr_loans_use(loans.handle, file.number):
        raise ShmError(
            f"the descriptor of {_WHAT} was closed by other code of this process: make a new channel"
        )
    return loans


def accept(pid: int, offer: bytes) -> Loans | None:
    """Return what another process offers as a `Lender`; None: this one cannot get at it."""
    try:
        loans = Loans()
        file = ffi.new("shmr_file *")
        file.fd, file.device, file.inode = _OFFER.unpack(offer)
    except (MemoryError, struct.error):
        return None
    return loans if lib.shmr_loans_accept(loans.handle, pid, file) else None


class Lent:
    """A part of a session whose bytes are lent.

    Attributes
    ----------
    number : int
        In the session.
    reference : bytes
        What travels instead.
    """

    __slots__ = ("_nbytes", "loan", "number", "reference")

    def __init__(self, number: int, nbytes: int, loan: int, reference: bytes) -> None:
        self.number = number
        self.reference = reference
        self.loan = loan
        self._nbytes = nbytes

    def __len__(self) -> int:
        return self._nbytes


class Lender(Loans):
    """A new file, as the end of a session has it that lends.

    Attributes
    ----------
    offer : bytes
        For `accept` in another process.

    Raises
    ------
    MemoryError
        There can be no more.
    """

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        if not lib.shmr_loans_make(self.handle, nbytes):
            raise MemoryError("no memory can be lent")
        file = lib.shmr_loans_offer(self.handle)
        self.offer = _OFFER.pack(file.fd, file.device, file.inode)
        self._loan = ffi.new("shmr_loan *")  # the last one, whatever a signal's handler raises
        self._last: Lent | None = None

    @property
    def loan_address(self) -> int:
        """Where it says whether there is something to take back."""
        return int(ffi.cast("uintptr_t", self._loan))

    def lend(self, number: int, prefix: bytes, pieces: list[Any], nbytes: int) -> Lent | None:
        """Lend a copy of some pieces; return a part of that number and size, or None if there is no room.

        Call `kept` when the session has kept it. If the one before was not kept (`last`), call `take_back` first.
        """
        buffers = [ffi.from_buffer(piece) for piece in pieces]
        parts = ffi.new("shmr_piece[]", [(buffer, len(buffer)) for buffer in buffers])
        if not lib.shmr_loans_lend(self.handle, parts, len(buffers), self._loan):
            return None
        loan = self._loan
        self._last = Lent(number, len(prefix) + nbytes, int(loan.number), prefix + bytes(ffi.buffer(loan)))
        return self._last

    @property
    def last(self) -> Lent | None:
        """The part of the last loan, if there is one that was returned."""
        last = self._last
        return last if last is not None and last.loan == self._loan.number else None

    def kept(self) -> None:
        """Note that the last part of `lend` was kept: there is nothing to take back."""
        self._loan.length = 0

    def take_back(self) -> None:
        """Take back the last loan of `lend`, if it was not given back."""
        if self._loan.length:
            lib.shmr_loans_give_back(self.handle, self._loan)

    def rest(self) -> None:
        """Keep no memory, if nothing is lent."""
        lib.shmr_loans_rest(self.handle)


def borrow(loans: Loans, before: int, reference: Any) -> Borrowed:
    """Return a part that has come as a reference.

    Parameters
    ----------
    loans : Loans
    before : int
        Bytes of a part that are not lent.
    reference : bytes-like
        What follows the prefix in a `Lent.reference`.

    Raises
    ------
    Corrupt
        It refers to nothing.
    """
    try:
        return Borrowed(loans, loans.address, before, reference)
    except ValueError as error:
        raise Corrupt(str(error), "parts") from None
