"""The blocks of the paged KV cache: who owns which."""

from __future__ import annotations

from collections import deque


class BlockAllocator:
    """Hands out cache blocks by number, each to one owner.

    Args:
        num_blocks: blocks in the cache.
        block_size: tokens in a block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = deque(range(num_blocks))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Return how many blocks hold ``tokens`` tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Return ``count`` blocks that nobody owned.

        Raises:
            ValueError: there are not as many.
        """
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for; {len(self._free)} of {self.num_blocks} are free")
        blocks = [self._free.popleft() for _ in range(count)]
        self._used.update(blocks)
        return blocks

    def free(self, blocks: list[int]) -> None:
        """Take ``blocks`` back.

        Raises:
            ValueError: one of them is not in use.
        """
        for block in blocks:
            if block not in self._used:
                raise ValueError(f"block {block} is not in use, so it cannot be freed")
            self._used.remove(block)
            self._free.append(block)
