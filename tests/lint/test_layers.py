"""Imports only go down. This list is the one in docs/tour.md."""

from __future__ import annotations

import ast

import pytest

from tests.helpers.sources import PACKAGE, ROOT, python_files

LAYERS = {
    8: ("cli", "bench", "__main__"),
    7: ("futures", "joblib", "dask"),
    6: ("engine",),
    5: ("workers",),
    4: ("queues", "channels"),
    3: (
        "leases",
        "attached",
        "ring",
        "codec",
        "exceptions",
        "pickling",
        "culprit",
        "reducers",
        "filemap",
        "plain",
        "stats",
        "crossings",
    ),
    2: ("region", "arena", "arrays", "descriptors", "tokens"),
    1: ("_native",),
    0: ("errors", "config", "interrupts", "threads"),
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}
TOP = "__init__"  # re-exports; imported by nobody inside


def top_module(path):
    """Name of the module right below shmengine that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(path, text):
    """(module right below shmengine, line) of every import of ours, lazy ones too."""
    package = ["shmengine", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            modules = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for parts in modules:
            if parts[0] == "shmengine":
                yield parts[1] if len(parts) > 1 else TOP, node.lineno


def violations(path, text):
    module = top_module(path)
    if module == TOP:
        return
    for imported, line in imported_modules(path, text):
        if imported not in LAYER_OF:
            yield f"{path.name}:{line}: imports {imported} from the package itself, not from its module"
        elif LAYER_OF[imported] > LAYER_OF[module]:
            layers = f"layer {LAYER_OF[module]} imports layer {LAYER_OF[imported]}"
            yield f"{path.name}:{line}: {module} imports {imported}: {layers}"


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_has_a_layer_and_imports_only_go_down(path):
    assert top_module(path) in LAYER_OF or top_module(path) == TOP, "give it a layer here and in docs/tour.md"
    assert not list(violations(path, path.read_text()))


@pytest.mark.parametrize(
    "text",
    [
        "import shmengine.engine",
        "from shmengine.engine.api import Engine",
        "from shmengine import engine",
        "from . import engine",
        "from .engine import api",
        "def f():\n    from shmengine.workers import pool",
        "from shmengine import Engine",
        "import shmengine",
    ],
)
def test_this_test_sees(text):
    assert list(violations(PACKAGE / "ring.py", text))


@pytest.mark.parametrize(
    "text", ["import numpy", "from shmengine.errors import Closed", "from . import errors"]
)
def test_this_test_allows(text):
    assert not list(violations(PACKAGE / "ring.py", text))


def test_relative_imports_inside_subpackages_are_resolved():
    assert not list(
        violations(PACKAGE / "engine" / "api.py", "from .backend import Call\nfrom ..ring import Ring")
    )
    assert list(violations(PACKAGE / "workers" / "pool.py", "from ..engine import api"))


def test_the_tour_shows_the_same_list():
    tour = (ROOT / "docs" / "tour.md").read_text()
    for layer, names in LAYERS.items():
        rows = [line for line in tour.splitlines() if line.strip().startswith(f"{layer} ")]
        assert len(rows) == 1, f"layer {layer} has one row in docs/tour.md"
        for name in names:
            assert name in rows[0] or name == "__main__", f"{name} in row {layer} of docs/tour.md"
