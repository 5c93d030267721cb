"""MoE spec: shapes and routing of a family's MoE layer.

Legend: D model dim, F the experts' hidden dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.moe.expert_form import ExpertForm
from engine.moe.router import RouterSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class MoESpec:
    """Shapes of a family's MoE layer."""

    router: RouterSpec
    hidden: int  # D
    ffn: int  # F, the experts' hidden dim
    experts: ExpertForm = ExpertForm()

    @property
    def width(self) -> int:
        """Numbers of a dispatched row: the model dim, or the experts' latent width."""
        return self.experts.latent or self.hidden
