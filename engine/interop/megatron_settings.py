"""Megatron settings: what capacity reads of a Megatron-Core `TransformerConfig`, and refuses.

Pure; imports nothing of Megatron-Core. Field names hold from 0.16 to 0.19.

Legend: T tokens on this rank, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from engine.config.validation import ConfigError
from engine.distributed.groups import Group
from engine.moe.router import RouterSpec

_SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),  # from Megatron-Core 0.18 on
}
# Megatron adds this to the sum by which scores other than softmax's are divided.
_NORMALIZE_EPS = 1e-20


def router_spec(config: Any) -> RouterSpec:
    """Return a router's sizes, and how to weight an expert that was not chosen.

    The scores are computed by `router_scores`, the choice by Megatron.
    """
    top_k, softmax = config.moe_router_topk, config.moe_router_score_function == "softmax"
    return RouterSpec(
        num_experts=config.num_moe_experts,
        top_k=top_k,
        # Softmax of the chosen logits alone is the softmax of all, divided by the chosen ones' sum.
        normalize=top_k > 1 and not (softmax and config.moe_router_pre_softmax),
        normalize_eps=0.0 if softmax else _NORMALIZE_EPS,
        scale=config.moe_router_topk_scaling_factor or 1.0,
    )


def router_scores(logits_TE: torch.Tensor, name: str) -> torch.Tensor:
    """Return the scores of moe_router_score_function `name`, float32 [T, E], not normalised.

    Args:
        logits_TE: any float dtype.
    """
    return _SCORES[name](logits_TE.float())


def check_settings(config: Any, *, tensor_ranks: int, expert_tensor_ranks: int) -> None:
    """Check that Megatron's settings are compatible with a capacity policy.

    Args:
        tensor_ranks, expert_tensor_ranks: sizes of the groups that share a token and an expert.

    Raises:
        ValueError: one sentence per problem, which names the field, its value and what to do.
    """
    problems = []
    factor, dispatcher = config.moe_expert_capacity_factor, config.moe_token_dispatcher_type
    num_experts = config.num_moe_experts
    if factor is not None and factor * config.moe_router_topk < num_experts:
        problems.append(
            f"moe_expert_capacity_factor = {factor}: Megatron would drop assignments before "
            f"moe.capacity.policy sees them; set it to {num_experts}.0, at which it drops none "
            "itself, and moe.capacity.factor to what is meant, or moe.capacity.policy to none"
        )
    if factor is None and dispatcher == "alltoall":
        problems.append(
            "moe_expert_capacity_factor = None: the alltoall dispatcher would expect K rows of "
            f"every token; set it to {num_experts}.0, at which Megatron drops none itself and "
            "counts its rows"
        )
    for name in ("moe_pad_expert_input_to_capacity", "moe_pad_experts_for_cuda_graph_inference"):
        if getattr(config, name, False):
            problems.append(
                f"{name} = True: would fill what was dropped with padding; set it to False"
            )
    balancing = config.moe_router_load_balancing_type
    if "sinkhorn" in ([balancing] if isinstance(balancing, str) else balancing):
        problems.append(
            f"moe_router_load_balancing_type = {balancing!r}: sinkhorn does not choose by score; "
            "use aux_loss or none"
        )
    if config.moe_router_score_function not in _SCORES:
        problems.append(
            f"moe_router_score_function = {config.moe_router_score_function!r}: must be one of "
            f"{', '.join(_SCORES)}"
        )
    if dispatcher == "flex":
        problems.append(
            "moe_token_dispatcher_type = 'flex': sends K rows of every token whatever was dropped; "
            "use alltoall"
        )
    if config.transformer_impl == "inference_optimized":
        problems.append(
            "transformer_impl = 'inference_optimized': its layers take K experts of every token; "
            "use transformer_engine or local"
        )
    if tensor_ranks > 1 and not config.sequence_parallel:
        problems.append(
            f"sequence_parallel = False: {tensor_ranks} tensor-parallel ranks would hold the same "
            "tokens and each count them; set it to True"
        )
    if expert_tensor_ranks > 1:
        problems.append(
            f"expert_tensor_parallel_size = {expert_tensor_ranks}: the ranks that share an "
            "expert's capacity would not be one expert-parallel group; set it to 1"
        )
    if problems:
        raise ConfigError(*problems)


def group_of(handle: Any) -> Group:
    """Return the engine's view of a process group; None is a group of one rank."""
    if handle is None:
        unused: Any = None  # a group of one calls no collective
        return Group(rank=0, size=1, ranks=(0,), handle=unused)
    ranks = tuple(dist.get_process_group_ranks(handle))
    return Group(rank=handle.rank(), size=handle.size(), ranks=ranks, handle=handle)
