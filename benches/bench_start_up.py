"""What the first use costs: the import, and an engine until its first result.

    python -c "import numpy"              beside  python -c "import shmengine"
    2 x python -c "import numpy" at once  beside  Engine(2) ... first result

Processes of their own each time; files are in the page cache after the warm-up round.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

NAMES = "Engine, shmengine.Ring, shmengine.Queue, shmengine.map_blocks"  # names are loaded when first used

STARTER = """
import sys
import shmengine as shm

shm.Engine
print("ready", flush=True)
while sys.stdin.readline():
    engine = shm.Engine(2)
    assert engine.submit(abs, -3).result(60) == 3
    print("done", flush=True)
    sys.stdin.readline()
    engine.close()
    print("closed", flush=True)
"""


@pytest.fixture
def environment(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Bytecode is cached, as it is for users, whatever this shell says; the warm-up fills the cache."""
    cleared = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**cleared, "PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("bytecode"))}


def python(source: str, environment: Mapping[str, str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", source], env=environment, text=True, **options)


def test_import(environment: Mapping[str, str], compare: Any, targets: Any) -> None:
    """`import shmengine`, and the use of its names, over `import numpy`."""

    def run(source: str) -> None:
        with python(source, environment) as process:
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

    loaded = over_numpy("import shmengine, all names")
    targets.at_most("import shmengine, all names used, over import numpy", loaded, 50, " ms")
    alone = over_numpy("import shmengine")
    targets.note("import shmengine alone (loads no numpy), over import numpy", f"{alone:.3g} ms")


def test_first_result(environment: Mapping[str, str], compare: Any, targets: Any) -> None:
    """An engine of two workers, until it has answered; closing it is not counted."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with python(STARTER, environment, **pipes) as starter:
        assert starter.stdin is not None
        assert starter.stdout is not None
        assert starter.stdout.readline() == "ready\n"

        def tell(answer: str) -> None:
            starter.stdin.write("go on\n")  # type: ignore[union-attr]
            starter.stdin.flush()  # type: ignore[union-attr]
            assert starter.stdout.readline() == answer  # type: ignore[union-attr]

        def ours() -> None:
            tell("done\n")
            running.append(True)

        def two_bare() -> None:
            if running:
                running.pop()
                tell("closed\n")
            processes = [python("import numpy", environment) for _ in range(2)]
            assert [process.wait(60) for process in processes] == [0, 0]

        running: list[bool] = []
        result = compare({"Engine(2), first result": ours, "two bare imports of numpy": two_bare}, repeats=15)
        two_bare()
        starter.stdin.close()
        assert starter.wait(60) == 0
    slower = 1 / result.ratio("Engine(2), first result", "two bare imports of numpy")
    targets.at_most("engine start over two bare python -c 'import numpy'", slower, 2, "x")
