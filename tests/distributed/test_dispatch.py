"""Rows that are sent once per rank, in fewer bits, or in chunks of tokens, on real gloo ranks.

Run: pytest tests/distributed/test_dispatch.py
"""

from __future__ import annotations

import pytest
import torch

from engine.config import (
    CapacityConfig,
    Config,
    DispatchConfig,
    ModelConfig,
    MoEConfig,
    OverlapConfig,
    ParallelConfig,
    RuntimeConfig,
)
from engine.distributed import bootstrap
from engine.moe.router import RouterSpec
from tests.helpers.layer_cases import (
    DEEPSEEK,
    HIDDEN,
    MIXTRAL,
    OLMOE,
    Doubled,
    build,
    step_of,
    tokens_of,
)
from tests.helpers.ranks import run_ranks

WIDE = RouterSpec(num_experts=16, top_k=6)
POLICIES = [
    {"policy": "none"},
    {"policy": "token_drop", "factor": "1"},
    {"policy": "token_drop", "factor": "1", "selection": "radix", "scope": "rank"},
    {"policy": "token_drop", "factor": "1", "consensus": "quota"},
    {"policy": "token_drop", "factor": "1", "consensus": "local"},
    {"policy": "expanded_drop", "factor": "1"},
    {"policy": "expanded_drop", "factor": "1", "tiers": "one"},
]


def outputs(
    rank: int, counts: list[int], spec: RouterSpec, ways: list[dict], tensor: int = 1
) -> list[list[dict]]:
    """Outputs and counters by way and policy. ways: fields of overlap and dispatch, by section."""
    config = Config(
        model=ModelConfig(path="unused"),
        parallel=ParallelConfig(tensor=tensor),
        runtime=RuntimeConfig(shared_memory=False),
    )
    topology = bootstrap.start(config)
    x = tokens_of(topology.data_rank, counts[topology.data_rank])
    found = []
    for way in ways:
        parts = Config(
            model=ModelConfig(path="unused"),
            moe=MoEConfig(
                overlap=OverlapConfig(**way.get("overlap", {})),
                dispatch=DispatchConfig(**way.get("dispatch", {})),
            ),
            parallel=ParallelConfig(tensor=tensor),
        )
        layer = build(topology, parts, spec, Doubled())
        row = []
        for settings in POLICIES:
            layer.set_capacity(CapacityConfig(**settings))
            calls, sent = layer.num_collectives, layer.bytes_sent
            out = layer(x, step_of(topology, counts, tensor), way.get("group_tokens"))
            row.append(
                {
                    "out": out,
                    "collectives": layer.num_collectives - calls,
                    "bytes": layer.bytes_sent - sent,
                    "rows": layer.telemetry.loads.take_rows()[0],
                }
            )
        found.append(row)
    bootstrap.stop(topology)
    return found


PLAIN = {"dispatch": {"deduplicate": False}}
LARGE = {"group_tokens": 10**9}  # as if the step were: quotas count unique rows in no other
CASES = [
    ([13, 9], MIXTRAL, 1),
    ([7, 0, 12], OLMOE, 1),
    ([0, 0], MIXTRAL, 1),
    ([1, 0, 2, 30], DEEPSEEK, 1),
    ([20], MIXTRAL, 1),
    ([19, 6], WIDE, 2),
]


@pytest.mark.parametrize(("counts", "spec", "tensor"), CASES)
def test_neither_unique_rows_nor_chunks_of_tokens_change_a_bit(counts, spec, tensor):
    ways = [
        PLAIN,
        {},
        {**PLAIN, "overlap": {"chunks": 3, "by": "tokens"}},
        {"overlap": {"chunks": 3, "by": "tokens"}},
        {"overlap": {"chunks": 2, "by": "experts"}},
    ]
    world = len(counts) * tensor
    for result in run_ranks(outputs, world, counts, spec, ways, tensor, timeout=120):
        serial = result[0]
        for way, row in zip(ways, result, strict=True):
            chunks = way.get("overlap", {}).get("chunks", 1)
            for settings, one, plain in zip(POLICIES, row, serial, strict=True):
                assert torch.equal(one["out"], plain["out"])
                assert one["rows"] == plain["rows"]
                if settings.get("consensus") != "quota":  # the agreement costs what it costs
                    more = 2 * (chunks - 1) if world > 1 else 0
                    assert one["collectives"] == plain["collectives"] + more


def test_quotas_say_how_many_rows_and_not_of_which_tokens_so_more_costs_a_gather():
    ways = [PLAIN, {}, LARGE, {**PLAIN, "overlap": {"chunks": 2, "by": "tokens"}}]
    for result in run_ranks(outputs, 2, [13, 9], WIDE, ways):
        quota = [row[3] for row in result]
        assert POLICIES[3]["consensus"] == "quota"
        assert [one["collectives"] for one in quota] == [3, 3, 4, 6]
        assert all(torch.equal(one["out"], quota[0]["out"]) for one in quota)
        rows = [one["bytes"] for one in quota]
        assert rows[2] < rows[0] == rows[1]


def test_unique_rows_lower_the_bytes_by_what_is_sent_twice():
    counts = [40, 33]
    ways = [PLAIN, LARGE, {**LARGE, "dispatch": {"partial_sums": True}}]
    for result in run_ranks(outputs, 2, counts, WIDE, ways):
        for plain, once, partial in zip(*result, strict=True):
            # 6 of 16 experts on 2 ranks: two rows of three are copies.
            assert once["bytes"] < 0.9 * plain["bytes"]
            assert partial["bytes"] < 0.9 * once["bytes"]
            torch.testing.assert_close(partial["out"], plain["out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "bound"), [("bf16", 2**-7), ("fp8", 2**-3)])
def test_narrow_rows_move_fewer_bytes_and_change_results_by_little(name, bound):
    counts = [40, 33]
    ways = [
        PLAIN,
        {"dispatch": {"deduplicate": False, "dtype": name}},
        {**LARGE, "dispatch": {"dtype": name}},
    ]
    results = run_ranks(outputs, 2, counts, WIDE, ways)
    for rank, result in enumerate(results):
        for plain, narrow, once in zip(*result, strict=True):
            assert torch.equal(narrow["out"], once["out"]), "each row is turned by itself"
            assert not torch.equal(narrow["out"], plain["out"])
            size = (plain["out"] - 2 * tokens_of(rank, counts[rank])).abs().max()
            assert (narrow["out"] - plain["out"]).abs().max() <= bound * size
            assert once["bytes"] < narrow["bytes"] < plain["bytes"]


def test_a_rank_sends_half_the_bytes_out_in_bf16():
    ways = [PLAIN, {"dispatch": {"deduplicate": False, "dtype": "bf16"}}]
    results = run_ranks(outputs, 2, [16, 16], MIXTRAL, ways)
    saved = [plain[0]["bytes"] - narrow[0]["bytes"] for plain, narrow in results]
    sent = [plain[0]["bytes"] - 8 * 8 for plain, _ in results]  # without the counts
    # Out and back of both ranks together: what goes out comes back, so half of all is halved.
    assert sum(saved) == sum(sent) // 4
    assert all(one % (HIDDEN * 2) == 0 for one in saved)
