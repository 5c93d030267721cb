"""Worker: this engine's offline API, `LLM(config).generate`, on one rank or several.

Also the engine process of tools/gpu_suite.py, which is why it takes any config key.
"""

from __future__ import annotations

import time
from typing import Any

from bench.protocol import memory_mib, serve


class Worker:
    """Holds the engine between requests."""

    def load(
        self, checkpoint: str, threads: int | None = None, settings: list[str] | None = None
    ) -> dict[str, Any]:
        """Load the model.

        Args:
            settings: `section.key=value` as for `--set`.

        Collective over all ranks.
        """
        import tempfile
        from pathlib import Path

        import torch

        from engine.config.loader import load_config
        from engine.llm import LLM
        from engine.ops import native

        before = memory_mib()
        overrides = [*(settings or []), *([f"runtime.threads={threads}"] if threads else [])]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "bench.yaml")
            path.write_text(f"model: {{path: {checkpoint!r}}}\n", encoding="utf-8")
            self._llm = LLM(load_config(str(path), overrides))
        return {
            "versions": {"torch": torch.__version__},
            "device": str(self._llm.topology.device),
            "backends": sorted({layer.backend for layer in self._llm.model.moe_layers}),
            "native": native.reason(),
            "idle": before,
        }

    def run(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """Continue every prompt greedily by `new_tokens`; return seconds around `generate`.

        In the reply, `parts` divides this rank's seconds by reporter, and `meetings` is the number
        of collectives of its MoE layers. Collective over all ranks.
        """
        import torch

        from engine.request import SamplingParams

        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        torch.distributed.barrier()
        before = self._num_collectives()
        begin = time.perf_counter()
        completions = self._llm.generate(prompts, params)
        seconds = time.perf_counter() - begin
        broken = [item.error for item in completions if item.error is not None]
        if broken:
            raise ValueError(f"{len(broken)} prompts did not run, the first: {broken[0]}")
        tokens = [list(item.token_ids) for item in completions]
        report = self._llm.report
        assert report is not None
        own = report.ranks[self._llm.topology.world.rank].seconds
        parts = {
            "computing": own["attention"] + own["experts"] + own["other"],
            "moving": own["communication"],
            "waiting": own["waiting"],
        }
        result = {"seconds": seconds, "tokens": tokens, "parts": parts}
        result["meetings"] = self._num_collectives() - before
        return {**result, **memory_mib(), **self._device_memory()}

    def score(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Return log probabilities of prompt tokens (but the first) and one new. Collective."""
        from engine.request import SamplingParams

        params = SamplingParams(
            max_new_tokens=1, ignore_eos=True, logprobs=True, prompt_logprobs=True
        )
        done = self._llm.generate(prompts, params)
        logprobs = [[*(c.prompt_logprobs or [])[1:], *(c.logprobs or [])] for c in done]
        return {"logprobs": logprobs}

    def close(self) -> dict[str, Any]:
        """Unload the model, so that another can be loaded. Collective."""
        import gc

        import torch

        self._llm.close()
        del self._llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return {}

    def _num_collectives(self) -> int:
        return sum(layer.num_collectives for layer in self._llm.model.moe_layers)

    def _device_memory(self) -> dict[str, float]:
        import torch

        device = self._llm.topology.device
        if device.type != "cuda":
            return {}
        return {"peak_device_mib": torch.cuda.max_memory_allocated(device) / 2**20}


if __name__ == "__main__":
    serve(Worker())
