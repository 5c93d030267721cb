"""Capacity in models that transformers builds: its own model with a plain capacity rule in
the place of its experts, and the engine's model run alike.

All sequences run in one step. `reference.decide` says which assignments stay and which extras come,
and transformers' own experts module computes them. What a router's scores are, and the weights of
them, is written here by hand, family by family.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from engine.config import CapacityConfig
from engine.distributed import bootstrap
from engine.distributed.groups import Topology, expert_range
from engine.layers.kv_cache import KVCache
from engine.models.decoder import GroupTokens
from engine.moe.step import MoEStep
from tests.helpers import reference
from tests.helpers.model_harness import BLOCK_SIZE, build_step, load_model, make_config

NUM_SEQUENCES, LENGTH = 4, 7
_NORMALIZED = reference.Family(normalize=True)


@dataclass(frozen=True)
class Scores:
    """What scores are: softmax or sigmoid of the logits, or the combine weights alone."""

    score: str
    family: reference.Family = field(default_factory=reference.Family)


def _sigmoid(scale: float, eps: float = 1e-20) -> Scores:
    return Scores("sigmoid", reference.Family(normalize=True, eps=eps, scale=scale))


SCORES = {
    "granitemoe": Scores("softmax", _NORMALIZED),
    "phimoe": Scores("weights"),
    "hunyuan-v1-moe": Scores("softmax", _NORMALIZED),
    "exaone-moe": _sigmoid(2.5),
    "afmoe": _sigmoid(1.7),
    "cohere2-moe": Scores("softmax", _NORMALIZED),
    "mistral4": Scores("softmax", reference.Family(normalize=True, eps=1e-20)),
    "flex-olmo": Scores("softmax"),
    "dots1": _sigmoid(1.5),
    "hy-v3": _sigmoid(2.826),
    "laguna": _sigmoid(1.0, eps=0.0),  # its scale multiplies the experts' sum
    "solar-open": _sigmoid(1.5),
}


@dataclass(frozen=True)
class Ran:
    """Logits of each sequence, and over all layers and ranks the assignments dropped and added."""

    logits: dict[int, torch.Tensor]
    dropped: int
    added: int


def sequences_of(vocab_size: int = 97) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(vocab_size, (NUM_SEQUENCES, LENGTH), generator=generator).tolist()


def plain(path: Path, case: Any, scores: Scores, settings: dict[str, Any], ranks: int) -> Ran:
    """Return what transformers gives under a capacity policy of so many ranks."""
    config = transformers.AutoConfig.from_pretrained(path)
    kind = type(case.model())
    model = kind.from_pretrained(path, config=config, dtype=torch.float32)
    model.eval()
    counts = {"dropped": 0, "added": 0}
    logits: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if not hasattr(module, "has_gate"):
            continue
        block = model.get_submodule(name.rpartition(".")[0])
        router = getattr(block, "gate", None) or block.router
        router.register_forward_hook(partial(_keep, logits, name))
        rule = partial(_limited, module.forward, logits, name, scores, settings, ranks, counts)
        module.forward = rule
    with torch.inference_mode():
        out = model(torch.tensor(sequences_of()), use_cache=False).logits
    return Ran(dict(enumerate(out)), **counts)


def _keep(logits: dict[str, torch.Tensor], name: str, _: Any, __: Any, output: Any) -> None:
    logits[name] = output[0]


def _limited(
    experts: Any,
    logits: dict[str, torch.Tensor],
    name: str,
    of: Scores,
    settings: dict[str, Any],
    ranks: int,
    counts: dict[str, int],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    num_experts, top_k = logits[name].shape[-1], top_k_index.shape[1]
    logits_TE = logits[name].reshape(-1, num_experts).float()
    if of.score == "weights":
        scores_TE = torch.zeros_like(logits_TE).scatter(1, top_k_index, top_k_weights)
    else:
        scores_TE = logits_TE.softmax(-1) if of.score == "softmax" else logits_TE.sigmoid()
    request_T = np.repeat(np.arange(NUM_SEQUENCES), LENGTH)
    position_T = np.tile(np.arange(LENGTH), NUM_SEQUENCES)
    rows = [np.flatnonzero(request_T % ranks == rank) for rank in range(ranks)]
    inputs = [
        reference.RankInput(
            scores_TE[own].numpy(),
            top_k_index[own].numpy(),
            top_k_weights[own].numpy(),
            request_T[own],
            position_T[own],
            np.ones(len(own), dtype=bool),
        )
        for own in rows
    ]
    starts = [expert_range(num_experts, ranks, rank)[0] for rank in range(ranks)]
    rules, bounds = reference.Rules(**settings), [*starts, num_experts]
    outcome = reference.decide(inputs, rules, of.family, bounds, num_experts, top_k)
    weights_TE = torch.zeros_like(scores_TE)
    for own, decided in zip(rows, outcome.ranks, strict=True):
        counts["dropped"] += int((~decided.keep).sum())
        counts["added"] += sum(map(len, decided.extras))
        for t, weights in zip(own, decided.weights, strict=True):
            for expert, weight in weights.items():
                weights_TE[t, expert] = weight
    every_TE = torch.arange(num_experts).expand_as(weights_TE)
    return experts(hidden_states, every_TE, weights_TE)


@torch.inference_mode()
def served(topology: Topology, model: Any, settings: dict[str, Any]) -> Ran:
    """Return what the engine's model gives on this rank: its own sequences and counts."""
    for moe in model.moe_layers:
        moe.set_capacity(CapacityConfig(**settings))
        moe.drops.read_and_reset()
    sequences = sequences_of()
    mine = range(topology.data_rank, NUM_SEQUENCES, topology.num_data)
    blocks = -(-LENGTH // BLOCK_SIZE)
    tables = [list(range(s * blocks, (s + 1) * blocks)) for s in range(NUM_SEQUENCES)]
    cache = KVCache(model.kv_spec, NUM_SEQUENCES * blocks, BLOCK_SIZE, topology.device, model.dtype)
    step = build_step([(s, 0, LENGTH) for s in mine], sequences, tables, [LENGTH] * len(mine))
    tokens_W = [len(range(r, NUM_SEQUENCES, topology.num_data)) for r in range(topology.num_data)]
    moe_step = MoEStep.whole(
        torch.tensor(mine).repeat_interleave(LENGTH),
        torch.arange(LENGTH).repeat(len(mine)),
        tuple(count * LENGTH for count in tokens_W),
    )
    total = NUM_SEQUENCES * LENGTH
    hidden_RD = model(step, cache, moe_step, GroupTokens(total, total))
    parts = model.logits(hidden_RD).split(LENGTH)
    drops = [moe.drops.read_and_reset() for moe in model.moe_layers]
    return Ran(
        dict(zip(mine, parts, strict=True)),
        sum(each.dropped for each in drops),
        sum(each.added for each in drops),
    )


def served_on_ranks(rank: int, path: Path, settings: list[dict[str, Any]]) -> list[Ran]:
    """Load a checkpoint on this rank and run it under one policy after the other."""
    config = make_config(path, implementation="transformers")
    topology = bootstrap.start(config, os.environ)
    model = load_model(config, topology)
    found = [served(topology, model, each) for each in settings]
    bootstrap.stop(topology)
    return found
