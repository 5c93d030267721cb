"""Copies of experts on the device against the same on the CPU.

The decisions of four ranks, one after the other: what each sends is recorded first. And low-bit
copies beside homes, by every backend, against float64.

Legend: R rows, D model dim, e instances on a rank, W ranks.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch

from engine.config import CapacityConfig
from engine.distributed.collectives import Done
from engine.layers.precision import compute_dtype
from engine.moe.capacity.copies_agreement import CopiesAgreement
from engine.moe.dispatch.chunk_layout import ExpertLayout
from engine.moe.local_experts import LocalExperts
from engine.moe.placement.instances import Instances
from engine.moe.placement.placement import LayerPlacement, Precision
from engine.moe.placement.row_split import RowSplit, SplitRule
from engine.moe.router import RouterSpec, Routing, route
from engine.moe.step import MoEStep
from engine.ops.grouped_ffn import grouped_ffn_reference
from engine.ops.quantised import dequantise, quantise
from engine.profiling.device_clocks import NoClock
from gpu_checks.check import Check, at_most, figure, guarded, relative_error

RANKS, TOKENS = 4, 700
SPEC = RouterSpec(num_experts=16, top_k=4, normalize=True)
HOMES = tuple(expert * 7 % 16 // 4 for expert in range(16))  # in no order
POLICIES = {
    "counts": None,
    "int4": CapacityConfig(),
    "token_drop": CapacityConfig(policy="token_drop", factor="1", scope="rank"),
    "expanded_drop": CapacityConfig(policy="expanded_drop", factor="1", scope="rank"),
}
HIDDEN, FFN, COUNTS = 256, 512, [64, 0, 130, 17, 0, 41]  # of three homes and three copies
BOUND = 1.5e-2  # of bfloat16, weights rounded once more


class _Unknown(Exception):
    """What the other ranks send is not known yet."""


class _Recorded:
    """Collectives of one rank after the other."""

    size, collective_bytes = RANKS, 0

    def __init__(self) -> None:
        self.rank, self.bytes_sent = 0, 0
        self.sent: list[torch.Tensor] = []  # by the ranks so far
        self.is_known = False

    def all_gather(self, part: torch.Tensor) -> Any:
        """Return the parts of all ranks, once they are known."""
        if not self.is_known:
            self.sent.append(part)
            raise _Unknown
        return Done(torch.stack(self.sent))


def check_copies(device: torch.device) -> list[Check]:
    """Check the decisions of every policy, and how long one takes that is made by claims."""
    found: list[Check] = []
    for policy, chunks in itertools.product(POLICIES, (1, 2)):
        name = f"copies, {policy}, {chunks} chunks"

        def check(policy: str = policy, chunks: int = chunks, name: str = name) -> list[Check]:
            here = _decide(policy, chunks, torch.device("cpu"))
            there = _decide(policy, chunks, device)
            pairs = zip(here, there, strict=True)
            wrong = sum(int((mine != theirs).sum()) for mine, theirs in pairs)
            return [at_most("capacity", name, float(wrong), 0)]

        found += guarded("capacity", name, check)
    name = "copies: token_drop of four ranks, ms per rank"
    found += guarded("capacity", name, lambda: [figure("capacity", name, _milliseconds(device))])
    return found


def _milliseconds(device: torch.device) -> float:
    """Return how long one rank takes for a decision, the copies to the host included."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        _decide("token_drop", 1, device)
        times.append((time.perf_counter() - start) / RANKS * 1e3)
    return sorted(times)[2]


@torch.inference_mode()
def _decide(policy: str, chunks: int, device: torch.device) -> list[torch.Tensor]:
    """Return the instances of every rank's assignments and what the ranks exchange."""
    copies = tuple((((home + 1) % RANKS),) if e % 3 == 0 else () for e, home in enumerate(HOMES))
    instances = Instances(LayerPlacement(HOMES, copies), RANKS)
    split = RowSplit(instances, SplitRule(low_bit=policy == "int4"))
    layout = ExpertLayout(instances.first_instances, chunks)
    collectives, config = _Recorded(), POLICIES[policy]
    found = []
    for known, rank in itertools.product((False, True), range(RANKS)):
        collectives.rank, collectives.is_known = rank, known
        agreement = CopiesAgreement(
            SPEC,
            config or CapacityConfig(),
            layer=1,
            layout=layout,
            collectives=collectives,  # pyright: ignore[reportArgumentType]
            split=split,
        )
        routing, token_T = _routing(rank, device), torch.arange(TOKENS, device=device)
        try:
            if config is None:
                homes_TK = instances.homes(routing.topk_ids_TK)
                at_home = Routing(routing.scores_TE, homes_TK, routing.topk_weights_TK)
                clock: Any = NoClock()
                made = agreement.keep_all(at_home, clock=clock, overlap=None, layout=layout)
            else:
                step = MoEStep.whole(token_T * 0 + rank, token_T, (TOKENS,) * RANKS)
                places_TK = instances.to_home_order(routing.topk_ids_TK)
                scores_TE = instances.experts_in_home_order(routing.scores_TE)
                ordered = Routing(scores_TE, places_TK, routing.topk_weights_TK)
                made = agreement.decide(ordered, step)
        except _Unknown:
            continue
        found += [made.ids_TM.cpu(), torch.from_numpy(made.exchanged_Wn)]
    return found


def _routing(rank: int, device: torch.device) -> Routing:
    """Return a rank's routing; quantised logits make ties, the skew loads some experts more."""
    generator = torch.Generator().manual_seed(rank)
    logits_TE = torch.randint(0, 6, (TOKENS, 16), generator=generator) * 0.5
    logits_TE += torch.linspace(1.5, 0.0, 16)
    routing = route(logits_TE, SPEC)
    return Routing(
        routing.scores_TE.to(device),
        routing.topk_ids_TK.to(device),
        routing.topk_weights_TK.to(device),
    )


@torch.inference_mode()
def check_copied_experts(device: torch.device, backend: str) -> list[Check]:
    """Check homes and low-bit copies of a backend that runs here, bfloat16."""
    found: list[Check] = []
    precisions: tuple[Precision, ...] = ("int8", "int4")
    for precision in precisions:
        name = f"{backend} bfloat16, {precision} copies"
        found += guarded(
            "experts",
            name,
            lambda precision=precision, name=name: [
                at_most("experts", name, _error(device, backend, precision), BOUND)
            ],
        )
    return found


def _error(device: torch.device, backend: str, precision: Precision) -> float:
    torch.manual_seed(0)
    experts = LocalExperts(
        3,
        3,
        precision,
        hidden=HIDDEN,
        ffn=FFN,
        backend=backend,
        device=device,
        dtype=torch.bfloat16,
    )
    kinds: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for local in range(6):
        made = torch.randn(2 * FFN, HIDDEN) * HIDDEN**-0.5, torch.randn(HIDDEN, FFN) * FFN**-0.5
        experts.set_weights(local, *made)
        for kind, weight in zip(kinds, made, strict=True):
            kept = weight.bfloat16().float()
            if local >= 3:
                kept = dequantise(quantise(kept[None], 8 if precision == "int8" else 4))[0]
            kind.append(kept.double())
    experts.finalize_weights()
    rows_RD = torch.randn(sum(COUNTS), HIDDEN).to(device, compute_dtype(torch.bfloat16, device))
    index_R = torch.randperm(len(rows_RD)).to(device)
    apart_RD = torch.empty_like(rows_RD).index_copy_(0, index_R, rows_RD)
    made_RD = experts(apart_RD, COUNTS, None, index_R).index_select(0, index_R)
    w13_e2FD, w2_eDF = (torch.stack(kind) for kind in kinds)
    expected_RD = grouped_ffn_reference(rows_RD.cpu().double(), w13_e2FD, w2_eDF, COUNTS)
    return relative_error(made_RD, expected_RD)
