"""Imported by each interpreter of a run: scripts that the tests start, and workers of other backends, know ours."""

from __future__ import annotations

import os

if "SHMENGINE_WORKER" not in os.environ:
    import shmengine.joblib  # noqa: F401  # it registers itself
