"""What the benches should reach and did, with the environment; to and from JSON, and as a table for documents."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

FORMAT = "shmengine benches"


@dataclass
class Target:
    """One line of the table."""

    bench: str
    what: str
    value: str
    bound: str
    met: bool | None  # None: for information


@dataclass
class Reached:
    """A run of the benches."""

    environment: dict[str, str]
    targets: list[Target]

    def save(self, path: Path) -> None:
        """Write it for `read`."""
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `save` has written.

        Raises
        ------
        ValueError
            It is something else.
        """
        found = json.loads(path.read_text())
        if found.get("format") != FORMAT:
            raise ValueError(f"{path.name} is not of pytest benches --save-targets")
        return cls(found["environment"], [Target(**target) for target in found["targets"]])

    def markdown(self) -> str:
        """Write the table."""
        words = {True: "met", False: "**missed**", None: ""}
        lines = ["| bench | what | measured | target | |", "|---|---|---|---|---|"]
        lines += [f"| {t.bench} | {t.what} | {t.value} | {t.bound} | {words[t.met]} |" for t in self.targets]
        where = ", ".join(f"{name} {value}" for name, value in self.environment.items() if name != "pinned")
        return "\n".join(lines) + f"\n\nMeasured on: {where}.\n"
