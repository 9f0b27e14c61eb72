import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphmode.graph import InputError, make_buckets
from graphmode.graph.buckets import check_buckets


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
    assert bucket - size < max(8, bucket / 4)


@pytest.mark.parametrize("sizes", [[], [0], [-1, 4], [True], [1.5]])
def test_bad_buckets_are_refused(sizes: list) -> None:
    with pytest.raises(InputError):
        check_buckets(sizes)


def test_no_bucket_below_one() -> None:
    with pytest.raises(InputError, match="0"):
        make_buckets(0)
