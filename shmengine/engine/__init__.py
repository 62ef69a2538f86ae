"""The engine: split arrays and iterables into tasks, dispatch them to workers, gather what comes back."""

from __future__ import annotations

from shmengine.engine.api import Engine

__all__ = ["Engine"]
