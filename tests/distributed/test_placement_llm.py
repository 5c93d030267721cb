"""Placement files through the whole engine: tokens, records and what is refused.

Run: pytest tests/distributed/test_placement_llm.py
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import (
    CapacityConfig,
    Config,
    CopiesConfig,
    ModelConfig,
    MoEConfig,
    OverlapConfig,
    SchedulerConfig,
)
from engine.llm import LLM
from engine.models.placement import plan_for_ranks
from engine.moe.placement.placement import LayerPlacement, Placement, PlannedLoads
from engine.moe.placement.placement_file import write_placement
from engine.request import SamplingParams
from tests.helpers.ranks import RanksFailed, run_ranks
from tools.make_random_checkpoint import make_checkpoint

PROMPTS = [
    [random.Random(seed).randrange(90) for _ in range(length)]
    for seed, length in enumerate([15, 37, 9, 30, 8, 12, 33, 21])
]
EXPERTS = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("olmoe")
    make_checkpoint("olmoe", path, overrides={"vocab_size": 97, "num_experts": EXPERTS})
    return path


def placement(precision: str = "model", copies: bool = True) -> Placement:
    held = ((1,), (0,), (), (1,), (), ()) if copies else ((),) * EXPERTS
    layer = LayerPlacement((0, 1, 1, 0, 1, 0), held)
    return Placement(2, EXPERTS, {1: layer}, precision)  # pyright: ignore[reportArgumentType]


def generate(rank: int, path: Path, file: str, moe: dict[str, Any]) -> dict[str, Any]:
    config = Config(
        model=ModelConfig(path=str(path), max_model_len=64),
        scheduler=SchedulerConfig(kv_cache_blocks=128, block_size=4),
        moe=MoEConfig(placement=file, **moe),
    )
    llm = LLM(config)
    done = llm.generate(PROMPTS, SamplingParams(max_new_tokens=4, ignore_eos=True))
    report = llm.report
    assert report is not None
    llm.close()
    return {
        "tokens": [item.token_ids for item in done],
        "records": [item.record() for item in done],
        "layers": report.layers,
        "rows": [each.expert_rows for each in report.ranks],
    }


def run(path: Path, file: Path | str, **moe: Any) -> dict[str, Any]:
    results = run_ranks(generate, 2, path, str(file), moe, timeout=120)
    assert results[0]["tokens"] == results[1]["tokens"]
    return results[0]


def test_copies_in_the_models_precision_change_no_token_and_level_the_ranks(checkpoint, tmp_path):
    plain = run(checkpoint, "contiguous")
    for name, copies in (("homes.yaml", False), ("copies.json", True)):
        write_placement(placement(copies=copies), tmp_path / name)
        placed = run(checkpoint, tmp_path / name)
        assert placed["tokens"] == plain["tokens"]
        assert [each.expert_loads for each in placed["layers"]] == [
            each.expert_loads for each in plain["layers"]
        ]
        assert [each.expert_loads_after for each in placed["layers"]] == [
            each.expert_loads_after for each in plain["layers"]
        ]
        assert "copied" not in placed["records"][0]["capacity"]
    assert (
        placed["layers"][1].rank_max_over_mean_after < plain["layers"][1].rank_max_over_mean_after
    )
    two_batch = run(checkpoint, tmp_path / name, overlap=OverlapConfig(two_batch=True))
    assert two_batch["tokens"] == plain["tokens"]


def test_records_say_how_many_rows_low_bit_copies_computed(checkpoint, tmp_path):
    write_placement(placement("int4"), tmp_path / "p.yaml")
    every = run(checkpoint, tmp_path / "p.yaml", copies=CopiesConfig(target=1.0))
    copied = [record["capacity"]["copied"] for record in every["records"]]
    assert sum(copied) > 0
    assert all(record["capacity"]["dropped"] == 0 for record in every["records"])
    never = run(checkpoint, tmp_path / "p.yaml", copies=CopiesConfig(target=0.01))
    assert [record["capacity"]["copied"] for record in never["records"]] == [0] * len(PROMPTS)
    assert never["tokens"] == run(checkpoint, "contiguous")["tokens"]
    decode = CopiesConfig(target=1.0, phases=("decode",))
    fewer = run(checkpoint, tmp_path / "p.yaml", copies=decode)
    assert sum(r["capacity"]["copied"] for r in fewer["records"]) < sum(copied)
    capacity = CapacityConfig(policy="token_drop", scope="rank", factor="1.0")
    dropped = run(checkpoint, tmp_path / "p.yaml", capacity=capacity)
    assert sum(record["capacity"]["dropped"] for record in dropped["records"]) > 0


WRONG = {
    "another number of experts": (
        replace(placement(), num_experts=EXPERTS + 1, layers={}),
        "is for 7 experts and the model has 6",
    ),
    "a layer that is not there": (
        replace(placement(), layers={9: placement().layers[1]}),
        "layer 9 is no MoE layer",
    ),
    "another model": (replace(placement(), fingerprint="0123"), "made for another model"),
    "more ranks": (replace(placement(), num_ranks=4, layers={}), "holds no loads to plan again"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_does_not_fit_is_refused_on_all_ranks(case, checkpoint, tmp_path):
    wrong, text = WRONG[case]
    write_placement(wrong, tmp_path / "wrong.yaml")
    with pytest.raises(RanksFailed) as failed:
        run(checkpoint, tmp_path / "wrong.yaml")
    assert str(failed.value).count(text) >= 2
    assert "moe.placement" in str(failed.value)


def test_a_file_for_more_ranks_is_planned_again_from_its_loads(checkpoint, tmp_path):
    """As an elastic restart on fewer ranks meets it: the same tokens, no rank without experts."""
    rows = (90, 10, 12, 14, 9, 8)
    domain = PlannedLoads(0.9, {0: 0.9, 1: 0.9}, {0: rows, 1: rows})
    layer = LayerPlacement((0, 1, 2, 2, 1, 0), ((1, 2), (), (), (0,), (), ()))
    for_three = Placement(3, EXPERTS, {0: layer, 1: layer}, domains={"text": domain})
    write_placement(for_three, tmp_path / "three.yaml")
    placed = run(checkpoint, tmp_path / "three.yaml")
    assert placed["tokens"] == run(checkpoint, "contiguous")["tokens"]
    again = plan_for_ranks(for_three, {"text": {0: np.array([rows]), 1: np.array([rows])}}, 2)
    assert again.num_ranks == 2
    assert [again.layer(index).num_copies for index in (0, 1)] == [2, 2]
    assert all(len(again.layer(index).hosts(0)) == 2 for index in (0, 1))
    assert again.domains["text"].share > 0.95
    alone = plan_for_ranks(for_three, {"text": {0: np.array([rows]), 1: np.array([rows])}}, 1)
    assert alone.num_copies == 0


def test_a_file_that_is_missing_or_no_placement_is_refused(checkpoint, tmp_path):
    with pytest.raises(RanksFailed, match="no such file"):
        run(checkpoint, tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(RanksFailed, match="must be lockstep-placement-1"):
        run(checkpoint, tmp_path / "list.yaml")
