"""Any bytes where a frame or a descriptor is expected: a value or a documented error, and nothing out of bounds."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.helpers.frames import check_bytes, check_descriptor, check_frame, mutated, resealed, seeds

FUZZ = Path(__file__).parents[1] / "fuzz"
KEPT = sorted(path for part in ("corpus", "crashes") for path in FUZZ.glob(f"{part}/fuzz_frames/*"))
SEEDS = seeds()


@pytest.mark.parametrize("number", range(len(SEEDS)))
def test_sound_frames(number):
    check_frame(SEEDS[number], trusted=True)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name[:12])
def test_what_the_fuzzer_kept(path):
    check_bytes(path.read_bytes())


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400))
def test_noise(raw):
    check_bytes(raw)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(SEEDS) - 1), st.integers(0, 1 << 32), st.booleans())
def test_damaged_frames(number, seed, good_checksum):
    raw = mutated(SEEDS[number], random.Random(seed))
    check_frame(resealed(raw) if good_checksum else raw)


@example(b",", b"n")
@example(b"a", b"n")
@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=140), st.sampled_from([b"", b"n", b"nd", b"nO", b"n\xff", b"f", b"i", b"b", b"-"]))
def test_descriptors(raw, kind):
    check_descriptor(np.arange(3, dtype="u8").tobytes() + kind + raw)
    check_descriptor(raw)
