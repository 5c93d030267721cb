"""Collectives of tensor parallelism are timed: two tensor groups of two ranks, one without tokens.

Run: pytest tests/distributed/test_tensor_spans.py
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from engine.config import (
    CapacityConfig,
    Config,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    SchedulerConfig,
)
from engine.generation.request_source import ListSource
from engine.llm import LLM
from engine.profiling.phase_clock import Phase, Spans
from engine.request import Request, SamplingParams
from tests.helpers.ranks import run_ranks
from tools.make_random_checkpoint import make_checkpoint

NEW = 12
LATE, LATE_S = 1, 0.05


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("olmoe")
    make_checkpoint("olmoe", path, overrides={"vocab_size": 97})
    return path


def run(rank: int, path: Path, capacity: dict[str, Any]) -> dict[str, Any]:
    """One prompt, of the first tensor group; rank 1 sleeps in every attention."""
    llm = LLM(
        Config(
            model=ModelConfig(path=str(path), max_model_len=64),
            scheduler=SchedulerConfig(kv_cache_blocks=128, block_size=4),
            parallel=ParallelConfig(tensor=2),
            moe=MoEConfig(capacity=CapacityConfig(**capacity)),
        )
    )
    clock, steps = llm._telemetry.clock, []
    read = clock.read

    def keep(*, ended: bool = False) -> Spans | None:
        found = read(ended=ended)
        if found is not None:
            steps.append(found)
        return found

    pytest.MonkeyPatch().setattr(clock, "read", keep)
    if rank == LATE:
        for layer in llm.model.layers:
            layer.attention.register_forward_pre_hook(lambda *_: time.sleep(LATE_S))
    params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    requests = [Request(index=0, id=0, prompt_token_ids=[5, 6, 7], params=params)]
    share = requests if llm.topology.data_rank == 0 else []
    report = llm.run(ListSource(share), lambda done: None)
    found = {
        "report": report,
        "layers": llm.model.num_layers,
        "stamps": llm._control.num_stamps,
        "arrivals": [(each.arrivals >= 0).tolist() for each in steps],
        "calls": [int((each.phases == Phase.TENSOR).sum()) for each in steps],
    }
    llm.close()
    return found


CAPACITIES = pytest.mark.parametrize(
    "capacity", [{}, {"policy": "token_drop", "phases": ("decode",)}]
)


@CAPACITIES
def test_every_collective_of_a_tensor_group_has_its_span_and_its_number(checkpoint, capacity):
    results = run_ranks(run, 4, checkpoint, capacity, timeout=90)
    first = results[0]
    layers = first["layers"]
    # OLMoE sums norms and outputs in attention, and gathers after the experts; outside of the
    # layers requests and outcomes are shared, and drops where tokens were subject to capacity.
    calls = [3 * layers + 2 + (bool(capacity) and step > 0) for step in range(NEW)]
    for rank, found in enumerate(results):
        assert found["calls"][:NEW] == calls
        assert [len(each) for each in found["arrivals"]] == [
            len(each) for each in first["arrivals"]
        ], "all ranks number the collectives alike"
        assert all(len(each) <= found["stamps"] for each in found["arrivals"])
        missing = [len(each) - sum(each) for each in found["arrivals"][:NEW]]
        assert missing == [0 if rank < 2 else 2 * layers] * NEW, "no tokens, no sums"
    report = first["report"]
    peer = report.ranks[0].phases["tensor"]
    assert 0 < peer.waiting < peer.seconds and peer.bytes_sent > 0
    assert report.ranks[0].seconds["waiting"] >= peer.waiting


@pytest.mark.alone
@CAPACITIES
def test_waits_in_a_tensor_group_are_no_attention_time_and_attributed_to_its_straggler(
    checkpoint, capacity
):
    first = run_ranks(run, 4, checkpoint, capacity, timeout=90)[0]
    layers, report = first["layers"], first["report"]
    peer, late = report.ranks[0].phases["tensor"], report.ranks[LATE].phases["tensor"]
    slept = LATE_S * layers * NEW
    assert slept / 2 < peer.waiting < peer.seconds
    assert late.waiting < slept / 4
    # A mean rank of four waited a quarter of what rank 0 did, the only one in its tensor group.
    caused = sum(report.ranks[LATE].wait_caused.values())
    assert caused > slept / 8
    costs = {each.rank: sum(each.wait_caused.values()) for each in report.ranks}
    assert max(costs, key=costs.__getitem__) == LATE
