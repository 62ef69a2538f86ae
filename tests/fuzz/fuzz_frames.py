"""atheris over the reader of frames: ``python tests/fuzz/fuzz_frames.py [libFuzzer options] FOLDER...``

Needs ``pip install -e .[fuzz]``. What it finds goes into tests/fuzz/crashes/fuzz_frames.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(include=["shmengine"]):
    from shmengine import arrays, codec, plain  # noqa: F401
    from shmengine.workers import messages  # noqa: F401
from tests.helpers.frames import check_bytes

if __name__ == "__main__":
    atheris.Setup(sys.argv, check_bytes)
    atheris.Fuzz()
