"""Chunked layers on real gloo ranks: the serial result, bit for bit. Run: pytest
tests/distributed/test_overlap.py
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
from engine.moe.dispatch import chunk_layout as overlap
from engine.moe.router import RouterSpec
from tests.helpers.layer_cases import (
    DEEPSEEK,
    MIXTRAL,
    OLMOE,
    Doubled,
    WatchedExchange,
    build,
    step_of,
    tokens_of,
)
from tests.helpers.ranks import RanksFailed, run_ranks

POLICIES = [
    {"policy": "none"},
    {"policy": "token_drop", "factor": "1"},
    {"policy": "token_drop", "factor": "1", "selection": "radix", "scope": "rank"},
    {"policy": "expanded_drop", "factor": "1"},
]


def chunked(
    rank: int, counts: list[int], spec: RouterSpec, chunks: list[int], tensor: int
) -> list[list[dict]]:
    """Outputs by chunk count and policy."""
    config = Config(
        model=ModelConfig(path="unused"),
        parallel=ParallelConfig(tensor=tensor),
        runtime=RuntimeConfig(shared_memory=False),
    )
    topology = bootstrap.start(config)
    x = tokens_of(topology.data_rank, counts[topology.data_rank])
    found = []
    for number in chunks:
        parts = Config(
            model=ModelConfig(path="unused"),
            moe=MoEConfig(
                overlap=OverlapConfig(chunks=number, by="experts"),
                dispatch=DispatchConfig(deduplicate=False),  # saves more the fewer chunks there are
            ),
            parallel=ParallelConfig(tensor=tensor),
        )
        layer = build(topology, parts, spec, Doubled())
        row = []
        for settings in POLICIES:
            layer.set_capacity(CapacityConfig(**settings))
            calls, sent = layer.num_collectives, layer.bytes_sent
            out = layer(x, step_of(topology, counts, tensor))
            row.append(
                {
                    "out": out,
                    "collectives": layer.num_collectives - calls,
                    "bytes": layer.bytes_sent - sent,
                    "rows": layer.telemetry.loads.take_rows()[0],
                    "chunks": layer.num_chunks,
                }
            )
        found.append(row)
    bootstrap.stop(topology)
    return found


@pytest.mark.parametrize(
    ("counts", "spec", "tensor"),
    [
        ([13, 9], MIXTRAL, 1),
        ([7, 0, 12], OLMOE, 1),
        ([0, 0], MIXTRAL, 1),
        ([1, 0, 2], DEEPSEEK, 1),
        ([20], MIXTRAL, 1),
        ([9, 6], MIXTRAL, 2),
    ],
)
def test_any_number_of_chunks_gives_the_serial_result_bit_for_bit(counts, spec, tensor):
    chunks = [1, 2, 3, 50]
    world = len(counts) * tensor
    most = -(-spec.num_experts // world)
    for result in run_ranks(chunked, world, counts, spec, chunks, tensor, timeout=120):
        for number, row in zip(chunks, result, strict=True):
            made = 1 if world == 1 else min(number, most)
            for one, serial in zip(row, result[0], strict=True):
                assert torch.equal(one["out"], serial["out"])
                assert one["chunks"] == made
                assert (one["bytes"], one["rows"]) == (serial["bytes"], serial["rows"])
                # The agreement costs what it costs; rows are dispatched and combined per chunk.
                extra = 2 * (made - 1) if world > 1 else 0
                assert one["collectives"] == serial["collectives"] + extra


def broken(rank: int, chunk: int, by: str) -> None:
    """Rank 1's experts fail in one chunk; nothing that was started is left behind."""
    config = Config(
        model=ModelConfig(path="unused"), moe=MoEConfig(overlap=OverlapConfig(chunks=4, by=by))
    )
    topology = bootstrap.start(config)
    layer = build(topology, config, MIXTRAL, None)
    exchange = WatchedExchange(topology)
    layer = build(topology, config, MIXTRAL, None, exchange)
    if rank == 1:
        pipeline, calls = layer._pipelines[0], []
        experts = pipeline._experts

        def fail(*arguments):
            calls.append(1)
            if len(calls) == chunk + 1:
                raise FloatingPointError("the experts of rank 1 broke")
            return experts(*arguments)

        pytest.MonkeyPatch().setattr(pipeline, "_experts", fail)
    try:
        layer(tokens_of(rank, 11))
    finally:
        if rank == 1:
            # Chunks 0 .. chunk + 1 were dispatched, 0 .. chunk - 1 combined.
            assert len(exchange.started) == min(chunk + 2, 4) + chunk
            exchange.assert_none_in_flight()


@pytest.mark.parametrize(
    ("chunk", "by"), [(0, "experts"), (2, "experts"), (3, "experts"), (1, "tokens"), (3, "tokens")]
)
def test_a_failure_inside_a_chunk_drains_the_pipeline_and_ends_all_ranks(chunk, by):
    with pytest.raises(RanksFailed) as caught:
        run_ranks(broken, 2, chunk, by, timeout=60)
    text = str(caught.value)
    assert "the experts of rank 1 broke" in text and "a handle leaked" not in text
    assert "rank 0:" in text and "returned" not in text, "rank 0 does not claim success"


def cut_or_not(rank: int, group_tokens: list[int | None]) -> list[tuple[torch.Tensor, int]]:
    config = Config(
        model=ModelConfig(path="unused"), moe=MoEConfig(overlap=OverlapConfig(chunks=4))
    )
    topology = bootstrap.start(config)
    layer = build(topology, config, MIXTRAL, None)
    found = []
    for tokens in group_tokens:
        calls = layer.num_collectives
        out = layer(tokens_of(rank, 11), None, tokens)
        found.append((out, layer.num_collectives - calls))
    bootstrap.stop(topology)
    return found


def test_a_step_of_few_tokens_is_not_cut():
    # Top-2 on two ranks: as many rows per rank as tokens; 4 chunks of 256 rows need 1,024.
    for found in run_ranks(cut_or_not, 2, [None, 22, 1023, 1024]):
        assert [calls for _, calls in found] == [9, 3, 3, 9]
        assert all(torch.equal(out, found[0][0]) for out, _ in found)


COSTS = {
    "rank 1 outvotes rank 0": ([100, 10, 300], [100, 400, 20], 1),
    "both gain from two": ([100, 10, 300], [100, 80, 20], 2),
}


def tuned(rank: int, costs: tuple[list[int], list[int]]) -> dict:
    """An `auto` layer with costs of our own; its calls, choice and collectives."""
    patch = pytest.MonkeyPatch()  # of this process, which ends with the test
    patch.setattr(overlap, "MIN_CHUNK_ROWS", 1)
    config = Config(
        model=ModelConfig(path="unused"), moe=MoEConfig(overlap=OverlapConfig(chunks="auto"))
    )
    topology = bootstrap.start(config)
    layer = build(topology, config, MIXTRAL, None)
    tuner, asked = layer.layout_policy.tuner, []
    due = tuner.due

    def with_costs(number: int, tokens: int) -> list[int] | None:
        measured = due(number, tokens)
        if measured is None:
            return None
        asked.append(measured)
        return costs[rank]

    patch.setattr(tuner, "due", with_costs)
    x, outs, calls = tokens_of(rank, 11), [], []
    for _ in range(24):
        before = layer.num_collectives
        outs.append(layer(x, None, 22))
        calls.append(layer.num_collectives - before)
    early = dict(layer.layout_policy.choices)
    layer(x[:1], None, 2)
    bootstrap.stop(topology)
    return {"outs": outs, "calls": calls, "asked": asked, "early": early}


@pytest.mark.parametrize("name", COSTS)
def test_auto_measures_every_candidate_and_keeps_what_is_fastest_for_all_ranks(name):
    *costs, chosen = COSTS[name]
    for found in run_ranks(tuned, 2, costs):
        assert all(torch.equal(out, found["outs"][0]) for out in found["outs"])
        # Three collectives, and two for each further chunk: warm-up, six rounds, then the choice.
        assert found["calls"] == [3, 5, 9] * 7 + [1 + 2 * chosen] * 3
        assert len(found["asked"]) == 1 and min(found["asked"][0]) > 0, "times were measured"
        assert found["early"] == {4: chosen}
