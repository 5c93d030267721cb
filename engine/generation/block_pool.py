"""Block pool: which blocks of the paged KV cache are free. Bookkeeping only, no tensors.

A block number indexes the cache tensors of every layer (`layers/kv_cache.py`); a sequence's block
table (`sequence.py`) lists its blocks in order.
"""

from __future__ import annotations


class BlockPool:
    """A fixed set of cache blocks, each holding the keys and values of `block_size` tokens.

    Raises:
        ValueError: when `num_blocks` or `block_size` is below 1.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"the KV cache has {num_blocks} blocks of {block_size} tokens: both must be at "
                "least 1; raise scheduler.kv_cache_gib or scheduler.kv_cache_blocks"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack, lowest number on top, so that a table's blocks tend to be neighbours in memory.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._used = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        """Number of free blocks."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks `num_tokens` tokens need."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> list[int]:
        """Return the numbers of `num_blocks` free blocks, now in use; at most `num_free`."""
        kept = len(self._free) - num_blocks
        assert kept >= 0, f"{num_blocks} blocks asked of {len(self._free)} free ones"
        block_ids = self._free[kept:][::-1]
        del self._free[kept:]
        for block in block_ids:
            self._used[block] = 1
        return block_ids

    def free(self, block_ids: list[int]) -> None:
        """Return blocks to the pool; each must be in use."""
        for block in block_ids:
            assert self._used[block], f"block {block} is freed twice"
            self._used[block] = 0
        self._free.extend(reversed(block_ids))
