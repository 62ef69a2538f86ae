"""What a part of the soak has to say: two counts to be proud of, and others that must be zero."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass
class Report:
    """Counts of one part, or of all together (they add up)."""

    kills: int = 0
    """Processes killed with SIGKILL whose partners went on."""
    messages: int = 0
    """Messages that arrived, or tasks whose outcome did."""
    redelivered: int = 0
    """Messages delivered again because the one who had leased them died: promised, and marked as such."""
    lost: int = 0
    """Messages whose commit returned, or tasks, that nobody ever saw."""
    duplicated: int = 0
    """Messages delivered again without such a death, or without saying so."""
    wrong: int = 0
    """Messages torn or never sent, results that differ from what they should be."""
    hung: int = 0
    """Times that nothing went on any more, or somebody did not end."""
    bytes_leaked: int = 0
    """Bytes in /dev/shm or mapped from there, and bytes of an arena that could not be had again, at the end."""
    fds_leaked: int = 0
    """File descriptors that were not there at the start."""
    rescued_wakeups: int = 0
    """Waits that ended by the periodic second look instead of a wake-up."""
    failures: list[str] = field(default_factory=list)
    """Whatever else went wrong, in words."""

    PROUD = ("kills", "messages", "redelivered")

    @property
    def passed(self) -> bool:
        """Whether everything that must be zero is."""
        return not any(value for name, value in self.as_dict().items() if name not in self.PROUD)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, counts: dict[str, Any]) -> Self:
        """Make a report of what `as_dict` returned; what is missing is zero."""
        return cls(**counts)

    def __iadd__(self, other: Report) -> Self:
        for each in dataclasses.fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
        return self

    def __str__(self) -> str:
        counts = self.as_dict()
        failures = counts.pop("failures")
        shown = ", ".join(f"{name} {value:,}" for name, value in counts.items())
        return "\n".join([shown, *(f"  {line}" for failure in failures for line in failure.splitlines())])
