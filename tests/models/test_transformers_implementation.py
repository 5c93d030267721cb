"""Models that transformers builds (model.implementation), on this engine's cache and dispatch.

The same checkpoint gives the same logits and tokens as transformers alone: on one rank and on two,
in chunks, one token at a time, and through the scheduler with preemptions and a capacity policy.

    python -m pytest tests/models/test_transformers_implementation.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.config import (
    CapacityConfig,
    Config,
    ModelConfig,
    MoEConfig,
    OverlapConfig,
    RuntimeConfig,
    SchedulerConfig,
)
from engine.distributed import bootstrap
from engine.distributed.groups import Topology
from engine.llm import LLM
from engine.models.registry import build_model, read_config
from engine.models.transformers_model.model import TransformersModel
from engine.request import SamplingParams
from tests.helpers.model_cases import CASES, NEW_TOKENS, Reference, make_reference
from tests.helpers.model_harness import (
    chunked,
    load_model,
    logits_on_this_rank,
    make_config,
    one_by_one,
    run_schedule,
    whole,
)
from tests.helpers.ranks import run_ranks
from tests.helpers.transformers_cases import FOREIGN_CASES
from tests.models.test_parity import check, inputs

SCHEDULES = {"whole": whole, "chunked": chunked, "one by one": one_by_one}
OWN = ("mixtral", "glm4-moe", "qwen2-moe", "gpt-oss")  # families here as well
ALL = {**{name: CASES[name] for name in OWN}, **FOREIGN_CASES}
# One of each kind of layer; the others run in `make test-long`.
FAST = {
    "mixtral",
    "gpt-oss",
    "granitemoe",
    "phimoe",
    "phimoe-longrope",
    "exaone-moe",
    "mistral4",
    "mimo-v2-flash",
    "laguna",
}
assert FAST <= ALL.keys()
PROMPTS = [list(range(5 + n, 11 + 4 * n)) for n in range(5)]
NEW = 12


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def reference(name: str) -> Reference:
        return make_reference(ALL[name], tmp_path_factory.mktemp("checkpoint"))

    return reference


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Topology]:
    topology = bootstrap.start(make_config(Path("unused")), {})
    yield topology
    bootstrap.stop(topology)


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.long) for case in ALL]
)
def test_one_rank_gives_the_logits_and_tokens_of_transformers(
    case: str, references: Any, one_rank: Topology
) -> None:
    reference = references(case)
    model = load_model(make_config(reference.path, implementation="transformers"), one_rank)
    assert isinstance(model, TransformersModel)
    sequences = inputs(reference)
    lengths = [len(tokens) for tokens in sequences]
    for make in SCHEDULES.values():
        for read in (None, NEW_TOKENS):
            check(reference, run_schedule(model, one_rank, sequences, make(lengths), read))


def test_auto_takes_our_own_family_where_there_is_one(references: Any, one_rank: Topology) -> None:
    kinds = [
        isinstance(load_model(make_config(references(name).path), one_rank), TransformersModel)
        for name in ("mixtral", "granitemoe")
    ]
    assert kinds == [False, True]


@pytest.mark.parametrize("case", ALL)
@pytest.mark.long
def test_two_ranks_agree_with_transformers(case: str, references: Any) -> None:
    check_two_ranks(references(case))


def test_two_ranks_agree_with_transformers_on_five_experts(references: Any) -> None:
    check_two_ranks(references("granitemoe"))


def check_two_ranks(reference: Reference) -> None:
    sequences = inputs(reference)
    lengths = [len(tokens) for tokens in sequences]
    schedules = {name: make(lengths) for name, make in SCHEDULES.items()}
    found = run_ranks(
        logits_on_this_rank,
        2,
        reference.path,
        sequences,
        schedules,
        {},
        NEW_TOKENS,
        torch.float32,
        "dequantize",
        "transformers",
    )
    for name in found[0]:
        check(reference, found[0][name] | found[1][name])


def job(
    rank: int,
    path: Path,
    blocks: int,
    capacity: dict[str, Any],
    implementation: Any,
    step_tokens: int = 16,
    prompts: list[list[int]] = PROMPTS,
) -> dict[str, Any]:
    config = Config(
        model=ModelConfig(
            path=str(path), max_model_len=48, dtype="float32", implementation=implementation
        ),
        scheduler=SchedulerConfig(
            kv_cache_blocks=blocks, block_size=4, max_batch_tokens=step_tokens, prefix_cache=False
        ),
        moe=MoEConfig(capacity=CapacityConfig(**capacity)),
        runtime=RuntimeConfig(device="cpu", threads=1),
    )
    llm = LLM(config)
    done = llm.generate(prompts, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    found = {
        "tokens": [item.token_ids for item in done],
        "preemptions": llm.report.ranks[rank].preemptions if llm.report else 0,
        "assignments": [item.capacity.assignments for item in done],
        "dropped": sum(item.capacity.dropped for item in done),
        "ranked by": llm.report.ranked_by if llm.report else None,
    }
    llm.close()
    return found


def greedy(path: Path) -> list[list[int]]:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    found = []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        out = model.generate(tokens, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        found.append(out[0, len(prompt) :].tolist())
    return found


def test_a_job_gives_transformers_tokens_with_chunked_prefill_and_preemptions(
    references: Any,
) -> None:
    path = references("exaone-moe").path
    (calm,) = run_ranks(job, 1, path, 96, {}, "auto", timeout=120)
    (tight,) = run_ranks(job, 1, path, 12, {}, "auto", timeout=120)
    assert tight["preemptions"] > 0 == calm["preemptions"]
    assert calm["tokens"] == tight["tokens"] == greedy(path)
    # One of two layers is sparse, and it is the last: all tokens but the newest run in it.
    assert calm["assignments"] == [2 * (len(prompt) + NEW - 1) for prompt in PROMPTS]
    assert tight["assignments"] == calm["assignments"]


@pytest.mark.long
def test_token_drop_keeps_the_same_on_one_rank_and_two(references: Any) -> None:
    path = references("solar-open").path
    capacity = {"policy": "token_drop", "factor": "0.5", "phases": ("prefill", "decode")}
    # Every prompt runs in the first step, whether one rank has them all or two share them.
    one, two = (
        run_ranks(job, ranks, path, 96, capacity, "auto", 256, timeout=120) for ranks in (1, 2)
    )
    assert one[0]["dropped"] > 0 and one[0]["tokens"] != greedy(path)
    assert [found["ranked by"] for found in (*one, *two)] == ["scores"] * 3
    assert two[0]["tokens"] == two[1]["tokens"] == one[0]["tokens"]


def test_mixtral_is_the_same_model_in_both_implementations(references: Any) -> None:
    path = references("mixtral").path
    (ours,) = run_ranks(job, 1, path, 96, {}, "lockstep", timeout=120)
    (theirs,) = run_ranks(job, 1, path, 96, {}, "transformers", timeout=120)
    assert ours["tokens"] == theirs["tokens"]


REFUSED = {
    "a recurrent state": ("GraniteMoeHybrid", {"num_local_experts": 4}, "layer_types|layers"),
    "a dense model": ("Llama", {}, "no experts"),
    "an encoder": ("SwitchTransformers", {}, "causal language model|encoder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_by_name_before_weights_are_read(
    case: str, tmp_path: Path
) -> None:
    family, settings, said = REFUSED[case]
    getattr(transformers, f"{family}Config")(**settings).save_pretrained(tmp_path)
    model_type = json.loads((tmp_path / "config.json").read_text())["model_type"]
    with pytest.raises(ValueError, match=said) as caught:
        read_config(tmp_path)
    assert f"model_type = {model_type!r}, which this engine cannot run" in str(caught.value)


@pytest.mark.parametrize(
    ("moe", "said"),
    [
        (MoEConfig(overlap=OverlapConfig(two_batch=True)), "moe.overlap.two_batch = True"),
    ],
    ids=["two-batch"],
)
def test_settings_that_transformers_modules_do_not_honour_are_refused(
    moe: MoEConfig, said: str, references: Any, one_rank: Topology
) -> None:
    path = references("granitemoe").path
    config = Config(model=ModelConfig(path=str(path)), moe=moe)
    with pytest.raises(ValueError, match=said):
        build_model(read_config(path), config, one_rank, one_rank.device, torch.float32)


def test_our_own_families_alone_run_where_that_is_asked_for(references: Any) -> None:
    with pytest.raises(ValueError, match=r"model_type = 'granitemoe', which this engine cannot"):
        read_config(references("granitemoe").path, "lockstep")
