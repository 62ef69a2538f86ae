"""What the other end of a socket channel, or whoever says that he is one, cannot do to this one."""

from __future__ import annotations

import pytest

import shmengine as shm
from tests.helpers.proxy import Proxy


def dial(server, **options):
    """Both ends of a channel through a server."""
    mine = shm.connect(server.address, timeout=20, **options)
    return mine, server.accept(20)


# --- what is said of an end that is lost ----------------------------------------------------------


def test_of_an_end_that_cannot_be_reached_nobody_says_that_it_died():
    with shm.listen("tcp://127.0.0.1:0", peer_timeout=0.5) as server, Proxy(server.address) as proxy:
        left = shm.connect(proxy.address, timeout=20, peer_timeout=0.5)
        right = server.accept(20)
        proxy.cut()
        for end in (left, right):
            with pytest.raises(shm.PeerLost, match=r"could not be reached for 0\.5 seconds"):
                end.receive(60)
            with pytest.raises(shm.PeerLost, match=r"could not be reached for 0\.5 seconds"):
                end.send(1)
            end.close()
