"""Worker: one MoE layer under one capacity policy after the other, all in one process per rank.

Each rank is pinned to a core of its own with one thread. The policies take turns inside a call, so
that they see the same state of the machine.

Legend: T tokens on this rank, E experts, W ranks.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bench.loads import routing_of
from bench.moe_case import MoEShape, make_tokens, make_weights, vary_margins
from bench.protocol import memory_mib, serve
from engine.config import CapacityConfig
from engine.config.loader import config_from_tree
from engine.distributed import bootstrap
from engine.distributed.collectives import GroupCollectives
from engine.moe.layer import MoELayer
from engine.moe.router import RouterSpec
from engine.moe.spec import MoESpec
from engine.moe.step import MoEStep, TokenCounts
from engine.profiling.device_clocks import HostClock, NoClock
from engine.profiling.phase_clock import Phase


class Worker:
    """One rank."""

    def load(self, shape: dict[str, int], seed: int, threads: int) -> dict[str, Any]:
        """Build the layer with seeded weights. Collective."""
        rank = int(os.environ.get("RANK", "0"))
        cores = sorted(os.sched_getaffinity(0))
        if int(os.environ.get("WORLD_SIZE", "1")) <= len(cores) and threads == 1:
            os.sched_setaffinity(0, {cores[rank]})
        tree = {"model": {"path": "."}, "runtime": {"device": "cpu", "threads": threads}}
        config = config_from_tree(tree)
        self._topology = bootstrap.start(config)
        self._collectives = GroupCollectives(self._topology.expert)
        torch.set_num_threads(threads)
        self._shape = MoEShape(**shape)
        self._weights, self._seed = make_weights(self._shape, seed), seed
        router = RouterSpec(
            num_experts=self._shape.experts, top_k=self._shape.top_k, normalize=True
        )
        self._layer = MoELayer(
            MoESpec(router=router, hidden=self._shape.hidden, ffn=self._shape.ffn),
            layer=0,
            topology=self._topology,
            config=config.moe,
            device=self._topology.device,
            dtype=torch.float32,
        )
        layer, weights = self._layer, self._weights
        own = layer.local_experts
        with torch.no_grad():
            layer.gate.weight_ED.copy_(weights.gate_ED)
            layer.experts.stacked.w13_e2FD.copy_(weights.w13_E2FD[own])
            layer.experts.stacked.w2_eDF.copy_(weights.w2_EDF[own])
        return memory_mib()

    @torch.inference_mode()
    def compare(
        self, loads: list[int], tokens: int, policies: dict[str, dict[str, Any]], rounds: int
    ) -> dict[str, Any]:
        """Time every policy `rounds` times, in turns, after one unmeasured turn.

        Args:
            loads: of every expert over all ranks.
            tokens: of one rank.

        Returns by policy: seconds of each round, mean seconds by phase, rows of this rank's
        experts, bytes, collectives, and a digest of the output. Collective.
        """
        x_TD, step = self._tokens(loads, tokens)
        settings = {name: CapacityConfig(**fields) for name, fields in policies.items()}
        found: dict[str, dict[str, Any]] = {
            name: {"seconds": [], "phases": np.zeros(len(Phase))} for name in policies
        }
        for turn in range(rounds + 1):
            names = list(settings)
            shift = turn % len(names)  # no policy always runs after the same one
            for name in names[shift:] + names[:shift]:
                self._once(found[name], settings[name], x_TD, step, measured=turn > 0)
        for entry in found.values():
            entry["phases"] = (entry["phases"] / rounds).tolist()
        return found

    @torch.inference_mode()
    def agree(
        self, loads: list[int], tokens: int, policies: dict[str, dict[str, Any]], rounds: int
    ) -> dict[str, Any]:
        """Time the agreement alone, all ranks starting together: seconds of each round by policy.

        A policy's is deciding, sorting, planning and accounting; that of `none`, which every layer
        needs, is sorting, exchanging the counts and planning. Collective.
        """
        x_TD, step = self._tokens(loads, tokens)
        layer = self._layer
        routing = layer.route(x_TD)
        found: dict[str, list[float]] = {name: [] for name in policies}
        for turn in range(rounds + 1):
            for name, fields in policies.items():
                layer.set_capacity(settings := CapacityConfig(**fields))
                known = _step_under(settings, step)
                dist.barrier()
                begin = time.perf_counter()
                layer.agreement.agree(routing, known, layer.telemetry)
                if turn:
                    found[name].append(time.perf_counter() - begin)
        return found

    def _tokens(self, loads: list[int], tokens: int) -> tuple[torch.Tensor, MoEStep]:
        """Return this rank's tokens, which the gate routes according to the loads."""
        rank, world = self._topology.world.rank, self._topology.world.size
        ids_TK = routing_of(np.array(loads), tokens * world, self._seed)
        x_TD = make_tokens(self._weights, ids_TK, self._seed)
        vary_margins(x_TD, self._seed)
        own = slice(tokens * rank, tokens * (rank + 1))
        step = MoEStep.whole(torch.full((tokens,), rank), torch.arange(tokens), (tokens,) * world)
        step = replace(step, counts=TokenCounts.zeros(tokens, torch.device("cpu")))
        return x_TD[own].contiguous(), step

    def _once(
        self,
        entry: dict[str, Any],
        settings: CapacityConfig,
        x_TD: torch.Tensor,
        step: MoEStep,
        *,
        measured: bool,
    ) -> None:
        layer = self._layer
        layer.set_capacity(settings)
        layer.telemetry.clock = clock = HostClock()
        layer.telemetry.loads.clear()
        sent, called = layer.bytes_sent, layer.num_collectives
        known = _step_under(settings, step)
        dist.barrier()
        begin = time.perf_counter()
        out_TD = layer(x_TD, known)
        seconds = time.perf_counter() - begin
        clock.close_step()
        spans = clock.read()
        layer.telemetry.clock = NoClock()
        if not measured:
            loads = layer.telemetry.loads.layers[0]
            entry["before"] = loads.experts.tolist()
            entry["rows"] = int(loads.own_after.sum())
            entry["bytes"] = layer.bytes_sent - sent
            entry["collectives"] = layer.num_collectives - called
            entry["digest"] = hashlib.sha256(out_TD.numpy().tobytes()).hexdigest()
            return
        assert spans is not None
        entry["seconds"].append(seconds)
        entry["phases"] += spans.seconds_by_phase()

    @torch.inference_mode()
    def exchange(self, kind: str, num_bytes: list[int], rounds: int) -> dict[str, Any]:
        """Return median seconds of a collective in which two ranks send each other these bytes.

        Args:
            kind: all_to_all, all_gather or all_reduce.
            num_bytes: the sizes to measure.

        Collective.
        """
        medians = []
        for size in num_bytes:
            part = torch.zeros(2 * size if kind == "all_to_all" else size, dtype=torch.uint8)
            calls: dict[str, Callable[[], Any]] = {
                "all_to_all": partial(dist.all_to_all_single, torch.empty_like(part), part),
                "all_gather": lambda part=part: self._collectives.all_gather(part).wait(),
                "all_reduce": lambda part=part: self._collectives.all_reduce(part).wait(),
            }
            medians.append(_median(calls[kind], rounds))
        return {"seconds": medians}


def _step_under(settings: CapacityConfig, step: MoEStep) -> MoEStep | None:
    """Return no step for a job without a policy, which counts no drops."""
    return None if settings.policy == "none" else step


def _median(call: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        dist.barrier()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:]))


if __name__ == "__main__":
    serve(Worker())
