"""A small MoE layer with fixed weights, on real ranks."""

from __future__ import annotations

import torch
from torch import nn

from engine.config import Config
from engine.distributed.collectives import GroupCollectives
from engine.moe.dispatch.exchange import Exchange
from engine.moe.expert_form import ExpertForm
from engine.moe.layer import MoELayer
from engine.moe.placement.placement import LayerPlacement, Precision
from engine.moe.router import RouterSpec
from engine.moe.spec import MoESpec
from engine.moe.step import MoEStep
from engine.moe.token_shard import part_bounds

HIDDEN, FFN = 16, 24


class Doubled(nn.Module):
    """A shared expert whose output is easy to take away again."""

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return 2 * x_TD


def weights_of(num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    gate = torch.randn(num_experts, HIDDEN, generator=generator)
    gate[0] += 0.6  # with tokens of positive mean, expert 0 is hot
    return (
        gate,
        torch.randn(num_experts, 2 * FFN, HIDDEN, generator=generator) * 0.3,
        torch.randn(num_experts, HIDDEN, FFN, generator=generator) * 0.3,
    )


def correction_of(num_experts: int) -> torch.Tensor:
    """The bias of the choice of a family that has one."""
    return torch.linspace(-0.3, 0.3, num_experts)


def logit_bias_of(num_experts: int) -> torch.Tensor:
    """Brings in experts that the tokens alone would not choose."""
    return torch.linspace(-2.0, 3.0, num_experts)


def expert_scale_of(num_experts: int) -> torch.Tensor:
    return torch.linspace(0.5, 2.0, num_experts)


def table_of(num_ids: int, num_experts: int, top_k: int) -> torch.Tensor:
    """Experts of each token id, in no order of their scores."""
    generator = torch.Generator().manual_seed(5)
    return torch.rand(num_ids, num_experts, generator=generator).argsort(1)[:, :top_k].clone()


def token_ids_of(rank: int, count: int, num_ids: int) -> torch.Tensor:
    """Token ids of which half are one and the same, as in a batch with common words."""
    generator = torch.Generator().manual_seed(200 + rank)
    ids = torch.randint(num_ids, (count,), generator=generator)
    return ids.where(torch.rand(count, generator=generator) < 0.5, 3)


def tokens_of(rank: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(count, HIDDEN, generator=generator) + 0.4


def activated(hidden: torch.Tensor, form: ExpertForm) -> torch.Tensor:
    """What a form is defined to compute of one row's first product."""
    gate, up = hidden.chunk(2) if form.gated else (hidden, torch.ones_like(hidden))
    if form.limit is not None:
        limit = torch.tensor(form.limit)
        gate = torch.minimum(gate, limit)
        if form.gated:
            up = torch.maximum(torch.minimum(up, limit), -limit)
        else:
            gate = torch.maximum(gate, -limit)
    if form.activation == "gpt_oss":
        return (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
    if form.activation == "relu2":
        return torch.where(gate > 0, gate * gate, 0) * up
    if form.activation == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    if form.activation == "gelu":
        return gate * 0.5 * (1 + torch.erf(gate / 2**0.5)) * up
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + torch.tanh(inner)) * up


class WatchedExchange(Exchange):
    """An exchange that keeps what it starts, and what of it was waited for."""

    def __init__(self, topology) -> None:
        super().__init__(topology.expert, GroupCollectives(topology.expert))
        self.started: list = []
        self.waited: list = []

    def start(self, rows):
        pending = super().start(rows)
        wait = pending.wait
        pending.wait = lambda: (self.waited.append(pending), wait())[1]
        self.started.append(pending)
        return pending

    def assert_none_in_flight(self) -> None:
        waited = {id(pending) for pending in self.waited}
        assert {id(pending) for pending in self.started} <= waited, "a handle leaked"


def build(
    topology,
    config: Config,
    spec: RouterSpec,
    shared: nn.Module | None,
    exchange: Exchange | None = None,
    placement: LayerPlacement | None = None,
    precision: Precision = "model",
    speeds_W: tuple[int, ...] | None = None,
) -> MoELayer:
    layer = MoELayer(
        MoESpec(router=spec, hidden=HIDDEN, ffn=FFN),
        layer=3,
        topology=topology,
        config=config.moe,
        device=topology.device,
        dtype=torch.float32,
        shared=shared,
        exchange=exchange,
        placement=placement,
        precision=precision,
        speeds_W=speeds_W,
    )
    gate, w13, w2 = weights_of(spec.num_logits)
    layer.gate.weight_ED.copy_(gate)
    if layer.gate.correction_bias_E is not None:
        layer.gate.correction_bias_E.copy_(correction_of(spec.num_logits))
    if layer.gate.logit_bias_E is not None:
        layer.gate.logit_bias_E.copy_(logit_bias_of(spec.num_logits))
    if layer.gate.expert_scale_E is not None:
        layer.gate.expert_scale_E.copy_(expert_scale_of(spec.num_experts))
    if layer.gate.table_VK is not None:
        layer.gate.table_VK.copy_(table_of(len(layer.gate.table_VK), spec.num_experts, spec.top_k))
    for local, expert in enumerate(layer.local_experts):
        layer.experts.set_weights(local, w13[expert], w2[expert])
    if precision != "model":
        layer.finalize_weights()
    return layer


def step_of(topology, counts: list[int], tensor: int) -> MoEStep:
    """Request = data rank, position = row; everything competes."""
    data, count = topology.data_rank, counts[topology.data_rank]
    start, end = part_bounds(count, tensor, topology.tensor.rank)
    sizes = [
        part_bounds(counts[rank // tensor], tensor, rank % tensor)
        for rank in range(topology.expert.size)
    ]
    return MoEStep(
        request_T=torch.full((end - start,), data, dtype=torch.int32),
        position_T=torch.arange(start, end, dtype=torch.int32),
        eligible_T=None,
        num_own_eligible=end - start,
        num_tokens_W=tuple(last - first for first, last in sizes),
        num_eligible=sum(counts),
    )


MIXTRAL = RouterSpec(num_experts=8, top_k=2, normalize=True)


OLMOE = RouterSpec(num_experts=10, top_k=3)


# A bias and a cap of the logits, and a scale of each expert's weight.
CAPPED = RouterSpec(
    num_experts=10, top_k=3, normalize=True, logit_bias=True, logit_cap=2.5, expert_scale=True
)


DEEPSEEK = RouterSpec(num_experts=8, top_k=3, scale=2.5, num_groups=4, top_groups=2)


MINIMAX = RouterSpec(num_experts=9, top_k=3, score="sigmoid", normalize=True, correction_bias=True)


# The best of groups by a bias, which scores and weights are without.
DEEPSEEK_V3 = RouterSpec(
    num_experts=8,
    top_k=3,
    score="sigmoid",
    normalize=True,
    normalize_eps=1e-20,
    scale=2.5,
    num_groups=4,
    top_groups=2,
    group_score="top2",
    correction_bias=True,
)


# A minimum that some tokens' sums do not reach.
ERNIE = RouterSpec(num_experts=8, top_k=2, normalize=True, normalize_min=0.6, correction_bias=True)


# DeepSeek-V4's first layers: a table of token ids chooses, the scores weigh.
TABLE = RouterSpec(
    num_experts=9,
    top_k=3,
    score="sqrt_softplus",
    normalize=True,
    normalize_eps=1e-20,
    scale=1.5,
    token_table=13,
)


# Some tokens choose zero experts alone.
LONGCAT = RouterSpec(
    num_experts=7, top_k=3, scale=1.5, correction_bias=True, num_zero_experts=4, float32_logits=True
)
