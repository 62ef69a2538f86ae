"""What an installed package must bring along."""

from __future__ import annotations

from pathlib import Path

import shmengine

PACKAGE = Path(shmengine.__file__).parent


def test_types_come_along():
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "_native" / "_core.pyi").is_file()
    assert (PACKAGE / "_native" / "_handles.pyi").is_file()
