"""Every access to shared memory goes through csrc/shmr_atomics.h: the seam for model checkers and tests."""

from __future__ import annotations

import re

import pytest

from tests.helpers.sources import ROOT, c_files, c_without_comments

SEAM = "shmr_atomics.h"
ATOMIC = re.compile(r"stdatomic\.h|\b_Atomic\b|\b__atomic_\w+|\b__sync_\w+|\batomic_\w+")


def bare_atomics(text):
    return [
        f"line {number}: {match[0]}"
        for number, line in enumerate(c_without_comments(text).split("\n"), start=1)
        for match in ATOMIC.finditer(line)
    ]


@pytest.mark.parametrize("path", c_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_bare_atomics_are_in_one_file_only(path):
    if path.name == SEAM:
        assert bare_atomics(path.read_text()), "the seam is where they are"
    else:
        assert not bare_atomics(path.read_text())


def test_there_is_one_seam():
    assert sum(path.name == SEAM for path in c_files()) == 1


def test_this_test_sees():
    text = (
        "#include <stdatomic.h>\n_Atomic int x;\natomic_load(&x);\n__atomic_fetch_add(&x);\nshmr_atomic_t y;"
    )
    assert len(bare_atomics(text)) == 4
    assert not bare_atomics("/* atomic_load */ // _Atomic")
