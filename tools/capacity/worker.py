"""Worker: one rank of the engine, loaded once, run under one capacity setting after another.

Started as every candidate of a bench, see `bench/candidate.py`; the weights are read once for all
settings.
"""

from __future__ import annotations

from typing import Any

from bench.protocol import serve


class Worker:
    """Holds the engine and this rank's requests."""

    def load(self, config: str, settings: list[str], items: list[dict[str, Any]]) -> dict[str, Any]:
        """Load the model and this rank's requests.

        Args:
            config: as for `--config`.
            settings: `section.key=value`.
            items: `rank`, `index`, `prompt` and `new_tokens` of every request; 0 new tokens: it is
                scored.

        Collective.
        """
        from engine.config.loader import load_config
        from engine.llm import LLM
        from engine.request import Request, SamplingParams

        self._llm = LLM(load_config(config, settings))
        rank = self._llm.topology.world.rank
        score = SamplingParams(max_new_tokens=0, prompt_logprobs=True)
        self._requests = [
            Request(
                index=item["index"],
                id=item["index"],
                prompt_token_ids=item["prompt"],
                params=SamplingParams(max_new_tokens=item["new_tokens"])
                if item["new_tokens"]
                else score,
            )
            for item in items
            if item["rank"] == rank
        ]
        spec = self._llm.model.moe_layers[0].spec
        return {
            "num_experts": spec.router.num_experts,
            "top_k": spec.router.top_k,
            "layers": len(self._llm.model.moe_layers),
        }

    def run(self, capacity: dict[str, Any]) -> dict[str, Any]:
        """Run the whole job under one setting. Collective over all ranks.

        Returns `scored`, index and negative log-likelihood of every excerpt; `generated`, index and
        new tokens of every prompt; `mass`, the gate mass of this rank's requests before and after
        capacity; `layers` of the run's report; and the loads of every layer call that capacity
        applied to, in order: `after`, this rank's rows to each expert, and on rank 0 `before`,
        every rank's, int [W][E].
        """
        from capacity.settings import from_json
        from engine.generation.request_source import ListSource
        from engine.request import Completion

        self._llm.set_capacity(from_json(capacity))
        entries = self._llm.record_decisions()
        done: list[Completion] = []
        report = self._llm.run(ListSource(self._requests), done.extend)
        if broken := [item.error for item in done if item.error is not None]:
            raise ValueError(f"{len(broken)} requests did not run, the first: {broken[0]}")
        rank = self._llm.topology.expert.rank
        reply: dict[str, Any] = {
            "scored": [
                [item.index, -sum(value for value in item.prompt_logprobs if value is not None)]
                for item in done
                if item.prompt_logprobs is not None
            ],
            "generated": [
                [item.index, item.token_ids] for item in done if item.prompt_logprobs is None
            ],
            "mass": [
                sum(item.capacity.mass for item in done),
                sum(item.capacity.mass_kept for item in done),
            ],
            "after": [entry.after_WE[rank].tolist() for entry in entries],
        }
        if rank == 0:
            reply["before"] = [entry.before_WE.tolist() for entry in entries]
            reply["steps"] = [entry.step for entry in entries]
            reply["top_k"] = self._llm.model.moe_layers[0].spec.router.top_k
            reply["seconds"] = report.seconds
            reply["bytes_sent"] = sum(item.bytes_sent for item in report.ranks)
            reply["layers"] = [
                {
                    "layer": item.layer,
                    "assignments": item.assignments,
                    "dropped": item.dropped,
                    "added": item.added,
                    "orphans": item.orphans,
                }
                for item in report.layers
            ]
        return reply


if __name__ == "__main__":
    serve(Worker())
