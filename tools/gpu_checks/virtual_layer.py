"""One MoE layer of 8 ranks run on one device, rank after rank: what token_drop gains.

The loads are made, not recorded: the first of 8 ranks has 2.9 times the mean rows, so that the
bounds at gamma 2, 1.5 and 1 are near the gains that the paper reports for Mixtral-8x7B (He et al.,
arXiv 2503.05066): 1.44, 1.89 and 2.55. All-to-alls are left out; `bench/simulated_ranks.py` has the
rules.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench.loads import overloaded_rank_loads
from bench.moe_case import MoEShape, MoEWeights
from bench.simulated_ranks import SimulatedRanks
from bench.transfers import KINDS, NO_TRANSFERS

from engine.config import CapacityConfig
from gpu_checks.check import Check, Settings, at_most, figure
from gpu_checks.shapes import MIXTRAL, tiny

GROUP = "speed"
RANKS, RATIO = 8, 2.9
PAPER = {"2": 1.44, "1.5": 1.89, "1": 2.55}


def check_virtual_layer(settings: Settings) -> Iterator[Check]:
    """Time the layer without a policy and with token_drop at every gamma."""
    shape = tiny(MIXTRAL) if settings.is_tiny else MIXTRAL
    layer = MoEShape(hidden=shape.hidden, ffn=shape.ffn, experts=shape.experts, top_k=shape.top_k)
    tokens = RANKS * (32 if settings.is_tiny else 2048)
    loads_E = overloaded_rank_loads(tokens, layer.experts, layer.top_k, RATIO, RANKS)
    ranks = SimulatedRanks(layer, _weights(layer, settings.device), RANKS, loads_E)
    policies = {"none": CapacityConfig()}
    for gamma in PAPER:
        policies[gamma] = CapacityConfig(policy="token_drop", factor=gamma)
    times = ranks.compare(policies, dict.fromkeys(KINDS, NO_TRANSFERS), rounds=3)
    base = times["none"]
    yield figure(GROUP, "virtual 8 ranks: layer without a policy, ms", base.seconds * 1e3)
    for gamma, paper in PAPER.items():
        gain, bound = base.seconds / times[gamma].seconds, max(base.rows) / max(times[gamma].rows)
        yield figure(
            GROUP,
            f"virtual 8 ranks: gain of token_drop, gamma {gamma}",
            gain,
            f"beside the paper's; bound of these loads {bound:.2f}, without all-to-alls",
            paper,
        )
        # Decisions are exact: the busiest rank has one expert and keeps no more than its capacity.
        most = -(-int(float(gamma) * tokens * layer.top_k) // RANKS)
        name = f"virtual 8 ranks: rows of the busiest rank, gamma {gamma}"
        if shape.experts == RANKS:
            yield at_most(GROUP, name, max(times[gamma].rows), most)


def _weights(shape: MoEShape, device: torch.device) -> MoEWeights:
    """Return random weights drawn on the device, bfloat16."""
    generator = torch.Generator().manual_seed(0)
    gate_DE, _ = torch.linalg.qr(torch.randn(shape.hidden, shape.experts, generator=generator))

    def normal(*sizes: int) -> torch.Tensor:
        made = torch.empty(*sizes, device=device, dtype=torch.bfloat16)
        return made.normal_(0, sizes[-1] ** -0.5)

    return MoEWeights(
        gate_DE.T.contiguous().to(device, torch.bfloat16),
        normal(shape.experts, 2 * shape.ffn, shape.hidden),
        normal(shape.experts, shape.hidden, shape.ffn),
    )
