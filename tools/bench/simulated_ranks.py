"""The engine's own MoE layer on simulated ranks: each rank's work run alone, one after the other.

`simulated_layer.py` times given counts; here every rank routes its tokens, agrees, packs, computes
and combines by the code of `engine/moe`, so the figure includes the cost of a policy. Only the
communication is replaced:

    agreement   a first pass, not timed, computes the results of the ranks' collectives: a rank runs
                until it calls one without a result; when all have called it, all get the result and
                start again. Timed runs find every result ready, so decisions are those of real
                ranks.
    rows        an all-to-all returns as many rows as would be received, with arbitrary contents:
                outputs mean nothing, loads and times do.

The spans of both all-to-alls are left out of a rank's seconds. Ranks wait for each other there, so
the layer takes the slowest rank's gate, agreement and packing, plus the slowest rank's experts and
combine, plus its collectives as `transfers.py` has measured them.

Legend: T tokens of a rank, D model dim, W ranks, E experts, K top-k.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from bench.loads import routing_of
from bench.moe_case import MoEShape, MoEWeights, make_tokens, share, vary_margins
from bench.simulated_rank import SimulatedRank, Unanswered
from bench.transfers import Kind, Transfers
from engine.config import CapacityConfig
from engine.moe.dispatch.buffers import RowBuffers
from engine.moe.dispatch.plan import DispatchPlan
from engine.moe.step import MoEStep, TokenCounts


@dataclass(frozen=True, slots=True)
class Agreed:
    """The agreement of all ranks under one policy."""

    answers: list[torch.Tensor]  # results of their collectives
    calls: list[tuple[Kind, int]]  # kind and bytes of one rank's part, per collective
    plans: list[DispatchPlan]  # by rank

    @property
    def rows(self) -> list[int]:
        """Rows computed by each rank's experts."""
        return [plan.num_received for plan in self.plans]

    def busiest_rows(self) -> int:
        """Return the rows that the busiest rank sends to others, or receives, in one all-to-all."""
        remote = [
            max(sum(splits) - splits[rank] for splits in (plan.send_splits, plan.recv_splits))
            for rank, plan in enumerate(self.plans)
        ]
        return max(remote)


@dataclass(frozen=True, slots=True)
class PolicyTime:
    """One policy's layer on simulated ranks."""

    agree_seconds: tuple[float, ...]  # per rank, before dispatch
    work_seconds: tuple[float, ...]  # per rank, after dispatch
    collective_seconds: float  # all collectives, those of the agreement included
    rows: tuple[int, ...]  # of each rank's experts

    @property
    def seconds(self) -> float:
        """Seconds of the layer."""
        return max(self.agree_seconds) + max(self.work_seconds) + self.collective_seconds


class SimulatedRanks:
    """W ranks with their experts and tokens in this process, on the device of their weights.

    loads_E: of all tokens together.
    """

    def __init__(
        self,
        shape: MoEShape,
        weights: MoEWeights,
        num_ranks: int,
        loads_E: np.ndarray,
        seed: int = 0,
    ) -> None:
        num_tokens = int(loads_E.sum()) // shape.top_k
        on_host = replace(weights, gate_ED=weights.gate_ED.cpu().float())
        x_TD = make_tokens(on_host, routing_of(loads_E, num_tokens, seed), seed)
        vary_margins(x_TD, seed)
        x_TD = x_TD.to(weights.w13_E2FD.device, weights.w13_E2FD.dtype)
        parts = [share(num_tokens, num_ranks, rank) for rank in range(num_ranks)]
        sizes = tuple(part.stop - part.start for part in parts)
        buffers, self._row_bytes = RowBuffers(), shape.hidden * x_TD.element_size()
        self._ranks = [
            SimulatedRank(shape, weights, rank, num_ranks, x_TD[part].contiguous(), buffers)
            for rank, part in enumerate(parts)
        ]
        self._steps = [_step(rank, sizes, x_TD.device) for rank in range(num_ranks)]

    @torch.inference_mode()
    def agree(self, config: CapacityConfig) -> Agreed:
        """Return the agreement under this policy; `none` runs without a step, as in a job."""
        answers: list[torch.Tensor] = []
        calls: list[tuple[Kind, int]] = []
        for layer in self._ranks:
            layer.set_capacity(config)
        while True:
            found = [
                layer.ask(answers, self._step(config, rank))
                for rank, layer in enumerate(self._ranks)
            ]
            plans = [each for each in found if isinstance(each, DispatchPlan)]
            if len(plans) == len(found):
                return Agreed(answers, calls, plans)
            asked = [each for each in found if isinstance(each, Unanswered)]
            assert len(asked) == len(found), "some ranks call one collective more than others"
            kind = asked[0].kind
            assert {each.kind for each in asked} == {kind}, "ranks call different collectives"
            parts = torch.stack([each.part for each in asked])
            calls.append((kind, parts[0].numel() * parts.element_size()))
            answers.append(parts if kind == "all_gather" else parts.sum(0, dtype=parts.dtype))

    @torch.inference_mode()
    def compare(
        self,
        policies: Mapping[str, CapacityConfig],
        transfers: Mapping[Kind, Transfers],
        rounds: int = 3,
    ) -> dict[str, PolicyTime]:
        """Time every policy `rounds` times, in turns, after one unmeasured turn."""
        agreed = {name: self.agree(config) for name, config in policies.items()}
        ranks = range(len(self._ranks))
        pairs: dict[str, list[list[tuple[float, float]]]] = {
            name: [[] for _ in ranks] for name in policies
        }
        for turn in range(rounds + 1):
            for name, config in policies.items():
                for rank, layer in enumerate(self._ranks):
                    layer.set_capacity(config)
                    pair = layer.timed(agreed[name].answers, self._step(config, rank))
                    if turn:
                        pairs[name][rank].append(pair)
        return {
            name: PolicyTime(
                tuple(statistics.median(first for first, _ in pairs[name][rank]) for rank in ranks),
                tuple(statistics.median(after for _, after in pairs[name][rank]) for rank in ranks),
                self._collective_seconds(agreed[name], transfers),
                tuple(agreed[name].rows),
            )
            for name in policies
        }

    def _step(self, config: CapacityConfig, rank: int) -> MoEStep | None:
        return None if config.policy == "none" else self._steps[rank]

    def _collective_seconds(self, agreed: Agreed, transfers: Mapping[Kind, Transfers]) -> float:
        others = len(self._ranks) - 1
        times = {"all_gather": others, "all_reduce": 2 * others / len(self._ranks)}
        agreement = sum(
            transfers[kind].of(part_bytes * times[kind]) for kind, part_bytes in agreed.calls
        )
        row_bytes = agreed.busiest_rows() * self._row_bytes
        return agreement + 2 * transfers["all_to_all"].of(row_bytes)


def _step(rank: int, sizes: tuple[int, ...], device: torch.device) -> MoEStep:
    num_tokens = sizes[rank]
    return MoEStep(
        request_T=torch.full((num_tokens,), rank, dtype=torch.int32, device=device),
        position_T=torch.arange(num_tokens, dtype=torch.int32, device=device),
        eligible_T=None,
        num_own_eligible=num_tokens,
        num_tokens_W=sizes,
        num_eligible=sum(sizes),
        counts=TokenCounts.zeros(num_tokens, device),
    )
