"""LongCat-Flash: checkpoints without weights of zero experts, and a job under capacity.

`test_parity.py` compares its logits and tokens with transformers.

    python -m pytest tests/models/test_longcat_flash.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import (
    CapacityConfig,
    Config,
    ModelConfig,
    MoEConfig,
    RuntimeConfig,
    SchedulerConfig,
)
from engine.distributed import bootstrap
from engine.distributed.groups import Topology
from engine.llm import LLM
from engine.models.registry import read_spec
from engine.models.spec import DenseSpec, SparseSpec
from engine.request import SamplingParams
from tests.helpers.model_cases import CASES, Reference, make_reference
from tests.helpers.model_harness import load_model, make_config, run_schedule, whole
from tests.helpers.ranks import run_ranks

CASE = CASES["longcat-flash"]
PROMPTS = [list(range(5 + n, 11 + 4 * n)) for n in range(6)]
NEW = 3


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(CASE, tmp_path_factory.mktemp("longcat"))


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Topology]:
    topology = bootstrap.start(make_config(Path("unused")), {})
    yield topology
    bootstrap.stop(topology)


def test_a_layer_is_two_of_which_the_first_has_the_experts_beside_its_mlp() -> None:
    spec = read_spec(CASE.config())
    assert len(spec.layers) == 4
    for first, second in zip(spec.layers[::2], spec.layers[1::2], strict=True):
        assert isinstance(first.mlp, SparseSpec) and first.parallel_dense == second.mlp
        assert isinstance(second.mlp, DenseSpec) and second.parallel_dense is None


def logits_of(path: Path, reference: Reference, topology: Topology) -> list[torch.Tensor]:
    sequences = [tokens[:-1] for tokens in reference.sequences]
    model = load_model(make_config(path), topology)
    found = run_schedule(model, topology, sequences, whole([len(each) for each in sequences]))
    return [found[index] for index in range(len(sequences))]


def test_a_published_checkpoint_has_no_weights_of_zero_experts_but_multi_token_heads(
    reference: Reference, one_rank: Topology, tmp_path: Path
) -> None:
    path = tmp_path / "published"
    shutil.copytree(reference.path, path)
    tensors = load_file(path / "model.safetensors")
    zero = [name for name in tensors if ".experts." in name and int(name.split(".")[5]) >= 6]
    assert zero, "transformers has saved some"
    kept = {name: tensor for name, tensor in tensors.items() if name not in zero}
    kept["model.mtp.layers.0.eh_proj.weight"] = torch.zeros(2, 2)
    save_file(kept, path / "model.safetensors", {"format": "pt"})
    published, saved = (logits_of(each, reference, one_rank) for each in (path, reference.path))
    for mine, other in zip(published, saved, strict=True):
        assert torch.equal(mine, other)


def generate(rank: int, path: Path, capacity: dict[str, Any]) -> dict[str, Any]:
    config = Config(
        model=ModelConfig(path=str(path), max_model_len=48, dtype="float32"),
        scheduler=SchedulerConfig(
            kv_cache_blocks=96, block_size=4, max_batch_tokens=512, prefix_cache=False
        ),
        moe=MoEConfig(capacity=CapacityConfig(**capacity)),
        runtime=RuntimeConfig(device="cpu", threads=1),
    )
    llm = LLM(config)
    log = llm.record_decisions()
    done = llm.generate(PROMPTS, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    layers = [asdict(layer) for layer in llm.report.layers] if rank == 0 else []
    llm.close()
    kept = {
        (entry.layer, int(entry.request_T[t]), int(entry.position_T[t])): (
            entry.topk_ids_TK[t].tolist(),
            entry.keep_TK[t].tolist(),
        )
        for entry in log
        for t in range(len(entry.request_T))
    }
    return {"tokens": [item.token_ids for item in done], "kept": kept, "layers": layers}


def test_a_job_under_capacity_keeps_the_same_on_1_to_3_ranks_and_counts_zero_experts_apart(
    reference: Reference,
) -> None:
    capacity = {"policy": "token_drop", "factor": "0.5", "phases": ("prefill", "decode")}
    config = json.loads((reference.path / "config.json").read_text())
    found = {}
    for world in (1, 2, 3):
        results = run_ranks(generate, world, reference.path, capacity, timeout=120)
        kept: dict[Any, Any] = {}
        for result in results:
            kept |= result["kept"]
            assert result["tokens"] == results[0]["tokens"]
        found[world] = (results[0]["tokens"], kept)
        layers = results[0]["layers"]
        assert [layer["layer"] for layer in layers] == [0, 2]
        for layer in layers:
            of_layer = [each for (index, *_), each in kept.items() if index == layer["layer"]]
            zero = sum(ids.count(-1) for ids, _ in of_layer)
            lost = sum(keep.count(False) for _, keep in of_layer)
            assert layer["zero_assignments"] == zero > 0
            assert layer["assignments"] == len(of_layer) * config["moe_topk"] - zero
            assert layer["assignments"] == sum(layer["expert_loads"])
            assert layer["dropped"] == lost > 0
            assert all(k for ids, keep in of_layer for i, k in zip(ids, keep, strict=True) if i < 0)
    assert found[1] == found[2] == found[3]
