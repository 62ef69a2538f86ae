"""Round trips of anything: nested objects, dtypes, layouts and sizes, through one channel that stays open."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.helpers.arrays import DTYPES, LAYOUTS, numpy_scalars, same, same_bytes
from tests.helpers.channels import MECHANISMS, make_pair, there_and_back
from tests.helpers.fault_points import SOAK
from tests.helpers.partners import STARTS

# Seconds each, and many through a socket: one start for a mechanism, all of them in a soak.
LARGE = list(itertools.product(MECHANISMS, STARTS) if SOAK else zip(MECHANISMS, STARTS, strict=True))
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(),
    st.binary(max_size=3000),
    numpy_scalars(),
)
ARRAYS = st.one_of(
    hnp.arrays(
        st.one_of(
            hnp.integer_dtypes(endianness="?"),
            hnp.floating_dtypes(endianness="?"),
            hnp.complex_number_dtypes(),
            hnp.boolean_dtypes(),
            hnp.byte_string_dtypes(),
            hnp.unicode_string_dtypes(),
        ),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7),
    ),
    st.builds(
        lambda dtype, layout: LAYOUTS[layout](dtype), st.sampled_from(DTYPES), st.sampled_from(list(LAYOUTS))
    ),
    st.builds(
        lambda dtype, count, step: np.arange(count).astype(dtype)[::step],
        st.sampled_from(["u1", "<i4", ">f8"]),
        st.integers(0, 100_000),
        st.sampled_from([1, 2, -1, -3]),
    ),
)
OBJECTS = st.recursive(
    st.one_of(SCALARS, ARRAYS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.text(max_size=5), st.integers()), inner, max_size=4),
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module", params=["frame", "payload", "no pickle"])
def check(request):
    return request.param


@pytest.fixture
def travel(make_channel, check):
    """A function that sends something to a partner, who sends it back, and returns what comes."""
    left, right = make_channel(**{"allow_pickle": False} if check == "no pickle" else {"check": check})
    yield lambda obj: there_and_back(left, right, obj)
    for end in (left, right):
        stats = end.stats()
        assert stats.gaps == stats.corrupt == 0


def test_nested_objects(travel):
    @settings(max_examples=15, deadline=None)
    @given(OBJECTS)
    def one(obj):
        assert alike(travel(obj), obj)

    one()


def test_arrays(travel):
    @settings(max_examples=20, deadline=None)
    @given(ARRAYS)
    def one(array):
        got = travel(array)
        assert got.dtype == array.dtype
        assert same_bytes(got, array)

    one()


def alike(one, other):
    """`same`, but of arrays whatever their bytes between fields are."""
    if isinstance(one, np.ndarray):
        return type(one) is type(other) and same_bytes(one, other)
    if isinstance(one, dict):
        return (
            type(other) is dict
            and list(one) == list(other)
            and all(alike(one[key], other[key]) for key in one)
        )
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(alike, one, other))
    return same(one, other)


def of_a_large_array(end, marks):
    array = end.receive()
    return array.shape, array[marks].tolist(), np.count_nonzero(array)


@pytest.mark.slow
@pytest.mark.watchdog(300)
@pytest.mark.parametrize(("mechanism", "how"), LARGE)
def test_more_than_two_gigabytes(mechanism, take):
    """Lengths beyond 31 bits; hardly any of the memory that is sent was ever touched."""
    big = np.zeros(5 << 29, "u1")
    marks = [0, 1, (1 << 31) - 1, 1 << 31, (1 << 31) + 12_345, big.size - 1]
    big[marks] = range(1, 7)
    left, right = make_pair(mechanism, buffer_bytes="3 GiB")
    with left:
        job = take(right).start(of_a_large_array, marks)
        left.send(big)
        assert job.result() == (big.shape, [1, 2, 3, 4, 5, 6], 6)
