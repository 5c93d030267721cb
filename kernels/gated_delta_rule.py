"""Gated delta rule: linear attention whose state forgets and corrects itself token by token.

Per value head, with decay g = exp(-exp(log_rate) * softplus(a + rate_bias)), step size
c = sigmoid(b), and q and k of length 1 (q then over sqrt(K)):

    state <- g * state;   state <- state + k (c * (v - k state))^T;   out = q state

Sequences of one token take one such update, all together. Longer ones run in chunks of 64 tokens:
within one, the corrections d of all tokens solve a triangular system, and the state is read and
written once. Both forms agree up to rounding, so neither does a token's result depend on how its
prompt was cut. On CUDA one kernel takes all tokens of all sequences, one by one.

Legend: T tokens, S sequences, S1 = S + 1, G key heads, H value heads (a multiple of G), K key dim,
V value dim, N states, L tokens of a chunk. Source: Yang et al., Gated Delta Networks, 2024.
"""

import torch
import torch.nn.functional as F

from engine.ops import triton_support

_CHUNK = 64
_EPS = 1e-6  # inside the root of the lengths of q and k


def gated_delta_rule(
    q_TGK: torch.Tensor,
    k_TGK: torch.Tensor,
    v_THV: torch.Tensor,
    a_TH: torch.Tensor,
    b_TH: torch.Tensor,
    log_rate_H: torch.Tensor,
    rate_bias_H: torch.Tensor,
    state_NHKV: torch.Tensor,
    states_S: torch.Tensor,
    query_start_S1: torch.Tensor,
    context_lens_S: torch.Tensor,
    query_lens: list[int],
    context_lens: list[int],
) -> torch.Tensor:
    """Returns the outputs [T, H, V] in v's dtype and advances the states IN PLACE.

    Value heads share a key head in consecutive groups of H / G. log_rate_H and rate_bias_H are
    float32. state_NHKV is float32; its rows states_S (int64, all different) belong to the
    sequences. One whose context is no longer than its tokens in this step begins with zeros,
    whatever its row holds. query_lens: tokens of each sequence, at least 1, the same as
    query_start_S1; context_lens: the same as context_lens_S. Computes in float32, but for the
    sigmoid of b, which is rounded to b's dtype; no copy to the host.
    """
    tokens, decay = (q_TGK, k_TGK, v_THV, a_TH, b_TH), (log_rate_H, rate_bias_H)
    states = (state_NHKV, states_S, query_start_S1, context_lens_S)
    if triton_support.serves(q_TGK):
        from engine.ops.gpu.gated_delta_rule import gated_delta_rule_triton

        return gated_delta_rule_triton(*tokens, *decay, *states, query_lens, context_lens)
    return gated_delta_rule_reference(*tokens, *decay, *states, query_lens, context_lens)


def gated_delta_rule_reference(
    q_TGK: torch.Tensor,
    k_TGK: torch.Tensor,
    v_THV: torch.Tensor,
    a_TH: torch.Tensor,
    b_TH: torch.Tensor,
    log_rate_H: torch.Tensor,
    rate_bias_H: torch.Tensor,
    state_NHKV: torch.Tensor,
    states_S: torch.Tensor,
    query_start_S1: torch.Tensor,
    context_lens_S: torch.Tensor,
    query_lens: list[int],
    context_lens: list[int],
) -> torch.Tensor:
    """Plain torch form of `gated_delta_rule`."""
    log_decay_TH = -log_rate_H.exp() * F.softplus(a_TH.float() + rate_bias_H)
    groups = v_THV.shape[1] // q_TGK.shape[1]
    q_THK = (_unit(q_TGK) * q_TGK.shape[-1] ** -0.5).repeat_interleave(groups, dim=1)
    k_THK = _unit(k_TGK).repeat_interleave(groups, dim=1)
    tokens = (q_THK, k_THK, v_THV.float(), log_decay_TH, b_TH.sigmoid().float())
    # Passes over the states take most of a decode step on a CPU: one copy, updated in place.
    state_SHKV = state_NHKV.index_select(0, states_S)
    if any(new == whole for new, whole in zip(query_lens, context_lens, strict=True)):
        fresh_S = context_lens_S == query_start_S1.diff()
        state_SHKV.masked_fill_(fresh_S[:, None, None, None], 0.0)
    # Decodes come first in a step: they are the leading sequences of one token.
    singles = next((s for s, n in enumerate(query_lens) if n > 1), len(query_lens))
    outs = []
    if singles:
        outs.append(_one_token(tuple(x[:singles] for x in tokens), state_SHKV[:singles]))
    first = singles
    for sequence in range(singles, len(query_lens)):
        state_HKV, end = state_SHKV[sequence], first + query_lens[sequence]
        for begin in range(first, end, _CHUNK):
            rows = slice(begin, min(begin + _CHUNK, end))
            out, state_HKV = _one_chunk(tuple(x[rows] for x in tokens), state_HKV)
            outs.append(out)
        state_SHKV[sequence] = state_HKV
        first = end
    if not outs:
        return torch.empty_like(v_THV)
    state_NHKV.index_copy_(0, states_S, state_SHKV)
    return (outs[0] if len(outs) == 1 else torch.cat(outs)).to(v_THV.dtype)


def _unit(x_TGK: torch.Tensor) -> torch.Tensor:
    wide_TGK = x_TGK.float()
    return wide_TGK * torch.rsqrt(wide_TGK.square().sum(-1, keepdim=True) + _EPS)


def _one_token(tokens: tuple[torch.Tensor, ...], state_SHKV: torch.Tensor) -> torch.Tensor:
    """Returns the outputs [S, H, V] of one token per sequence; advances the states IN PLACE."""
    q_SHK, k_SHK, v_SHV, log_decay_SH, beta_SH = tokens
    state_SHKV.mul_(log_decay_SH.exp()[..., None, None])
    known_SHV = (k_SHK.unsqueeze(-2) @ state_SHKV).squeeze(-2)
    d_SHV = (v_SHV - known_SHV) * beta_SH.unsqueeze(-1)
    state_SHKV.add_(k_SHK.unsqueeze(-1) * d_SHV.unsqueeze(-2))
    return (q_SHK.unsqueeze(-2) @ state_SHKV).squeeze(-2)


def _one_chunk(
    tokens: tuple[torch.Tensor, ...], state_HKV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the outputs [L, H, V] of consecutive tokens of one sequence, and its new state."""
    q_LHK, k_LHK, v_LHV, log_decay_LH, beta_LH = tokens
    q_HLK, k_HLK, v_HLV = (x.transpose(0, 1) for x in (q_LHK, k_LHK, v_LHV))
    sum_HL, beta_HL1 = log_decay_LH.t().cumsum(1), beta_LH.t().unsqueeze(-1)
    # What is left at token i of what token j <= i wrote; later tokens count for nothing.
    left_HLL = (sum_HL.unsqueeze(2) - sum_HL.unsqueeze(1)).tril().exp().tril()
    since_HL1 = sum_HL.exp().unsqueeze(-1)  # what is left of the state before the chunk
    keys_HLL = k_HLK @ k_HLK.transpose(1, 2)
    # d_i = c_i * (v_i - what the state before and d_j, j < i, already say for k_i)
    system_HLL = beta_HL1 * keys_HLL * left_HLL
    right_HLV = beta_HL1 * (v_HLV - since_HL1 * (k_HLK @ state_HKV))
    d_HLV = torch.linalg.solve_triangular(system_HLL, right_HLV, upper=False, unitriangular=True)
    scores_HLL = (q_HLK @ k_HLK.transpose(1, 2)) * left_HLL
    out_HLV = since_HL1 * (q_HLK @ state_HKV) + scores_HLL @ d_HLV
    decayed_HLK = k_HLK * (sum_HL[:, -1:] - sum_HL).exp().unsqueeze(-1)
    state_HKV = since_HL1[:, -1:] * state_HKV + decayed_HLK.transpose(1, 2) @ d_HLV
    return out_HLV.transpose(0, 1), state_HKV
