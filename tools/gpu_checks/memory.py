"""Memory that the engine sizes itself, under full steps; and the rate at which weights are read."""

from __future__ import annotations

import gc
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from make_random_checkpoint import make_checkpoint

from engine.config.loader import config_from_tree
from engine.generation.request_source import ListSource
from engine.llm import LLM
from engine.request import Request, SamplingParams
from gpu_checks.check import Check, Settings, at_most, figure, guarded
from gpu_checks.shapes import QWEN3, dummy_llm, tiny

GROUP = "memory"


def check_memory(settings: Settings) -> Iterator[Check]:
    """Check a KV cache that takes what is free; measure the loading of weights."""
    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as name:
        folder = Path(name)
        yield from guarded(GROUP, "KV cache", lambda: _check_cache(settings, folder / "shape"))
        gc.collect()
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
        yield from guarded(GROUP, "weights", lambda: _check_loading(settings, folder / "weights"))


def _check_cache(settings: Settings, folder: Path) -> list[Check]:
    """Run the largest steps with a cache whose size nobody gave."""
    shape = tiny(QWEN3) if settings.is_tiny else QWEN3
    # So many sequences of so many tokens want more than any device has.
    sequences, longest, batch = (4, 64, 64) if settings.is_tiny else (256, 32768, 8192)
    chance = random.Random(0)
    requests = [
        Request(
            index=number,
            id=str(number),
            prompt_token_ids=[chance.randrange(shape.vocab) for _ in range(longest // 32)],
            params=SamplingParams(max_new_tokens=4, ignore_eos=True),
        )
        for number in range(min(sequences, 64))
    ]
    done: list[str | None] = []
    with dummy_llm(
        shape,
        folder,
        settings.device,
        model={"max_model_len": longest},
        scheduler={"max_sequences": sequences, "max_batch_tokens": batch},
    ) as llm:
        blocks = llm.resolved_settings["scheduler.kv_cache_blocks"]
        tokens = blocks * llm.config.scheduler.block_size
        llm.run(ListSource(requests), lambda each: done.extend(one.finish_reason for one in each))
    failed = len(requests) - done.count("length")
    found = [
        at_most(GROUP, "KV cache left to the engine: requests that failed", failed, 0),
        figure(GROUP, "KV cache left to the engine: tokens", tokens),
    ]
    if settings.device.type == "cuda":
        total = torch.cuda.mem_get_info()[1]
        share = torch.cuda.max_memory_reserved() / total
        note = f"of {total / 2**30:.0f} GiB; weights {shape.weight_bytes / 2**30:.1f} GiB"
        found.append(at_most(GROUP, "peak, share of the device", share, 0.98, note))
    return found


def _check_loading(settings: Settings, folder: Path) -> list[Check]:
    """Load a checkpoint twice; the second time its files are in memory."""
    fields = None if settings.is_tiny else {"intermediate_size": 4096}
    make_checkpoint(
        "mixtral", folder, size="tiny" if settings.is_tiny else "bench", overrides=fields
    )
    tree = {
        "model": {"path": str(folder), "dtype": "bfloat16"},
        "scheduler": {"kv_cache_blocks": 64},
        "runtime": {"device": settings.device.type},
    }
    found = []
    for turn in ("first", "second"):
        llm = LLM(config_from_tree(tree))
        report = llm.weights_report
        llm.close()
        assert report is not None
        found.append(
            figure(
                GROUP,
                f"weights, {turn} time, GB/s",
                report.bytes_read / report.seconds / 1e9,
                f"{report.bytes_read / 1e6:.0f} MB, float32 to bfloat16",
            )
        )
    return found
