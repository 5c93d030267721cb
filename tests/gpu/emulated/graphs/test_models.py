"""Decode steps of the model families in a graph, on the emulated device, with idle rows.

Run: pytest tests/gpu/emulated/graphs/test_models.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.config.loader import config_from_tree
from engine.generation.decode_step import fill_inputs
from engine.generation.sequence import Sequence
from engine.generation.step import Slice
from engine.layers.decode_inputs import DecodeInputs
from engine.layers.kv_cache import KVCache
from engine.llm import LLM
from engine.models.decoder import GroupTokens
from engine.profiling.telemetry import Telemetry
from engine.request import Request, SamplingParams
from tests.gpu.emulated.cuda import emulated_cuda
from tests.gpu.emulated.device import DEVICE
from tests.gpu.emulated.graphs.cuda_graph import check_replays
from tests.gpu.emulated.guard import obstacle
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=f"not emulated: {obstacle()}")

SIZE, BLOCKS, ROWS, MAX_LEN = 4, 32, 4, 64
# Tokens per sequence in each step: growing contexts, fewer sequences, none.
STEPS = [[5, 12, 3], [6, 13, 4], [7, 14, 5, 9], [8], []]


def replayed(rank: int, guard: Path, path: Path, tensor: int) -> int:
    """Check replays of a family's decode steps; return the operations of the graph."""

    tree = {
        "model": {"path": str(path), "max_model_len": MAX_LEN, "dtype": "bfloat16"},
        "scheduler": {"kv_cache_blocks": BLOCKS, "block_size": SIZE, "max_batch_tokens": 64},
        "runtime": {"device": "cuda", "timeout_s": 60.0, "graphs": "off"},
        "parallel": {"tensor": tensor},
        "moe": {"dispatch": {"exchange": "static"}, "experts": {"backend": "grouped_mm"}},
    }
    with pytest.MonkeyPatch.context() as patch, emulated_cuda(guard), torch.inference_mode():
        patch.setenv("LOCKSTEP_NATIVE", "0")
        llm = LLM(config_from_tree(tree))
        model, device = llm.model, DEVICE.device
        model.set_telemetry(Telemetry())
        cache = KVCache(model.kv_spec, BLOCKS, SIZE, device, model.dtype, ROWS, has_scratch=True)
        for tensors in (cache.keys, cache.values):
            for each in tensors:
                each.fill_(0.25)
        assert cache.scratch_slot is not None
        inputs = DecodeInputs(
            ROWS, MAX_LEN // SIZE, SIZE, device, cache.scratch_slot, cache.scratch_state
        )

        def fill(lengths: list[int]) -> None:
            slices = [
                Slice(_sequence(row, length), length - 1, 1, True)
                for row, length in enumerate(lengths)
            ]
            fill_inputs(inputs, slices, model.vocab_size)

        def run() -> torch.Tensor:
            return model.logits(
                model(inputs.step, cache, None, GroupTokens(ROWS, ROWS, bucket=ROWS))
            )

        graph = check_replays(run, [lambda each=each: fill(each) for each in STEPS])
        assert graph.recorder is not None
        llm.close()
        return len(graph.recorder.operations)


def _sequence(row: int, length: int) -> Sequence:
    tokens = [(11 * row + 5 * each) % 97 for each in range(length)]
    params = SamplingParams(temperature=1.0, seed=row)
    seq = Sequence(Request(index=row, id=str(row), prompt_token_ids=tokens, params=params))
    seq.block_ids = [8 * row + each for each in range(8)]
    seq.state_row = row
    return seq


@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        pytest.param("mixtral", 1, marks=pytest.mark.long),
        pytest.param("olmoe", 2, marks=pytest.mark.long),
        ("qwen3_moe", 2),
        ("deepseek_v2", 2),
        pytest.param("gpt_oss", 1, marks=pytest.mark.long),
        pytest.param("qwen3_next", 1, marks=pytest.mark.long),
        pytest.param("llama4_text", 1, marks=pytest.mark.long),
    ],
)
def test_a_decode_step_can_be_captured(
    guard: Path, checkpoint: Callable[[str], Path], family: str, tensor: int
) -> None:
    assert min(run_ranks(replayed, tensor, guard, checkpoint(family), tensor)) > 10
