"""Asynchronous scheduling on emulated CUDA: the CPU's completions, and one wait per step behind
which the device has work.

Run: pytest tests/gpu/emulated/test_async.py
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from engine.config.loader import config_from_tree
from engine.generation.late.late_step import LateStep
from engine.generation.request_source import ListSource
from engine.llm import LLM
from engine.request import Request, SamplingParams
from tests.gpu.emulated.cuda import emulated_cuda
from tests.gpu.emulated.device import DEVICE
from tests.gpu.emulated.guard import obstacle
from tests.gpu.emulated.runs import Job
from tests.helpers.ranks import run_ranks
from tools.make_random_checkpoint import make_checkpoint

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=f"not emulated: {obstacle()}")

ENDS = tuple(range(0, 97, 7))
SAMPLING = {"logprobs": False, "stop_token_ids": ENDS, "max_new_tokens": 12}
DRAWN = {**SAMPLING, "temperature": 0.9, "top_p": 0.9}
USES = ((LateStep, "copy_out"),)
STATIC = {"moe": {"experts": {"backend": "grouped_mm"}, "dispatch": {"exchange": "static"}}}
JOBS = {
    "mixtral": Job("mixtral", sampling=SAMPLING, uses=USES),
    "olmoe sampled": Job("olmoe", sampling=DRAWN, uses=USES),
    "qwen3-next sampled": Job("qwen3_next", sampling=DRAWN, uses=USES),
}
ON = {"scheduler": {"async_scheduling": "on"}}  # the CPU's half of a job too


@pytest.mark.parametrize(
    "name",
    [
        name if name == "olmoe sampled" else pytest.param(name, marks=pytest.mark.long)
        for name in JOBS
    ],
)
def test_completions_equal_the_cpus_to_the_bit(name: str, on_both_devices) -> None:
    job = JOBS[name]
    on_both_devices(Job(job.family, ON | job.settings, job.sampling, uses=job.uses))


def waits_per_step(
    rank: int, guard: Path, path: Path, setting: str, graphs: str
) -> list[list[int]]:
    """Run a job; return of each step how much work lay behind each point that was waited for."""
    os.environ["LOCKSTEP_NATIVE"] = "0"
    steps: list[list[int]] = []
    with pytest.MonkeyPatch.context() as patch, emulated_cuda(guard):
        tree: dict[str, Any] = {
            "model": {"path": str(path), "max_model_len": 64, "dtype": "bfloat16"},
            "scheduler": {
                "kv_cache_blocks": 256,
                "block_size": 4,
                "max_batch_tokens": 256,
                "async_scheduling": setting,
            },
            "runtime": {"device": "cuda", "timeout_s": 60.0, "graphs": graphs},
            "profiler": {"enabled": False},
            **STATIC,
        }
        llm = LLM(config_from_tree(tree))
        found: list[int] = []
        wait = DEVICE.wait

        def noted(what: str, number: int | None = None) -> None:
            if not DEVICE.is_in_kernel and (number is None or number > DEVICE.completed):
                found.append(0 if number is None else DEVICE.issued - number)
            wait(what, number)  # SYNC: of the caller

        def on_step(report: Any) -> None:
            steps.append(list(found))
            found.clear()

        patch.setattr(DEVICE, "wait", noted)
        chance = random.Random(rank)
        params = SamplingParams(max_new_tokens=8, ignore_eos=True)
        requests = [
            Request(
                index=2 * number + rank,
                id=str(number),
                prompt_token_ids=[chance.randrange(97) for _ in range(9)],
                params=params,
            )
            for number in range(6)
        ]
        llm.run(ListSource(requests), lambda _: None, on_step)
        llm.close()
    return steps


# With graphs the next step is two of them, and what fills their inputs.
@pytest.mark.long
@pytest.mark.parametrize(("graphs", "least"), [("off", 21), ("auto", 5)])
def test_each_step_waits_once_and_the_device_has_the_next_step_meanwhile(
    graphs, least, guard, tmp_path
) -> None:
    path = tmp_path / "mixtral"
    make_checkpoint("mixtral", path, overrides={"vocab_size": 97})
    at_once = run_ranks(waits_per_step, 2, guard, path, "off", graphs, timeout=240)
    late = run_ranks(waits_per_step, 2, guard, path, "auto", graphs, timeout=240)
    for own in at_once:
        decode = own[1:]
        assert len(own) == 8 and all(each == [0] for each in decode), own
    for own in late:
        assert len(own) == 8
        # The first step's tokens are read in the second; the last one's at the end of the run.
        assert [len(each) for each in own[1:]] == [1] * 7
        assert all(each[0] >= least for each in own[1:]), own
