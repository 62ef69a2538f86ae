"""Contestants that take turns, A B C A B C ...: medians of what they took, and of the ratios of the rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Comparison", "Contestant", "Each", "show_seconds"]

Contestant = Callable[[], "float | Each | None"]
"""Does some work, checks its own answer, and returns how much it did (None: one piece), or what each piece took."""


@dataclass(frozen=True)
class Each:
    """Seconds for one piece of work by the contestant's own clock: its median, say, which a pause does not move."""

    seconds: float


@dataclass
class Comparison:
    """What contestants did in the same rounds, A B C A B C ...; the first one is ours."""

    unit: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    work: dict[str, list[float]] = field(default_factory=dict)

    def run(self, name: str, contestant: Contestant) -> None:
        """Let one contestant run once."""
        start = time.perf_counter()
        done = contestant()
        seconds = time.perf_counter() - start
        if isinstance(done, Each):
            seconds, done = done.seconds, 1.0
        self.seconds.setdefault(name, []).append(seconds)
        self.work.setdefault(name, []).append(1.0 if done is None else float(done))

    def forget(self) -> None:
        """Drop what was measured so far (the warm-up)."""
        self.seconds.clear()
        self.work.clear()

    def costs(self, name: str) -> list[float]:
        """Seconds for one piece of work, round by round."""
        return [s / w for s, w in zip(self.seconds[name], self.work[name], strict=True)]

    def cost(self, name: str) -> float:
        """Median of the seconds for one piece of work."""
        return statistics.median(self.costs(name))

    def ratio(self, ours: str, *rivals: str) -> float:
        """Return how many times faster `ours` is: the median over the rounds; of several rivals, to the best one."""
        mine = self.costs(ours)
        return min(
            statistics.median(b / a for a, b in zip(mine, self.costs(rival), strict=True)) for rival in rivals
        )

    def spread(self, name: str) -> float:
        """Half the distance of the quartiles, as a part of the median."""
        costs = self.costs(name)
        if len(costs) < 2:
            return 0.0
        low, _, high = statistics.quantiles(costs, n=4, method="inclusive")
        return (high - low) / 2 / statistics.median(costs)

    def lines(self, bytes_each: int = 0) -> list[str]:
        """Return the table as text: cost, rate, spread, and how ours compares."""
        names = list(self.seconds)
        width = max(map(len, names))
        rows = []
        for name in names:
            cost = self.cost(name)
            rate = f"{bytes_each / cost / 1e9:8.2f} GB/s" if bytes_each else f"{1 / cost:12,.1f}/s"
            ours = "" if name == names[0] else f"   ours is {self.ratio(names[0], name):6.2f}x as fast"
            spread = f"± {self.spread(name):4.0%}"
            rows.append(f"{name:<{width}}  {show_seconds(cost):>9} {self.unit}  {rate}  {spread}{ours}")
        return rows

    def summary(self) -> dict[str, Any]:
        """Return the same for machines."""
        first = next(iter(self.seconds))
        return {
            name: {
                "median_seconds": self.cost(name),
                "spread": self.spread(name),
                "ratio": self.ratio(first, name),
                "rounds": self.costs(name),
            }
            for name in self.seconds
        }


def show_seconds(seconds: float) -> str:
    """Write a duration with a fitting unit."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
