"""Capacity rules: what the capacity policies, copies of experts and a balanced shared expert can do
for one model on so many ranks.

What is refused is what the engine refuses when it builds a layer, here on torch's meta device;
docs/capacity.md explains the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import torch

from engine.config import CapacityConfig, DispatchConfig, MoEConfig
from engine.model_check.rank_share import topology_on_meta
from engine.models.decoder_layer import DecoderLayer
from engine.models.spec import LayerSpec, ModelSpec, SparseSpec
from engine.moe.dispatch.buffers import RowBuffers
from engine.moe.dispatch.chunk_tuner import ChunkTuner
from engine.moe.placement.placement import LayerPlacement, Placement, Precision
from engine.moe.router import RouterSpec
from engine.moe.spec import MoESpec

Refusal = Callable[..., str | None]
_SCORES = {
    "softmax": "softmax",
    "sigmoid": "sigmoid",
    "sqrt_softplus": "square root of softplus",
}


def dropless_factors(router: RouterSpec, ranks: int, most_local: int) -> tuple[Fraction, Fraction]:
    """Return the capacity factors from which nothing is dropped, in scope expert and scope rank.

    An expert gets at most all T tokens, and C = gamma T K / E of them stay: gamma = E / K. A rank
    of e experts gets at most T min(K, e) assignments, and e C of them stay. With Z zero experts E +
    Z takes the place of E.

    Args:
        ranks: of the expert-parallel group.
        most_local: e, the experts of the rank that has most.
    """
    logits, top_k = router.num_logits, router.top_k
    by_expert = Fraction(logits, top_k)
    # The rank with the fewest experts has the least room.
    least = router.num_experts // ranks
    by_rank = max(
        Fraction(logits * min(top_k, local), local * top_k) for local in {least, most_local}
    )
    return by_expert, by_rank


def capacity_of(spec: ModelSpec, ranks: int) -> dict[str, Any] | None:
    """Return what capacity can do, by setting; a text begins with "no" where it cannot.

    None: no layer has experts.
    """
    # One layer of each kind: what one refuses, the model refuses.
    kinds = {
        layer.mlp: i for i, layer in enumerate(spec.layers) if isinstance(layer.mlp, SparseSpec)
    }
    if not kinds:
        return None
    layers = [(i, spec.layers[i]) for i in kinds.values()]
    # Of layers with unequal top-k the one that needs the largest factor to drop nothing.
    sparse = min(kinds, key=lambda mlp: mlp.moe.router.top_k)
    router = sparse.moe.router
    most_local = -(-router.num_experts // ranks)
    by_expert, by_rank = dropless_factors(router, ranks, most_local)
    refusal = partial(_refusal, layers, ranks)
    return {
        "ranks": ranks,
        "dropless_factor": {"expert": float(by_expert), "rank": float(by_rank)},
        "priority": _priority(router),
        "token_drop": _answer(refusal(_capacity(policy="token_drop"))),
        "renormalize": _renormalize(max(mlp.moe.router.top_k for mlp in kinds), refusal),
        "expanded_drop": _expanded_drop(router, refusal, most_local),
        "copies": _copies(sparse.moe, refusal, ranks),
        "shared_expert": _shared(sparse, refusal),
    }


def _capacity(**settings: Any) -> MoEConfig:
    return MoEConfig(capacity=CapacityConfig(**settings))


def _refusal(
    layers: Sequence[tuple[int, LayerSpec]],
    ranks: int,
    config: MoEConfig,
    precision: Precision | None = None,
) -> str | None:
    """Return why the engine refuses to build one of some layers with these settings; None: it does
    not.

    precision: of a copy of expert 0 on the last rank; None: no expert has a copy.
    """
    topology = topology_on_meta(ranks)
    device = topology.device
    for index, layer in layers:
        placement = None
        if precision is not None and isinstance(layer.mlp, SparseSpec):
            experts = layer.mlp.moe.router.num_experts
            homes = LayerPlacement.contiguous(experts, ranks)
            copies = ((ranks - 1,), *homes.copies_E[1:])
            layers_with_copies = {index: LayerPlacement(homes.home_E, copies)}
            placement = Placement(ranks, experts, layers_with_copies, precision)
        try:
            DecoderLayer(
                layer,
                layer=index,
                topology=topology,
                config=config,
                device=device,
                dtype=torch.bfloat16,
                row_buffers=RowBuffers(),
                tuner=ChunkTuner(device),
                placement=placement,
            )
        except ValueError as error:
            return str(error)
    return None


def _answer(refusal: str | None, yes: str = "yes") -> str:
    return yes if refusal is None else f"no: {refusal}"


def score_basis(router: RouterSpec) -> str:
    """Return which scores of a router capacity has, in words."""
    return "all experts' scores" if router.scores_known else "combine weights of the chosen"


def _priority(router: RouterSpec) -> str:
    """Return the score by which assignments are kept (moe.capacity.order = score), in words."""
    if not router.scores_known:
        return "the combine weight: the router gives no scores of experts that it did not choose"
    text = f"{_SCORES[router.score]} over all {router.num_experts} experts"
    if router.num_zero_experts and router.score == "softmax":
        text += f" and {router.num_zero_experts} zero experts"
    if router.logit_bias:
        text += ", the gate's bias included"
    if router.logit_cap is not None:
        text += f", logits capped at {router.logit_cap:g}"
    without = ["correction bias"] if router.correction_bias else []
    without += ["normalisation over the top-k"] if router.normalize else []
    without += [f"scale of {router.scale:g}"] if router.scale != 1 else []
    without += ["scales of single experts"] if router.expert_scale else []
    return text + (f"; without {', '.join(without)}" if without else "")


def _renormalize(most_top_k: int, refusal: Refusal) -> str:
    if most_top_k == 1:
        return "no effect: a token has one expert, which it keeps with all its weight or loses"
    return _answer(refusal(_capacity(policy="token_drop", renormalize=True)))


def _expanded_drop(router: RouterSpec, refusal: Refusal, most_local: int) -> str:
    text = f"yes, expand at most {most_local}, the experts of a rank"
    if router.num_groups > 1:
        text += (
            f"; extras may be of any group, the top-{router.top_k} are of {router.top_groups} of "
            f"{router.num_groups}"
        )
    return _answer(refusal(_capacity(policy="expanded_drop")), text)


def _copies(moe: MoESpec, refusal: Refusal, ranks: int) -> str:
    if ranks == 1:
        return "no: one rank has all experts"
    config = _capacity(policy="token_drop")
    if (why := refusal(config, "model")) is not None:
        return _answer(why)
    found = "in the model's precision"
    if refusal(config, "int8") is None:
        found += ", int8 or int4"
    else:
        found += f" alone: its experts have {moe.experts.words}"
    return f"yes, {found}; with a policy: consensus global"


def _shared(sparse: SparseSpec, refusal: Refusal) -> str:
    if sparse.moe.router.external:
        return "no: transformers runs shared experts, if there are any (model.implementation)"
    if sparse.shared is None:
        return "no: the model has no shared expert"
    config = MoEConfig(shared_expert="balanced", dispatch=DispatchConfig(partial_sums=True))
    return _answer(refusal(config), "yes, it needs moe.dispatch.partial_sums and no expanded_drop")
