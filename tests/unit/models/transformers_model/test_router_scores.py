"""Which function of its logits a router's weights are.

Run: pytest tests/unit/models/transformers_model/test_router_scores.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from engine.models.registry import read_spec
from engine.models.spec import SparseSpec
from engine.models.transformers_model.block_record import BlockRecord, BlockRecords
from engine.models.transformers_model.probe import probe
from engine.models.transformers_model.router_scores import RouterScores
from engine.moe.router import RouterSpec
from tests.helpers.model_cases import CASES
from tests.helpers.transformers_capacity import SCORES
from tests.helpers.transformers_cases import FOREIGN_CASES

# Of this engine's families, those whose model transformers builds on its parts.
OWN = [
    "mixtral",
    "olmoe",
    "qwen2-moe",
    "qwen2-moe-mixed-layers-window",
    "qwen3-moe",
    "deepseek-v2-lite",
    "deepseek-v2-groups-q-lora-biases",
    "deepseek-v3",
    "deepseek-v3-split-pairs-unnormalised",
    "glm4-moe",
    "minimax-m2",
    "ernie4-5-moe",
    "ernie4-5-moe-interval-untied-no-shared",
]
D, E, K, T = 32, 6, 2, 2


@pytest.mark.parametrize("case", OWN)
def test_of_our_families_the_rule_is_the_one_that_their_spec_states(case: str) -> None:
    config = CASES[case].config()
    layers = read_spec(config, "lockstep").layers
    calls = probe(config).experts
    assert calls
    for call in calls:
        mlp = layers[call.layer].mlp
        assert isinstance(mlp, SparseSpec) and call.scores is not None
        router = mlp.moe.router
        assert rule_of(call.scores) == rule_of(router)


def rule_of(of: RouterScores | RouterSpec) -> tuple[Any, ...]:
    eps = of.normalize_eps if of.normalize else 0.0
    least = of.normalize_min if of.normalize else 0.0
    return of.score, of.normalize, eps, least, pytest.approx(of.scale, rel=1e-6)


@pytest.mark.parametrize("case", SCORES)
def test_of_other_families_the_rule_is_the_one_in_their_code(case: str) -> None:
    wanted = SCORES[case]
    for call in probe(FOREIGN_CASES[case].config()).experts:
        if wanted.score == "weights":
            assert call.scores is None
            continue
        assert call.scores is not None
        assert (call.scores.score, call.scores.normalize) == (wanted.score, wanted.family.normalize)
        assert call.scores.scale == pytest.approx(wanted.family.scale)


Weigh = Callable[[torch.Tensor, "Router"], tuple[torch.Tensor, torch.Tensor]]


class Router(nn.Module):
    """Returns logits, weights and ids."""

    def __init__(self, weigh: Weigh) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(E, D))
        self.bias = nn.Parameter(torch.empty(E))
        self.gain = nn.Parameter(torch.empty(()))
        self.weigh = weigh

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = nn.functional.linear(x, self.weight)
        return logits, *self.weigh(logits, self)


class Experts(nn.Module):
    """In place of experts."""

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)


class Block(nn.Module):
    """A router, experts, and a shared expert that runs first."""

    def __init__(self, weigh: Weigh, after: Callable[..., torch.Tensor] | None = None) -> None:
        super().__init__()
        self.shared = nn.Linear(D, D)
        self.gate, self.experts, self.after = Router(weigh), Experts(), after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = self.shared(x)
        _, weights, ids = self.gate(x.view(-1, D))
        if self.after is not None:
            weights = self.after(weights, x.view(-1, D))
        return shared + self.experts(x.view(-1, D), ids, weights)


def scores_of(block: nn.Module, top_k: int = K) -> RouterScores | None:
    """Return what is found about a block that has run on the meta device."""
    block.to("meta")
    record = BlockRecord(block, "experts", E)
    block(torch.empty(1, T, D, device="meta"))
    return record.scores(T, top_k)


def chosen(scores: torch.Tensor, top_k: int = K) -> tuple[torch.Tensor, torch.Tensor]:
    found = scores.topk(top_k)
    return found.values, found.indices


def sigmoid_with_bias(logits: torch.Tensor, router: Router) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.sigmoid()
    ids = (scores + router.bias).topk(K).indices
    weights = scores.gather(1, ids)
    return 2.5 * weights / (weights.sum(1, keepdim=True) + 1e-9), ids


def test_a_bias_of_the_choice_is_no_part_of_the_rule() -> None:
    found = scores_of(Block(sigmoid_with_bias))
    assert found is not None
    assert (found.name, found.index) == ("gate", 0)
    assert rule_of(found) == ("sigmoid", True, 1e-9, 0.0, 2.5)


def test_weights_that_the_block_changes_alike_are_those_that_count() -> None:
    found = scores_of(Block(sigmoid_with_bias, lambda weights, _: 2 * weights))
    assert found is not None and found.scale == 5.0


def of_biased_scores(logits: torch.Tensor, router: Router) -> tuple[torch.Tensor, torch.Tensor]:
    return chosen(logits.sigmoid() + router.bias)


def of_a_learned_scale(logits: torch.Tensor, router: Router) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = chosen(logits.softmax(-1))
    return weights * router.gain, ids


def of_relu(logits: torch.Tensor, _: Router) -> tuple[torch.Tensor, torch.Tensor]:
    return chosen(logits.relu())


def of_temperature(logits: torch.Tensor, _: Router) -> tuple[torch.Tensor, torch.Tensor]:
    return chosen((logits / 1.01).softmax(-1))


def of_one_expert(logits: torch.Tensor, _: Router) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = chosen(logits.softmax(-1), 1)
    return weights / weights, ids


def of_experts_that_are_none(logits: torch.Tensor, _: Router) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = chosen(logits.softmax(-1))
    return weights, ids - 1


@pytest.mark.parametrize(
    ("weigh", "top_k"),
    [
        (of_biased_scores, K),
        (of_a_learned_scale, K),
        (of_relu, K),
        (of_temperature, K),
        (of_one_expert, 1),  # 1, whatever the scores
        (of_experts_that_are_none, K),
    ],
)
def test_weights_that_are_no_rules_have_no_scores(weigh: Weigh, top_k: int) -> None:
    assert scores_of(Block(weigh), top_k) is None


def test_weights_that_depend_on_the_token_have_no_scores() -> None:
    def by_token(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return weights * x[:, :1].sigmoid()

    assert scores_of(Block(sigmoid_with_bias, by_token)) is None


def test_a_shared_expert_stays_without_memory() -> None:
    block = Block(sigmoid_with_bias)
    shared = block.shared
    assert scores_of(block) is not None
    assert shared.weight.is_meta and not block.gate.weight.is_meta


def test_blocks_that_are_alike_run_once_and_others_by_themselves() -> None:
    first = Block(sigmoid_with_bias)
    model = nn.ModuleList([first, copy.deepcopy(first), Block(of_relu)]).to("meta")
    model[2].gate.kind = "relu"
    records = BlockRecords(model, T)
    for number, block in enumerate(model):
        records.add(f"{number}.experts", E)
        block(torch.empty(1, T, D, device="meta"))
    found = [records.scores(f"{number}.experts", K) for number in range(3)]
    assert found[0] is found[1] is not None and found[2] is None
    assert model[1].gate.weight.is_meta
