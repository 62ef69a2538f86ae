"""Build the C core: everything else about the package is in pyproject.toml.

``SHMENGINE_SANITIZE=address|thread|undefined``, ``SHMENGINE_DEBUG=1`` and ``SHMENGINE_COVERAGE=1`` change
the compiler's flags; they are read by ``shmengine/_native/build.py``.
"""

from __future__ import annotations

import platform
import sys

import numpy as np
from setuptools import Extension, setup

MACHINES = ("x86_64", "aarch64")

if sys.platform != "linux" or platform.machine() not in MACHINES:
    sys.exit(
        f"shmengine runs on Linux on {' and '.join(MACHINES)} only; this is {platform.system()} on "
        f"{platform.machine()}. What there is to port: csrc (waiting, regions)."
    )

setup(
    cffi_modules=["shmengine/_native/build.py:ffi"],
    ext_modules=[
        Extension(
            "shmengine._native._handles",
            ["csrc/handles.c"],
            include_dirs=["csrc", np.get_include()],
            depends=["csrc/shmr.h", "csrc/shmr_status.h"],
            extra_compile_args=["-std=c11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden"],
        )
    ],
)
