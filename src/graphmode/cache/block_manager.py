"""The blocks of sequences: which ones hold their tokens in each cache group, and which prefixes can be used again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import lcm
from typing import Protocol

from graphmode.cache.block_pool import BlockPool, block_keys
from graphmode.cache.specs import CacheGroup


class CachedSequence(Protocol):
    """What the cache knows of a sequence.

    Attributes:
        token_ids: its tokens, as far as the host knows them.
        num_computed: tokens whose keys and values are in the cache, or will be when the steps in flight are done.
        num_settled: those of them whose full blocks can be found by other sequences, and are given back where no later
            token reads them.
        block_tables: of each group its blocks, by their place in the sequence; 0 where one was given back.
        block_keys: digests of its prefixes, as far as they are computed.
    """

    token_ids: list[int]
    num_computed: int
    num_settled: int
    block_tables: list[list[int]]
    block_keys: list[bytes]

    @property
    def contents(self) -> list[tuple[int, int, bytes]]:
        """What tokens stand for beside themselves, as of :func:`~graphmode.cache.block_pool.block_keys`."""


class BlockManager:
    """Gives sequences the blocks that their tokens need, of every cache group, and takes them back.

    Blocks behind a window are given back before a step is scheduled, while the one before may still read them: their
    next owner writes them in a later step, which comes later on the device's stream. Only tokens that the host knows
    count, so that a block can be found by other sequences before it is given back. It stays findable until it is
    needed.

    Args:
        groups: the cache's.
        num_blocks: of each group.
        step_tokens: the most tokens of a step.
        decode_steps: the most tokens that a sequence makes in steps launched together.
        prefix_caching: whether blocks can be found by other sequences.

    Raises:
        ValueError: a block size is no multiple of the smallest.
    """

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        num_blocks: Sequence[int],
        *,
        step_tokens: int,
        decode_steps: int = 1,
        prefix_caching: bool = True,
    ) -> None:
        self.groups = tuple(groups)
        self.pools = tuple(BlockPool(count) for count in num_blocks)
        self._step_tokens = step_tokens
        self._decode_steps = decode_steps
        self._prefix_caching = prefix_caching
        self._each = tuple(zip(self.groups, self.pools, strict=True))
        sizes = [group.block_size for group in groups]
        self._key_tokens = min(sizes)  # each key is of so many tokens more than the one before
        self._hit_tokens = lcm(*sizes)  # a prefix ends where a block of every group does
        self._windows = any(group.window is not None for group in groups)
        self._finest = sizes.index(self._key_tokens)
        if any(size % self._key_tokens for size in sizes):
            raise ValueError(f"block sizes are {sizes}; each must be a multiple of the smallest")

    @property
    def num_free(self) -> tuple[int, ...]:
        """Blocks of each group that no sequence holds."""
        return tuple(pool.num_free for pool in self.pools)

    def lacking(self, length: int) -> tuple[int, int] | None:
        """Return how many blocks a sequence of ``length`` tokens needs of a group that never has as many, and its size.

        None where it can run.
        """
        for group, pool in self._each:
            if (needed := group.most_blocks(length, self._step_tokens, self._decode_steps)) > pool.num_blocks:
                return needed, pool.num_blocks
        return None

    def begin(self, sequence: CachedSequence, *, read_prefix: bool) -> None:
        """Let a sequence use the blocks of the longest prefix that others have computed; of none if it reads none.

        One token at least is left to compute, so that there is something to sample from.
        """
        tokens = self._known_prefix(sequence) if read_prefix and self._prefix_caching else 0
        sequence.num_computed = sequence.num_settled = tokens
        if tokens == 0:
            sequence.block_tables = [[] for _ in self.groups]
            return
        for group, pool in self._each:
            first = group.first_read(tokens) // group.block_size
            blocks = pool.find(self._keys(sequence, group, range(first, tokens // group.block_size)))
            pool.share(blocks)
            sequence.block_tables.append([0] * first + blocks)

    def extend(self, ends: Sequence[tuple[CachedSequence, int]]) -> bool:
        """Give sequences the blocks for their tokens before an end each, or give none where there are too few."""
        longer = []
        for sequence, end in ends:
            self._settle(sequence)
            if end > len(sequence.block_tables[self._finest]) * self._key_tokens:
                longer.append((sequence.block_tables, end))
        if not longer:
            return True
        for at, (group, pool) in enumerate(self._each):
            if sum(group.blocks_for(end) - len(tables[at]) for tables, end in longer) > pool.num_free:
                return False
        for tables, end in longer:
            for table, (group, pool) in zip(tables, self._each, strict=True):
                table += pool.allocate(group.blocks_for(end) - len(table))
        return True

    def release(self, sequence: CachedSequence) -> None:
        """Take all blocks of a sequence back; full ones stay findable."""
        self._settle(sequence)
        for (group, pool), table in zip(self._each, sequence.block_tables, strict=False):
            pool.free(table[group.first_read(sequence.num_settled) // group.block_size :])
        sequence.block_tables = []
        sequence.num_computed = sequence.num_settled = 0

    def _settle(self, sequence: CachedSequence) -> None:
        """Make full blocks findable, then give those back that no later token reads."""
        known, before = min(len(sequence.token_ids), sequence.num_computed), sequence.num_settled
        if known <= before or (not self._windows and known // self._key_tokens == before // self._key_tokens):
            return  # no block has become full, and none lies behind a window
        sequence.num_settled = known
        for (group, pool), table in zip(self._each, sequence.block_tables, strict=True):
            size = group.block_size
            if self._prefix_caching and known // size > before // size:
                full = range(before // size, known // size)
                for at, key in zip(full, self._keys(sequence, group, full), strict=True):
                    pool.publish(table[at], key)
            if group.window is not None:
                behind = slice(group.first_read(before) // size, group.first_read(known) // size)
                if behind.start < behind.stop:
                    pool.free(table[behind])
                    table[behind] = [0] * (behind.stop - behind.start)

    def _known_prefix(self, sequence: CachedSequence) -> int:
        """Return how long the longest prefix is whose blocks are all known, as far as the next token reads them."""
        tokens = len(sequence.token_ids) - 1
        for group, pool in self._each:
            if group.window is None:
                blocks = pool.find(self._keys(sequence, group, range(tokens // group.block_size)))
                tokens = min(tokens, len(blocks) * group.block_size)
        tokens -= tokens % self._hit_tokens
        while (
            tokens > 0
            and (usable := min(self._usable(sequence, at, tokens) for at in range(len(self.groups)))) < tokens
        ):
            tokens = usable - usable % self._hit_tokens
        return tokens

    def _usable(self, sequence: CachedSequence, at: int, tokens: int) -> int:
        """Return ``tokens`` where a group has what the token after them reads, else the start of a block it lacks."""
        group, pool = self._each[at]
        if group.window is None:
            return tokens
        for block in range(tokens // group.block_size - 1, group.first_read(tokens) // group.block_size - 1, -1):
            [key] = self._keys(sequence, group, range(block, block + 1))
            if not pool.find([key]):
                return block * group.block_size
        return tokens

    def _keys(self, sequence: CachedSequence, group: CacheGroup, blocks: range) -> Iterator[bytes]:
        """Give the keys of a sequence's full blocks, computing those that nobody asked for before.

        A key is the digest of all tokens up to the end of a block, so groups of other block sizes share them.
        """
        keys, step = sequence.block_keys, group.block_size // self._key_tokens
        more = block_keys(sequence.token_ids, self._key_tokens, keys, sequence.contents)
        for end in range((blocks.start + 1) * step, (blocks.stop + 1) * step, step):
            while len(keys) < end:
                keys.append(next(more))
            yield keys[end - 1]
