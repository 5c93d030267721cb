"""Depthwise causal convolution over the tokens of a ragged step, with earlier tokens as state.

Every token's sum runs over the same inputs in the same order, whether they are in this step or in
the state, so a prompt cut into chunks gives the same result up to the rounding of torch's silu.

Legend: T tokens of the step, S sequences, S1 = S + 1, C channels, W taps, N states, V = W - 1.
"""

import torch
import torch.nn.functional as F

from engine.ops import triton_support


def causal_conv_silu(
    x_TC: torch.Tensor,
    weight_CW: torch.Tensor,
    state_NVC: torch.Tensor,
    states_S: torch.Tensor,
    query_start_S1: torch.Tensor,
    context_lens_S: torch.Tensor,
) -> torch.Tensor:
    """Returns silu of the convolution of each sequence's tokens: [T, C] in x's dtype.

    The last tap belongs to the token itself. state_NVC holds the last V inputs of a sequence, the
    newest last; the rows states_S (int64, all different) are read and replaced IN PLACE. A sequence
    whose context is no longer than its tokens in this step begins with zeros, whatever its row
    holds. Every sequence has at least one token; S and T may be 0. No copy to the host.
    """
    given = (x_TC, weight_CW, state_NVC, states_S, query_start_S1, context_lens_S)
    if triton_support.serves(x_TC):
        from engine.ops.gpu.causal_conv_silu import causal_conv_silu_triton

        return causal_conv_silu_triton(*given)
    return causal_conv_silu_reference(*given)


def causal_conv_silu_reference(
    x_TC: torch.Tensor,
    weight_CW: torch.Tensor,
    state_NVC: torch.Tensor,
    states_S: torch.Tensor,
    query_start_S1: torch.Tensor,
    context_lens_S: torch.Tensor,
) -> torch.Tensor:
    """Plain torch form of `causal_conv_silu`."""
    num_tokens, past = x_TC.shape[0], weight_CW.shape[1] - 1
    if not num_tokens:
        return x_TC.clone()
    start_S = query_start_S1[:-1].long()
    lens_S = query_start_S1.diff().long()
    fresh_S = context_lens_S == lens_S
    old_SVC = state_NVC.index_select(0, states_S).masked_fill(fresh_S[:, None, None], 0.0)
    wide_TC, taps_WC = x_TC.float(), weight_CW.float().t()
    if num_tokens == states_S.shape[0]:  # one token of each sequence
        return _one_token(x_TC, wide_TC, taps_WC, state_NVC, states_S, old_SVC)
    sequences_S = torch.arange(states_S.shape[0], device=x_TC.device)
    sequence_T = sequences_S.repeat_interleave(lens_S, output_size=num_tokens)
    token_T = torch.arange(num_tokens, device=x_TC.device)
    offset_T = token_T - start_S[sequence_T]
    sum_TC = wide_TC * taps_WC[past]
    for back in range(1, past + 1):
        here_TC = wide_TC.index_select(0, (token_T - back).clamp_(min=0))
        row_T = (offset_T + (past - back)).clamp_(max=past - 1)
        before_TC = old_SVC[sequence_T, row_T].float()
        input_TC = torch.where((offset_T >= back)[:, None], here_TC, before_TC)
        sum_TC = sum_TC + input_TC * taps_WC[past - back]
    # Row r of a new state is place lens + r of the old state followed by the step's tokens.
    place_SV = lens_S[:, None] + torch.arange(past, device=x_TC.device)
    kept_SVC = old_SVC[sequences_S[:, None], place_SV.clamp(max=max(past - 1, 0))]
    new_SV = (start_S[:, None] + place_SV - past).clamp_(min=0)
    new_SVC = torch.where((place_SV >= past)[..., None], x_TC[new_SV].to(kept_SVC.dtype), kept_SVC)
    state_NVC.index_copy_(0, states_S, new_SVC)
    return F.silu(sum_TC).to(x_TC.dtype)


def _one_token(
    x_SC: torch.Tensor,
    wide_SC: torch.Tensor,
    taps_WC: torch.Tensor,
    state_NVC: torch.Tensor,
    states_S: torch.Tensor,
    old_SVC: torch.Tensor,
) -> torch.Tensor:
    """Returns the output [S, C] of one token per sequence and replaces the states IN PLACE."""
    past = old_SVC.shape[1]
    sum_SC = wide_SC * taps_WC[past]
    for back in range(1, past + 1):
        sum_SC += old_SVC[:, past - back].float() * taps_WC[past - back]
    if past:
        new_SVC = torch.cat((old_SVC[:, 1:], x_SC.unsqueeze(1).to(old_SVC.dtype)), dim=1)
        state_NVC.index_copy_(0, states_S, new_SVC)
    return F.silu(sum_SC).to(x_SC.dtype)
