"""All claims from the best to the last: the order in which the cut over copies goes through them.

Legend: N claims, W ranks, B claims of a rank: N = W * B where words are [W, B].
"""

from collections.abc import Sequence

import torch

from engine.ops import native, triton_support


def order_claims(words: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the claims' indices, the best first: int64 [N].

    words: int32 [N] or [W, B] each, at least one, most significant first; larger is better. Claims
    that are equal in all words keep their order. No host sync.
    """
    if words[0].is_cpu and native.available():
        return torch.ops.lockstep_cpu.order_claims(list(words))
    return order_claims_reference(words)


def order_claims_reference(words: Sequence[torch.Tensor]) -> torch.Tensor:
    """Plain torch form of `order_claims`: stable sorts by two words at a time, the last first."""
    order_N: torch.Tensor | None = None
    for last in range(len(words), 0, -2):
        key_N = sort_key(words[max(0, last - 2) : last], order_N)
        found_N = key_N.argsort(stable=True)
        order_N = found_N if order_N is None else order_N[found_N]
    assert order_N is not None, "order_claims needs at least one word"
    return order_N


def sort_key(words: Sequence[torch.Tensor], order_N: torch.Tensor | None = None) -> torch.Tensor:
    """Return one or two words as numbers to sort by, int64 [N], the smallest for the largest words.

    Args:
        words: int32 [N] or [W, B] each, the more significant first.
        order_N: int64, the order to return them in; None: as they are.
    """
    if triton_support.serves(words[0]):
        from engine.ops.gpu.sort_key import sort_key_triton

        return sort_key_triton(words, order_N)
    return sort_key_reference(words, order_N)


def sort_key_reference(
    words: Sequence[torch.Tensor], order_N: torch.Tensor | None = None
) -> torch.Tensor:
    """Plain torch form of `sort_key`."""
    # ~word is smallest for the largest word; the lower one is moved into 0 .. 2**32 - 1.
    key = (~words[-1]).long() + 2**31
    if len(words) == 2:
        key = (~words[0]).long().bitwise_left_shift(32) + key
    key_N = key.flatten()
    return key_N if order_N is None else key_N[order_N]
