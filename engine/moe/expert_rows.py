"""Expert rows: what experts get of a token and what a token gets back, where it is not its own row.

    weights on the input   the row times its combine weight is sent, and its result counts once
                           (Llama 4); one expert per token, so a row is sent for one weight
    latent width           rows are projected to it before the dispatch, and the sum of a token's
                           results back after the combine: buffers and collectives move latent rows

A token that lost all of its experts gets zero either way: neither projection has a bias.

Legend: T tokens of this rank, D model dim, L latent width, D itself where there is none.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from engine.moe.capacity.decision import Decision
from engine.moe.router import Routing
from engine.ops.linear import linear
from engine.ops.panels import to_panels


class ExpertRows(nn.Module):
    """Makes the rows of one layer that are dispatched, and outputs of what is combined.

    Args:
        hidden: D.
        latent: L; None: rows keep their width.
        weights_on_input: whether rows are multiplied by their combine weights.
        device, dtype: of the weights, which are allocated uninitialised.
    """

    down_LD: nn.Parameter | None
    up_DL: nn.Parameter | None

    def __init__(
        self,
        hidden: int,
        latent: int | None,
        weights_on_input: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.weights_on_input = weights_on_input
        self.down_LD = self.up_DL = None
        if latent is not None:
            shapes = ((latent, hidden), (hidden, latent))
            self.down_LD, self.up_DL = (
                nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)
                for shape in shapes
            )

    def finalize_weights(self) -> None:
        """Change the loaded weights to the layout that is read fastest, in place."""
        for weight in self.parameters():
            to_panels(weight)

    def before(
        self, x_TD: torch.Tensor, routing: Routing, scale_E: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the rows [T, L] to send of each token.

        scale_E: float32, by which weights on the input are multiplied; None: by nothing.
        """
        if self.down_LD is not None:
            x_TD = linear(x_TD, self.down_LD)
        if self.weights_on_input:
            weights_T1 = routing.topk_weights_TK
            if scale_E is not None:
                weights_T1 = weights_T1 * scale_E[routing.topk_ids_TK]
            x_TD = x_TD * weights_T1.to(x_TD.dtype)
        return x_TD

    def counted_once(self, decision: Decision) -> Decision:
        """Return a decision whose results count with the weight 1, which rows already bear."""
        once_TM = torch.ge(decision.ids_TM, 0, out=torch.empty_like(decision.weights_TM))
        return replace(decision, weights_TM=once_TM)

    def after(self, out_TL: torch.Tensor) -> torch.Tensor:
        """Return the outputs [T, D] of combined rows."""
        return out_TL if self.up_DL is None else linear(out_TL, self.up_DL)
