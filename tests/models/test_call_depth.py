"""How many of the engine's own frames lie between a scheduler step and a kernel: at most ten.

Run: pytest tests/models/test_call_depth.py
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import engine
from engine.config import CapacityConfig, Config, ModelConfig, MoEConfig, SchedulerConfig
from engine.generation.loop import GenerationLoop
from engine.generation.request_source import ListSource
from engine.llm import LLM
from engine.ops.grouped_ffn import grouped_ffn
from engine.ops.paged_attention import paged_attention
from engine.ops.permute import combine_rows, gather_rows
from engine.ops.select_experts import select_experts
from engine.ops.select_top import select_top
from engine.ops.sort_by_expert import sort_by_expert
from engine.request import Request, SamplingParams
from tests.helpers.ranks import run_ranks
from tools.make_random_checkpoint import make_checkpoint

MAX_FRAMES = 10
ENGINE = Path(engine.__file__).parent  # engine/ops is the link to kernels/
LOOP = inspect.unwrap(GenerationLoop.run).__code__
KERNELS = {
    kernel.__code__: kernel.__name__
    for kernel in (
        combine_rows,
        gather_rows,
        grouped_ffn,
        paged_attention,
        select_experts,
        select_top,
        sort_by_expert,
    )
}


def own_frames(frame: FrameType | None) -> list[str]:
    """From `GenerationLoop.run` to `frame`, both included; torch's frames are left out."""
    names = []
    while frame is not None:
        code = frame.f_code
        if (file := Path(code.co_filename)).is_relative_to(ENGINE):
            names.append(f"{file.relative_to(ENGINE)}: {code.co_name}")
        if code is LOOP:
            return names[::-1]
        frame = frame.f_back
    pytest.fail("a kernel ran outside of the generation loop")


def decode_and_record(rank: int, path: Path) -> dict[str, list[str]]:
    """Generate three tokens; return the longest stack of each kernel in the decode steps."""
    found: dict[str, list[str]] = dict.fromkeys(KERNELS.values(), [])

    def record(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and (kernel := KERNELS.get(frame.f_code)):
            found[kernel] = max(found[kernel], own_frames(frame), key=len)

    llm = LLM(
        Config(
            model=ModelConfig(path=str(path), max_model_len=64),
            moe=MoEConfig(
                capacity=CapacityConfig(policy="token_drop", factor="0.5", phases=("decode",))
            ),
            scheduler=SchedulerConfig(kv_cache_blocks=64, block_size=4),
        )
    )
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    # Four tokens per decode step, so that capacity binds.
    requests = [
        Request(index=index, id=str(index), prompt_token_ids=[1, 2, 3], params=params)
        for index in range(4)
    ]
    try:  # the first step is the prefill: profile from its end on
        llm.run(ListSource(requests), lambda _: None, lambda _: sys.setprofile(record))
    finally:
        sys.setprofile(None)
    llm.close()
    return found


@pytest.fixture(scope="module")
def stacks(tmp_path_factory) -> dict[str, list[str]]:
    path = tmp_path_factory.mktemp("mixtral")
    make_checkpoint("mixtral", path)
    return run_ranks(decode_and_record, 1, path, timeout=120)[0]


@pytest.mark.parametrize("kernel", KERNELS.values())
def test_a_decode_step_reaches_its_kernels_within_ten_own_frames(stacks, kernel):
    frames = stacks[kernel]
    assert frames, f"{kernel} did not run in a decode step"
    listed = "\n".join(f"{number:3} {frame}" for number, frame in enumerate(frames, 1))
    assert len(frames) <= MAX_FRAMES, f"{len(frames)} own frames:\n{listed}"
