"""Block pool: which blocks of the paged KV cache are free, in use or cached. No tensors.

A block number indexes the cache tensors of every layer (`layers/kv_cache.py`); a sequence's block
table (`sequence.py`) lists its blocks in order. Sequences with a common prefix have the same blocks
at the start of their tables, so a block counts its users.

    free --allocate--> in use --free--> free
                          | publish: full, known by the hash of its content (`prefix_cache.py`)
                          v
                    in use, cached --free--> cached --evicted, least recently used first--> free
                          ^------- share -------'

A block is written by the sequence that allocated it, before it is full, and never again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

# At most this share of the pool keeps content that no sequence uses. On CPU a block takes memory
# once it is written: without a limit every job of some length would touch the whole cache.
_MAX_CACHED_SHARE = 4


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
        self._users = [0] * num_blocks  # sequences per block
        self._block_of: dict[bytes, int] = {}  # content hash -> block
        self._hash_of: dict[int, bytes] = {}  # the reverse
        # Cached blocks without users, the least recently used first.
        self._unused: OrderedDict[int, None] = OrderedDict()
        self._max_unused = -(-num_blocks // _MAX_CACHED_SHARE)

    @property
    def num_free(self) -> int:
        """Number of blocks that can be allocated: the free ones, and the cached ones not in use."""
        return len(self._free) + len(self._unused)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks `num_tokens` tokens need."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> list[int]:
        """Return the numbers of `num_blocks` blocks, now in use; at most `num_free`.

        Cached content is dropped only where no block is free, the least recently used first.
        """
        while len(self._free) < num_blocks and self._unused:
            self._evict()
        kept = len(self._free) - num_blocks
        assert kept >= 0, f"{num_blocks} blocks asked of {len(self._free)} free ones"
        block_ids = self._free[kept:][::-1]
        del self._free[kept:]
        for block in block_ids:
            self._users[block] = 1
        return block_ids

    def free(self, block_ids: list[int]) -> None:
        """Take one user from each of a sequence's blocks, which must be in use.

        The last blocks of a sequence are dropped from the cache before its first ones, without
        which they cannot be found.
        """
        users, hash_of = self._users, self._hash_of
        for block in reversed(block_ids):
            assert users[block], f"block {block} is freed twice"
            users[block] -= 1
            if users[block]:
                continue
            if block in hash_of:
                self._unused[block] = None
            else:
                self._free.append(block)
        while len(self._unused) > self._max_unused:
            self._evict()

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the cached blocks of the longest run of leading hashes that are all cached."""
        found: list[int] = []
        for each in hashes:
            block = self._block_of.get(each)
            if block is None:
                break
            found.append(block)
        return found

    def is_cached(self, content_hash: bytes) -> bool:
        """Return whether a block has this content."""
        return content_hash in self._block_of

    def num_unused(self, block_ids: list[int]) -> int:
        """Return how many of these cached blocks no sequence uses: sharing them takes free ones."""
        return sum(not self._users[block] for block in block_ids)

    def share(self, block_ids: list[int]) -> None:
        """Add one user to each of these cached blocks."""
        for block in block_ids:
            if not self._users[block]:
                del self._unused[block]
            self._users[block] += 1

    def publish(self, block: int, content_hash: bytes) -> None:
        """Make a block in use known by its content, unless another block has the same content."""
        assert self._users[block], f"block {block} is published while not in use"
        if content_hash not in self._block_of and block not in self._hash_of:
            self._block_of[content_hash] = block
            self._hash_of[block] = content_hash

    def withdraw(self, block_ids: list[int]) -> None:
        """Drop the content hashes of these blocks; sequences that use them are unaffected."""
        for block in block_ids:
            if (content_hash := self._hash_of.pop(block, None)) is not None:
                del self._block_of[content_hash]

    def drop_cached(self) -> None:
        """Forget all cached content."""
        while self._unused:
            self._evict()
        self._block_of.clear()
        self._hash_of.clear()

    def _evict(self) -> None:
        block, _ = self._unused.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        self._free.append(block)
