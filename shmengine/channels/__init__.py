"""Channels: a main process and its workers talk, through pipes, message queues, shared memory or sockets.

One contract for all four (end.py); what is in the same file as the name says is of one mechanism.
"""

from __future__ import annotations

from shmengine.channels.end import End
from shmengine.channels.link import Capabilities
from shmengine.channels.open import channel

__all__ = ["Capabilities", "End", "channel"]
