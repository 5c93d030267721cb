"""Recurrent states of sequences (Gated DeltaNet) through the whole engine.

Run: pytest tests/distributed/test_recurrent_states.py

The tokens of a prompt must not depend on what else runs, on how its tokens are cut into steps, on
preemptions, or on the row that its states have.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from engine.config import (
    Config,
    ModelConfig,
    MoEConfig,
    OverlapConfig,
    ParallelConfig,
    RuntimeConfig,
    SchedulerConfig,
)
from engine.llm import LLM
from engine.moe.dispatch import chunk_layout, layout_policy
from engine.request import Completion, SamplingParams
from tests.helpers.batch_case import committed, infer, records, report
from tests.helpers.ranks import RanksFailed, run_ranks
from tools.make_random_checkpoint import make_checkpoint

DRAW = random.Random(7)
SHARED = [DRAW.randrange(90) for _ in range(12)]
# Prompts of one token to several chunks of the delta rule (64), some with a common beginning.
PROMPTS = [
    [*(SHARED if number % 2 else []), *(DRAW.randrange(90) for _ in range(length))]
    for number, length in enumerate((1, 3, 9, 70, 1, 14, 5, 2, 31, 8, 4, 6))
]
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True, logprobs=True)
LARGE = {"kv_cache_blocks": 256, "block_size": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("states") / "qwen3_next"
    make_checkpoint("qwen3_next", path, overrides={"vocab_size": 97})
    return path


def engine(
    path: Path,
    scheduler: dict[str, Any],
    parallel: dict[str, Any] | None = None,
    moe: MoEConfig | None = None,
) -> LLM:
    return LLM(
        Config(
            model=ModelConfig(path=str(path), max_model_len=128, dtype="float32"),
            scheduler=SchedulerConfig(**{**LARGE, **scheduler}),
            parallel=ParallelConfig(**(parallel or {})),
            moe=moe or MoEConfig(),
            runtime=RuntimeConfig(device="cpu", timeout_s=60.0, threads=1),
        )
    )


def one_by_one(rank: int, path: Path) -> list[Completion]:
    """Complete each prompt in a run of its own."""
    llm = engine(path, {})
    done = [llm.generate([prompt], GREEDY)[0] for prompt in PROMPTS]
    llm.close()
    return done


def together(
    rank: int,
    path: Path,
    scheduler: dict[str, Any],
    parallel: dict[str, Any],
    moe: MoEConfig,
) -> tuple[list[list[Completion]], int, int | None, dict[str, Any]]:
    """Complete all prompts in two runs; also this rank's preemptions, bytes of states, settings."""
    chunk_layout.MIN_CHUNK_ROWS = layout_policy.COLLECTIVE_BYTES = 1
    llm = engine(path, scheduler, parallel, moe)
    split, run_split = [], llm.model.forward_two_batch
    llm.model.forward_two_batch = lambda *step: split.append(1) or run_split(*step)
    done = [llm.generate(PROMPTS, GREEDY) for _ in range(2)]
    assert bool(split) == moe.overlap.two_batch
    assert llm.report is not None
    own, rows = llm.report.ranks[rank], llm._scheduler.max_sequences
    assert sorted(llm._scheduler._free_rows) == list(range(rows))
    state_bytes = sum(
        tensor.nbytes
        for tensor, state in zip(
            (*llm._runner.cache.keys, *llm._runner.cache.values),
            llm.model.kv_spec.states * 2,
            strict=True,
        )
        if state is not None
    )
    assert own.state_bytes == state_bytes
    settings = llm.resolved_settings
    llm.close()
    return done, own.preemptions, own.state_bytes, settings


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> list[Completion]:
    (found,) = run_ranks(one_by_one, 1, checkpoint)
    return found


CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], MoEConfig]] = {
    "all in a step": (1, {}, {}, MoEConfig()),
    "chunks": (1, {"max_batch_tokens": 7}, {}, MoEConfig()),
    "few rows": (1, {"max_sequences": 3}, {}, MoEConfig()),
    "preemption": (1, {"kv_cache_blocks": 24}, {}, MoEConfig()),
    "preemption in chunks": (
        1,
        {"kv_cache_blocks": 24, "max_batch_tokens": 9, "max_sequences": 5},
        {},
        MoEConfig(),
    ),
    "two ranks": (2, {}, {}, MoEConfig()),
    "tensor": (2, {"kv_cache_blocks": 24}, {"tensor": 2}, MoEConfig()),
    "two_batch": (2, {}, {}, MoEConfig(overlap=OverlapConfig(two_batch=True))),
    "two_batch in chunks": (
        2,
        {"max_batch_tokens": 11},
        {},
        MoEConfig(overlap=OverlapConfig(two_batch=True)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_each_prompt_alone(
    name: str, checkpoint: Path, alone: list[Completion]
) -> None:
    world, scheduler, parallel, moe = CASES[name]
    found = run_ranks(together, world, checkpoint, scheduler, parallel, moe, timeout=120)
    for runs, preemptions, _, settings in found:
        for done in runs:
            assert [each.token_ids for each in done] == [each.token_ids for each in alone]
            for each, other in zip(done, alone, strict=True):
                assert each.logprobs == pytest.approx(other.logprobs, abs=1e-4)
            assert not any(each.cached_tokens for each in done)
        assert settings["scheduler.prefix_cache"] is False
        if scheduler.get("kv_cache_blocks") == 24:
            assert preemptions > 0


def choices(rank: int, path: Path, scheduler: dict[str, Any]) -> list[list[Completion]]:
    """Complete prompts with several choices each, with and without what reads the prompt."""
    llm = engine(path, scheduler)
    sampled = {"max_new_tokens": 8, "ignore_eos": True, "temperature": 0.8, "seed": 3, "n": 3}
    params = [
        SamplingParams(**sampled, logprobs=True, prompt_logprobs=bool(number % 3))
        for number in range(len(PROMPTS))
    ]
    done = llm.generate(PROMPTS, params)
    llm.close()
    return [[each, *each.others] for each in done]


def test_choices_and_logprobs_of_prompts_do_not_depend_on_chunks_or_preemptions(
    checkpoint: Path,
) -> None:
    (whole,) = run_ranks(choices, 1, checkpoint, {})
    settings = {"max_batch_tokens": 9, "kv_cache_blocks": 24, "max_sequences": 5}
    (cut,) = run_ranks(choices, 1, checkpoint, settings)
    for these, those in zip(cut, whole, strict=True):
        assert len({tuple(each.token_ids) for each in these}) == 3
        assert [each.token_ids for each in these] == [each.token_ids for each in those]
        for each, other in zip(these, those, strict=True):
            assert each.logprobs == pytest.approx(other.logprobs, abs=1e-4)
            if other.prompt_logprobs is None:
                assert each.prompt_logprobs is None
            else:
                assert each.prompt_logprobs is not None
                assert each.prompt_logprobs[1:] == pytest.approx(
                    other.prompt_logprobs[1:], abs=1e-4
                )


@pytest.fixture
def job(checkpoint: Path, tmp_path: Path) -> list[str]:
    """The arguments of a batch job whose lines share a prefix."""
    with (tmp_path / "in.jsonl").open("w") as file:
        for number, prompt in enumerate(PROMPTS):
            line = {
                "id": number,
                "prompt_token_ids": [*SHARED * 5, *prompt][:90],
                "max_new_tokens": 3,
            }
            line["ignore_eos"] = True
            file.write(json.dumps(line) + "\n")
    (tmp_path / "config.yaml").write_text(
        f"model: {{path: {checkpoint}, max_model_len: 128}}\n"
        "runtime: {device: cpu, timeout_s: 60, threads: 1}\n"
    )
    paths = (("config", "config.yaml"), ("input", "in.jsonl"), ("output", "out.jsonl"))
    return [part for option, name in paths for part in (f"--{option}", str(tmp_path / name))]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["scheduler.prefix_cache=true"], r"scheduler\.prefix_cache = true: .* to auto or false"),
        (
            ["scheduler.max_sequences=2147483647", "scheduler.max_batch_tokens=2147483647"],
            r"scheduler\.max_sequences: 2147483647 does not fit: .*; give at most \d+",
        ),
    ],
    ids=["prefix cache", "states"],
)
def test_what_states_do_not_allow_is_refused_with_what_to_do(
    settings: list[str], text: str, job: list[str]
) -> None:
    argv = [*job, *(part for each in settings for part in ("--set", each))]
    (code, _, said), (other, _, _) = run_ranks(infer, 2, argv)
    assert code and other
    assert re.search(text, said.replace("\n", " ")), said
    assert "Traceback" not in said


def test_a_job_that_was_killed_has_the_same_records_when_it_is_resumed(job: list[str]) -> None:
    argv = [*job, "--set", "scheduler.max_sequences=3", "--set", "scheduler.max_batch_tokens=32"]
    output = Path(job[-1])
    with pytest.raises(RanksFailed):
        run_ranks(infer, 1, argv, (0, 2, "kill after"))
    before = len(committed(output, 1))
    assert 0 < before < len(PROMPTS)
    ((code, out, said),) = run_ranks(infer, 1, argv)
    assert code == 0, said
    assert f"{before} of them by earlier runs" in out
    resumed = [record["token_ids"] for record in records(output)]
    ((code, _, said),) = run_ranks(infer, 1, [*argv, "--overwrite"])
    assert code == 0, said
    assert [record["token_ids"] for record in records(output)] == resumed


def test_a_job_does_not_deal_lines_by_prefixes_that_nothing_shares(job: list[str]) -> None:
    for code, out, said in run_ranks(infer, 2, job):
        assert code == 0, said
        assert "prefix" not in out
    output = Path(job[-1])
    assert [len(record["token_ids"]) for record in records(output)] == [3] * len(PROMPTS)
    found = report(output)
    assert "shared_prefixes" not in found
    assert all(each["state_bytes"] > 0 for each in found["run"]["ranks"])
    settings = [each["resolved"]["scheduler.prefix_cache"] for each in found["run"]["ranks"]]
    assert settings == [False, False]
