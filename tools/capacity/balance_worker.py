"""Balance worker: one rank of the engine, run with one placement and setting after another.

The ranks stay; the engine is built anew for every placement, since it holds other weights. Started
as every candidate of a bench, see `bench/candidate.py`.

Legend: S steps, L MoE layers, E experts, W ranks.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from bench.protocol import serve

from engine.profiling.loads import LoadCounter


class CallLog(LoadCounter):
    """Load counter that also keeps every layer call: rows of all experts, and of own instances."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[int, list[tuple[np.ndarray, list[int]]]] = {}

    def record(
        self,
        layer: int,
        *,
        before_E: np.ndarray,
        rank_before: list[int],
        own_after: list[int],
        own_experts: list[int],
    ) -> None:
        """Keep the call."""
        self.calls.setdefault(layer, []).append((before_E.copy(), list(own_after)))
        super().record(
            layer,
            before_E=before_E,
            rank_before=rank_before,
            own_after=own_after,
            own_experts=own_experts,
        )


class Worker:
    """Holds the ranks' topology, this rank's requests, and the engine for one placement."""

    def load(
        self, config: str, settings: list[str], jobs: dict[str, list[dict[str, Any]]]
    ) -> dict[str, Any]:
        """Join the ranks and keep this rank's requests. Collective.

        Args:
            config: as for `--config`.
            settings: `section.key=value`.
            jobs: by name, `rank`, `index`, `prompt` and `new_tokens` of every request; 0 new
                tokens: it is scored.
        """
        from engine.config.loader import load_config
        from engine.distributed import bootstrap
        from engine.request import Request, SamplingParams

        self._config, self._settings = config, settings
        self._topology = bootstrap.start(load_config(config, settings))
        rank = self._topology.world.rank
        score = SamplingParams(max_new_tokens=0, prompt_logprobs=True)
        self._jobs = {
            name: [
                Request(
                    index=item["index"],
                    id=item["index"],
                    prompt_token_ids=item["prompt"],
                    params=SamplingParams(max_new_tokens=item["new_tokens"], logprobs=True)
                    if item["new_tokens"]
                    else score,
                )
                for item in items
                if item["rank"] == rank
            ]
            for name, items in jobs.items()
        }
        return {}

    def place(self, placement: str | None) -> dict[str, Any]:
        """Build the engine for a placement file; None: contiguous. Collective.

        Returns `copy_bytes` of this rank and `expert_weights`, those of all experts.
        """
        from engine.config.loader import load_config
        from engine.llm import LLM

        chosen = [] if placement is None else [f"moe.placement={placement}"]
        self._llm: Any = None  # so that the weights of the last one go first
        self._llm = LLM(load_config(self._config, [*self._settings, *chosen]), self._topology)
        self._calls = CallLog()
        self._llm._telemetry.loads = self._calls
        layers = self._llm.model.moe_layers
        spec = layers[0].spec
        weights = 3 * spec.hidden * spec.ffn * spec.router.num_experts * len(layers)
        return {
            "copy_bytes": sum(layer.experts.copy_bytes for layer in layers),
            "expert_weights": weights,
        }

    def run(self, job: str, capacity: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run a job under a capacity setting; None: dropless. Collective.

        Returns `scored`: index, negative log-likelihood and digest of every excerpt; `generated`:
        index, new tokens and digest of every prompt, the digests over tokens and log probabilities;
        `after` and `copied`, rows of this rank and of its copies, [S][L]; `exempt`, rows of this
        rank's tokens that capacity does not apply to, by the rank of their home, [S][L][W], none
        without a policy; and on rank 0 `before`,
        rows of every expert before capacity, [S][L][E], and `prefill`, tokens of each step.
        """
        from capacity.settings import from_json
        from engine.config import CapacityConfig
        from engine.generation.request_source import ListSource
        from engine.request import Completion

        self._llm.set_capacity(CapacityConfig() if capacity is None else from_json(capacity))
        self._calls.calls.clear()
        entries = self._llm.record_decisions()
        done: list[Completion] = []
        steps: list[int] = []
        self._llm.run(
            ListSource(self._jobs[job]),
            done.extend,
            on_step=lambda report: steps.append(report.tokens_prefill),
        )
        if broken := [item.error for item in done if item.error is not None]:
            raise ValueError(f"{len(broken)} requests did not run, the first: {broken[0]}")
        layers = sorted(self._calls.calls)
        by_step = list(zip(*(self._calls.calls[layer] for layer in layers), strict=True))
        group, instances = self._topology.expert, self._instances()
        homes = {layer: each.num_homes(group.rank) for layer, each in instances.items()}
        exempt = np.zeros((len(by_step), len(layers), group.size), dtype=np.int64)
        for entry in entries:
            home_E = np.array(instances[entry.layer].placement.home_E)
            ranks = home_E[entry.topk_ids_TK[~entry.eligible_T]].ravel()
            exempt[entry.step, layers.index(entry.layer)] += np.bincount(
                ranks, minlength=group.size
            )
        reply: dict[str, Any] = {
            "scored": [
                [item.index, -sum(x for x in item.prompt_logprobs if x is not None), digest(item)]
                for item in done
                if item.prompt_logprobs is not None
            ],
            "generated": [
                [item.index, item.token_ids, digest(item)]
                for item in done
                if item.prompt_logprobs is None
            ],
            "after": [[sum(own) for _, own in step] for step in by_step],
            "copied": [
                [sum(own[homes[layer] :]) for layer, (_, own) in zip(layers, step, strict=True)]
                for step in by_step
            ],
            "exempt": exempt.tolist(),
        }
        if self._topology.expert.rank == 0:
            if len(steps) != len(by_step):
                raise ValueError(f"{len(steps)} steps were reported and {len(by_step)} recorded")
            reply["prefill"] = steps
            reply["layers"] = layers
            reply["before"] = [[before_E.tolist() for before_E, _ in step] for step in by_step]
        return reply

    def _instances(self) -> dict[int, Any]:
        """Return the instances of every MoE layer."""
        return {layer.layer: layer.instances for layer in self._llm.model.moe_layers}


def digest(item: Any) -> str:
    """Return a hash of a completion's tokens and log probabilities, exact to the bit."""
    parts = [list(item.token_ids or ()), item.logprobs, item.prompt_logprobs]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


if __name__ == "__main__":
    serve(Worker())
