"""Which mechanism to take, by message size, and why: from the numbers of one run alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from shmengine.bench.plan import show_size
from shmengine.bench.results import Row

__all__ = ["Band", "bands", "recommend"]

SIMPLEST_FIRST: Final = ("pipe", "mqueue", "socket", "shm")
"""Between mechanisms that are about as good, the one with the fewest limits to know about."""
ABOUT_AS_GOOD: Final = 1.25
PAYS: Final = 2.0  # a mechanism stops paying where another one is so many times as fast
WORTH_SAYING: Final = 1.2
ENOUGH_ROUNDS: Final = 3  # for quartiles that tell anything
NOISY: Final = 0.25  # half the distance of the quartiles, as a part of the median


@dataclass(frozen=True)
class Band:
    """Neighbouring sizes for which the same mechanism is the one to take; `choice` is its row at each of them."""

    mechanism: str
    choice: tuple[Row, ...]

    @property
    def first(self) -> int:
        """The smallest size, in bytes."""
        return self.choice[0].nbytes

    @property
    def last(self) -> int:
        """The largest size, in bytes."""
        return self.choice[-1].nbytes


def bands(rows: Iterable[Row]) -> list[Band]:
    """Choose for each size, by throughput and round trip of ``send`` and ``receive``; join what is the same.

    A mechanism that is within 25 % of the best in both is good enough: of those the simplest is taken. If none is,
    the one that is least behind, in both together.
    """
    chosen: list[Row] = []
    for _, at_size in groupby(_sent(rows), key=lambda row: row.nbytes):
        candidates = sorted(at_size, key=lambda row: SIMPLEST_FIRST.index(row.target))
        rate, latency = max(map(_rate, candidates)), min(map(_latency, candidates))
        behind = [(rate / _rate(row), _latency(row) / latency) for row in candidates]
        good = [row for row, each in zip(candidates, behind, strict=True) if max(each) <= ABOUT_AS_GOOD]
        products = [slower * later for slower, later in behind]
        chosen.append(good[0] if good else candidates[products.index(min(products))])
    return [Band(name, tuple(group)) for name, group in groupby(chosen, key=lambda row: row.target)]


def recommend(rows: Sequence[Row], load_per_core: float = 0.0) -> list[str]:
    """Say it in sentences.

    Parameters
    ----------
    rows : sequence of Row
    load_per_core : float, optional
        Before the run began.

    Returns
    -------
    list of str
        Empty if no two mechanisms were measured.
    """
    sent = _sent(rows)
    if len({row.target for row in sent}) < 2:
        return []
    found = bands(rows)
    sentences = [_sentence(band, sent, alone=len(found) == 1) for band in found]
    sentences += _where_the_pipe_stops(sent)
    sentences += _in_place(rows)
    sentences += _rivals(rows)
    sentences.append("To another machine only the socket reaches.")
    if load_per_core > 0.5 or any(_spread(row) > NOISY for row in sent):
        sentences.append("The machine was not quiet: repeat this before you rely on it.")
    return sentences


def _sent(rows: Iterable[Row]) -> list[Row]:
    """The mechanisms' whole rows, of arrays that are sent; by size."""
    whole = (
        row
        for row in rows
        if row.group == "mechanism" and row.mode == "copy" and row.error is None and row.rate and row.latency
    )
    return sorted(whole, key=lambda row: row.nbytes)


def _rate(row: Row) -> float:
    assert row.rate is not None
    return row.rate.median


def _latency(row: Row) -> float:
    assert row.latency is not None
    return row.latency.median


def _spread(row: Row) -> float:
    assert row.rate is not None
    return (row.rate.high - row.rate.low) / 2 / row.rate.median


def _sentence(band: Band, sent: Sequence[Row], *, alone: bool) -> str:
    if alone:
        where = "At all sizes"
    elif band.first == sent[0].nbytes:
        where = f"Up to {show_size(band.last)}"
    elif band.last == sent[-1].nbytes:
        where = f"From {show_size(band.first)}"
    elif band.first == band.last:
        where = f"At {show_size(band.first)}"
    else:
        where = f"From {show_size(band.first)} to {show_size(band.last)}"
    return f"{where}: {band.mechanism}. {_why(band, sent)}"


def _why(band: Band, sent: Sequence[Row]) -> str:
    """Compare with the strongest of the others, where the difference is largest."""
    leads = []
    for row in band.choice:
        others = [other for other in sent if other.nbytes == row.nbytes and other.target != row.target]
        if others:
            best = max(others, key=_rate)
            leads.append((_rate(row) / _rate(best), row, best))
    if not leads:
        return "Nothing else was measured there."
    lead, row, best = max(leads, key=lambda each: each[0])
    size = show_size(row.nbytes)
    if lead < 1:
        quicker = min((other for other in sent if other.nbytes == row.nbytes), key=_latency)
        if quicker is row:
            return (
                f"It has the shortest round trip, {_microseconds(row)} at {size}; {best.target} moves more"
                f" ({1 / lead:.2g} times)."
            )
        return f"It is the simplest, and at {size} within {max(1 / lead - 1, 0):.0%} of {best.target}."
    text = f"At {size} it passes {_bandwidth(row)}, {lead:.3g} times as much as {best.target} ({_bandwidth(best)})"
    trip = _latency(best) / _latency(row)
    text += f"; a round trip takes {_microseconds(row)}, not {_microseconds(best)}" if trip > 1 else ""
    if row.cpu is not None and best.cpu is not None and best.cpu.median / row.cpu.median > WORTH_SAYING:
        text += f"; it needs {row.cpu.median / best.cpu.median:.0%} of the CPU time"
    return text + "."


def _where_the_pipe_stops(sent: Sequence[Row]) -> list[str]:
    pipe = {row.nbytes: row for row in sent if row.target == "pipe"}
    ahead: list[tuple[float, Row]] = []
    for nbytes, row in pipe.items():
        others = [other for other in sent if other.nbytes == nbytes and other.target != "pipe"]
        if others:
            best = max(others, key=_rate)
            ahead.append((_rate(best) / _rate(row), best))
    if not ahead:
        return []
    losing = [best for lead, best in ahead if lead >= PAYS]
    if not losing:
        return [f"The pipe pays at all these sizes: nothing is {PAYS:g} times as fast."]
    # From where on it loses for good; a single size in the middle is no boundary.
    lost = next(n for n in range(len(ahead) + 1) if all(lead >= PAYS for lead, _ in ahead[n:]))
    if lost == len(ahead):
        return []
    lead, best = ahead[lost]
    size = show_size(best.nbytes)
    if lost == 0:
        text = f"The pipe never pays here: at {size} already {best.target} passes {lead:.2g} times as many messages."
    else:
        text = f"The pipe stops paying at {size}: from there on {best.target} is twice as fast, or more."
    return [text]


def _in_place(rows: Iterable[Row]) -> list[str]:
    copied = {row.nbytes: _rate(row) for row in _sent(rows) if row.target == "shm"}
    gains = [
        (_rate(row) / copied[row.nbytes], row.nbytes)
        for row in rows
        if row.target == "shm" and row.mode == "block" and row.rate and row.nbytes in copied
    ]
    if not gains or max(gains)[0] < WORTH_SAYING:
        return []
    gain, nbytes = max(gains)
    where = f"up to {gain:.2g} times as fast over shm ({show_size(nbytes)})"
    return [f"Messages that are filled and read in place (claim, lease) pass {where}."]


def _rivals(rows: Sequence[Row]) -> list[str]:
    """Be honest about who is faster; the quartiles must not overlap, and there must be some."""
    faster: dict[tuple[str, str], tuple[float, int]] = {}
    for row in rows:
        if row.group != "rival" or row.rate is None or row.rounds < ENOUGH_ROUNDS:
            continue
        ours = [
            r for r in rows if r.group != "rival" and r.nbytes == row.nbytes and r.mode == row.mode and r.rate
        ]
        if not ours:
            continue
        best = max(ours, key=_rate)
        assert best.rate is not None
        lead = _rate(row) / _rate(best)
        if lead >= WORTH_SAYING and row.rate.low > best.rate.high:
            key = row.target.partition(" (")[0], row.mode
            faster[key] = max(faster.get(key, (0.0, 0)), (lead, row.nbytes))
    if not faster:
        return []
    named = ", ".join(
        f"{name} ({lead:.2g} times at {show_size(nbytes)}{'' if mode == 'copy' else ', in place'})"
        for (name, mode), (lead, nbytes) in faster.items()
    )
    return [f"Faster than anything of ours that does the same: {named}."]


def _bandwidth(row: Row) -> str:
    bandwidth = row.bytes_per_second or 0.0
    return f"{bandwidth / 1e9:.2g} GB/s" if bandwidth >= 1e9 else f"{bandwidth / 1e6:.3g} MB/s"


def _microseconds(row: Row) -> str:
    value = _latency(row) * 1e6
    return f"{value:,.0f} us" if value >= 100 else f"{value:.2g} us"
