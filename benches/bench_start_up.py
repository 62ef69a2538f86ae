"""What the first use costs: the import, and an engine until its first result.

    python -c "import numpy"              beside  python -c "import shmengine"
    2 x python -c "import numpy" at once  beside  Engine(2) ... first result

Processes of their own each time; files are in the page cache after the warm-up round.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import pytest

from shmengine.bench.work import Starter

NAMES = "Engine, shmengine.Ring, shmengine.Queue, shmengine.map_blocks"  # names are loaded when first used


@pytest.fixture
def starter() -> Iterator[Starter]:
    with Starter() as starter:
        yield starter


def test_import(starter: Starter, compare: Any, targets: Any) -> None:
    """`import shmengine`, and the use of its names, over `import numpy`."""

    def run(source: str) -> None:
        with starter.python(source) as process:
            assert process.wait() == 0  # with a limit it looks every 50 ms

    result = compare(
        {
            "import shmengine, all names": lambda: run(f"import shmengine; shmengine.{NAMES}"),
            "import shmengine": lambda: run("import shmengine"),
            "import numpy": lambda: run("import numpy"),
        },
        repeats=25,
        unit="a process",
    )

    def over_numpy(name: str) -> float:
        pairs = zip(result.seconds[name], result.seconds["import numpy"], strict=True)
        return statistics.median(ours - theirs for ours, theirs in pairs) * 1e3

    loaded = over_numpy("import shmengine, all names")
    targets.at_most("import shmengine, all names used, over import numpy", loaded, 50, " ms")
    alone = over_numpy("import shmengine")
    targets.note("import shmengine alone (loads no numpy), over import numpy", f"{alone:.3g} ms")


def test_first_result(starter: Starter, compare: Any, targets: Any) -> None:
    """An engine of two workers, until it has answered; closing it is not counted."""
    result = compare(
        {"Engine(2), first result": starter.engine, "two bare imports of numpy": starter.bare}, repeats=15
    )
    slower = 1 / result.ratio("Engine(2), first result", "two bare imports of numpy")
    targets.at_most("engine start over two bare python -c 'import numpy'", slower, 2, "x")
