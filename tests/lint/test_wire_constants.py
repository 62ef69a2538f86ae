"""What csrc/small.c and sending.c know of parts and frames is what sessions.py, codec.py and socket.py say."""

from __future__ import annotations

import re

import pytest
import zmq

from shmengine import codec
from shmengine.channels import link, ports, sessions, socket
from tests.helpers.scripts import ROOT

SOURCES = "".join((ROOT / "csrc" / name).read_text() for name in ("wire.h", "small.c", "sending.c"))
DEFINED = dict(re.findall(r"^#define (\w+) (\d+)\b", SOURCES, re.MULTILINE))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DONTWAIT", zmq.DONTWAIT),
        ("SNDMORE", zmq.SNDMORE),
        ("SRCFD", zmq.SRCFD),
        ("PREFIX_BYTES", sessions.PREFIX_BYTES),
        ("DATA", sessions.Kind.DATA),
        ("ACKNOWLEDGE", sessions.Kind.ACKNOWLEDGE),
        ("LOAN", sessions.Kind.LOAN),
        ("LENT_BYTES", sessions.LENT_BYTES),
        ("MESSAGE_COST", sessions.MESSAGE_COST),
        ("HEADER_BYTES", codec.HEADER_BYTES),
        ("CHECKED_FROM", codec._CHECKED_FROM),
        ("KIND_PICKLE", codec.KIND_PICKLE),
        ("KIND_ARRAY", codec.KIND_ARRAY),
        ("LOOK_EVERY", socket.LOOK_EVERY),
        ("LOOK_NS", link.LOOK_NS),
        ("MOST_AT_ONCE", ports.MOST_AT_ONCE),
        ("ALIGNMENT", socket.ALIGNMENT),
        ("SMALL_PART_BYTES", sessions.PREFIX_BYTES + socket.SMALL_FRAME_BYTES),
    ],
)
def test_they_are_the_same(name, value):
    assert int(DEFINED[name]) == value


def test_the_magic_and_version_are_the_same():
    assert f'header->magic, "{codec.FRAME_MAGIC.decode()}", 4' in SOURCES
    assert f"header->version == {codec.FRAME_VERSION} " in SOURCES
