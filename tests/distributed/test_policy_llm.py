"""Policy files through the whole engine: equal layers, layers that differ, and what is refused.

Run: pytest tests/distributed/test_policy_llm.py
"""

from __future__ import annotations

import os
import random
from dataclasses import asdict, replace
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
    ParallelConfig,
    SchedulerConfig,
)
from engine.distributed.groups import expert_range
from engine.llm import LLM
from engine.moe.placement import placement_file
from engine.moe.placement.placement import LayerPlacement, Placement
from engine.moe.policy.policy import Expected, NamedPlacement, Policy
from engine.moe.policy.policy_file import digest, write_policy
from engine.request import SamplingParams
from tests.helpers import reference
from tests.helpers.ranks import RanksFailed, run_ranks
from tools.make_random_checkpoint import make_checkpoint

PROMPTS = [
    [random.Random(seed).randrange(90) for _ in range(length)]
    for seed, length in enumerate([5, 17, 1, 30, 8, 12, 3, 21])
]
EXPERTS, LAYERS = 6, 2
DROP = CapacityConfig(policy="token_drop", factor="1")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("olmoe")
    make_checkpoint("olmoe", path, overrides={"vocab_size": 97, "num_experts": EXPERTS})
    return path


def generate(rank: int, path: Path, moe: dict[str, Any], chunk: int) -> dict[str, Any]:
    moe = dict(moe)
    config = Config(
        model=ModelConfig(path=str(path), max_model_len=64, **moe.pop("model", {})),
        parallel=ParallelConfig(**moe.pop("parallel", {})),
        # Each rank runs a common prefix once, so its decisions depend on the number of ranks.
        scheduler=SchedulerConfig(
            kv_cache_blocks=128, block_size=4, max_batch_tokens=chunk, prefix_cache=False
        ),
        moe=MoEConfig(**moe),
    )
    llm = LLM(config)
    log = llm.record_decisions()
    done = llm.generate(PROMPTS, SamplingParams(max_new_tokens=4, ignore_eos=True))
    report = llm.report
    assert report is not None
    limits = [each.row_limit for each in llm.model.moe_layers]
    reserved = llm.model.row_buffers.num_bytes
    llm.close()
    return {
        "tokens": [item.token_ids for item in done],
        "records": [item.record() for item in done],
        "layers": [
            {key: value for key, value in asdict(each).items() if not key.endswith("seconds")}
            | {"wait": 0, "wait_by_cause": {}}
            for each in report.layers
        ],
        "rows": [each.expert_rows for each in report.ranks],
        "bytes": [(each.bytes_sent, each.num_collectives) for each in report.ranks],
        "memory": (limits, reserved),
        "policy": report.policy,
        "log": log,
    }


def run(path: Path, world: int = 2, *, chunk: int = 2048, **moe: Any) -> list[dict[str, Any]]:
    results = run_ranks(generate, world, path, moe, chunk, timeout=120)
    assert all(each["tokens"] == results[0]["tokens"] for each in results)
    return results


def written(folder: Path, policy: Policy, name: str = "policy.yaml") -> str:
    write_policy(policy, folder / name)
    return str(folder / name)


def equal(capacity: CapacityConfig, **fields: Any) -> Policy:
    return Policy(dict.fromkeys(range(LAYERS), capacity), **fields)


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Assert that two runs gave the same, by the same collectives."""
    for key in ("tokens", "records", "layers", "rows", "bytes", "memory"):
        assert one[key] == other[key], key
    assert len(one["log"]) == len(other["log"])
    for a, b in zip(one["log"], other["log"], strict=True):
        np.testing.assert_equal(asdict(a), asdict(b))


EQUAL: list[dict[str, Any]] = [
    {"factor": "1", "scope": "rank"},
    {"factor": "0.8", "order": "random", "phases": ("prefill", "decode")},
    {"factor": "1", "policy": "expanded_drop", "phases": ("decode",)},
    {"factor": "inf"},
]


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        pytest.param(world, settings, marks=() if settings is EQUAL[0] else pytest.mark.long)
        for world in (1, 2, 3)
        for settings in EQUAL
    ],
    ids=str,
)
def test_equal_layers_give_what_the_global_setting_gives(world, settings, checkpoint, tmp_path):
    capacity = CapacityConfig(**{"policy": "token_drop", **settings})
    file = written(tmp_path, equal(capacity))
    globally = run(checkpoint, world, chunk=32, capacity=capacity)
    by_policy = run(checkpoint, world, chunk=32, policy=file, capacity=replace(DROP, factor="9"))
    for one, other in zip(by_policy, globally, strict=True):
        same(one, other)
        assert one["policy"].file == file


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"implementation": "transformers"}},
        {"parallel": {"expert": 2, "tensor": 2}},
    ],
    ids=str,
)
def test_tensor_ranks_and_models_of_transformers_take_a_policy(settings, checkpoint, tmp_path):
    world = 4 if "parallel" in settings else 2
    both = CapacityConfig(policy="token_drop", factor="0.5", phases=("prefill", "decode"))
    globally = run(checkpoint, world, chunk=32, capacity=both, **settings)
    by_policy = run(checkpoint, world, chunk=32, policy=written(tmp_path, equal(both)), **settings)
    for one, other in zip(by_policy, globally, strict=True):
        same(one, other)
    for phases in (("prefill",), ("decode",)):
        differs = Policy({0: both, 1: replace(both, phases=phases)})
        results = run(checkpoint, world, chunk=32, policy=written(tmp_path, differs), **settings)
        assert all(each["dropped"] > 0 for each in results[0]["layers"])
        for rank in results:
            for entry in rank["log"]:
                in_prompt = entry.position_T < [len(PROMPTS[r]) for r in entry.request_T]
                wanted = in_prompt if phases == ("prefill",) else ~in_prompt
                assert entry.layer == 0 or (entry.eligible_T == wanted).all()
    results = run(checkpoint, world, policy=written(tmp_path, Policy({0: both})), **settings)
    assert [each["dropped"] > 0 for each in results[0]["layers"]] == [True, False]


def test_a_policy_without_layers_gives_what_a_dropless_job_gives(checkpoint, tmp_path):
    globally = run(checkpoint)
    by_policy = run(checkpoint, policy=written(tmp_path, Policy({})), capacity=DROP)
    for one, other in zip(by_policy, globally, strict=True):
        same(one, other)


def entries(results: list[dict[str, Any]], layer: int) -> list[list[Any]]:
    """Return the entries of each step by rank, of one layer."""
    by_step: dict[int, list[Any]] = {}
    for result in results:
        for entry in result["log"]:
            if entry.layer == layer:
                by_step.setdefault(entry.step, []).append(entry)
    return list(by_step.values())


def dropped_as_the_reference_says(
    results: list[dict[str, Any]], layer: int, capacity: CapacityConfig
) -> int:
    """Compare what a layer kept with what its own settings keep; return how much it dropped."""
    world, dropped = len(results), 0
    bounds = [expert_range(EXPERTS, world, rank)[0] for rank in range(world)] + [EXPERTS]
    assert capacity.order != "score", "the log has no scores"
    rules = reference.Rules(
        factor=str(capacity.factor), scope=capacity.scope, order=capacity.order, layer=layer
    )
    for ranks in entries(results, layer):
        inputs = [
            reference.RankInput(
                scores=np.zeros((len(each.request_T), EXPERTS), dtype=np.float32),
                topk_ids=each.topk_ids_TK,
                weights=np.zeros(each.topk_ids_TK.shape, dtype=np.float32),
                request=each.request_T,
                position=each.position_T,
                competes=each.eligible_T,
            )
            for each in ranks
        ]
        top_k = ranks[0].topk_ids_TK.shape[1]
        outcome = reference.decide(inputs, rules, reference.Family(), bounds, EXPERTS, top_k)
        for each, wanted in zip(ranks, outcome.ranks, strict=True):
            assert (each.keep_TK == wanted.keep).all()
            dropped += int((~each.keep_TK).sum())
    return dropped


def test_each_layer_keeps_what_its_own_limits_say(checkpoint, tmp_path):
    first = CapacityConfig(policy="token_drop", factor="0.7", order="first")
    second = CapacityConfig(policy="token_drop", factor="0.9", scope="rank", order="random")
    results = run(checkpoint, policy=written(tmp_path, Policy({0: first, 1: second})))
    lost = [
        dropped_as_the_reference_says(results, i, each) for i, each in enumerate((first, second))
    ]
    assert [each["dropped"] for each in results[0]["layers"]] == lost
    assert min(lost) > 0
    assert sum(each["capacity"]["dropped"] for each in results[0]["records"]) == sum(lost)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_layers_may_limit_different_phases(phase, checkpoint, tmp_path):
    first = CapacityConfig(
        policy="token_drop", factor="0.5", order="first", phases=("prefill", "decode")
    )
    second = CapacityConfig(policy="token_drop", factor="0.5", order="last", phases=(phase,))
    results = run(checkpoint, chunk=32, policy=written(tmp_path, Policy({0: first, 1: second})))
    assert dropped_as_the_reference_says(results, 0, first) > 0
    assert dropped_as_the_reference_says(results, 1, second) > 0
    for rank in results:
        for entry in rank["log"]:
            in_prompt = entry.position_T < [len(PROMPTS[r]) for r in entry.request_T]
            expected = in_prompt if phase == "prefill" else ~in_prompt
            wanted = np.ones_like(in_prompt) if entry.layer == 0 else expected
            assert (entry.eligible_T == wanted).all()


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_layer_that_drops_nothing_exchanges_what_a_dropless_layer_does(
    layer, checkpoint, tmp_path
):
    other = 1 - layer
    limited = run(checkpoint, policy=written(tmp_path, Policy({other: DROP})))
    plain = run(checkpoint)
    assert limited[0]["layers"][other]["dropped"] > 0
    assert limited[0]["layers"][layer]["dropped"] == 0
    for key in ("num_collectives", "bytes_sent"):
        assert limited[0]["layers"][layer][key] == pytest.approx(
            plain[0]["layers"][layer][key], rel=0 if key == "num_collectives" else 0.1
        )
    # Of the last layer only the rows that are read, though the step is limited.
    rows = [sum(each[0]["layers"][layer]["expert_loads"]) for each in (limited, plain)]
    assert rows[0] == rows[1]
    if layer == LAYERS - 1:
        routed = [
            [each["capacity"]["assignments"] for each in run[0]["records"]]
            for run in (limited, plain)
        ]
        assert routed[0] == routed[1]


def placed(precision: str) -> Placement:
    layer = LayerPlacement((0, 1, 1, 0, 1, 0), ((1,), (0,), (), (1,), (), ()))
    return Placement(2, EXPERTS, dict.fromkeys(range(LAYERS), layer), precision)  # pyright: ignore[reportArgumentType]


def with_placement(folder: Path, policy: Policy, precision: str) -> Policy:
    placement_file.write_placement(placed(precision), folder / "p.yaml")
    return replace(
        policy, placement=NamedPlacement("p.yaml", placement_file.digest(placed(precision)))
    )


@pytest.mark.parametrize(
    ("precision", "replan"),
    [
        ("model", "off"),
        pytest.param("int4", "off", marks=pytest.mark.long),
        pytest.param("model", 2, marks=pytest.mark.long),
        pytest.param("int4", 2, marks=pytest.mark.long),
    ],
)
def test_a_policy_with_a_placement_gives_what_the_two_settings_give(
    precision, replan, checkpoint, tmp_path
):
    capacity = replace(DROP, scope="rank")
    policy = with_placement(tmp_path, equal(capacity), precision)
    copies = CopiesConfig(replan=replan, target=1.0)
    globally = run(checkpoint, capacity=capacity, placement=str(tmp_path / "p.yaml"), copies=copies)
    by_policy = run(checkpoint, policy=written(tmp_path, policy), copies=copies)
    for one, other in zip(by_policy, globally, strict=True):
        if replan == "off":
            same(one, other)
        else:  # when copies change depends on when their weights have arrived
            assert len(one["tokens"]) == len(other["tokens"])


def test_low_bit_copies_take_rows_of_layers_that_drop_nothing(checkpoint, tmp_path):
    both = replace(DROP, scope="rank", phases=("prefill", "decode"))
    policy = with_placement(tmp_path, Policy({0: both}), "int4")
    results = run(checkpoint, policy=written(tmp_path, policy), copies=CopiesConfig(target=1.0))
    copied = [each["placement"]["copied_rows"] for each in results[0]["layers"]]
    assert min(copied) > 0
    assert results[0]["layers"][1]["dropped"] == 0


def test_the_report_has_what_the_policy_promised(checkpoint, tmp_path):
    expected = Expected(share=0.95, loss=0.0007, bound=0.001)
    policy = equal(DROP, expected=expected, data={"text.jsonl": "9a1b"}, ranks=2)
    [one, other] = run(checkpoint, policy=written(tmp_path, policy))
    report = one["policy"]
    assert report == other["policy"]
    assert report.digest == digest(policy)
    assert report.expected == asdict(expected)
    assert report.data == {"text.jsonl": "9a1b"}
    assert report.layers[0]["factor"] == "1"
    assert report.share > 0


def capacity_set_later(rank: int, path: Path, file: str | None) -> tuple[Any, ...]:
    moe = MoEConfig(policy=file) if file is not None else MoEConfig(capacity=DROP)
    llm = LLM(Config(model=ModelConfig(path=str(path), max_model_len=64), moe=moe))
    llm.set_capacity(DROP)
    done = llm.generate(PROMPTS, SamplingParams(max_new_tokens=4, ignore_eos=True))
    report, policy = llm.report, llm.policy
    llm.close()
    assert report is not None and report.policy is policy is None
    return [item.record() for item in done], [each.dropped for each in report.layers]


def test_a_capacity_set_between_runs_takes_the_place_of_the_policy(checkpoint, tmp_path):
    file = written(tmp_path, Policy({0: replace(DROP, factor="0.6")}))
    later, globally = (
        run_ranks(capacity_set_later, 2, checkpoint, given, timeout=120) for given in (file, None)
    )
    assert later == globally and min(later[0][1]) > 0


WRONG: dict[str, tuple[Policy, str, dict[str, Any]]] = {
    "a layer that is not there": (Policy({9: DROP}), "layers.9: is no MoE layer", {}),
    "another model": (equal(DROP, fingerprint="0123"), "was made for another model", {}),
    "no such placement": (
        equal(DROP, placement=NamedPlacement("none.yaml", "01")),
        "none.yaml: cannot be read",
        {},
    ),
    "more extras than experts": (
        equal(CapacityConfig(policy="expanded_drop", factor="1", expand=5)),
        "layers.0.expand = 5: must be at most 3",
        {},
    ),
    "two batches": (
        equal(DROP),
        "moe.overlap.two_batch = True",
        {"overlap": OverlapConfig(two_batch=True)},
    ),
    "copies to change": (equal(DROP), "names none", {"copies": CopiesConfig(replan=8)}),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_policy_that_does_not_fit_is_refused_on_all_ranks(case, checkpoint, tmp_path):
    wrong, text, moe = WRONG[case]
    with pytest.raises(RanksFailed) as failed:
        run(checkpoint, policy=written(tmp_path, wrong), **moe)
    assert str(failed.value).count(text) >= 2, failed.value
    assert "policy" in str(failed.value)


def test_another_placement_than_the_named_one_is_refused(checkpoint, tmp_path):
    policy = with_placement(tmp_path, equal(replace(DROP, scope="rank")), "model")
    placement_file.write_placement(placed("int4"), tmp_path / "p.yaml")
    with pytest.raises(RanksFailed, match=r"placement\.digest = .* not the one that the policy"):
        run(checkpoint, policy=written(tmp_path, policy))


def generate_from(rank: int, path: Path, folder: Path) -> None:
    os.chdir(folder / str(rank))  # as on hosts of their own
    generate(rank, path, {"policy": "policy.yaml"}, 2048)


def test_different_files_on_the_ranks_are_refused(checkpoint, tmp_path):
    for rank, factor in enumerate(("1", "1.5")):
        (tmp_path / str(rank)).mkdir()
        written(tmp_path / str(rank), equal(replace(DROP, factor=factor)))
    with pytest.raises(RanksFailed, match="hold different files"):
        run_ranks(generate_from, 2, checkpoint, tmp_path, timeout=60)
