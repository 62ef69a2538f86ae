"""What a run has shown: rows of numbers with the plan and the environment; to and from JSON, and to CSV."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Self

__all__ = ["FORMAT", "VERSION", "Promise", "Report", "Row", "Spread", "Work", "spread"]

FORMAT: Final = "shmengine bench"
VERSION: Final = 1


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of the rounds."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles of one value or more."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


@dataclass(frozen=True)
class Row:
    """One target at one size in one mode.

    Attributes
    ----------
    target, group, mode : str
    nbytes : int
        Of a message.
    slots : int
        Messages that can wait.
    rate : Spread or None
        Messages per second, one way.
    cpu : Spread or None
        CPU seconds of both processes together per message, one way.
    latency : Spread or None
        Seconds of a round trip with a message of this size each way; of the medians of the rounds.
    p99 : float or None
        Of all round trips together, if there were enough of them.
    rounds, messages, trips : int
        How many were measured, one way and round; and checked.
    error : str or None
        Why it was not measured, or not to the end.
    """

    target: str
    group: str
    mode: str
    nbytes: int
    slots: int
    rate: Spread | None
    cpu: Spread | None
    latency: Spread | None
    p99: float | None
    rounds: int
    messages: int
    trips: int
    error: str | None = None

    @property
    def name(self) -> str:
        """The target, and the mode if it is not the usual one."""
        return self.target if self.mode == "copy" else f"{self.target}, in place"

    @property
    def bytes_per_second(self) -> float | None:
        """Median of the bytes that pass, one way."""
        return None if self.rate is None else self.rate.median * self.nbytes

    @property
    def cpu_per_gib(self) -> float | None:
        """Median of the CPU seconds of both processes per GiB."""
        return None if self.cpu is None else self.cpu.median / self.nbytes * 2**30

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """Read what `dataclasses.asdict` has written."""
        values = {each.name: row[each.name] for each in fields(cls)}
        for name in ("rate", "cpu", "latency"):
            if values[name] is not None:
                values[name] = Spread(**values[name])
        return cls(**values)


@dataclass(frozen=True)
class Work:
    """The engine beside one other way to do the same.

    Attributes
    ----------
    what, rival : str
    ours, theirs : float
        Median of the seconds for one piece of work.
    ratio : Spread
        How many times as fast the engine is, within each round.
    rounds : int
    """

    what: str
    rival: str
    ours: float
    theirs: float
    ratio: Spread
    rounds: int

    @classmethod
    def from_dict(cls, work: Mapping[str, Any]) -> Self:
        """Read what `dataclasses.asdict` has written."""
        values = {each.name: work[each.name] for each in fields(cls)}
        return cls(**{**values, "ratio": Spread(**values["ratio"])})


@dataclass(frozen=True)
class Promise:
    """What one of the benches of the source tree has measured, and what it should reach.

    Attributes
    ----------
    bench, what : str
    value, bound : str
        With their units; no bound for what is there for information.
    met : bool or None
    """

    bench: str
    what: str
    value: str
    bound: str
    met: bool | None


@dataclass(frozen=True)
class Report:
    """A whole run.

    Attributes
    ----------
    environment : dict of str to str
    plan : dict
        What was asked for.
    missing : dict of str to str
        Targets that could not be measured at all, and why.
    rows : list of Row
    recommendation : list of str
        Sentences.
    work : list of Work
        Of a run that measured the engine; then there are no rows.
    promises : list of Promise
        Of a run of the benches; then there is nothing else.
    """

    environment: dict[str, str]
    plan: dict[str, Any]
    missing: dict[str, str]
    rows: list[Row]
    recommendation: list[str]
    work: list[Work] = field(default_factory=list)
    promises: list[Promise] = field(default_factory=list)

    def to_json(self) -> str:
        """Write it for programs."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` has written.

        Raises
        ------
        ValueError
            It is something else, or of another version.
        """
        try:
            found = json.loads(text)
            if found["format"] != FORMAT:
                raise ValueError(f"its format is {found['format']!r}")
            if found["version"] != VERSION:
                raise ValueError(f"its version is {found['version']}, this program reads {VERSION}")
            rows = [Row.from_dict(row) for row in found["rows"]]
            return cls(
                dict(found["environment"]),
                found["plan"],
                found["missing"],
                rows,
                list(found["recommendation"]),
                [Work.from_dict(work) for work in found["work"]],
                [Promise(**promise) for promise in found.get("promises", [])],
            )
        except (KeyError, TypeError, ValueError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"these are no results of `shmengine bench --json`: {why}") from error

    def to_csv(self) -> str:
        """Write the rows for spreadsheets: one line each, times in microseconds."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        if self.work:
            writer.writerow(CSV_COLUMNS_OF_WORK)
            writer.writerows([*_csv_cells_of_work(work)] for work in self.work)
            return out.getvalue()
        if self.promises:
            writer.writerow(field.name for field in fields(Promise))
            writer.writerows(asdict(promise).values() for promise in self.promises)
            return out.getvalue()
        writer.writerow(CSV_COLUMNS)
        for row in self.rows:
            writer.writerow([*_csv_cells(row)])
        return out.getvalue()


CSV_COLUMNS: Final = (
    "target",
    "group",
    "mode",
    "bytes",
    "messages_per_second",
    "messages_per_second_q1",
    "messages_per_second_q3",
    "bytes_per_second",
    "latency_us",
    "latency_us_q1",
    "latency_us_q3",
    "latency_us_p99",
    "cpu_us_per_message",
    "cpu_seconds_per_gib",
    "rounds",
    "messages",
    "trips",
    "error",
)


def _csv_cells(row: Row) -> list[object]:
    def parts(values: Spread | None, factor: float = 1.0) -> list[float | None]:
        if values is None:
            return [None, None, None]
        return [values.median * factor, values.low * factor, values.high * factor]

    return [
        row.target,
        row.group,
        row.mode,
        row.nbytes,
        *parts(row.rate),
        row.bytes_per_second,
        *parts(row.latency, 1e6),
        None if row.p99 is None else row.p99 * 1e6,
        parts(row.cpu, 1e6)[0],
        row.cpu_per_gib,
        row.rounds,
        row.messages,
        row.trips,
        row.error,
    ]


CSV_COLUMNS_OF_WORK: Final = (
    "work",
    "rival",
    "shmengine_us",
    "rival_us",
    "times_as_fast",
    "times_as_fast_q1",
    "times_as_fast_q3",
    "rounds",
)


def _csv_cells_of_work(work: Work) -> list[object]:
    times = (work.ours * 1e6, work.theirs * 1e6)
    return [work.what, work.rival, *times, work.ratio.median, work.ratio.low, work.ratio.high, work.rounds]
