"""Build the C core through cffi (API mode). Build time only: never imported at run time.

Environment switches (rebuild with ``make rebuild`` after changing one):

- ``SHMENGINE_DEBUG=1``: invariants checked, no optimisation;
- ``SHMENGINE_SANITIZE=address|undefined|thread``: that sanitizer (its runtime must be preloaded);
- ``SHMENGINE_COVERAGE=1``: gcov instrumentation;
- ``SHMENGINE_FAULT_POINTS=1``: for tests alone, ``lib.shmr_fault_arm(nth, loads)`` raises SIGKILL at the nth access of
  shared memory from then on.
"""

from __future__ import annotations

import os
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"

SOURCES = (
    "shmr_region.c",
    "shmr_reserve.c",
    "shmr_arena.c",
    "shmr_runs.c",
    "shmr_held.c",
    "shmr_block.c",
    "shmr_descriptor.c",
    "shmr_guard.c",
    "shmr_ring.c",
    "shmr_message.c",
    "shmr_scatter.c",
    "shmr_bell.c",
    "shmr_file.c",
    "shmr_wait.c",
    "shmr_recover.c",
    "shmr_numpy.c",
    "shmr_stream.c",
    "shmr_loan.c",
    "shmr_memory.c",
    "shmr_watch.c",
)


def fault_points() -> bool:
    """Whether each access of shared memory is to be a possible point of death."""
    return os.environ.get("SHMENGINE_FAULT_POINTS") == "1"


def flags() -> tuple[list[str], list[str]]:
    """Compiler and linker flags after the environment."""
    compile_args = ["-std=c11", "-D_GNU_SOURCE", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra"]
    link_args = ["-pthread"]
    if os.environ.get("SHMENGINE_DEBUG") == "1":
        compile_args += ["-O0", "-g", "-DSHMR_DEBUG"]
    else:
        # Aligned: else code that nobody has touched gains or loses a tenth by where the linker puts it.
        compile_args += ["-O2", "-g", "-falign-functions=64"]
    sanitize = os.environ.get("SHMENGINE_SANITIZE", "")
    if sanitize:
        if sanitize not in {"address", "undefined", "thread"}:
            raise SystemExit(f"SHMENGINE_SANITIZE={sanitize!r}: use address, undefined or thread")
        compile_args += [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer"]
        link_args += [f"-fsanitize={sanitize}"]
    if os.environ.get("SHMENGINE_COVERAGE") == "1":
        compile_args += ["-O0", "--coverage", "-fprofile-update=atomic"]
        link_args += ["--coverage"]
    if fault_points():
        compile_args += ["-include", "fault_points.h"]
    return compile_args, link_args


compile_args, link_args = flags()
ffi = FFI()
ffi.cdef((CSRC / "shmr_cdef.h").read_text())
sources = list(SOURCES)
if fault_points():
    ffi.cdef("void shmr_fault_arm(int64_t nth, int loads); int64_t shmr_fault_count(void);")
    sources.append("fault_points.c")
ffi.set_source(
    "shmengine._native._core",
    '#include "shmr.h"\n',
    sources=[os.path.relpath(CSRC / name, ROOT) for name in sources],
    include_dirs=[os.path.relpath(CSRC, ROOT)],
    depends=[os.path.relpath(path, ROOT) for path in sorted(CSRC.glob("*.h"))],
    extra_compile_args=compile_args,
    extra_link_args=link_args,
)

if __name__ == "__main__":
    os.chdir(ROOT)
    ffi.compile(verbose=True)
