"""Prefix cache: sequences with a common prefix share its blocks; its tokens run once.

Keys and values of a token depend on the tokens up to it alone, so a full block is known by the
hash of its tokens and of all before it, a chain:

    tokens    t0 .. t15        t16 .. t31            t32 .. t40
    hashes    h0 = H(t0..)     h1 = H(h0, t16..)     none: not full

A sequence that is admitted takes the longest run of its leading blocks that are cached and starts
behind it; the last token always runs, since its logits are needed. The blocks that it fills are
published in the step that fills them, prompt and generated tokens alike: a sequence that was
preempted finds its own again.

Blocks published in a step may be shared in the same step by slices behind the one that fills them.
That is right because each layer writes the keys and values of all the step's rows before its
attention reads any, and of two micro-batches the first, with the earlier slices, is ahead in every
layer (`moe/dispatch/two_batch.py`).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as List
from hashlib import blake2b
from pathlib import Path

from engine.config import Config
from engine.generation.block_pool import BlockPool
from engine.generation.sequence import Sequence
from engine.layers.gated_delta import GatedDeltaSpec
from engine.models.registry import read_config, read_spec
from engine.models.spec import ModelSpec

# 128 bits, so that the tokens need not be compared: among 2**40 blocks two of different content
# have the same hash with a probability below 2**-48.
_DIGEST_BYTES = 16


def extend_hashes(hashes: list[bytes], token_ids: List[int], block_size: int, end: int) -> None:
    """Append the hashes of the full blocks among the first `end` tokens that `hashes` lacks.

    The same on every rank, in every process and on every machine of one byte order.

    Args:
        hashes: of the leading blocks, extended in place.
        token_ids: at least `end` tokens, each below 2**63.
    """
    previous = hashes[-1] if hashes else b""
    for index in range(len(hashes), end // block_size):
        tokens = array("q", token_ids[index * block_size : (index + 1) * block_size])
        previous = blake2b(previous + tokens.tobytes(), digest_size=_DIGEST_BYTES).digest()
        hashes.append(previous)


def resolve_prefix_cache(setting: bool | str, spec: ModelSpec) -> bool:
    """Return whether sequences share blocks, by scheduler.prefix_cache and what the model allows.

    A recurrent state is of one sequence at its newest token; that of a prefix is gone, so a
    sequence could not start behind it.

    Raises:
        ValueError: it is to be on for a model with recurrent states.
    """
    has_states = any(isinstance(layer.attention, GatedDeltaSpec) for layer in spec.layers)
    if has_states and setting is True:
        raise ValueError(
            "scheduler.prefix_cache = true: this model has layers with a recurrent state per "
            "sequence (linear attention), which requests with a common prefix cannot share; set it "
            "to auto or false"
        )
    return bool(setting) and not has_states


def may_share_prefixes(config: Config) -> bool:
    """Return what `resolve_prefix_cache` does for the checkpoint of a config, before it is loaded.

    True where its config cannot be read or the setting is wrong: loading it says so.
    """
    try:
        implementation = config.model.implementation
        hf_config = read_config(Path(config.model.path), implementation)
        spec = read_spec(hf_config, implementation)
        return resolve_prefix_cache(config.scheduler.prefix_cache, spec)
    except (ValueError, OSError):
        return True


class PrefixCache:
    """What the scheduler of one data rank shares between its sequences.

    Every tensor rank has one of its own and makes the same decisions.

    Args:
        enabled: whether anything is shared, see `resolve_prefix_cache`.
    """

    def __init__(self, pool: BlockPool, enabled: bool) -> None:
        self.enabled = enabled
        self._pool = pool
        self._expected: set[bytes] = set()  # of prompts that were added and not yet filled

    def clear(self) -> None:
        """Forget all cached content."""
        self._expected.clear()
        self._pool.drop_cached()

    def expect(self, seq: Sequence) -> None:
        """Estimate how much of a new sequence's prompt will be cached once it is admitted.

        That is what is cached now, or in prompts added before it.
        """
        if not self.enabled:
            return
        hashes, block_size = seq.block_hashes, self._pool.block_size
        extend_hashes(hashes, seq.token_ids, block_size, seq.num_prompt)
        expected, usable = self._expected, self._usable(seq)
        for index, each in enumerate(hashes):
            if each not in expected and not self._pool.is_cached(each):
                usable = min(usable, index)
                break
        seq.num_expected = min(usable, len(hashes)) * block_size
        expected.update(hashes[usable:])

    def forget(self, seq: Sequence) -> None:
        """Withdraw the blocks of a sequence that failed: they may be what made it fail."""
        self._expected.difference_update(seq.block_hashes)
        self._pool.withdraw(seq.block_ids)

    def find(self, seq: Sequence) -> list[int]:
        """Return the cached blocks that a sequence about to be admitted can start with."""
        if not self.enabled:
            return []
        usable = self._usable(seq)
        extend_hashes(seq.block_hashes, seq.token_ids, self._pool.block_size, len(seq.token_ids))
        return self._pool.find(seq.block_hashes[:usable])

    def fill(self, seq: Sequence, end: int) -> None:
        """Publish the blocks that are full once the sequence's first `end` tokens have run."""
        block_size = self._pool.block_size
        full = end // block_size
        if not self.enabled or full <= seq.num_published:
            return
        extend_hashes(seq.block_hashes, seq.token_ids, block_size, end)
        for index in range(seq.num_published, full):
            self._pool.publish(seq.block_ids[index], seq.block_hashes[index])
        self._expected.difference_update(seq.block_hashes[seq.num_published : full])
        seq.num_published = full

    def _usable(self, seq: Sequence) -> int:
        """Return how many blocks of a sequence may come from the cache."""
        if seq.prompt_logprobs is not None:
            return 0  # the logits of every prompt token are needed
        known = len(seq.token_ids)
        # After a preemption two tokens run: one alone would be a decode slice among prefills.
        return (known - (1 if known == seq.num_prompt else 2)) // self._pool.block_size
