"""Rows whose next token is drawn: their weights, their candidates, and the draw.

Each row's token depends on its own logits and parameters alone, and its bits neither on the other
rows nor on how many candidates are looked at beyond those that it needs.

Legend: V vocabulary, R rows, C candidates of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.generation.sampling.likeliest import likeliest_ids


@dataclass(frozen=True, slots=True)
class DrawnRows:
    """The rows of a step that sample in one way. All on the logits' device, float64 by default."""

    logits_RV: Tensor  # float32
    top_R: Tensor  # float32, the largest logit
    random_R: Tensor  # one draw each, in [0, 1)
    temperature_R: Tensor
    top_k_R: Tensor  # V where it is off
    top_p_R: Tensor
    min_p_R: Tensor | None  # None where no row has it

    def weights(self, logits_RC: Tensor) -> Tensor:
        """Return unnormalised probabilities, float32 [R, C]; the row's maximum has weight 1.

        Tokens below min_p have weight 0.
        """
        smallest = torch.finfo(torch.float32).tiny
        temperature_R1 = self.temperature_R.float().clamp(min=smallest)[:, None]
        weights_RC = ((logits_RC - self.top_R[:, None]) / temperature_R1).exp()
        if self.min_p_R is not None:
            weights_RC = weights_RC.masked_fill(weights_RC < self.min_p_R[:, None], 0)
        return weights_RC


@dataclass(frozen=True, slots=True)
class Candidates:
    """The likeliest tokens of rows, after filtering by min_p and top_k and before top_p."""

    rows: DrawnRows
    ids_RC: Tensor  # int64, the likeliest first
    weights_RC: Tensor  # float32, 0 for what is filtered out
    mass_RC: Tensor  # float64, of a token and all before it
    total_R: Tensor  # float64, of all tokens that min_p and top_k leave
    lacks_R: Tensor | None  # whether top_p needs more tokens; None: there are none

    @classmethod
    def of(cls, rows: DrawnRows, width: int, *, nucleus: bool) -> Candidates:
        """Sort the candidates.

        Args:
            rows: rows with top_k or top_p.
            width: C, at least every top_k that is on.
            nucleus: whether some rows have no top_k.
        """
        vocab = rows.logits_RV.shape[1]
        ids_RC = likeliest_ids(rows.logits_RV, width)
        weights_RC = rows.weights(rows.logits_RV.gather(1, ids_RC))
        rank_C = torch.arange(width, device=ids_RC.device)
        weights_RC = weights_RC.masked_fill(rank_C >= rows.top_k_R[:, None], 0)
        mass_RC = weights_RC.cumsum(dim=1, dtype=torch.float64)
        total_R, lacks_R = mass_RC[:, -1], None
        if nucleus and width < vocab:
            all_R = rows.weights(rows.logits_RV).sum(dim=1, dtype=torch.float64)
            total_R = torch.where(rows.top_k_R < vocab, total_R, all_R)
            lacks_R = mass_RC[:, -1] < rows.top_p_R * total_R
        return cls(rows, ids_RC, weights_RC, mass_RC, total_R, lacks_R)

    def draw(self) -> Tensor:
        """Return tokens [R].

        Top-p keeps the fewest of the likeliest tokens whose mass reaches top_p.
        """
        before_RC = self.mass_RC - self.weights_RC
        kept_RC = before_RC < (self.rows.top_p_R * self.total_R)[:, None]
        ids_RC, order_RC = self.ids_RC.sort(dim=1)
        weights_RC = (self.weights_RC * kept_RC).gather(1, order_RC)
        return ids_RC.gather(1, invert(weights_RC, self.rows.random_R)[:, None])[:, 0]


def invert(weights_RC: Tensor, random_R: Tensor) -> Tensor:
    """Return the column [R] where the cumulative weight exceeds the share `random_R` of its total.

    In float64, where u < 1 makes u * total < total: a column of weight 0 is never chosen.
    """
    cdf_RC = weights_RC.cumsum(dim=1, dtype=torch.float64)
    target_R1 = (random_R * cdf_RC[:, -1])[:, None]
    column_R1 = torch.searchsorted(cdf_RC, target_R1, right=True)
    # A row of NaN, reported later, would be past the end.
    return column_R1[:, 0].clamp(max=weights_RC.shape[1] - 1)
