from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphmode.graph import InputError, make_buckets
from graphmode.graph.buckets import bucket_sizes, check_buckets, powers_of_two, spread


@given(st.integers(1, 100_000))
def test_made_buckets_are_few_sorted_and_end_at_the_maximum(maximum: int) -> None:
    sizes = make_buckets(maximum)
    assert sizes[-1] == maximum
    assert list(sizes) == sorted(set(sizes))
    assert len(sizes) <= 5 + 4 * maximum.bit_length()


@given(st.integers(9, 100_000), st.data())
def test_padding_above_the_smallest_buckets_is_bounded(maximum: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(9, maximum))
    bucket = next(bucket for bucket in make_buckets(maximum) if bucket >= size)
    assert bucket - size < max(8, bucket / 5)


@given(st.integers(0, 16), st.integers(0, 100_000))
def test_powers_of_two_are_buckets(exponent: int, more: int) -> None:
    assert 2**exponent in make_buckets(2**exponent + more)


@pytest.mark.parametrize("sizes", [[], [0], [-1, 4], [True], [1.5]])
def test_bad_buckets_are_refused(sizes: list) -> None:
    with pytest.raises(InputError):
        check_buckets(sizes)


def test_no_bucket_below_one() -> None:
    with pytest.raises(InputError, match="0"):
        make_buckets(0)


SIZES = st.sets(st.integers(1, 5000), max_size=60).map(sorted)


@given(SIZES, st.integers(0, 60))
def test_sizes_within_a_budget_keep_their_ends_and_lie_spread(sizes: list[int], budget: int) -> None:
    """Capture stops anywhere in the order: what it has by then is within the budget, and a larger one only adds."""
    order = spread(sizes)
    assert sorted(order) == sizes
    kept = sorted(order[:budget])
    assert len(kept) == min(budget, len(sizes))
    if kept:
        assert kept[-1] == sizes[-1]
    if len(kept) > 1:
        assert kept[0] == sizes[0]
        runs = [sizes.index(high) - sizes.index(low) for low, high in pairwise(kept)]
        assert max(runs) <= 2 * min(runs) + 1


def test_the_order_of_capture() -> None:
    assert spread([1, 2, 4, 8, 16]) == (16, 1, 4, 8, 2)
    assert spread([1, 2]) == (2, 1)
    assert spread([3]) == (3,)
    assert spread([]) == ()


@given(st.integers(1, 10**6))
def test_powers_of_two_end_with_the_largest_step_and_pad_less_than_half(maximum: int) -> None:
    sizes = powers_of_two(maximum)
    assert sizes[-1] == maximum
    assert all(size & (size - 1) == 0 for size in sizes[:-1])
    assert all(small < large <= 2 * small for small, large in pairwise(sizes))


def test_numbers_and_arrays_of_numpy_are_sizes() -> None:
    assert bucket_sizes(np.array([4, 2]), ["n"]) == (2, 4)
    assert bucket_sizes(np.int64(4), ["n"]) == make_buckets(4)
    assert bucket_sizes(range(1, 4), ["n"]) == (1, 2, 3)
