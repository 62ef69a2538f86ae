"""What the first use costs: the import, and an engine until its first result.

    python -c "import numpy"              beside  python -c "import shmengine"
    2 x python -c "import numpy" at once  beside  Engine(2) ... first result

Processes of their own each time; files are in the page cache after the warm-up round.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import Any

import shmengine as shm


def python(source: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", source])


NAMES = "Engine, shmengine.Ring, shmengine.Queue, shmengine.map_blocks"  # names are loaded when first used


def test_import(compare: Any, targets: Any) -> None:
    """`import shmengine`, and the use of its names, over `import numpy`."""

    def run(source: str) -> None:
        with python(source) as process:
            assert process.wait(60) == 0

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

    targets.at_most(
        "import shmengine, with all names used, over import numpy",
        over_numpy(next(iter(result.seconds))),
        50,
        " ms",
    )
    targets.note("import shmengine alone, over import numpy", f"{over_numpy('import shmengine'):.3g} ms")


def test_first_result(compare: Any, targets: Any) -> None:
    """An engine of two workers, until it has answered; closing it is not counted."""
    made: list[shm.Engine] = []

    def ours() -> None:
        engine = shm.Engine(2)
        made.append(engine)
        assert engine.submit(abs, -3).result(60) == 3

    def two_bare() -> None:
        while made:
            made.pop().close()
        processes = [python("import numpy") for _ in range(2)]
        assert [process.wait(60) for process in processes] == [0, 0]

    try:
        result = compare({"Engine(2), first result": ours, "two bare imports of numpy": two_bare}, repeats=15)
    finally:
        while made:
            made.pop().close()
    slower = 1 / result.ratio("Engine(2), first result", "two bare imports of numpy")
    targets.at_most("engine start over two bare python -c 'import numpy'", slower, 2, "x")
