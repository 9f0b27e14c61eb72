"""The blocks of one cache group: how many use each, and which hold a prefix that can be used again."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence


def block_keys(
    token_ids: Sequence[int],
    block_size: int,
    known: Sequence[bytes] = (),
    contents: Sequence[tuple[int, int, bytes]] = (),
) -> Iterator[bytes]:
    """Give the keys of a sequence's full blocks after those that are known: digests of their tokens and all before.

    Each is computed when it is asked for: a search ends with the first block that is not found. Tokens that stand for
    an image are the same for all images, so its digest joins the keys of their blocks.

    Args:
        token_ids: the sequence.
        block_size: tokens in a block.
        known: keys of its first blocks, computed before.
        contents: ``(start, end, digest)`` in order: tokens ``start`` to ``end - 1`` stand for what has this digest.
    """
    key = known[-1] if known else b""
    at = 0
    for start in range(len(known) * block_size, len(token_ids) - block_size + 1, block_size):
        digest = hashlib.blake2b(key, digest_size=16)
        digest.update(array("q", token_ids[start : start + block_size]).tobytes())
        while at < len(contents) and contents[at][0] < start + block_size:
            _, end, content = contents[at]
            if start < end:
                digest.update(content)
            if end > start + block_size:
                break
            at += 1
        yield (key := digest.digest())


class BlockPool:
    """Hands out cache blocks by number and counts their users.

    A full block whose content is known by key can be shared. When its last user is gone it stays findable until
    its memory is needed: blocks are taken again in the order in which they were let go (least recently used first).

    Args:
        num_blocks: how many there are.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._users: dict[int, int] = {}
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody uses, findable ones included."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Return ``count`` blocks that nobody uses, forgetting what they held.

        Raises:
            ValueError: there are not as many.
        """
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for; {len(self._free)} of {self.num_blocks} are free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._users[block] = 1
            if (key := self._key_of.pop(block, None)) is not None:
                del self._block_of[key]
        return blocks

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Return the blocks that hold the longest known prefix of ``keys``."""
        blocks = []
        for key in keys:
            if (block := self._block_of.get(key)) is None:
                break
            blocks.append(block)
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Become a user of ``blocks``, found a moment ago."""
        for block in blocks:
            self._users[block] = self._users.get(block, 0) + 1
            self._free.pop(block, None)

    def publish(self, block: int, key: bytes) -> None:
        """Make a block in use findable: it holds the tokens of ``key``. A key's first block stays the one found."""
        if block not in self._key_of and key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def free(self, blocks: Sequence[int]) -> None:
        """Stop using ``blocks``, those of one sequence in order. Its end is forgotten before its beginning.

        Raises:
            ValueError: one of them is not in use.
        """
        for block in reversed(blocks):
            if block not in self._users:
                raise ValueError(f"block {block} is not in use, so it cannot be freed")
            self._users[block] -= 1
            if self._users[block] == 0:
                del self._users[block]
                self._free[block] = None
