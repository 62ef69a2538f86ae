"""Process large NumPy arrays in parallel through crash-safe shared memory, without copying them.

>>> import numpy as np
>>> import shmengine as shm
>>> x = np.arange(1_000_000.0)
>>> with shm.Engine(workers=2) as engine:
...     y = engine.map_blocks(lambda block: np.sqrt(block) * 2 + 1, x)
...     total = engine.reduce(np.sum, x, combine=np.add)
>>> bool(np.array_equal(y, np.sqrt(x) * 2 + 1)), float(total)
(True, 499999500000.0)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shmengine.errors import (
    ArrayError,
    BlockError,
    Closed,
    Corrupt,
    EndOfStream,
    LayoutMismatch,
    LeaseError,
    MemoryBudgetExceeded,
    PeerLost,
    RemoteError,
    RemoteTraceback,
    SerializationError,
    ShmError,
    StaleReference,
    TaskTimeout,
    Timeout,
    UseAfterFork,
    WorkerDied,
    WouldBlock,
)

if TYPE_CHECKING:
    from shmengine import joblib as joblib
    from shmengine.channels.end import End as End
    from shmengine.channels.keys import Keys as Keys
    from shmengine.channels.keys import generate_keys as generate_keys
    from shmengine.channels.open import channel as channel
    from shmengine.channels.servers import Server as Server
    from shmengine.channels.servers import connect as connect
    from shmengine.channels.servers import listen as listen
    from shmengine.engine import Engine as Engine
    from shmengine.engine.default import map as map
    from shmengine.engine.default import map_blocks as map_blocks
    from shmengine.engine.default import reduce as reduce
    from shmengine.engine.stalls import Stall as Stall
    from shmengine.engine.stalls import Stalls as Stalls
    from shmengine.errors import Full as Full
    from shmengine.futures import Executor as Executor
    from shmengine.queues import JoinableQueue as JoinableQueue
    from shmengine.queues import Queue as Queue
    from shmengine.ring import Ring as Ring
    from shmengine.stats import ChannelStats as ChannelStats
    from shmengine.stats import EngineStats as EngineStats
    from shmengine.stats import RingStats as RingStats

__version__ = "0.1.0"

__all__ = [
    "ArrayError",
    "BlockError",
    "ChannelStats",
    "Closed",
    "Corrupt",
    "End",
    "EndOfStream",
    "Engine",
    "EngineStats",
    "Executor",
    "Full",
    "JoinableQueue",
    "Keys",
    "LayoutMismatch",
    "LeaseError",
    "MemoryBudgetExceeded",
    "PeerLost",
    "Queue",
    "RemoteError",
    "RemoteTraceback",
    "Ring",
    "RingStats",
    "SerializationError",
    "Server",
    "ShmError",
    "StaleReference",
    "Stall",
    "Stalls",
    "TaskTimeout",
    "Timeout",
    "UseAfterFork",
    "WorkerDied",
    "WouldBlock",
    "__version__",
    "channel",
    "connect",
    "generate_keys",
    "listen",
    "map",
    "map_blocks",
    "reduce",
]

# Each public name is imported when it is first used: a script that wants a ring does not pay for the engine.
_HOMES = {
    "ChannelStats": "shmengine.stats",
    "End": "shmengine.channels.end",
    "Engine": "shmengine.engine",
    "EngineStats": "shmengine.stats",
    "Executor": "shmengine.futures",
    "Full": "shmengine.errors",
    "JoinableQueue": "shmengine.queues",
    "Queue": "shmengine.queues",
    "Keys": "shmengine.channels.keys",
    "Ring": "shmengine.ring",
    "RingStats": "shmengine.stats",
    "Server": "shmengine.channels.servers",
    "Stall": "shmengine.engine.stalls",
    "Stalls": "shmengine.engine.stalls",
    "channel": "shmengine.channels.open",
    "connect": "shmengine.channels.servers",
    "generate_keys": "shmengine.channels.keys",
    "listen": "shmengine.channels.servers",
    "map": "shmengine.engine.default",
    "map_blocks": "shmengine.engine.default",
    "reduce": "shmengine.engine.default",
}


# Modules of ours for which users install a library: imported when they are first used, too.
_INTEGRATIONS = {"joblib"}


if not TYPE_CHECKING:  # or every name would be one

    def __getattr__(name: str) -> Any:
        import importlib

        if name in _INTEGRATIONS:
            return importlib.import_module(f"{__name__}.{name}")
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(home), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
