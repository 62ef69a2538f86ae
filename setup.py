"""Build the C core: everything else about the package is in pyproject.toml.

``SHMENGINE_SANITIZE=address|thread|undefined``, ``SHMENGINE_DEBUG=1`` and ``SHMENGINE_COVERAGE=1`` change
the compiler's flags; they are read by ``shmengine/_native/build.py``.
"""

from __future__ import annotations

import platform
import sys

from setuptools import setup

MACHINES = ("x86_64", "aarch64")

if sys.platform != "linux" or platform.machine() not in MACHINES:
    sys.exit(
        f"shmengine runs on Linux on {' and '.join(MACHINES)} only; this is {platform.system()} on "
        f"{platform.machine()}. What there is to port: csrc (waiting, regions)."
    )

setup(cffi_modules=["shmengine/_native/build.py:ffi"])
