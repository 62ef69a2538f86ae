"""Other interpreters of this machine."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

PLACES = (".pyenv/versions/{0}.*/bin", ".local/share/uv/python/cpython-{0}.*/bin")
"""Below the home directory: where pyenv and uv keep theirs."""


def interpreter(version: str) -> str | None:
    """Return an interpreter of this version ("3.12"), if one is installed: that on the path, or the newest."""
    for candidate in _candidates(version):
        # pyenv puts programs on the path that only say which versions it has.
        if subprocess.run([candidate, "-c", ""], check=False, capture_output=True).returncode == 0:
            return candidate
    return None


def _candidates(version: str) -> Iterator[str]:
    if (found := shutil.which(f"python{version}")) is not None:
        yield found
    for place in PLACES:
        pattern = f"{place.format(version)}/python{version}"
        yield from map(str, sorted(Path.home().glob(pattern), key=_micro, reverse=True))


def _micro(path: Path) -> tuple[int, ...]:
    # "3.13.10" is newer than "3.13.9"; uv's directories are named "cpython-3.13.10-linux-x86_64-gnu".
    name = path.parents[1].name.removeprefix("cpython-").partition("-")[0]
    return tuple(int(part) if part.isdecimal() else -1 for part in name.split("."))
