"""The MoE layer on real gloo ranks against a token-by-token oracle.

Run: pytest tests/distributed/test_moe_layer.py
"""

import pytest
import torch

from engine.config import Config, ExpertsConfig, ModelConfig, MoEConfig, ParallelConfig
from engine.distributed import bootstrap
from engine.moe.layer import MoELayer
from engine.moe.router import RouterSpec
from engine.moe.spec import MoESpec
from tests.helpers.ranks import run_ranks

HIDDEN, FFN = 16, 24


def full_weights(num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(num_experts, HIDDEN, generator=generator),
        torch.randn(num_experts, 2 * FFN, HIDDEN, generator=generator) * 0.3,
        torch.randn(num_experts, HIDDEN, FFN, generator=generator) * 0.3,
    )


def tokens_of(rank: int, count: int) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(100 + rank))


def oracle(x: torch.Tensor, num_experts: int, top_k: int) -> torch.Tensor:
    """Softmax router, raw top-k weights, one token and one expert at a time, in float64."""
    gate, w13, w2 = (part.double() for part in full_weights(num_experts))
    out = torch.zeros_like(x, dtype=torch.float64)
    for t, row in enumerate(x.double()):
        scores = (gate @ row).softmax(0)
        for expert in scores.topk(top_k).indices.tolist():
            up = w13[expert] @ row
            hidden = torch.nn.functional.silu(up[:FFN]) * up[FFN:]
            out[t] += scores[expert] * (w2[expert] @ hidden)
    return out


def run_layer(
    rank: int, counts: list[int], num_experts: int, top_k: int, tensor: int, backend: str
) -> dict:
    config = Config(
        model=ModelConfig(path="unused"),
        parallel=ParallelConfig(tensor=tensor),
        moe=MoEConfig(experts=ExpertsConfig(backend=backend)),
    )
    topology = bootstrap.start(config)
    spec = MoESpec(router=RouterSpec(num_experts=num_experts, top_k=top_k), hidden=HIDDEN, ffn=FFN)
    layer = MoELayer(
        spec,
        layer=0,
        topology=topology,
        config=config.moe,
        device=topology.device,
        dtype=torch.float32,
    )
    gate, w13, w2 = full_weights(num_experts)
    local = layer.local_experts
    layer.gate.weight_ED.copy_(gate)
    layer.experts.stacked.w13_e2FD.copy_(w13[local])
    layer.experts.stacked.w2_eDF.copy_(w2[local])
    out = layer(tokens_of(topology.data_rank, counts[topology.data_rank]))
    loads = layer.telemetry.loads.layers[0]
    result = {
        "out": out,
        "experts": loads.experts.tolist(),
        "slowest": loads.slowest,
        "bytes": layer.bytes_sent,
        "collectives": layer.num_collectives,
        "name": layer.backend,
    }
    bootstrap.stop(topology)
    return result


@pytest.mark.parametrize(
    ("counts", "num_experts", "top_k"),
    [
        ([9], 5, 2),
        ([4, 7], 4, 2),
        ([6, 0], 4, 1),
        ([0, 0], 4, 2),
        ([5, 0, 3], 5, 5),
        ([1, 8, 2], 7, 3),
        ([3, 2, 0, 6], 4, 2),
    ],
)
def test_every_rank_gets_what_one_process_would_compute(counts, num_experts, top_k):
    results = run_ranks(run_layer, len(counts), counts, num_experts, top_k, 1, "torch")
    for rank, result in enumerate(results):
        expected = oracle(tokens_of(rank, counts[rank]), num_experts, top_k)
        torch.testing.assert_close(result["out"].double(), expected, atol=1e-5, rtol=1e-5)
        assert sum(result["experts"]) == sum(counts) * top_k
        assert result["experts"] == results[0]["experts"]


def test_tensor_ranks_share_their_tokens_and_hold_the_same_result():
    # Two tensor groups of two ranks; 5 tokens split 3/2, 1 token split 1/0.
    results = run_ranks(run_layer, 4, [5, 1], 6, 2, 2, "torch")
    for rank, result in enumerate(results):
        expected = oracle(tokens_of(rank // 2, [5, 1][rank // 2]), 6, 2)
        torch.testing.assert_close(result["out"].double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(results[0]["out"], results[1]["out"])
    assert sum(results[0]["experts"]) == 12, "an assignment was sent by two tensor ranks"


def test_grouped_mm_backend_gives_the_same_result():
    results = run_ranks(run_layer, 2, [6, 3], 4, 2, 1, "grouped_mm")
    for rank, result in enumerate(results):
        assert result["name"] == "grouped_mm"
        expected = oracle(tokens_of(rank, [6, 3][rank]), 4, 2)
        torch.testing.assert_close(result["out"].double(), expected, atol=1e-5, rtol=1e-5)


def test_one_rank_needs_no_collective_and_sends_no_byte():
    (result,) = run_ranks(run_layer, 1, [9], 4, 2, 1, "torch")
    assert (result["bytes"], result["collectives"]) == (0, 0)


def test_two_ranks_call_three_collectives_and_count_remote_bytes_only():
    counts, num_experts, top_k = [4, 7], 4, 2
    results = run_ranks(run_layer, 2, counts, num_experts, top_k, 1, "torch")
    assert [result["collectives"] for result in results] == [3, 3]
    row = HIDDEN * 4
    for rank, result in enumerate(results):
        # Dispatched and combined rows: this rank's remote assignments and those of its peer.
        # Rows this small are sent per assignment: a packed row has more bytes. Counts: the load per
        # expert, the unique rows per rank.
        remote = [_remote(tokens_of(r, counts[r]), r, num_experts, top_k) for r in range(2)]
        expected = remote[rank] * row + remote[1 - rank] * row + (num_experts + 2) * 8
        assert result["bytes"] == expected


def _remote(x: torch.Tensor, rank: int, num_experts: int, top_k: int) -> int:
    chosen = (x @ full_weights(num_experts)[0].T).topk(top_k).indices
    half = num_experts // 2
    return int(((chosen < half) if rank == 1 else (chosen >= half)).sum())


def too_many_ranks(rank: int) -> str:
    config = Config(model=ModelConfig(path="unused"))
    topology = bootstrap.start(config)
    spec = MoESpec(router=RouterSpec(num_experts=1, top_k=1), hidden=HIDDEN, ffn=FFN)
    with pytest.raises(ValueError, match=r"parallel\.expert: 2 exceeds the model's 1 experts"):
        MoELayer(
            spec,
            layer=0,
            topology=topology,
            config=config.moe,
            device=topology.device,
            dtype=torch.float32,
        )
    bootstrap.stop(topology)
    return "refused"


def test_more_ranks_than_experts_is_refused_on_every_rank():
    assert run_ranks(too_many_ranks, 2) == ["refused", "refused"]
