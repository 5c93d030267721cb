"""Capacity decisions on the device against the same on the CPU: they must be identical.

Both get the same scores, so nothing may differ, ties included.
"""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist

from engine.config import CapacityConfig
from engine.distributed.collectives import GroupCollectives
from engine.distributed.groups import Group
from engine.moe.capacity.agreement import CapacityAgreement
from engine.moe.dispatch.chunk_layout import ExpertLayout
from engine.moe.router import RouterSpec, Routing, route
from engine.moe.step import MoEStep
from gpu_checks.check import Check, at_most, guarded
from gpu_checks.experts.copies import check_copies

GROUP = "capacity"
TOKENS = 3000
SPEC = RouterSpec(num_experts=16, top_k=4, normalize=True)


def check_capacity(device: torch.device) -> list[Check]:
    """Check every policy, consensus, scope and order, by gather and by radix; and copies."""
    generator = torch.Generator().manual_seed(0)
    # Quantised logits make ties, the skew loads some experts more.
    logits_TE = torch.randint(0, 6, (TOKENS, 16), generator=generator) * 0.5
    logits_TE += torch.linspace(1.5, 0.0, 16)
    routing = route(logits_TE, SPEC)
    found: list[Check] = []
    for policy, consensus, scope, order in itertools.product(
        ("token_drop", "expanded_drop"),
        ("global", "quota", "local"),
        ("expert", "rank"),
        ("score", "last", "random"),
    ):
        for selection in ("gather", "radix") if consensus == "global" else ("auto",):
            config = CapacityConfig(
                policy=policy,  # pyright: ignore[reportArgumentType]
                factor="1",
                consensus=consensus,  # pyright: ignore[reportArgumentType]
                scope=scope,  # pyright: ignore[reportArgumentType]
                order=order,  # pyright: ignore[reportArgumentType]
                selection=selection,  # pyright: ignore[reportArgumentType]
            )
            name = f"{policy} {consensus} {selection} {scope} {order}"
            found += guarded(
                GROUP,
                name,
                lambda config=config, name=name: [
                    at_most(GROUP, name, _differences(config, routing, device), 0)
                ],
            )
    return found + check_copies(device)


def _differences(config: CapacityConfig, routing: Routing, device: torch.device) -> float:
    """Return assignments and extras that differ between the device and the CPU."""
    here, there = (_decide(config, routing, place) for place in (torch.device("cpu"), device))
    return float((here != there).sum())


@torch.inference_mode()
def _decide(config: CapacityConfig, routing: Routing, device: torch.device) -> torch.Tensor:
    single = Group(0, 1, (0,), dist.GroupMember.WORLD)  # pyright: ignore[reportArgumentType]
    agreement = CapacityAgreement(
        SPEC,
        config,
        layer=1,
        layout=ExpertLayout([0, SPEC.num_experts], 1),
        collectives=GroupCollectives(single),  # a group of one calls nothing
    )
    token_T = torch.arange(TOKENS, device=device)
    step = MoEStep.whole(token_T % 7, token_T // 7, (TOKENS,))
    moved = Routing(
        routing.scores_TE.to(device),
        routing.topk_ids_TK.to(device),
        routing.topk_weights_TK.to(device),
    )
    return agreement.decide(moved, step).ids_TM.cpu()
