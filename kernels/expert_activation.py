"""What an expert computes between its two matrices, for the forms of `engine.moe.expert_form`.

Legend: R rows, F hidden dim of the expert, N 2F with a gate, else F.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from engine.ops import native
from engine.ops.silu_and_mul import silu_and_mul

Activation = Literal["silu", "gelu", "gelu_tanh", "relu2", "gpt_oss"]


class Rule(NamedTuple):
    """One form's activation; see `engine.moe.expert_form.ExpertForm`."""

    activation: Activation
    gated: bool
    limit: float | None
    alpha: float


def activate(hidden_RN: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Returns the activations [R, F] of an expert's first product, in its dtype.

    hidden_RN is written to: [R, 2F], gate before up, or [R, F] without a gate. A row's bits do not
    depend on the other rows.
    """
    if rule.limit is not None:
        _clamp(hidden_RN, rule)
    if rule.activation == "silu" and rule.gated:
        return silu_and_mul(hidden_RN)
    if rule.activation == "gpt_oss" and native.serves(hidden_RN):
        # gate * sigmoid(alpha * gate) is silu(alpha * gate) / alpha, which is compiled.
        gate_RF, up_RF = hidden_RN.chunk(2, dim=-1)
        gate_RF.mul_(rule.alpha)
        up_RF.add_(1).div_(rule.alpha)
        return silu_and_mul(hidden_RN)
    if native.serves(hidden_RN) and rule.activation != "relu2":
        hidden_RN = _one_by_one(hidden_RN)
    return _activated(hidden_RN, rule)


def activate_reference(hidden_RN: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Plain torch form of `activate`; writes to nothing."""
    hidden_RN = hidden_RN.clone()
    if rule.limit is not None:
        _clamp(hidden_RN, rule)
    return _activated(hidden_RN, rule)


def _clamp(hidden_RN: torch.Tensor, rule: Rule) -> None:
    assert rule.limit is not None
    if not rule.gated:
        hidden_RN.clamp_(-rule.limit, rule.limit)
        return
    gate_RF, up_RF = hidden_RN.chunk(2, dim=-1)
    gate_RF.clamp_(max=rule.limit)
    up_RF.clamp_(-rule.limit, rule.limit)


def _activated(hidden_RN: torch.Tensor, rule: Rule) -> torch.Tensor:
    gate_RF, up_RF = hidden_RN, None
    if rule.gated:
        gate_RF, up_RF = hidden_RN.chunk(2, dim=-1)
    if rule.activation == "gpt_oss":
        assert up_RF is not None
        return (up_RF + 1) * (gate_RF * torch.sigmoid(gate_RF * rule.alpha))
    if rule.activation == "relu2":
        made_RF = F.relu(gate_RF).square_()
    elif rule.activation == "silu":
        made_RF = F.silu(gate_RF)
    else:
        made_RF = F.gelu(gate_RF, approximate="tanh" if "tanh" in rule.activation else "none")
    return made_RF if up_RF is None else made_RF.mul_(up_RF)


def _one_by_one(x_RN: torch.Tensor) -> torch.Tensor:
    """Return a copy whose numbers lie apart. Torch computes whole vectors of adjacent numbers and
    what is left over in two ways, whose last bits differ; of these it has no vectors.
    """
    return torch.stack((x_RN, x_RN), dim=-1)[..., 0]


def add_expert_bias(
    out_RO: torch.Tensor, bias_eO: torch.Tensor, ends_e: torch.Tensor | None
) -> None:
    """Add to each row the bias of its expert, in place; rows past the last have one too.

    ends_e: int32, the end of each expert's rows; given wherever there is a bias.
    """
    assert ends_e is not None
    place_R = torch.arange(out_RO.shape[0], dtype=torch.int32, device=out_RO.device)
    # Rows past the last end are the last expert's: there are such where the host knows no counts.
    out_RO.add_(bias_eO[torch.searchsorted(ends_e[:-1], place_R, right=True)])
