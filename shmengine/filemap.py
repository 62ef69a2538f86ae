"""Arrays in memory-mapped files, sent as the name of the file.

Only what is certain to be the same bytes on the other side goes by name: a shared mapping of a
file that is still found under its path. Private ("copy on write") mappings, deleted files and
anonymous memory are not; their data travels.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections import OrderedDict
from typing import Any, cast

import numpy as np

from shmengine.arrays import Array, Bytes, decode_spec, encode_spec, extent_of, spec_of, view
from shmengine.errors import ShmError, StaleReference

__all__ = ["forget_files", "mapping_behind", "open_view", "reference_to"]

MAX_OPEN_FILES = 16

Identity = tuple[int, int]
"""Device and inode of a file."""

_identities: weakref.WeakKeyDictionary[mmap.mmap, tuple[str, Identity, int]] = weakref.WeakKeyDictionary()


def mapping_behind(array: Array) -> np.memmap[Any, Any] | None:
    """Return the `numpy.memmap` that an array is, or is a view of."""
    base: Any = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap) and cast("Any", base)._mmap is not None:
            return base
        base = base.base
    return None


def _path_of_mapping(address: int) -> str | None:
    """Return the path that the kernel knows for the file mapped at this address."""
    with open("/proc/self/maps", "rb") as maps:
        for line in maps:
            low, _, rest = line.partition(b"-")
            if int(low, 16) <= address < int(rest.partition(b" ")[0], 16):
                fields = line.rstrip(b"\n").split(None, 5)
                return os.fsdecode(fields[5]) if len(fields) == 6 else None
    return None


def reference_to(array: Array, mode: str) -> tuple[Any, ...] | None:
    """Describe an array in a mapped file, as arguments for `open_view`.

    Parameters
    ----------
    array : ndarray
        A `numpy.memmap`, or any view of one, of a plain dtype.
    mode : {"r", "r+"}
        How the other side opens the file; "r+" only if it is mapped so here.

    Returns
    -------
    tuple or None
        None if the data has to travel.
    """
    mapped = mapping_behind(array)
    if mapped is None or mapped.mode == "c" or mapped.filename is None or array.size == 0:
        return None
    memory: mmap.mmap = cast("Any", mapped)._mmap
    known = _identities.get(memory)
    try:
        if known is None:
            path = os.path.realpath(mapped.filename)
            start = int(np.frombuffer(memory, np.uint8, 1).__array_interface__["data"][0])
            if _path_of_mapping(start) != path:
                return None
            status = os.stat(path)
            known = _identities[memory] = (path, (status.st_dev, status.st_ino), start)
        path, identity, start = known
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    low, high = extent_of(array)
    if (status.st_dev, status.st_ino) != identity or not start <= low <= high <= start + len(memory):
        return None
    # A mapping begins at a multiple of the page size at or below the array's own offset.
    granularity = mmap.ALLOCATIONGRANULARITY
    position = mapped.offset - mapped.offset % granularity + low - start
    if mapped.mode == "r":
        mode = "r"
    return path, identity, mode, position, encode_spec(spec_of(array)), type(array) is np.memmap


_open_files: OrderedDict[tuple[str, Identity, str], np.memmap[Any, Any]] = OrderedDict()
_open_files_lock = threading.Lock()


def open_view(
    path: str, identity: Identity, mode: str, position: int, spec_bytes: bytes, is_memmap: bool
) -> Array:
    """Open what `reference_to` described.

    Raises
    ------
    StaleReference
        If the file is gone, is another one now, or has become too short.
    """
    spec = decode_spec(spec_bytes)
    key = (path, identity, mode)
    try:
        status = os.stat(path)
        if (status.st_dev, status.st_ino) != identity:
            raise StaleReference(f"{path} is not the file any more that was memory-mapped and sent")
        with _open_files_lock:
            root = _open_files.get(key)
            if root is None or root.nbytes < status.st_size:
                root = np.memmap(path, np.uint8, mode)  # type: ignore[call-overload]
                _open_files[key] = root
            _open_files.move_to_end(key)
            while len(_open_files) > MAX_OPEN_FILES:
                _open_files.popitem(last=False)
    except (OSError, ValueError) as error:
        if isinstance(error, ShmError):
            raise
        raise StaleReference(f"cannot map {path}, which was memory-mapped and sent: {error}") from error
    # A mapping reaches behind the end of a file that shrank, and reading there is SIGBUS.
    usable: Bytes = root[: status.st_size].view(np.ndarray)
    try:
        array = view(usable, spec, position)
    except ShmError as error:
        raise StaleReference(f"{path} has become too short: {status.st_size} bytes") from error
    if is_memmap:
        array = array.view(np.memmap)
        array.__array_finalize__(root)
    return array


def forget_files() -> None:
    """Drop the cache of open files; mappings with live views stay."""
    with _open_files_lock:
        _open_files.clear()


if hasattr(os, "register_at_fork"):

    def _after_fork() -> None:
        global _open_files_lock
        _open_files_lock = threading.Lock()

    os.register_at_fork(after_in_child=_after_fork)
