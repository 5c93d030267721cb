"""Worker: transformers' own `generate`, one process or its expert parallelism over ranks.

Prompts are padded to the left, as generate requires. With `batch` below the number of prompts they
run in batches of similar length, which saves a ragged job most of its padding.
"""

from __future__ import annotations

import os
import time
from typing import Any

from bench.protocol import memory_mib, serve

PAD = 0


class Worker:
    """Holds the model between requests."""

    def load(
        self,
        checkpoint: str,
        threads: int,
        experts: str,
        expert_parallel: str | None = None,
        batch: int | None = None,
        dtype: str = "float32",
        capacity: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Load the model.

        Args:
            experts: 'eager' or 'grouped_mm'.
            expert_parallel: 'all_to_all' or 'all_reduce', or 'lockstep', which is this engine's in
                transformers; None: one process.
            batch: prompts per call of `generate`; None: all.
            dtype: of the weights and of what is computed.
            capacity: keys of moe.capacity of this engine's; None: nothing is dropped.
        """
        import torch
        import transformers

        torch.set_num_threads(threads)
        before = memory_mib()
        self._batch = batch
        extra: dict[str, Any] = {}
        if expert_parallel:
            from transformers.distributed.configuration_utils import DistributedConfig

            # The family's own plans: attention split over heads, experts over ranks. (5.23 refuses
            # an empty tensor plan, for experts alone, when tp_size > 1.)
            if expert_parallel == "lockstep":
                from engine.config.loader import config_from_tree
                from engine.interop.transformers_ep import register

                tree = {"model": {"path": checkpoint}, "moe": {"capacity": capacity or {}}}
                register(config_from_tree(tree).moe)
            ranks = int(os.environ["WORLD_SIZE"])
            extra["distributed_config"] = DistributedConfig(
                tp_size=ranks, ep_size=ranks, ep_implementation=expert_parallel
            )
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=getattr(torch, dtype), experts_implementation=experts, **extra
        )
        self._model = model.eval()
        self._model.generation_config.eos_token_id = None
        return {
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "idle": before,
        }

    def run(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """Continue every prompt greedily by `new_tokens`; return seconds from lists to lists."""
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        begin = time.perf_counter()
        tokens: list[list[int]] = [[] for _ in prompts]
        order = range(len(prompts))
        if self._batch is not None:
            order = sorted(order, key=lambda index: len(prompts[index]))
        step = self._batch or len(prompts)
        for start in range(0, len(prompts), step):
            chosen = order[start : start + step]
            outputs = self._generate([prompts[index] for index in chosen], new_tokens)
            for index, output in zip(chosen, outputs, strict=True):
                tokens[index] = output
        return {"seconds": time.perf_counter() - begin, "tokens": tokens, **memory_mib()}

    def _generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        import torch

        width = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=PAD,
            )
        return output[:, width:].tolist()


if __name__ == "__main__":
    serve(Worker())
