"""Gate: the router's weights of one MoE layer, and its routing with them; step 2 of `layer.py`.

Legend: T tokens on this rank, D model dim, E experts (with zero experts), K top-k, V token ids.
"""

from __future__ import annotations

import torch
from torch import nn

from engine.moe.router import RouterSpec, Routing, gate_logits, route, route_by_table


class Gate(nn.Module):
    """Chooses experts and combine weights of tokens. Weights are allocated uninitialised.

    Args:
        spec: how logits become a choice.
        hidden: D.
        device: of the weights.
        dtype: what the model computes in.
    """

    weight_ED: nn.Parameter  # float32 where the logits are, else what the model computes in
    correction_bias_E: nn.Parameter | None  # float32
    logit_bias_E: nn.Parameter | None  # in the dtype of the weights
    expert_scale_E: nn.Parameter | None  # float32, multiplies the combine weights
    table_VK: nn.Parameter | None  # int64, the experts of each token id

    def __init__(
        self, spec: RouterSpec, hidden: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._spec = spec
        logits = 0 if spec.external is not None else spec.num_logits
        dtype = torch.float32 if spec.float32_logits else dtype

        def empty(*shape: int, dtype: torch.dtype = dtype) -> nn.Parameter:
            tensor = torch.empty(*shape, device=device, dtype=dtype)
            return nn.Parameter(tensor, requires_grad=False)

        self.weight_ED = empty(logits, hidden)
        self.correction_bias_E = self.logit_bias_E = self.expert_scale_E = self.table_VK = None
        if spec.correction_bias:
            self.correction_bias_E = empty(logits, dtype=torch.float32)
        if spec.logit_bias:
            self.logit_bias_E = empty(logits)
        if spec.expert_scale:
            self.expert_scale_E = empty(spec.num_experts, dtype=torch.float32)
        if spec.token_table is not None:
            self.table_VK = empty(spec.token_table, spec.top_k, dtype=torch.int64)

    def route(self, x_TD: torch.Tensor, token_ids_T: torch.Tensor | None = None) -> Routing:
        """Return the scores, experts and combine weights of tokens.

        token_ids_T: int64, if and only if a table chooses.
        """
        logits_TE = gate_logits(x_TD, self.weight_ED, self._spec, self.logit_bias_E)
        if self.table_VK is not None:
            assert token_ids_T is not None, "a layer with a token table needs token ids"
            return route_by_table(logits_TE, self._spec, self.table_VK, token_ids_T)
        return route(logits_TE, self._spec, self.correction_bias_E)
