"""The whole engine on real gloo ranks: the same tokens however the job is spread.

Run: pytest tests/distributed/test_llm.py
"""

import os
import random
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import (
    CapacityConfig,
    Config,
    DispatchConfig,
    ModelConfig,
    MoEConfig,
    OverlapConfig,
    ParallelConfig,
    RuntimeConfig,
    SchedulerConfig,
)
from engine.generation.request_source import ListSource
from engine.llm import LLM
from engine.moe.dispatch import chunk_layout, layout_policy
from engine.moe.dispatch.pipeline import Pipeline
from engine.ops import lane
from engine.request import Completion, Request, RequestError, SamplingParams
from tests.helpers.ranks import run_ranks
from tools.make_random_checkpoint import make_checkpoint

PROMPTS = [
    [random.Random(seed).randrange(90) for _ in range(length)]
    for seed, length in enumerate([5, 17, 1, 30, 8, 12, 3])
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mixtral")
    make_checkpoint("mixtral", path, overrides={"vocab_size": 97, "num_local_experts": 5})
    return path


def config_of(
    path: Path, scheduler: dict[str, Any], parallel: dict[str, Any], shared_memory: bool = True
) -> Config:
    return Config(
        runtime=RuntimeConfig(shared_memory=shared_memory),
        model=ModelConfig(path=str(path), max_model_len=64),
        scheduler=SchedulerConfig(**{"kv_cache_blocks": 64, "block_size": 4, **scheduler}),
        parallel=ParallelConfig(**parallel),
    )


def generate(
    rank: int,
    path: Path,
    scheduler: dict[str, Any],
    parallel: dict[str, Any],
    params: SamplingParams,
    prompts: list[list[int]],
    shared_memory: bool,
) -> tuple[list[Completion], int]:
    llm = LLM(config_of(path, scheduler, parallel, shared_memory))
    assert llm.report is None
    done = llm.generate(prompts, params)
    assert llm.report is not None
    preemptions = llm.report.ranks[rank].preemptions
    llm.close()
    return done, preemptions


def run(
    path,
    world=1,
    *,
    scheduler=None,
    parallel=None,
    params=None,
    prompts=PROMPTS,
    shared_memory=True,
):
    params = params or SamplingParams(max_new_tokens=6, ignore_eos=True, logprobs=True)
    parts = (scheduler or {}, parallel or {}, params, prompts, shared_memory)
    results = run_ranks(generate, world, path, *parts, timeout=90)
    first = results[0][0]
    for done, _ in results:
        assert [item.token_ids for item in done] == [item.token_ids for item in first]
    return first, sum(preempted for _, preempted in results)


@pytest.fixture(scope="module")
def alone(checkpoint) -> list[Completion]:
    return run(checkpoint)[0]


def assert_same(done: list[Completion], expected: list[Completion]) -> None:
    assert [item.index for item in done] == [item.index for item in expected]
    assert [item.token_ids for item in done] == [item.token_ids for item in expected]
    for item, other in zip(done, expected, strict=True):
        torch.testing.assert_close(
            torch.tensor(item.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, {}),
        (3, {}),
        (2, {"expert": 1}),  # two replicas of the whole model
        (2, {"tensor": 2}),
        (4, {"expert": 2, "tensor": 2}),
    ],
)
def test_every_layout_of_ranks_gives_the_tokens_of_one_rank(checkpoint, alone, world, parallel):
    done, _ = run(checkpoint, world, parallel=parallel)
    assert_same(done, alone)


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}])
def test_over_gloo_the_tokens_are_those_of_one_rank(checkpoint, alone, parallel):
    done, _ = run(checkpoint, 2, parallel=parallel, shared_memory=False)
    assert_same(done, alone)


def test_ranks_without_any_request_take_part_until_the_end(checkpoint, alone):
    done, _ = run(checkpoint, 3, prompts=PROMPTS[:1])
    assert_same(done, alone[:1])


def test_chunked_prefill_and_one_sequence_at_a_time_change_nothing(checkpoint, alone):
    done, _ = run(checkpoint, scheduler={"max_batch_tokens": 4, "max_sequences": 2})
    assert_same(done, alone)


def test_preempted_sequences_are_recomputed_and_lose_nothing(checkpoint):
    params = SamplingParams(max_new_tokens=24, ignore_eos=True, logprobs=True)
    calm, none = run(checkpoint, params=params)
    # 14 blocks of 4 hold 56 tokens; the seven sequences grow to 244.
    tight, some = run(checkpoint, params=params, scheduler={"kv_cache_blocks": 14})
    assert none == 0 and some > 0
    assert_same(tight, calm)
    assert [item.capacity.assignments for item in tight] == [
        item.capacity.assignments for item in calm
    ], "recomputed tokens were counted twice"


def test_seeded_sampling_does_not_depend_on_ranks_or_batch(checkpoint):
    params = SamplingParams(
        max_new_tokens=8, temperature=0.9, top_p=0.95, seed=11, ignore_eos=True, logprobs=True
    )
    one, _ = run(checkpoint, params=params)
    two, _ = run(checkpoint, 2, params=params, scheduler={"max_sequences": 2})
    assert_same(two, one)
    greedy, _ = run(checkpoint, prompts=PROMPTS[:2])
    assert one[0].token_ids[:6] != greedy[0].token_ids, "sampling at 0.9 chose as greedy does"


def test_prompt_logprobs_are_those_of_every_prompt_token(checkpoint):
    params = SamplingParams(max_new_tokens=1, prompt_logprobs=True, ignore_eos=True)
    whole, _ = run(checkpoint, params=params)
    chunked, _ = run(checkpoint, 2, params=params, scheduler={"max_batch_tokens": 5})
    for item, other, prompt in zip(whole, chunked, PROMPTS, strict=True):
        assert item.prompt_logprobs is not None and other.prompt_logprobs is not None
        assert len(item.prompt_logprobs) == len(prompt) and item.prompt_logprobs[0] is None
        values = torch.tensor(item.prompt_logprobs[1:])
        assert (values < 0).all()
        torch.testing.assert_close(
            values, torch.tensor(other.prompt_logprobs[1:]), atol=1e-4, rtol=1e-4
        )


def test_assignments_count_each_token_once_for_each_expert_and_layer(checkpoint, alone):
    import json

    hf = json.loads((checkpoint / "config.json").read_text())
    top_k, before_last = hf["num_experts_per_tok"], hf["num_hidden_layers"] - 1
    for item, prompt in zip(alone, PROMPTS, strict=True):
        # The last sampled token is never run, nor is a cached one; the last layer runs the six that
        # are read.
        tokens = (len(prompt) - item.cached_tokens + 5) * before_last + 6
        assert item.capacity.assignments == tokens * top_k
        assert (item.capacity.dropped, item.capacity.added) == (0, 0)
        assert item.capacity.gate_mass_kept == 1.0


def test_a_prompt_that_cannot_run_fails_alone(checkpoint):
    prompts = [PROMPTS[0], [1] * 80, PROMPTS[2]]
    done, _ = run(checkpoint, 2, prompts=prompts)
    assert [item.finish_reason for item in done] == ["length", "error", "length"]
    assert done[1].error is not None
    assert "80" in done[1].error["message"] and "64" in done[1].error["message"]


def generate_in_rounds(rank: int, path: Path, moe: MoEConfig, parallel: dict[str, Any]) -> Any:
    """Completions without and with a limit of the rows that a rank receives at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_layout, "MIN_CHUNK_ROWS", 1)
        patch.setattr(layout_policy, "COLLECTIVE_BYTES", 1)
        llm = LLM(replace(config_of(path, {"max_batch_tokens": 32}, parallel), moe=moe))
        params = SamplingParams(max_new_tokens=6, ignore_eos=True, logprobs=True)
        whole = llm.generate(PROMPTS, params)
        for layer in llm.model.moe_layers:
            assert layer.row_limit is None, "two ranks have room for every row"
            layer.row_limit = 24
        called = []
        rounds = Pipeline.rounds
        patch.setattr(
            Pipeline, "rounds", lambda *each: called.append(len(each[3])) or rounds(*each)
        )
        parts = llm.generate(PROMPTS, params)
        llm.close()
    return whole, parts, called


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}])
@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(),
        MoEConfig(overlap=OverlapConfig(chunks=2), dispatch=DispatchConfig(deduplicate=False)),
        MoEConfig(overlap=OverlapConfig(two_batch=True)),
        MoEConfig(capacity=CapacityConfig(policy="token_drop")),
    ],
    ids=["dedup", "chunks", "two_batch", "token_drop"],
)
def test_more_rows_than_a_rank_has_room_for_come_in_rounds(checkpoint, moe, parallel):
    for whole, parts, called in run_ranks(generate_in_rounds, 2, checkpoint, moe, parallel):
        assert max(called) >= 2
        assert [item.token_ids for item in parts] == [item.token_ids for item in whole]
        assert [item.logprobs for item in parts] == [item.logprobs for item in whole]


def report_of(rank: int, path: Path) -> Any:
    llm = LLM(config_of(path, {}, {}))
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    requests = [
        Request(index=index, id=str(index), prompt_token_ids=prompt, params=params)
        for index, prompt in enumerate(PROMPTS)
    ]
    share = requests[llm.topology.data_rank :: llm.topology.num_data]
    steps = []
    for _ in range(2):  # the second run's report must not contain the first's
        steps.clear()
        report = llm.run(ListSource(share), lambda done: None, steps.append)
    llm.close()
    return report, steps


def test_the_run_report_accounts_for_every_token_row_and_request(checkpoint):
    results = run_ranks(report_of, 2, checkpoint)
    report, steps = results[0]
    prefill = sum(map(len, PROMPTS))
    decode = 3 * len(PROMPTS)
    assert sum(rank.tokens_prefill for rank in report.ranks) == prefill
    assert sum(rank.tokens_decode for rank in report.ranks) == decode
    assert sum(step.tokens_prefill for step in steps) == prefill
    assert steps[-1].finished <= len(PROMPTS) and report.steps == len(steps)
    layers = report.layers
    assert sum(rank.expert_rows for rank in report.ranks) == sum(
        sum(layer.expert_loads) for layer in layers
    )
    assert sum(layers[0].expert_loads) == (prefill + decode) * 2
    assert report.max_over_mean >= 1.0
    assert len(report.latencies["ttft"]) == len(report.latencies["tpot"]) == len(PROMPTS)
    for rank in report.ranks:
        assert set(rank.seconds) == {"attention", "experts", "communication", "waiting", "other"}
        assert all(value >= 0 for value in rank.seconds.values())
        assert 0 < sum(rank.seconds.values()) <= report.seconds * 1.01
        assert rank.bytes_sent > 0
        assert rank.resolved_settings == {
            "runtime.device": "cpu",
            "runtime.threads": 1,
            "runtime.graphs": "off: the model runs on cpu",
            "runtime.shared_memory": lane.available(),
            "model.dtype": "float32",
            "model.max_model_len": 64,
            "model.quantization": "none",
            "parallel.expert": 2,
            "scheduler.kv_cache_blocks": 64,
            "scheduler.prefix_cache": True,
            "scheduler.async_scheduling": False,
            "attention.backend": "triton",
            "scheduler.kv_dtype": "float32",
            "moe.experts.backend": "torch",
            "moe.overlap.chunks": 1,
            "profiler.every": 1,
        }


def load_broken(rank: int, path: Path, parallel: dict[str, Any] | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        LLM(config_of(path, {}, parallel or {}))
    return str(caught.value)


def test_a_weight_that_is_nan_on_one_rank_stops_all_with_its_name(checkpoint, tmp_path):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(key for key in tensors if ".experts.4." in key)  # the last rank's alone
    tensors[name][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    messages = run_ranks(load_broken, 2, tmp_path)
    assert messages[0] == messages[1] and name in messages[0]


def load_again(rank: int, path: Path) -> tuple[str, list[list[int]]]:
    """Correct a setting that only the model can judge, as in a notebook."""
    config = config_of(path, {}, {})
    capacity = CapacityConfig(policy="expanded_drop", expand=50)
    with pytest.raises(ValueError) as refused:
        LLM(replace(config, moe=MoEConfig(capacity=capacity)))
    llm = LLM(config)
    done = llm.generate(PROMPTS[:3], SamplingParams(max_new_tokens=3, ignore_eos=True))
    llm.close()
    return str(refused.value), [each.token_ids for each in done]


@pytest.mark.parametrize("world", [1, 2])
def test_after_settings_that_were_refused_the_right_ones_load_in_the_same_process(
    checkpoint, world
):
    for message, tokens in run_ranks(load_again, world, checkpoint):
        assert "moe.capacity.expand = 50" in message
        assert [len(each) for each in tokens] == [3, 3, 3]


def load_each(rank: int, folder: Path, parallel: dict[str, Any] | None = None) -> str:
    """Every rank has a checkpoint of its own, as on hosts without a common file system."""
    os.chdir(folder / str(rank))
    return load_broken(rank, Path("."), parallel)


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors"])
def test_what_one_replica_cannot_load_stops_the_others_too(checkpoint, tmp_path, broken):
    for rank in "01":
        (tmp_path / rank).mkdir()
        for file in checkpoint.iterdir():
            (tmp_path / rank / file.name).write_bytes(file.read_bytes())
    (tmp_path / "1" / broken).write_text("{")
    messages = run_ranks(load_each, 2, tmp_path, {"expert": 1}, timeout=60)
    assert messages[0] == messages[1]
    assert "rank 1" in messages[0] and broken in messages[0]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("{", "rank 1: model.path = '.': config.json is not valid JSON"),
        (
            '{"model_type": "gpt2"}',
            "model_type = 'gpt2', which this engine cannot run with transformers'",
        ),
        (None, "rank 1 on {host}: this config cannot run here:"),
    ],
    ids=["json", "model_type", "absent"],
)
def test_a_config_json_that_is_wrong_on_one_host_stops_all_with_its_text(
    checkpoint, tmp_path, broken, message
):
    for rank in "01":
        (tmp_path / rank).mkdir()
        for file in checkpoint.iterdir():
            (tmp_path / rank / file.name).write_bytes(file.read_bytes())
    (tmp_path / "1" / "config.json").unlink()
    if broken is not None:
        (tmp_path / "1" / "config.json").write_text(broken)
    messages = run_ranks(load_each, 2, tmp_path)
    assert messages[0] == messages[1]
    assert message.format(host=socket.gethostname()) in messages[0]


BEYOND = "<|beyond|>"  # a token that the tokenizer has and the model's embedding has not


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory) -> Path:
    from transformers import AutoTokenizer

    from tests.helpers.batch_case import make_model

    path = tmp_path_factory.mktemp("with_tokenizer")
    make_model(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([BEYOND], special_tokens=True)
    tokenizer.save_pretrained(path)
    return path


def generate_each(rank: int, path: Path, calls: list[Any]) -> list[Any]:
    """Complete each of the calls' prompts; return what comes back, or the text of a ValueError."""
    llm = LLM(config_of(path, {}, {}))
    results: list[Any] = []
    for prompts in calls:
        try:
            results.append(llm.generate(prompts, SamplingParams(max_new_tokens=2, ignore_eos=True)))
        except ValueError as error:
            results.append(str(error))
    llm.close()
    return results


WRONG = [
    ([5, 258], "[1] = 258: must be from 0 to 257"),
    ([-1], "[0] = -1: must be from 0 to 257"),
    ("a\ud800", "surrogate"),
    ([], "is empty"),
    ("", "is empty"),
    (f"a{BEYOND}", f"token 1 ('{BEYOND}') has the id 258"),
    (5.5, "must be text or a list of token ids"),
    (None, "must be text or a list of token ids"),
    (b"ab", "must be text or a list of token ids"),
    ({"prompt": "a"}, "must be text or a list of token ids"),
    ([True], "[0] = true: must be a whole number"),
    (np.array([[1, 2]]), "[0] = [1, 2]: must be a whole number"),
    (torch.tensor([0.5]), "[0] = 0.5: must be a whole number"),
    ([5, "a"], "must be a whole number"),
]


@pytest.mark.parametrize("world", [1, 2])
def test_a_wrong_prompt_of_any_kind_is_an_error_completion_and_the_others_run(
    with_tokenizer, world
):
    prompts = [part for wrong, _ in WRONG for part in (wrong, [5, 6])]
    for (done,) in run_ranks(generate_each, world, with_tokenizer, [prompts]):
        assert [item.index for item in done] == list(range(2 * len(WRONG)))
        assert {item.finish_reason for item in done[1::2]} == {"length"}
        for place, (item, (_, part)) in enumerate(zip(done[::2], WRONG, strict=True)):
            assert item.finish_reason == "error" and item.token_ids == [] and item.text == ""
            assert item.error["line"] is None
            message = item.error["message"]
            assert message.startswith(f"prompts[{2 * place}]") and part in message, message


def test_prompts_alone_and_of_every_kind_of_sequence_are_completed(with_tokenizer):
    (results,) = run_ranks(complete_alike, 1, with_tokenizer)
    assert results[0][0] == 1 and results[0][2] == 2
    assert all(result == results[0] for result in results), results


def complete_alike(rank: int, path: Path) -> list[Any]:
    """Complete the same prompt in every form; not sent to the rank, as iterators do not pickle."""
    llm = LLM(config_of(path, {}, {}))
    ids = list(llm.encode("ab"))
    calls: list[Any] = [
        "ab", ["ab"], ("ab",), iter(["ab"]), np.array(["ab"]), ids, [ids], [tuple(ids)],
        [np.array(ids)], [torch.tensor(ids)], [[np.int64(ids[0]), torch.tensor(ids[1])]],
        np.array(ids), np.array([ids]), torch.tensor(ids), torch.tensor([ids]),
    ]  # fmt: skip
    params = SamplingParams(max_new_tokens=2, ignore_eos=True)
    results = []
    for prompts in calls:
        done = llm.generate(prompts, params)
        results.append((len(done), done[0].token_ids, done[0].prompt_tokens, done[0].error))
    assert llm.generate([], params) == []
    llm.close()
    return results


@pytest.mark.parametrize("prompts", [None, 5, b"ab", {"prompt": "a"}, {"a"}])
def test_prompts_that_are_no_sequence_are_refused_in_words(with_tokenizer, prompts):
    ((text,),) = run_ranks(generate_each, 1, with_tokenizer, [prompts])
    assert "prompts" in text and "must be a list" in text


def sample_with(rank: int, path: Path, sampling: Any) -> str:
    llm = LLM(config_of(path, {}, {}))
    with pytest.raises(ValueError) as caught:
        llm.generate([[5], [6]], sampling)
    llm.close()
    return str(caught.value)


@pytest.mark.parametrize("sampling", [{"max_new_tokens": 3}, [{"seed": 1}, {"seed": 2}], "greedy"])
def test_sampling_that_is_no_sampling_params_is_refused_in_words(checkpoint, sampling):
    (text,) = run_ranks(sample_with, 1, checkpoint, sampling)
    assert text.startswith("sampling") and "must be SamplingParams" in text


class Failing:
    """A source whose requests fail at once, for rank 0; the last one runs. Rank 1 has one too."""

    limit = 1 << 30

    def __init__(self, num_failing: int, taking_s: float, rank: int) -> None:
        self.left = num_failing if rank == 0 else 0
        self.last: Request | None = Request(index=10**6 + rank, id="last", prompt_token_ids=[5])
        self.taking_s = taking_s

    def take(self) -> Request | Completion | None:
        if self.left:
            self.left -= 1
            time.sleep(self.taking_s)
            problem = RequestError("invalid_json", "bad line")
            return Completion.failure(self.left, str(self.left), problem)
        last, self.last = self.last, None
        return last

    def is_exhausted(self) -> bool:
        return not self.left and self.last is None


def run_failing(
    rank: int, path: Path, parallel: dict[str, Any], num_failing: int, taking_s: float
) -> tuple[list[tuple[int, int]], list[str], int]:
    llm = LLM(config_of(path, {}, parallel))
    source = Failing(num_failing, taking_s, llm.topology.data_rank)
    batches: list[tuple[int, int]] = []  # how many completions, how many failing ones were left
    reasons: list[str] = []

    def sink(done: list[Completion]) -> None:
        batches.append((len(done), source.left))
        reasons.extend(each.finish_reason for each in done)

    steps: list[Any] = []
    llm.run(source, sink, steps.append)
    llm.close()
    return batches, reasons, len(steps)


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}])
@pytest.mark.parametrize(("num_failing", "taking_s"), [(5000, 0.0), (5, 0.15)])
def test_what_fails_is_passed_on_step_by_step_however_many_fail_in_a_row(
    checkpoint, parallel, num_failing, taking_s
):
    """One step that takes them all would make the others wait without end."""
    batches, reasons, num_steps = run_ranks(
        run_failing, 2, checkpoint, parallel, num_failing, taking_s
    )[0]
    assert reasons.count("error") == num_failing and reasons.count("length") == 1
    assert max(size for size, _ in batches) <= (1024 if not taking_s else 1)
    assert batches[0][1] > 0, "the first are passed on before the last is taken"
    assert num_steps >= 5


class Undecodable:
    """A tokenizer that cannot decode next to token 7."""

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool) -> str:
        if 7 in ids:
            raise Exception("no such piece")
        return "x" * len(ids)


def generate_undecodable(
    rank: int, path: Path, parallel: dict[str, Any], params: SamplingParams
) -> list[Completion]:
    llm = LLM(config_of(path, {}, parallel))
    llm.tokenizer = Undecodable()
    done = llm.generate([[5, 7], [5, 6], [7], [6, 5]], params)
    llm.close()
    return done


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}])
@pytest.mark.parametrize("stop", [(), ("y",)])
def test_new_tokens_that_cannot_be_decoded_fail_their_request_alone(checkpoint, parallel, stop):
    params = SamplingParams(max_new_tokens=3, ignore_eos=True, stop=stop)
    for done in run_ranks(generate_undecodable, 2, checkpoint, parallel, params):
        assert [item.finish_reason for item in done] == ["error", "length", "error", "length"]
        assert done[0].error is not None and "no such piece" in done[0].error["message"]
        assert [item.text for item in done] == ["", "xxx", "", "xxx"]


def run_requests(rank: int, path: Path, parallel: dict[str, Any]) -> list[Completion]:
    llm = LLM(config_of(path, {}, parallel))
    params = SamplingParams(max_new_tokens=2, ignore_eos=True)
    requests = [
        Request(index=index, id=str(index), prompt_token_ids=ids, params=params)
        for index, ids in enumerate([[5, 97], [5, 96], [2**70]])
    ]
    done: list[Completion] = []
    llm.run(ListSource(requests if llm.topology.data_rank == 0 else []), done.extend)
    llm.close()
    return sorted(done, key=lambda item: item.index)


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}])
def test_a_source_that_gives_an_id_past_the_vocabulary_gets_an_error(checkpoint, parallel):
    done, _ = run_ranks(run_requests, 2, checkpoint, parallel)
    assert [item.finish_reason for item in done] == ["error", "length", "error"]
    assert "[1] = 97: must be from 0 to 96, the model's vocabulary" in done[0].error["message"]


def generate_every_setting(
    rank: int, path: Path, parallel: dict[str, Any], scheduler: dict[str, Any], policy: str
) -> list[Completion]:
    """Complete the prompts with every setting that changes or reports logits, three times each."""
    config = config_of(path, scheduler, parallel)
    if policy != "none":
        moe = MoEConfig(capacity=CapacityConfig(policy=policy, factor=100.0))
        config = replace(config, moe=moe)
    llm = LLM(config)
    each = [
        {"repetition_penalty": 1.5, "top_k": 20},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"logit_bias": {5: 4.0, 6: -100.0}, "min_p": 0.05},
        {"min_tokens": 4, "stop_token_ids": list(range(50))},
        {"prompt_logprobs": 2, "min_p": 0.1, "top_p": 0.9},
    ]
    params = [
        SamplingParams(
            max_new_tokens=8, temperature=1.0, seed=3, logprobs=2, n=number % 3 + 1, **extra
        )
        for number, extra in enumerate([*each, *each][: len(PROMPTS)])
    ]
    done = llm.generate(PROMPTS, params)
    llm.close()
    return done


@pytest.mark.parametrize(
    ("world", "parallel", "scheduler", "policy"),
    [
        (1, {}, {"max_batch_tokens": 7, "max_sequences": 2}, "none"),
        (2, {}, {}, "none"),
        (2, {"tensor": 2}, {}, "none"),
        (2, {}, {}, "token_drop"),
    ],
)
def test_every_setting_and_choice_is_the_same_on_any_ranks_and_in_any_batch(
    checkpoint, world, parallel, scheduler, policy
):
    (alone,) = run_ranks(generate_every_setting, 1, checkpoint, {}, {}, "none", timeout=90)
    done = run_ranks(
        generate_every_setting, world, checkpoint, parallel, scheduler, policy, timeout=90
    )[0]
    assert [len(item.choices) for item in done] == [n % 3 + 1 for n in range(len(PROMPTS))]
    for item, other in zip(done, alone, strict=True):
        assert_same(item.choices, other.choices)
        for one, two in zip(item.choices, other.choices, strict=True):
            assert [[t for t, _ in top] for top in one.top_logprobs or ()] == [
                [t for t, _ in top] for top in two.top_logprobs or ()
            ]
            assert (one.finish_reason, one.stop_reason) == (two.finish_reason, two.stop_reason)
    several = [item for item in alone if item.others]
    assert all(a.token_ids != b.token_ids for a, b in [item.choices[:2] for item in several])


def test_the_first_of_several_choices_is_the_completion_of_one(checkpoint):
    one = SamplingParams(max_new_tokens=6, temperature=1.0, logprobs=True)
    first, _ = run(checkpoint, params=one)
    several, _ = run(checkpoint, params=replace(one, n=3))
    assert [item.token_ids for item in several] == [item.token_ids for item in first]
    assert all(len({tuple(c.token_ids) for c in item.choices}) > 1 for item in several)
