"""All claims from the best to the last: the order in which the cut over copies goes through them.

Legend: N claims.
"""

from collections.abc import Sequence

import torch

from engine.ops import native


def order_claims(words: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the claims' indices, the best first: int64 [N].

    words: int32 [N] each, at least one, most significant first; larger is better. Claims that are
    equal in all words keep their order.
    """
    if words[0].is_cpu and native.available():
        return torch.ops.lockstep_cpu.order_claims(list(words))
    return order_claims_reference(words)


def order_claims_reference(words: Sequence[torch.Tensor]) -> torch.Tensor:
    """Plain torch form of `order_claims`: stable sorts by two words, no host sync."""
    order_N: torch.Tensor | None = None
    last = len(words)
    while last > 0:
        pair = words[max(0, last - 2) : last]
        last -= len(pair)
        # ~word is smallest for the largest word; the lower one is moved into 0 .. 2**32 - 1.
        key_N = (~pair[-1]).long() + 2**31
        if len(pair) == 2:
            key_N = (~pair[0]).long().bitwise_left_shift(32) + key_N
        if order_N is None:
            order_N = key_N.argsort(stable=True)
        else:
            order_N = order_N[key_N[order_N].argsort(stable=True)]
    assert order_N is not None, "order_claims needs at least one word"
    return order_N
