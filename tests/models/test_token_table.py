"""Layers whose experts come from a table of token ids, in a whole model, against transformers.

The model is a Mixtral whose routers are DeepSeek-V4's: in the first and last layer its router with
a table, which is given the token ids, in the others its router by scores.

    python -m pytest tests/models/test_token_table.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter

from engine.config import Config, ModelConfig, MoEConfig, OverlapConfig, SchedulerConfig
from engine.distributed import bootstrap
from engine.llm import LLM
from engine.models import model_types, registry
from engine.models.spec import ModelSpec, SparseSpec
from engine.moe.dispatch import chunk_layout
from engine.request import SamplingParams
from engine.weights.loader import CheckpointError
from tests.helpers.layer_cases import table_of
from tests.helpers.model_harness import (
    chunked,
    load_model,
    make_config,
    one_by_one,
    run_schedule,
    whole,
)
from tests.helpers.ranks import run_ranks
from tools.make_random_checkpoint import make_checkpoint

VOCAB, EXPERTS, TOP_K, LAYERS, SCALE = 61, 6, 2, 3, 1.5
BY_TABLE = (0, LAYERS - 1)
LENGTHS = (9, 1, 14, 5)
NEW = 4
SCHEDULES = {"whole": whole, "chunked": chunked, "one by one": one_by_one}


def name_of(layer: int) -> str:
    return f"model.layers.{layer}.block_sparse_moe.gate.tid2eid"


def with_tables(spec: ModelSpec) -> ModelSpec:
    layers = list(spec.layers)
    for number in BY_TABLE:
        mlp = layers[number].mlp
        assert isinstance(mlp, SparseSpec)
        router = replace(
            mlp.moe.router,
            score="sqrt_softplus",
            normalize_eps=1e-20,
            scale=SCALE,
            token_table=spec.vocab_size,
        )
        moe = replace(mlp.moe, router=router)
        layers[number] = replace(layers[number], mlp=replace(mlp, moe=moe))
    return replace(spec, layers=tuple(layers))


def patch_family(patch: pytest.MonkeyPatch) -> None:
    family = model_types.FAMILIES["mixtral"]
    patch.setitem(model_types.FAMILIES, "mixtral", lambda config: with_tables(family(config)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tables")
    sizes = {"vocab_size": VOCAB, "num_local_experts": EXPERTS, "num_hidden_layers": LAYERS}
    make_checkpoint("mixtral", path, overrides={**sizes, "num_experts_per_tok": TOP_K})
    add_tables(path, [table_of(VOCAB, EXPERTS, TOP_K).roll(n, 0) for n in BY_TABLE])
    return path


def add_tables(path: Path, tables: list[torch.Tensor]) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors |= {name_of(n): table for n, table in zip(BY_TABLE, tables, strict=True)}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Prompts with their greedy continuations, and transformers' logits of all their tokens."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tensors, ids = load_file(checkpoint / "model.safetensors"), []
    config = DeepseekV4Config(
        num_local_experts=EXPERTS,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        hidden_size=model.config.hidden_size,
        vocab_size=VOCAB,
        scoring_func="sqrtsoftplus",
        routed_scaling_factor=SCALE,
    )
    for number in BY_TABLE:
        router = DeepseekV4HashRouter(config)
        router.weight = model.model.layers[number].mlp.gate.weight
        router.tid2eid = tensors[name_of(number)]
        by_hidden = router.forward
        router.forward = lambda hidden, by_hidden=by_hidden: by_hidden(hidden, ids[-1])
        model.model.layers[number].mlp.gate = router
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: ids.append(args[0]))
    sequences, logits = [], []
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for length in LENGTHS:
            tokens = torch.randint(VOCAB, (length,), generator=generator).tolist()
            for _ in range(NEW):
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            sequences.append(tokens)
            logits.append(model(torch.tensor([tokens])).logits[0])
    return sequences, logits


def run(
    rank: int, path: Path, sequences: list[list[int]], parallel: dict[str, int]
) -> dict[tuple, dict[int, torch.Tensor]]:
    """Logits of this rank's sequences by schedule, of all tokens and of the last ones alone."""
    config = make_config(path, **parallel)
    topology = bootstrap.start(config)
    with pytest.MonkeyPatch.context() as patch:
        patch_family(patch)
        model = load_model(config, topology)
    lengths = [len(tokens) for tokens in sequences]
    found = {
        (name, last): run_schedule(model, topology, sequences, schedule(lengths), last)
        for name, schedule in SCHEDULES.items()
        for last in (None, NEW + 1)
    }
    bootstrap.stop(topology)
    return found


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(1, {}), pytest.param(2, {"tensor": 2}, marks=pytest.mark.long), (3, {})],
    ids=["1", "2 as a tensor group", "3"],
)
def test_logits_are_those_of_transformers_routers(checkpoint, reference, ranks, parallel):
    sequences, logits = reference
    results = run_ranks(run, ranks, checkpoint, sequences, parallel)
    for name, last in results[0]:
        of_all = {s: rows for each in results for s, rows in each[name, last].items()}
        assert sorted(of_all) == list(range(len(sequences)))
        for s, expected in enumerate(logits):
            scale = expected.abs().max()
            rows = of_all[s]
            assert len(rows) == (len(expected) if last is None else min(last, len(expected)))
            assert (rows - expected[-len(rows) :]).abs().max() < 2e-5 * scale


def generate(rank: int, path: Path, prompts: list[list[int]]) -> tuple[list[list[int]], int]:
    """Greedy tokens of a job whose steps run as two micro-batches, and how many do."""
    num_steps = 0
    with pytest.MonkeyPatch.context() as patch:
        patch_family(patch)
        patch.setattr(chunk_layout, "MIN_CHUNK_ROWS", 1)  # no step is too small
        llm = LLM(
            Config(
                model=ModelConfig(path=str(path), max_model_len=64),
                scheduler=SchedulerConfig(kv_cache_blocks=128, block_size=4, max_batch_tokens=24),
                moe=MoEConfig(overlap=OverlapConfig(two_batch=True)),
            )
        )
        forward = llm.model.forward_two_batch

        def count(*arguments) -> torch.Tensor:
            nonlocal num_steps
            num_steps += 1
            return forward(*arguments)

        patch.setattr(llm.model, "forward_two_batch", count)
        done = llm.generate(prompts, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
        llm.close()
    return [each.token_ids for each in done], num_steps


def test_a_job_in_two_micro_batches_gets_the_greedy_tokens_of_transformers(checkpoint, reference):
    sequences, _ = reference
    prompts = [tokens[:-NEW] for tokens in sequences]
    for tokens, num_steps in run_ranks(generate, 2, checkpoint, prompts, timeout=90):
        assert tokens == [each[-NEW:] for each in sequences]
        assert num_steps >= NEW


def refused(rank: int, path: Path) -> str:
    config = make_config(path)
    topology = bootstrap.start(config)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError) as error:
        patch_family(patch)
        load_model(config, topology)
    bootstrap.stop(topology)
    return str(error.value)


def test_a_table_that_names_an_expert_too_many_stops_every_rank(checkpoint, tmp_path):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    table = table_of(VOCAB, EXPERTS, TOP_K)
    wrong = table.clone()
    wrong[17, 1] = EXPERTS
    add_tables(tmp_path, [table, wrong])
    for text in run_ranks(refused, 2, tmp_path):
        assert f"{name_of(LAYERS - 1)} in " in text
        assert f"row 17 holds {EXPERTS}, which must be from 0 to {EXPERTS - 1}" in text


def test_a_vocabulary_larger_than_a_table_is_refused(checkpoint):
    with pytest.MonkeyPatch.context() as patch:
        patch_family(patch)
        spec = registry.read_spec(registry.read_config(checkpoint))
    with pytest.raises(ValueError, match="vocab_size: 62 exceeds the 61 rows of layer 0's table"):
        replace(spec, vocab_size=VOCAB + 1)
