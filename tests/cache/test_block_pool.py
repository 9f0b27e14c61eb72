import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from graphmode.cache.block_pool import BlockPool, block_keys


class PoolMachine(RuleBasedStateMachine):
    """Blocks as sequences use them: each holds one content, found only while it holds it."""

    @initialize(total=st.integers(1, 12))
    def start(self, total: int) -> None:
        self.pool = BlockPool(total)
        self.total = total
        self.users: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    @rule(count=st.integers(0, 6))
    def allocate(self, count: int) -> None:
        if count > self.pool.num_free:
            with pytest.raises(ValueError, match="free"):
                self.pool.allocate(count)
            return
        blocks = self.pool.allocate(count)
        held = {block for user in self.users for block in user}
        assert not held & set(blocks), "a block in use was handed out"
        for block in blocks:
            self.content.pop(block, None)
        self.users.append(blocks)

    @precondition(lambda self: any(self.users))
    @rule(which=st.integers(0, 99), at=st.integers(0, 99), key=st.integers(0, 4).map(lambda n: bytes([n])))
    def publish(self, which: int, at: int, key: bytes) -> None:
        users = [user for user in self.users if user]
        blocks = users[which % len(users)]
        block = blocks[at % len(blocks)]
        if block not in self.content:
            self.content[block] = key
            self.pool.publish(block, key)

    @rule(keys=st.lists(st.integers(0, 4).map(lambda n: bytes([n])), max_size=3))
    def find_and_share(self, keys: list[bytes]) -> None:
        found = self.pool.find(keys)
        assert [self.content[block] for block in found] == keys[: len(found)]
        self.pool.share(found)
        self.users.append(found)

    @precondition(lambda self: self.users)
    @rule(which=st.integers(0, 99))
    def free(self, which: int) -> None:
        self.pool.free(self.users.pop(which % len(self.users)))

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "pool"):
            held = {block for user in self.users for block in user}
            assert self.pool.num_free == self.total - len(held)


TestPool = PoolMachine.TestCase


def test_freeing_twice_is_an_error() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.free(blocks)
    with pytest.raises(ValueError, match="not in use"):
        pool.free(blocks)


def test_the_least_recently_used_goes_first_and_a_sequence_loses_its_end_before_its_beginning() -> None:
    pool = BlockPool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    keys = list(block_keys([1, 2], 1)), list(block_keys([3, 4], 1))
    for blocks, named in zip((old, new), keys, strict=True):
        for block, key in zip(blocks, named, strict=True):
            pool.publish(block, key)
    pool.free(old)
    pool.free(new)
    pool.allocate(1)
    assert pool.find(keys[0]) == old[:1]
    pool.allocate(1)
    assert pool.find(keys[0]) == []
    assert pool.find(keys[1]) == new


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=12), st.integers(1, 4))
def test_keys_are_equal_exactly_where_all_tokens_so_far_are(a: list[int], b: list[int], size: int) -> None:
    keys_a, keys_b = list(block_keys(a, size)), list(block_keys(b, size))
    assert len(keys_a) == len(a) // size
    assert keys_a[:1] + list(block_keys(a, size, keys_a[:1])) == keys_a
    for index, (key_a, key_b) in enumerate(zip(keys_a, keys_b, strict=False)):
        end = (index + 1) * size
        assert (key_a == key_b) == (a[:end] == b[:end])


@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9), st.sampled_from([b"cat", b"dog"])), max_size=4),
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9), st.sampled_from([b"cat", b"dog"])), max_size=4),
    st.integers(0, 5),
)
def test_blocks_with_tokens_that_stand_for_something_else_have_other_keys(
    block_size: int, first: list, second: list, known: int
) -> None:
    """Keys agree up to the first block in which what tokens stand for differs; known ones are taken as they are."""

    def contents(gaps: list) -> list[tuple[int, int, bytes]]:
        spans, at = [], 0
        for gap, length, digest in gaps:
            spans.append((at + gap, at + gap + length, digest))
            at += gap + length
        return spans

    tokens = [7] * 48
    both = [contents(first), contents(second)]
    keys = [list(block_keys(tokens, block_size, contents=each)) for each in both]
    for index, pair in enumerate(zip(*keys, strict=True)):
        seen = [
            [[digest for low, high, digest in each if low < start + block_size and start < high] for start in starts]
            for each in both
            for starts in [range(0, (index + 1) * block_size, block_size)]
        ]
        assert (pair[0] == pair[1]) == (seen[0] == seen[1])
    assert list(block_keys(tokens, block_size, keys[0][:known], both[0])) == keys[0][known:]
    assert list(block_keys(tokens, block_size, contents=[])) == list(block_keys(tokens, block_size))
