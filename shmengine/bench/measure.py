"""Two processes and a link between them; and all pairs of a plan, in interleaved rounds.

one way       left: put put put ...          right: take take take ...        from first put to last take
round trip    left: put take put take ...    right: take put take put ...     each timed by itself
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Self

import numpy as np

from shmengine.bench.crew import Crew, CrewError, Handler, Member, cores
from shmengine.bench.plan import Mode, Plan, slots_for
from shmengine.bench.registry import Target
from shmengine.bench.results import Row, Spread, spread
from shmengine.bench.target import End, Link, Side

__all__ = ["Interrupted", "Kind", "Pair", "Round", "Wrong", "measure"]

Kind = Literal["one way", "round trip"]
KINDS: Final[tuple[Kind, ...]] = ("one way", "round trip")
MAX_COUNT: Final = 1 << 20
MAX_GROWTH: Final = 16  # of a count, from what a shorter run suggests
CALIBRATIONS: Final = 5
PATIENT: Final = 1.3  # times the time that a run should take; then what is left is left out
OUT_OF_TIME: Final = "there was no time left"
ENOUGH_TRIPS: Final = 100  # below, no 99th percentile is told


class Interrupted(KeyboardInterrupt):
    """Measuring was, and some sizes were done.

    Attributes
    ----------
    rows : list of Row
        What they have shown.
    sizes : int
        How many they were.
    """

    def __init__(self, rows: list[Row], sizes: int) -> None:
        super().__init__(rows, sizes)
        self.rows, self.sizes = rows, sizes


class Wrong(CrewError):
    """A message was not the one expected."""


@dataclass(frozen=True)
class Round:
    """What one round of a pair has shown.

    Attributes
    ----------
    count : int
        Messages, or round trips.
    seconds : float
        For all of them.
    cpu_seconds : float
        Of both processes, with all their threads.
    trips : ndarray of float64
        Seconds of each round trip; empty for one way.
    """

    count: int
    seconds: float
    cpu_seconds: float
    trips: np.ndarray[Any, np.dtype[np.float64]]


class Pair:
    """Two processes with a link between them; a context manager. It owns the link.

    Raises
    ------
    CrewError
        The link could not be opened.
    """

    def __init__(self, link: Link, *, pinned: bool = True, patience: float = 20.0) -> None:
        self.link = link
        self._number = 0  # of the next message, in both directions; goes on through all rounds
        self._broken: CrewError | None = None
        try:
            members = [_member(link, "left"), _member(link, "right")]
            self._crew = Crew(members, cores(2) if pinned else (), patience)
        except BaseException:
            link.close()
            raise

    def run(self, kind: Kind, mode: Mode, count: int) -> Round:
        """Send `count` messages through, or round and back.

        Raises
        ------
        Wrong
            A message was lost, doubled, early, stale or torn.
        CrewError
            A process died or hung. From then on every call raises the same.
        """
        if self._broken is not None:
            raise self._broken
        try:
            return self._run(kind, mode, count)
        except CrewError as error:
            self._broken = error
            raise

    def _run(self, kind: Kind, mode: Mode, count: int) -> Round:
        request = (kind, mode, self._number, count)
        left, right = self._crew.ask(request, request)
        self._number += count
        for reply in (left, right):
            if reply["wrong"] is not None:
                raise Wrong(f"message {reply['wrong']} arrived wrong, or another one in its place")
        end = right["end"] if kind == "one way" else left["end"]
        return Round(count, end - left["start"], left["cpu"] + right["cpu"], left["trips"])

    def one_way(self, mode: Mode, count: int) -> int:
        """Send `count` messages through; return it. For comparisons that time by themselves."""
        return self.run("one way", mode, count).count

    def round_trips(self, mode: Mode, count: int) -> int:
        """Send `count` messages there and back; return it."""
        return self.run("round trip", mode, count).count

    def close(self) -> None:
        """End both processes, and remove the link."""
        try:
            self._crew.close()
        finally:
            self.link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _member(link: Link, side: Side) -> Member:
    def member() -> tuple[Handler, Callable[[], None]]:
        end = link.open(side)
        gc.collect()
        gc.freeze()  # what main has allocated is not walked again and again

        def answer(request: tuple[Kind, Mode, int, int]) -> dict[str, Any]:
            return _answer(end, side, *request)

        return answer, end.close

    return member


def _answer(end: End, side: Side, kind: Kind, mode: Mode, first: int, count: int) -> dict[str, Any]:
    """One side's part in a round."""
    put, take = end.put[mode], end.take[mode]
    numbers = range(first, first + count)
    trips = np.empty(0)
    wrong = None
    cpu = time.process_time()
    start = time.perf_counter()
    if kind == "one way" and side == "left":
        for number in numbers:
            put(number)
    elif kind == "one way":
        for number in numbers:
            if not take(number) and wrong is None:
                wrong = number
    elif side == "left":
        clock, times = time.perf_counter, [start]
        for number in numbers:
            put(number)
            if not take(number) and wrong is None:
                wrong = number
            times.append(clock())
        trips = np.diff(times)
    else:
        for number in numbers:
            if not take(number) and wrong is None:
                wrong = number
            put(number)
    stop = time.perf_counter()
    return {"start": start, "end": stop, "cpu": time.process_time() - cpu, "wrong": wrong, "trips": trips}


# --- a whole plan ---------------------------------------------------------------------------------


@dataclass
class _Cell:
    """One target at one size in one mode: what its rounds have shown so far."""

    target: Target
    mode: Mode
    nbytes: int
    slots: int
    pair: Pair | None
    error: str | None = None
    counts: dict[Kind, int] = field(default_factory=dict)
    rounds: dict[Kind, list[Round]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def row(self) -> Row:
        ways, trips = self.rounds["one way"], self.rounds["round trip"]
        all_trips = np.concatenate([each.trips for each in trips]) if trips else np.empty(0)
        return Row(
            target=self.target.name,
            group=self.target.group,
            mode=self.mode,
            nbytes=self.nbytes,
            slots=self.slots,
            rate=_spread(each.count / each.seconds for each in ways),
            cpu=_spread(each.cpu_seconds / each.count for each in ways),
            latency=_spread(float(np.median(each.trips)) for each in trips),
            p99=float(np.quantile(all_trips, 0.99)) if len(all_trips) >= ENOUGH_TRIPS else None,
            rounds=len(ways),
            messages=sum(each.count for each in ways),
            trips=len(all_trips),
            error=self.error,
        )


@dataclass(frozen=True)
class _Clock:
    """Until when a size should be done, and when the whole run must be."""

    share: float
    end: float

    def is_late(self) -> bool:
        """Whether only the least is still done."""
        return time.monotonic() > self.share

    def is_over(self) -> bool:
        """Whether nothing more is begun."""
        return time.monotonic() > self.end


def _spread(values: Iterator[float]) -> Spread | None:
    found = list(values)
    return spread(found) if found else None


def measure(
    plan: Plan, targets: Sequence[Target], progress: Callable[[int, int, str], None] = lambda *_: None
) -> list[Row]:
    """Measure all targets at all sizes.

    Parameters
    ----------
    plan : Plan
    targets : sequence of Target
    progress : callable, optional
        ``progress(done, total, text)``, often.

    Returns
    -------
    list of Row
        One for each target, mode and size that goes together, in this order of the sizes. What failed has an error.

    Raises
    ------
    Interrupted
        By Ctrl-C, when some sizes were done.
    """
    start = time.monotonic()
    end = start + PATIENT * (plan.total_seconds or math.inf)
    rows: list[Row] = []
    steps = len(plan.sizes) * (plan.repeats + 1)
    given_up: set[str] = set()  # targets that hung or crashed are not tried again
    for number, nbytes in enumerate(plan.sizes):
        share = math.inf
        if plan.total_seconds is not None:
            left = plan.total_seconds - (time.monotonic() - start)
            share = time.monotonic() + left / (len(plan.sizes) - number)
        done = number * (plan.repeats + 1)

        def report(repeat: int, text: str, done: int = done) -> None:
            progress(done + repeat, steps, text)

        tried = [target for target in targets if target.name not in given_up]
        try:
            measured = _measure_size(plan, tried, nbytes, _Clock(share, end), report)
        except KeyboardInterrupt:
            if number == 0:
                raise
            raise Interrupted(rows, number) from None
        given_up |= {row.target for row in measured if row.error not in (None, OUT_OF_TIME)}
        rows += measured
    progress(steps, steps, "done")
    return rows


def _measure_size(
    plan: Plan,
    targets: Sequence[Target],
    nbytes: int,
    clock: _Clock,
    report: Callable[[int, str], None],
) -> list[Row]:
    with _open(plan, targets, nbytes, report) as cells:
        for cell in cells:
            for kind in KINDS:
                report(0, f"{cell.target.name}: warming up")
                if clock.is_over() and cell.error is None:
                    cell.error = OUT_OF_TIME
                _calibrate(cell, kind, 0.0 if clock.is_late() else plan.round_seconds)
        for repeat in range(plan.repeats):
            if repeat and clock.is_late():
                break
            for cell in cells:
                for kind in KINDS:
                    report(1 + repeat, cell.target.name)
                    _run(cell, kind)
    return [cell.row() for cell in cells]


@contextmanager
def _open(
    plan: Plan, targets: Sequence[Target], nbytes: int, report: Callable[[int, str], None]
) -> Iterator[list[_Cell]]:
    """All pairs of one size: they live side by side, so that their rounds can take turns."""
    slots = slots_for(nbytes)
    cells: list[_Cell] = []
    pairs: list[Pair] = []
    try:
        for target in targets:
            report(0, f"{target.name}: starting")
            try:
                pair = Pair(target.link(nbytes, slots), pinned=plan.pinned, patience=plan.patience)
            except Exception as error:  # whatever a rival's package raises is its row's
                cells.append(_Cell(target, plan.modes[0], nbytes, slots, None, _text(error)))
                continue
            pairs.append(pair)
            cells += [
                _Cell(target, mode, nbytes, slots, pair) for mode in plan.modes if mode in pair.link.modes
            ]
        yield cells
    finally:
        for pair in pairs:
            pair.close()


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, CrewError) else f"{type(error).__name__}: {error}"


def _run(cell: _Cell, kind: Kind) -> None:
    """One round, after a short one that makes memory warm again."""
    if cell.pair is None or cell.error is not None:
        return
    try:
        if cell.pair.link.shares_memory:
            cell.pair.run(kind, cell.mode, 2 * cell.slots)
        cell.rounds[kind].append(cell.pair.run(kind, cell.mode, cell.counts[kind]))
    except CrewError as error:
        cell.error = str(error)


def _calibrate(cell: _Cell, kind: Kind, seconds: float) -> None:
    """Find how many messages a round has; this is the warm-up too."""
    if cell.pair is None or cell.error is not None:
        return
    count = least = 2 * cell.slots if cell.pair.link.shares_memory else 2  # it wraps in each round
    fastest = 0.0
    try:
        for tries in range(CALIBRATIONS):
            took = cell.pair.run(kind, cell.mode, count).seconds
            fastest = max(fastest, count / took)  # the first ones meet cold memory, and processes that sleep
            cell.counts[kind] = wanted = min(MAX_COUNT, max(least, int(fastest * seconds)))
            if wanted <= 2 * count and (tries >= 2 or took > 2 * seconds):
                break
            count = min(wanted, MAX_GROWTH * count)
    except CrewError as error:
        cell.error = str(error)
