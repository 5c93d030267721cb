"""A model whose layers choose unequal numbers of experts, whole jobs on 1 to 3 ranks.

Run: pytest tests/distributed/test_unequal_top_k.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import (
    CapacityConfig,
    Config,
    DispatchConfig,
    ModelConfig,
    MoEConfig,
    OverlapConfig,
    ProfilerConfig,
    SchedulerConfig,
)
from engine.llm import LLM
from engine.models import model_types
from engine.models.spec import ModelSpec, SparseSpec
from engine.profiling.routing.trace import read_trace
from engine.reporting import open_exporters
from engine.request import SamplingParams
from tests.helpers.ranks import run_ranks

CHECKPOINT = Path(__file__).parents[2] / "configs/checkpoints/tiny_mixtral"
PROMPTS = [list(range(5, 5 + length)) for length in (9, 21, 4, 13, 2)]
NEW = 4
TOP_K = (1, 3, 2, 4)  # of the layers, in turn


def with_unequal_top_k(spec: ModelSpec) -> ModelSpec:
    layers = []
    for number, layer in enumerate(spec.layers):
        assert isinstance(layer.mlp, SparseSpec)
        moe = layer.mlp.moe
        router = replace(moe.router, top_k=TOP_K[number % len(TOP_K)])
        layers.append(replace(layer, mlp=replace(layer.mlp, moe=replace(moe, router=router))))
    return replace(spec, layers=tuple(layers))


def run(rank: int, folder: Path, moe: MoEConfig) -> dict[str, Any]:
    open_exporters.CLAIMS_EVERY = 1
    families = model_types.FAMILIES
    family = families["mixtral"]
    with pytest.MonkeyPatch.context() as patch:
        changed = lambda hf_config: with_unequal_top_k(family(hf_config))  # noqa: E731
        patch.setitem(families, "mixtral", changed)
        llm = LLM(
            Config(
                model=ModelConfig(path=str(CHECKPOINT), max_model_len=64),
                scheduler=SchedulerConfig(kv_cache_blocks=128, block_size=4, prefix_cache=False),
                moe=moe,
                profiler=ProfilerConfig(routing=str(folder), routing_claims=True),
            )
        )
    done = llm.generate(PROMPTS, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    assert llm.report is not None
    report = llm.report
    growths = llm.model.row_buffers.num_growths
    llm.close()
    return {
        "tokens": [completion.token_ids for completion in done],
        "loads": [sum(layer.expert_loads) for layer in report.layers],
        "growths": growths,
    }


def check_claims(folder: Path) -> None:
    """A layer's recorded claims have its own number of columns, and are its loads."""
    trace = read_trace(folder)
    assert trace.top_k == max(TOP_K[: len(trace.layers)])
    for claims, loads_LE in zip(trace.claims(), trace.loads_SLE, strict=True):
        for layer, loads_E in zip(trace.layers, loads_LE, strict=True):
            ids_TK = claims.layers[layer].topk_ids_TK
            if len(ids_TK):
                assert ids_TK.shape[1] == TOP_K[layer % len(TOP_K)]
            rows_E = np.bincount(ids_TK.ravel(), minlength=trace.num_experts)
            assert rows_E.tolist() == loads_E.tolist()


@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(),
        MoEConfig(overlap=OverlapConfig(chunks=2), dispatch=DispatchConfig(deduplicate=True)),
        MoEConfig(capacity=CapacityConfig(policy="token_drop", factor="1")),
        MoEConfig(capacity=CapacityConfig(policy="token_drop", factor="1", scope="rank")),
    ],
    ids=["dropless", "chunks", "token_drop", "token_drop by rank"],
)
def test_jobs_and_traces_do_not_depend_on_the_ranks(tmp_path: Path, moe: MoEConfig) -> None:
    alone = run_ranks(run, 1, tmp_path / "1", moe)[0]
    assert alone["tokens"] and len(set(alone["loads"])) > 1
    check_claims(tmp_path / "1")
    for ranks in (2, 3):
        results = run_ranks(run, ranks, tmp_path / str(ranks), moe, timeout=90)
        for result in results:
            if moe.capacity.policy == "none":
                assert result["tokens"] == alone["tokens"]
                assert result["loads"] == alone["loads"]
            else:
                assert result["growths"] == 0, "the reserved buffers hold every layer"
        check_claims(tmp_path / str(ranks))
