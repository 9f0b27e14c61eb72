import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphmode.engine.block_allocator import BlockAllocator


@given(st.integers(1, 30), st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60))
def test_every_block_has_at_most_one_owner_and_none_is_lost(total: int, actions: list[tuple[bool, int]]) -> None:
    allocator = BlockAllocator(total, 16)
    owned: list[list[int]] = []
    for take, number in actions:
        if take and number <= allocator.num_free:
            owned.append(allocator.allocate(number))
        elif take:
            with pytest.raises(ValueError, match="free"):
                allocator.allocate(number)
        elif owned:
            allocator.free(owned.pop(number % len(owned)))
        held = [block for blocks in owned for block in blocks]
        assert len(held) == len(set(held))
        assert set(held) <= set(range(total))
        assert allocator.num_free == total - len(held)


def test_freeing_twice_is_an_error() -> None:
    allocator = BlockAllocator(4, 16)
    blocks = allocator.allocate(2)
    allocator.free(blocks)
    with pytest.raises(ValueError, match="not in use"):
        allocator.free(blocks)


@given(st.integers(0, 1000), st.integers(1, 64))
def test_blocks_for_is_the_least_that_holds_the_tokens(tokens: int, size: int) -> None:
    blocks = BlockAllocator(1, size).blocks_for(tokens)
    assert (blocks - 1) * size < tokens <= blocks * size or tokens == blocks == 0
