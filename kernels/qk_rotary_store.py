"""From the projections of a step to rotated queries and a written cache: what attention reads.

Bound, norm of queries and keys, rotary position embedding and the write into the paged cache: on
CUDA one kernel instead of one per operation and tensor. That of a latent is
`latent_rotary_store.py`.

Legend: T tokens, H query heads, G kv heads, D head dim, R rotated dims (even, R <= D).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from engine.ops import triton_support
from engine.ops.rms_norm import rms_norm
from engine.ops.rotary import apply_rotary
from engine.ops.store_kv import store_kv


@dataclass(frozen=True, slots=True)
class QKRule:
    """What happens to queries and keys before they are rotated."""

    norm: Literal["none", "head", "projection"]  # over each head, or over all heads as one row
    eps: float = 1e-6  # of the norm
    clip: float | None = None  # bound on |q|, |k| and |v|, after "projection" and before "head"


def qk_rotary_store(
    q_TO: torch.Tensor,
    k_TO: torch.Tensor,
    v_TO: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots_T: torch.Tensor,
    rule: QKRule,
) -> torch.Tensor:
    """Returns the queries [T, H, D], normalised and rotated, and stores the keys and the values.

    q and k may be overwritten.

    Args:
        q_TO, k_TO, v_TO: [T, H * D], [T, G * D], [T, G * D]; may be views of one projection.
        q_norm, k_norm: weights of the norms, [D] of a head or [H * D] and [G * D] of a projection;
            None where `rule` has no norm.
        cos_TR, sin_TR: each of the R / 2 angles twice, as in `apply_rotary`.
        k_cache, v_cache: [num_blocks, G, block_size, D], written at slots_T (int64, distinct).
    """
    if triton_support.serves(q_TO):
        from engine.ops.gpu.qk_rotary_store import qk_rotary_store_triton as run
    else:
        run = qk_rotary_store_reference
    return run(q_TO, k_TO, v_TO, q_norm, k_norm, cos_TR, sin_TR, k_cache, v_cache, slots_T, rule)


def qk_rotary_store_reference(
    q_TO: torch.Tensor,
    k_TO: torch.Tensor,
    v_TO: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots_T: torch.Tensor,
    rule: QKRule,
) -> torch.Tensor:
    """`qk_rotary_store` as single ops, on CPU the compiled ones where there are any."""
    heads = (-1, k_cache.shape[3])
    if rule.norm == "projection":
        assert q_norm is not None and k_norm is not None
        q_TO, k_TO = rms_norm(q_TO, q_norm, rule.eps), rms_norm(k_TO, k_norm, rule.eps)
    if rule.clip is not None:
        bound = rule.clip
        q_TO, k_TO = q_TO.clamp(-bound, bound), k_TO.clamp(-bound, bound)
        v_TO = v_TO.clamp(-bound, bound)
    q_THD, k_TGD = q_TO.unflatten(1, heads), k_TO.unflatten(1, heads)
    if rule.norm == "head":
        assert q_norm is not None and k_norm is not None
        q_THD, k_TGD = rms_norm(q_THD, q_norm, rule.eps), rms_norm(k_TGD, k_norm, rule.eps)
    apply_rotary(q_THD, k_TGD, cos_TR, sin_TR)
    store_kv(k_TGD, v_TO.unflatten(1, heads), k_cache, v_cache, slots_T)
    return q_THD
