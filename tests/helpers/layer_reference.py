"""Which experts of a token count by which weight under a capacity policy, by the slow reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from engine.distributed.groups import expert_range
from engine.moe.router import RouterSpec, route
from tests.helpers import reference


def decided_weights(
    router: RouterSpec, logits: list[torch.Tensor], settings: dict[str, Any], layer: int
) -> list[list[dict[int, float]]]:
    """Per rank and token: expert -> weight. logits: [T, E] of every rank; all tokens compete."""
    inputs = []
    for rank, logits_TE in enumerate(logits):
        routing = route(logits_TE, router)
        count = logits_TE.shape[0]
        inputs.append(
            reference.RankInput(
                scores=routing.scores_TE.numpy(),
                topk_ids=routing.topk_ids_TK.numpy(),
                weights=routing.topk_weights_TK.numpy(),
                request=np.full(count, rank),
                position=np.arange(count),
                competes=np.ones(count, bool),
            )
        )
    if settings["policy"] == "none":
        return [
            [
                dict(zip(ids, of, strict=True))
                for ids, of in zip(x.topk_ids.tolist(), x.weights.tolist(), strict=True)
            ]
            for x in inputs
        ]
    size = len(logits)
    bounds = [expert_range(router.num_experts, size, rank)[0] for rank in range(size)]
    outcome = reference.decide(
        inputs,
        reference.Rules(**settings, layer=layer),
        reference.Family(normalize=router.normalize, eps=router.normalize_eps, scale=router.scale),
        [*bounds, router.num_experts],
        router.num_experts,
        router.top_k,
    )
    return [rank.weights for rank in outcome.ranks]
