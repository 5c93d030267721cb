"""From the projections of a step to latent queries and a written latent cache: MLA's
`qk_rotary_store.py`.

Legend: T tokens, Q of them that attend, H heads, C latent, R rotated dims (even), L = C + R.
Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.
"""

import torch

from engine.ops import triton_support
from engine.ops.rms_norm import rms_norm
from engine.ops.rotary import apply_rotary
from engine.ops.store_kv import store_kv


def latent_rotary_store(
    absorbed_QHC: torch.Tensor,
    q_rope_THR: torch.Tensor,
    latent_TC: torch.Tensor,
    k_rope_TR: torch.Tensor,
    norm_C: torch.Tensor,
    eps: float,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    cache: torch.Tensor,
    slots_T: torch.Tensor,
    *,
    interleaved: bool,
    rows_Q: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the queries [Q, H, L]: absorbed, then rotated; stores the latents and rotated keys.

    q_rope and k_rope may be overwritten.

    Args:
        absorbed_QHC: queries in the latent space.
        q_rope_THR, k_rope_TR: what is rotated, of all T tokens; the key is shared by the heads.
        latent_TC: before their norm, whose weight and epsilon are norm_C [C] and `eps`.
        cos_TR, sin_TR: each of the R / 2 angles twice, as in `apply_rotary`.
        cache: [num_blocks, 1, block_size, L], written at slots_T (int64, distinct).
        interleaved: rotary pairs are (2i, 2i + 1) and move to (i, i + R / 2), see `split_pairs`.
        rows_Q: int64, the tokens that attend, ascending; None: all.
    """
    if triton_support.serves(absorbed_QHC):
        from engine.ops.gpu.latent_rotary_store import latent_rotary_store_triton as run
    else:
        run = latent_rotary_store_reference
    return run(
        absorbed_QHC,
        q_rope_THR,
        latent_TC,
        k_rope_TR,
        norm_C,
        eps,
        cos_TR,
        sin_TR,
        cache,
        slots_T,
        interleaved=interleaved,
        rows_Q=rows_Q,
    )


def latent_rotary_store_reference(
    absorbed_QHC: torch.Tensor,
    q_rope_THR: torch.Tensor,
    latent_TC: torch.Tensor,
    k_rope_TR: torch.Tensor,
    norm_C: torch.Tensor,
    eps: float,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    cache: torch.Tensor,
    slots_T: torch.Tensor,
    *,
    interleaved: bool,
    rows_Q: torch.Tensor | None = None,
) -> torch.Tensor:
    """`latent_rotary_store` as single ops, on CPU the compiled ones where there are any."""
    k_rope_T1R = k_rope_TR.unsqueeze(1)
    if interleaved:
        q_rope_THR, k_rope_T1R = split_pairs(q_rope_THR), split_pairs(k_rope_T1R)
    apply_rotary(q_rope_THR, k_rope_T1R, cos_TR, sin_TR)
    if rows_Q is not None:
        q_rope_THR = q_rope_THR.index_select(0, rows_Q)
    latent_T1C = rms_norm(latent_TC, norm_C, eps).unsqueeze(1)
    key_T1L = torch.cat((latent_T1C, k_rope_T1R), dim=2)
    store_kv(key_T1L, latent_T1C, cache, cache.narrow(3, 0, latent_TC.shape[1]), slots_T)
    return torch.cat((absorbed_QHC, q_rope_THR), dim=2)


def split_pairs(x: torch.Tensor) -> torch.Tensor:
    """Returns x [.., R] with rotary pairs (2i, 2i + 1) moved to (i, i + R / 2).

    Queries and keys are both rotated in this order, so their products are those of the interleaved
    rotation.
    """
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
