"""Every family against transformers: the same checkpoint, the same logits, the same greedy tokens.

Float32 on CPU, ragged prompts in one flattened batch, on one rank and on several. The checkpoints
are tiny and random (`model_cases.py`), written by transformers itself.

    python -m pytest tests/models
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.distributed import bootstrap
from engine.distributed.groups import Topology
from engine.models.decoder import CausalLM
from engine.weights.safetensors_header import read_catalog
from tests.helpers.model_cases import CASES, NEW_TOKENS, SHARDED_CASES, Reference, make_reference
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

SCHEDULES = {"whole": whole, "chunked": chunked, "one by one": one_by_one}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def reference(name: str) -> Reference:
        return make_reference(CASES[name], tmp_path_factory.mktemp("checkpoint"))

    return reference


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Topology]:
    topology = bootstrap.start(make_config(Path("unused")), {})
    yield topology
    bootstrap.stop(topology)


@pytest.fixture(scope="module")
def models(references, one_rank):
    @cache
    def model(name: str) -> CausalLM:
        return load_model(make_config(references(name).path), one_rank)

    return model


def check(reference: Reference, logits: dict[int, torch.Tensor]) -> None:
    """Same logits within 2e-5 of their scale, of all tokens or of the last ones alone, and they
    choose the reference's continuation.
    """
    assert sorted(logits) == list(range(len(reference.sequences)))
    for s, expected in enumerate(reference.logits):
        scale = expected.abs().max()
        assert len(logits[s]) in (len(expected), NEW_TOKENS)
        expected = expected[-len(logits[s]) :]
        difference = (logits[s] - expected).abs().max()
        assert difference < 2e-5 * scale, f"sequence {s}: off by {difference / scale:.1e} of scale"
        chosen = logits[s][-NEW_TOKENS:].argmax(-1).tolist()
        assert chosen == reference.sequences[s][-NEW_TOKENS:]


def inputs(reference: Reference) -> list[list[int]]:
    """The sequences without their last token, which has no reference logits."""
    return [tokens[:-1] for tokens in reference.sequences]


@pytest.mark.parametrize("read", [None, NEW_TOKENS], ids=["all read", "last read"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", CASES)
def test_one_rank_gives_the_logits_and_tokens_of_transformers(
    case, schedule, read, references, models, one_rank
):
    reference = references(case)
    sequences = inputs(reference)
    steps = SCHEDULES[schedule]([len(tokens) for tokens in sequences])
    check(reference, run_schedule(models(case), one_rank, sequences, steps, read))


def check_ranks(reference: Reference, world: int, **parallel: int) -> None:
    sequences = inputs(reference)
    lengths = [len(tokens) for tokens in sequences]
    schedules = {name: make(lengths) for name, make in SCHEDULES.items()}
    found = run_ranks(
        logits_on_this_rank, world, reference.path, sequences, schedules, parallel, NEW_TOKENS
    )
    tensor = parallel.get("tensor", 1)
    for name in found[0]:
        together: dict[int, torch.Tensor] = {}
        for rank in range(0, world, tensor):
            for peer in range(rank + 1, rank + tensor):
                for s, logits in found[rank][name].items():
                    assert torch.equal(logits, found[peer][name][s])
            together |= found[rank][name]
        check(reference, together)


# Of two cases of one family, one runs in `make test-long`.
LONG = ("llama4", "qwen3-next", "qwen3-5-moe-one-kv-head-5-experts-tied")
SHARDED = [
    pytest.param(case, marks=pytest.mark.long) if case in LONG else case for case in SHARDED_CASES
]


@pytest.mark.parametrize("case", SHARDED)
def test_two_expert_parallel_ranks_agree_with_transformers(case, references):
    check_ranks(references(case), 2)


@pytest.mark.parametrize("case", SHARDED)
def test_two_tensor_parallel_ranks_agree_with_transformers(case, references):
    check_ranks(references(case), 2, tensor=2)


def test_three_ranks_share_five_experts(references):
    check_ranks(references("mixtral-5-experts-top-1"), 3)


THREE = ("glm4-moe", "minimax-m2", "qwen3-next")
THREE_LONG = ("ernie4-5-moe", "llama4", "longcat-flash")


@pytest.mark.parametrize(
    "case", [*THREE, *(pytest.param(case, marks=pytest.mark.long) for case in THREE_LONG)]
)
def test_three_expert_parallel_ranks_agree_with_transformers(case, references):
    check_ranks(references(case), 3)


def test_key_value_heads_are_replicated_over_four_tensor_ranks(references):
    check_ranks(references("olmoe-clip-bias-normalised-top-k-all"), 4, tensor=4)


def test_tensor_and_data_parallel_attention_combine(references):
    check_ranks(references("qwen2-moe"), 4, tensor=2)


def test_two_replicas_of_the_model_agree_with_transformers(references):
    check_ranks(references("mixtral"), 2, expert=1)


def test_more_ranks_than_sequences_leaves_some_with_nothing_to_do(references):
    reference = references("deepseek-v2-lite")
    alone = Reference(reference.path, reference.sequences[:1], reference.logits[:1])
    check_ranks(alone, 2)


@pytest.mark.parametrize("case", ["mixtral", "qwen2-moe", "qwen3-5-moe"])
def test_experts_stacked_in_two_tensors_load_as_well(case, tmp_path):
    reference = make_reference(CASES[case], tmp_path, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in read_catalog(tmp_path).entries
    check_ranks(reference, 2)


def test_a_kimi_k2_checkpoint_is_run_as_deepseek_v3_without_its_code(references, tmp_path):
    reference = references("deepseek-v3")
    shutil.copytree(reference.path, tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "config.json").read_text())
    values["model_type"] = "kimi_k2"
    values["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    check_ranks(Reference(tmp_path, reference.sequences, reference.logits), 2)


def test_multi_token_prediction_layers_are_left_unread(references, one_rank, tmp_path):
    reference = references("deepseek-v3")
    shutil.copytree(reference.path, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.2.eh_proj.weight"] = torch.full((32, 64), float("nan"))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load_model(make_config(tmp_path), one_rank)
    sequences = inputs(reference)
    steps = whole([len(tokens) for tokens in sequences])
    check(reference, run_schedule(model, one_rank, sequences, steps))
