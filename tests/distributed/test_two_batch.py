"""Steps that run as two micro-batches: the same results, and one computes during the other's
collectives.

Run: pytest tests/distributed/test_two_batch.py
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import (
    Config,
    ModelConfig,
    MoEConfig,
    OverlapConfig,
    ParallelConfig,
    SchedulerConfig,
)
from engine.distributed import bootstrap
from engine.generation.request_source import partition
from engine.llm import LLM
from engine.moe.dispatch import chunk_layout as overlap
from engine.moe.dispatch.two_batch import interleave
from engine.profiling.phase_clock import Phase, Spans
from engine.request import Request, SamplingParams
from tests.helpers.layer_cases import MIXTRAL, Doubled, WatchedExchange, build, tokens_of
from tests.helpers.ranks import RanksFailed, run_ranks
from tools.make_random_checkpoint import make_checkpoint

TWO = MoEConfig(overlap=OverlapConfig(two_batch=True))


def micro_batches_of_a_layer(rank: int, counts: list[int], cuts: list[int]) -> dict:
    """One layer on a rank's tokens, whole and as two micro-batches."""
    config = Config(model=ModelConfig(path="unused"), moe=TWO)
    topology = bootstrap.start(config)
    layer = build(topology, config, MIXTRAL, Doubled())
    x, cut = tokens_of(rank, counts[rank]), cuts[rank]
    whole = layer(x)
    rows = layer.telemetry.loads.take_rows()
    layer.telemetry.loads.clear()
    parts = [layer.steps(part, micro_batch=n) for n, part in enumerate((x[:cut], x[cut:]))]
    joined = torch.cat(interleave(parts))
    found = {
        "equal": torch.equal(whole, joined),
        "rows": (rows, layer.telemetry.loads.take_rows()),
        "experts": layer.telemetry.loads.layers[3].experts.sum(),
        "most": layer.max_collectives,
    }
    bootstrap.stop(topology)
    return found


@pytest.mark.parametrize(
    ("counts", "cuts"),
    [([13, 9], [6, 5]), ([8, 5, 0], [8, 0, 0]), ([0, 0], [0, 0]), ([7, 4], [7, 4])],
)
def test_two_micro_batches_of_a_layer_give_the_whole_bit_for_bit(counts, cuts):
    for found in run_ranks(micro_batches_of_a_layer, len(counts), counts, cuts):
        assert found["equal"]
        assert found["rows"][0] == found["rows"][1], "loads of both are one call's"
        assert found["experts"] == sum(counts) * MIXTRAL.top_k
        assert found["most"] == 6


def broken_micro_batch(rank: int, broken: int) -> None:
    """Rank 1's experts fail in one micro-batch; no collective is left in flight."""
    config = Config(model=ModelConfig(path="unused"), moe=TWO)
    topology = bootstrap.start(config)
    exchange = WatchedExchange(topology)
    layer = build(topology, config, MIXTRAL, None, exchange)
    if rank == 1:

        def fail(*arguments):
            raise FloatingPointError("the experts of rank 1 broke")

        pytest.MonkeyPatch().setattr(layer._pipelines[broken], "_experts", fail)
    x = tokens_of(rank, 12)
    parts = [layer.steps(part, micro_batch=index) for index, part in enumerate((x[:6], x[6:]))]
    try:
        interleave(parts)
    finally:
        if rank == 1:
            # Both are dispatched; the first is combined where the second fails.
            assert len(exchange.started) == 2 + broken
            exchange.assert_none_in_flight()


@pytest.mark.parametrize("broken", [0, 1])
def test_a_failure_in_one_micro_batch_waits_for_what_the_other_has_in_flight(broken):
    with pytest.raises(RanksFailed) as caught:
        run_ranks(broken_micro_batch, 2, broken, timeout=60)
    text = str(caught.value)
    assert "the experts of rank 1 broke" in text and "a handle leaked" not in text
    assert "AssertionError" not in text and "returned" not in text


# Through the engine

PROMPTS = [
    [random.Random(seed).randrange(90) for _ in range(length)]
    for seed, length in enumerate([5, 17, 1, 30, 8, 12, 3, 21, 9])
]


PARAMS = SamplingParams(max_new_tokens=5, ignore_eos=True, logprobs=True)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    found = {}
    for family in ("olmoe", "deepseek_v2"):
        found[family] = tmp_path_factory.mktemp(family)
        make_checkpoint(family, found[family], overrides={"vocab_size": 97})
    return found


def generate(rank: int, path: Path, num_prompts: int, parallel: dict[str, int]) -> list[dict]:
    """The same job in whole steps and in micro-batches; no step is too small."""
    pytest.MonkeyPatch().setattr(overlap, "MIN_CHUNK_ROWS", 1)
    found = []
    for two_batch in (False, True):
        config = Config(
            model=ModelConfig(path=str(path), max_model_len=64),
            scheduler=SchedulerConfig(kv_cache_blocks=128, block_size=4, max_batch_tokens=40),
            moe=MoEConfig(overlap=OverlapConfig(two_batch=two_batch)),
            parallel=ParallelConfig(**parallel),
        )
        llm = LLM(config)
        spans, sizes = _listen(llm)
        done = llm.generate(PROMPTS[:num_prompts], PARAMS)
        found.append(
            {
                "done": [(item.token_ids, item.logprobs) for item in done],
                "overlapped": sum(_overlapped(each, Phase.ATTENTION) for each in spans),
                "arrivals": [len(each.arrivals) for each in spans],
                "stamps": llm._control.num_stamps,
                "sizes": sizes,
                "loads": [
                    (load.experts.tolist(), load.slowest_after, load.mean_after)
                    for load in llm._telemetry.loads.layers.values()
                ],
            }
        )
        llm.close()
    return found


def _listen(llm: LLM) -> tuple[list[Spans], list[tuple[int, int]]]:
    """Every step's spans, and the tokens of every step's micro-batches."""
    spans: list[Spans] = []
    sizes: list[tuple[int, int]] = []
    clock, model = llm._telemetry.clock, llm.model
    read, forward = clock.read, model.forward_two_batch

    def keep(*, ended: bool = False) -> Spans | None:
        found = read(ended=ended)
        if found is not None:
            spans.append(found)
        return found

    def measure(micro_batches, *arguments):
        sizes.append(tuple(each.token_ids_T.shape[0] for each in micro_batches))
        return forward(micro_batches, *arguments)

    patch = pytest.MonkeyPatch()
    patch.setattr(clock, "read", keep)
    patch.setattr(model, "forward_two_batch", measure)
    return spans, sizes


def _overlapped(spans: Spans, phase: Phase) -> int:
    """Spans of a phase that lie between the start of a collective and the wait for it."""
    waits = {
        int(n): begin for n, begin in zip(spans.collectives, spans.starts, strict=True) if n >= 0
    }
    begins = spans.starts[(spans.phases == phase) & (spans.tokens > 0)]
    in_flight = [
        (begins > arrival) & (begins < waits[number])
        for number, arrival in enumerate(spans.arrivals.tolist())
        if number in waits
    ]
    return int(np.any(in_flight, axis=0).sum()) if in_flight else 0


@pytest.mark.parametrize(
    ("family", "world", "prompts", "parallel"),
    [
        ("olmoe", 2, 9, {}),
        ("olmoe", 2, 1, {}),
        ("olmoe", 4, 9, {"tensor": 2}),
        ("olmoe", 4, 6, {"expert": 2}),
        ("olmoe", 1, 4, {}),
        ("deepseek_v2", 2, 9, {}),
    ],
)
def test_completions_of_micro_batches_are_those_of_whole_steps(
    checkpoints, family, world, prompts, parallel
):
    results = run_ranks(generate, world, checkpoints[family], prompts, parallel, timeout=180)
    group, tensor = parallel.get("expert", world), parallel.get("tensor", 1)
    requests = [
        Request(index=i, id=str(i), prompt_token_ids=prompt, params=PARAMS)
        for i, prompt in enumerate(PROMPTS[:prompts])
    ]
    shares = partition(requests, world // tensor)
    for rank, (whole, two) in enumerate(results):
        for (tokens, logprobs), other in zip(whole["done"], two["done"], strict=True):
            assert tokens == other[0]
            # Latent attention multiplies in torch, whose rounding depends on a batch's size.
            exact = family == "olmoe"
            assert other[1] == (logprobs if exact else pytest.approx(logprobs, abs=1e-5))
        assert whole["loads"] == two["loads"]
        assert not whole["sizes"] and not whole["overlapped"]
        peer = results[rank // group * group][1]
        assert two["arrivals"] == peer["arrivals"], "all ranks have the same yield points"
        assert max(two["arrivals"]) <= two["stamps"], "every collective has its stamp"
        crowded = any(
            len(shares[each // tensor]) > 1
            for each in range(rank // group * group, rank // group * group + group)
        )
        # One rank waits for no other; the one sequence of a rank is not cut.
        assert bool(two["sizes"]) == (world > 1 and crowded)
        if any(first and second for first, second in two["sizes"]):
            assert two["overlapped"] > 0, "attention during collectives"
    assert any(first and second for _, two in results for first, second in two["sizes"]) == (
        world > 1 and prompts > 1
    )
