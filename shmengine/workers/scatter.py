"""Blocks of arrays as bare bytes: what main says once for all of them, and how a worker runs one.

::

    main ── BLOCK ──► task ring      the bytes of one block of each array; spec: which `Plan`
    main ◄── PLACED ── result ring   the worker wrote the result to its place, or it is named by reference

Anything else (an error, a result that does not fit) comes back as the result of an ordinary task.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from shmengine.arena import Arena
from shmengine.arrays import Bytes, SharedReference, decode_spec, is_alone, view
from shmengine.codec import copy_array, crc32c_of

__all__ = ["BLOCK_SPEC", "PLACED_SPEC", "Flat", "Plan", "PlanRunner", "Target"]

BLOCK_SPEC = struct.Struct("<QQQQ")
"""Of a block: reference (region, block, generation) of its plan; tag of the message with block 0."""
PLACED_SPEC = struct.Struct("<QQQ")
"""Of an answer: bytes, offset in the region and (with a payload check) checksum of a result that main is to copy;
or 0, 0 and the bytes that are in their place."""

_ALIGNMENT = 64


class Flat(NamedTuple):
    """An array whose blocks travel as bytes: one behind the other in memory, `axis` the slowest of its dimensions."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    axis: int

    @property
    def order(self) -> Literal["C", "F"]:
        """Order in memory; either, if there is one dimension."""
        return "F" if self.axis else "C"

    def block_shape(self, rows: int) -> tuple[int, ...]:
        """Return the shape of a block of so many positions on the axis."""
        return (*self.shape[: self.axis], rows, *self.shape[self.axis + 1 :])


class Target(NamedTuple):
    """The array that results go to."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    axis: int
    order: str
    """In which a result must be contiguous to be named by reference; empty: workers write it themselves."""
    reference: SharedReference | None
    """If workers can reach it."""
    spec: bytes


class Plan(NamedTuple):
    """All that the blocks of one call have in common."""

    function: Any
    entropy: Any
    private: bool
    """Whether the function may write into its arguments."""
    kwargs: dict[str, Any]
    arrays: list[tuple[Any, int]]
    """For each array a `Flat`, or an array that is cut where it is read (by reference); and the axis."""
    length: int
    rows: int
    before: int
    after: int
    target: Target | None
    """None: not known, or not to be reached; results come back as values."""


class PlanRunner:
    """Runs blocks of one plan, in a worker."""

    def __init__(self, plan: Plan, fn: Callable[..., Any], arena: Arena, payload_check: int) -> None:
        self.fn = fn
        self.frame: Bytes | None = None
        self.used = time.perf_counter_ns()
        self.entropy = plan.entropy
        self.private = plan.private
        self.kwargs = plan.kwargs
        self._plan = plan
        self._arena = arena
        self._payload_check = payload_check
        target = plan.target
        if target is not None:
            self._target = target
            self._target_spec = decode_spec(target.spec)
            self._rest = target.shape[: target.axis] + target.shape[target.axis + 1 :]

    def span(self, index: int) -> tuple[int, int, int, int]:
        """Return start and stop of a block on the axis, and its ghost cells before and after."""
        plan = self._plan
        start = index * plan.rows
        stop = min(start + plan.rows, plan.length)
        return start, stop, min(plan.before, start), min(plan.after, plan.length - stop)

    def blocks(self, index: int, root: Bytes) -> list[np.ndarray[Any, Any]]:
        """Return block `index` of every array; `root` are the bytes that came."""
        start, stop, before, after = self.span(index)
        blocks = []
        at = 0
        for array, axis in self._plan.arrays:
            if type(array) is Flat:
                at = -(-at // _ALIGNMENT) * _ALIGNMENT
                block = np.ndarray(
                    array.block_shape(before + stop - start + after), array.dtype, root, at, None, array.order
                )
                at += block.nbytes
            else:
                block = array[(slice(None),) * axis + (slice(start - before, stop + after),)]
            blocks.append(block)
        return blocks

    def place(self, index: int, results: list[Any]) -> tuple[int, int, int, SharedReference | None] | None:
        """Write the result to its place, or name it; None if it is not just what belongs there.

        One that the function keeps is not named: it may be written to again.

        Parameters
        ----------
        results : list
            With the result, which it alone refers to.

        Returns
        -------
        nbytes, offset, check, reference
            With a reference, where in the region the result is, its checksum and what to hold it by; without, it
            is in its place.
        """
        if self._plan.target is None or type(results[0]) is not np.ndarray:
            return None
        target = self._target
        alone = target.reference is not None or is_alone(results, 0)
        result = results[0]
        start, stop, before, after = self.span(index)
        axis, shape = target.axis, result.shape
        if (
            len(shape) != len(target.shape)
            or shape[axis] != before + stop - start + after
            or shape[:axis] + shape[axis + 1 :] != self._rest
            or result.dtype != target.dtype
        ):
            return None
        inner = result
        if before or after:
            inner = result[(slice(None),) * axis + (slice(before, before + stop - start),)]
        if target.reference is not None:
            with self._arena.borrowed(target.reference) as root:
                whole = view(root, self._target_spec, target.reference.offset)
                copy_array(whole[(slice(None),) * axis + (slice(start, stop),)], inner)
            return inner.nbytes, 0, 0, None
        if not alone or not (inner.flags.f_contiguous if target.order == "F" else inner.flags.c_contiguous):
            return None
        reference = self._arena.share(inner)
        if reference is None:
            return None
        check = crc32c_of(inner) if self._payload_check else 0
        return inner.nbytes, self._arena.offset_of(inner), check, reference
