"""Build the C core: everything else about the package is in pyproject.toml.

``SHMENGINE_SANITIZE=address|thread|undefined``, ``SHMENGINE_DEBUG=1``, ``SHMENGINE_COVERAGE=1`` and
``SHMENGINE_FAULT_POINTS=1`` change what is compiled; they are read by ``shmengine/_native/build.py``.
"""

from __future__ import annotations

import importlib.util
import platform
import sys
from pathlib import Path

import numpy as np
from setuptools import Extension, setup

MACHINES = ("x86_64", "aarch64")

if sys.platform != "linux" or platform.machine() not in MACHINES:
    sys.exit(
        f"shmengine runs on Linux on {' and '.join(MACHINES)} only; this is {platform.system()} on "
        f"{platform.machine()}. What there is to port: csrc (waiting, regions)."
    )

# The package itself cannot be imported yet.
spec = importlib.util.spec_from_file_location("build", Path(__file__).parent / "shmengine/_native/build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
compile_args, link_args = build.flags()

setup(
    cffi_modules=["shmengine/_native/build.py:ffi"],
    ext_modules=[
        Extension(
            "shmengine._native._handles",
            [
                f"csrc/{name}.c"
                for name in (
                    "handles",
                    "claims",
                    "leases",
                    "message",
                    "directions",
                    "wire",
                    "borrowed",
                    "sending",
                    "small",
                    "stack",
                )
            ],
            include_dirs=["csrc", np.get_include()],
            depends=["csrc/handles.h", "csrc/ends.h", "csrc/wire.h", "csrc/shmr.h", "csrc/shmr_status.h"],
            extra_compile_args=compile_args,
            extra_link_args=link_args,
        )
    ],
)
