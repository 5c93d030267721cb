"""MoE layers under capacity on real gloo ranks, against float64 and the slow reference.

Run: pytest tests/distributed/test_capacity_layer.py
"""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from engine.config import CapacityConfig, Config, ModelConfig, ParallelConfig
from engine.distributed import bootstrap
from engine.distributed.groups import expert_range
from engine.generation.memory import MoEShape, row_bound
from engine.moe.router import RouterSpec, gate_logits, route
from tests.helpers import reference
from tests.helpers.layer_cases import (
    CAPPED,
    DEEPSEEK,
    DEEPSEEK_V3,
    ERNIE,
    FFN,
    HIDDEN,
    LONGCAT,
    MINIMAX,
    MIXTRAL,
    OLMOE,
    TABLE,
    Doubled,
    build,
    correction_of,
    expert_scale_of,
    logit_bias_of,
    step_of,
    table_of,
    token_ids_of,
    tokens_of,
    weights_of,
)
from tests.helpers.ranks import RanksFailed, run_ranks


def run_layer(
    rank: int,
    counts: list[int],
    spec: RouterSpec,
    rules: list[dict],
    tensor: int = 1,
    with_shared: bool = False,
    poison: int | None = None,
) -> list[dict]:
    """Outputs and counters of one layer under one policy after the other."""
    config = Config(model=ModelConfig(path="unused"), parallel=ParallelConfig(tensor=tensor))
    topology = bootstrap.start(config)
    layer = build(topology, config, spec, Doubled() if with_shared else None)
    x = tokens_of(topology.data_rank, counts[topology.data_rank])
    ids = None
    if spec.token_table is not None:
        ids = token_ids_of(topology.data_rank, len(x), spec.token_table)
    if poison == rank:
        x[0] = float("nan")
    results = []
    for settings in rules:
        layer.set_capacity(CapacityConfig(**settings))
        entries = layer.telemetry.decisions.start()
        layer.telemetry.loads.clear()
        bytes_before, calls_before = layer.bytes_sent, layer.num_collectives
        out = layer(x, step_of(topology, counts, tensor), token_ids_T=ids)
        results.append(
            {
                "out": out,
                "bytes": layer.bytes_sent - bytes_before,
                "collectives": layer.num_collectives - calls_before,
                "decision": asdict(entries[0]) if entries else None,
                "account": asdict(layer.drops.read_and_reset()),
                "rows": layer.telemetry.loads.take_rows()[0],
            }
        )
    bootstrap.stop(topology)
    return results


def expected(
    counts: list[int], spec: RouterSpec, settings: dict
) -> tuple[list[torch.Tensor], reference.Outcome]:
    """Every rank's output in float64 from the reference's decision, and the decision."""
    gate, w13, w2 = weights_of(spec.num_logits)
    world, inputs, xs = len(counts), [], []
    family = reference.Family(
        normalize=spec.normalize,
        eps=spec.normalize_eps,
        scale=spec.scale,
        minimum=spec.normalize_min,
        expert_scale=expert_scale_of(spec.num_experts).tolist() if spec.expert_scale else None,
        zero_experts=spec.num_zero_experts,
    )
    # The reference sees zero experts as the router chooses them.
    plain = replace(spec, num_experts=spec.num_logits, num_zero_experts=0)
    for rank, count in enumerate(counts):
        x = tokens_of(rank, count)
        bias = logit_bias_of(spec.num_logits) if spec.logit_bias else None
        correction = correction_of(spec.num_logits) if spec.correction_bias else None
        routing = route(gate_logits(x, gate, plain, bias), plain, correction)
        scores, topk_ids = routing.scores_TE.numpy(), routing.topk_ids_TK.numpy()
        weights = routing.topk_weights_TK.numpy()
        if spec.token_table is not None:
            table = table_of(spec.token_table, spec.num_experts, spec.top_k).numpy()
            ids = token_ids_of(rank, count, spec.token_table).numpy()
            topk_ids, weights = reference.route_by_table(scores, table, ids, family)
        inputs.append(
            reference.RankInput(
                scores=scores,
                topk_ids=topk_ids,
                weights=weights,
                request=np.full(count, rank),
                position=np.arange(count),
                competes=np.ones(count, bool),
            )
        )
        xs.append(x.double())
    starts = [expert_range(spec.num_experts, world, rank)[0] for rank in range(world)]
    outcome = reference.decide(
        inputs,
        reference.Rules(**settings, layer=3),
        family,
        [*starts, spec.num_experts],
        spec.num_experts,
        spec.top_k,
    )
    outs = []
    for x, decided in zip(xs, outcome.ranks, strict=True):
        out = torch.tensor(decided.own)[:, None] * x
        for t, weights in enumerate(decided.weights):
            for expert, weight in weights.items():
                up = w13[expert].double() @ x[t]
                hidden = torch.nn.functional.silu(up[:FFN]) * up[FFN:]
                out[t] += weight * (w2[expert].double() @ hidden)
        outs.append(out)
    return outs, outcome


SETTINGS = [
    {"policy": "token_drop", "factor": "1"},
    {"policy": "token_drop", "factor": "1", "scope": "rank"},
    {"policy": "token_drop", "factor": "1.2", "consensus": "quota", "scope": "rank"},
    {"policy": "token_drop", "factor": "1", "consensus": "local", "order": "last"},
    {"policy": "token_drop", "factor": "0.5", "order": "random", "renormalize": True},
    {"policy": "token_drop", "factor": "0.7", "scope": "rank", "renormalize": True},
    {"policy": "expanded_drop", "factor": "1"},
    {"policy": "expanded_drop", "factor": "1", "tiers": "one", "scope": "rank"},
    {"policy": "expanded_drop", "factor": "1", "extras": "dropped", "consensus": "quota"},
]


@pytest.mark.parametrize(
    ("counts", "spec"),
    [
        ([13, 9], MIXTRAL),
        ([7, 0, 12], OLMOE),
        ([6, 11, 3, 8], DEEPSEEK),
        ([20], MIXTRAL),
        ([8, 5, 10], MINIMAX),
        ([9, 12], ERNIE),
        ([8, 5, 11], CAPPED),
        ([12, 7], DEEPSEEK_V3),
        ([9, 0, 11], replace(MINIMAX, score="sqrt_softplus", scale=1.5)),
        ([20], TABLE),
        ([13, 9], TABLE),
        ([7, 0, 12], TABLE),
        ([21], LONGCAT),
        ([13, 10], LONGCAT),
        ([8, 0, 15], LONGCAT),
    ],
)
def test_layers_compute_what_the_reference_decides(counts, spec):
    results = run_ranks(run_layer, len(counts), counts, spec, SETTINGS)
    for index, settings in enumerate(SETTINGS):
        outs, outcome = expected(counts, spec, settings)
        for rank, result in enumerate(results):
            one = result[index]
            torch.testing.assert_close(one["out"].double(), outs[rank], atol=1e-5, rtol=1e-4)
            assert one["rows"] == outcome.rank_rows()[rank]
            if one["decision"] is not None:
                assert (one["decision"]["keep_TK"] == outcome.ranks[rank].keep).all()
            decided = outcome.ranks[rank]
            kept = zip(decided.weights, decided.own, strict=True)
            orphans = [t for t, (each, own) in enumerate(kept) if not each and not own]
            assert not one["out"][orphans].any(), "an orphan gets exactly zero"
        accounts = [result[index]["account"] for result in results]
        dropped = sum(outcome.before) - sum(outcome.kept)
        routed = sum(account["routed"] for account in accounts)
        assert routed + outcome.zero == sum(counts) * spec.top_k
        if outcome.capacity is not None:  # else the step does not count
            assert sum(account["zero"] for account in accounts) == outcome.zero
        assert sum(account["dropped"] for account in accounts) == dropped
        assert sum(account["orphans"] for account in accounts) == outcome.orphans
        added = sum(outcome.computed) - sum(outcome.kept)
        assert sum(account["added"] for account in accounts) == added
    assert any(result[0]["decision"] is not None for result in results)


def events_of_a_dropless_call(rank: int, fails: bool) -> tuple[list[str], str]:
    """When the loads' exchange begins, is waited for, and the shared expert runs."""
    topology = bootstrap.start(Config(model=ModelConfig(path="unused")))
    events: list[str] = []

    class Noting(Doubled):
        def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
            events.append("shared")
            if fails:
                raise ArithmeticError("7 and a half")
            return super().forward(x_TD)

    config = Config(model=ModelConfig(path="unused"))
    layer = build(topology, config, RouterSpec(num_experts=4, top_k=2), Noting())
    collectives = layer._collectives
    begin = collectives.all_gather

    class Noted:
        def __init__(self, pending) -> None:
            self.pending = pending

        def wait(self) -> torch.Tensor:
            events.append("waited")
            return self.pending.wait()

    def all_gather(counts: torch.Tensor) -> Noted:
        events.append("begun")
        return Noted(begin(counts))

    pytest.MonkeyPatch().setattr(collectives, "all_gather", all_gather)
    raised = ""
    try:
        layer(tokens_of(rank, 5))
    except ArithmeticError as error:
        raised = str(error)
    bootstrap.stop(topology)
    return events, raised


def test_without_a_policy_the_shared_expert_runs_while_the_loads_are_exchanged():
    assert (
        run_ranks(events_of_a_dropless_call, 2, False) == [(["begun", "shared", "waited"], "")] * 2
    )


def test_a_shared_expert_that_fails_leaves_no_exchange_behind():
    expected = (["begun", "shared", "waited"], "7 and a half")
    assert run_ranks(events_of_a_dropless_call, 2, True) == [expected] * 2


def test_a_shared_expert_is_never_dropped():
    counts = [9, 14]
    results = run_ranks(run_layer, 2, counts, MIXTRAL, SETTINGS, 1, True)
    for index, settings in enumerate(SETTINGS):
        outs, _ = expected(counts, MIXTRAL, settings)
        for rank, result in enumerate(results):
            shared = 2 * tokens_of(rank, counts[rank]).double()
            torch.testing.assert_close(
                result[index]["out"].double(), outs[rank] + shared, atol=1e-5, rtol=1e-4
            )


def test_tensor_ranks_agree_on_their_shared_tokens():
    # Two tensor groups of two ranks: the capacity group is all four.
    settings = [{"policy": "token_drop", "factor": "1"}]
    counts = [9, 6]
    results = run_ranks(run_layer, 4, counts, MIXTRAL, settings, 2)
    assert torch.equal(results[0][0]["out"], results[1][0]["out"])
    assert torch.equal(results[2][0]["out"], results[3][0]["out"])
    # Global consensus does not care who holds a token: two ranks without tensor groups decide so.
    whole = run_ranks(run_layer, 2, counts, MIXTRAL, settings)
    for rank in range(2):
        torch.testing.assert_close(results[2 * rank][0]["out"], whole[rank][0]["out"])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_3_enough_capacity_is_bit_for_bit_dropless(world):
    settings = [{"policy": "none"}] + [
        {"policy": policy, "factor": factor, "consensus": consensus, "scope": scope}
        for policy in ("token_drop", "expanded_drop")
        for factor in ("4", "inf")
        for consensus in ("global", "quota", "local")
        for scope in ("expert", "rank")
    ]
    counts = [11, 5, 0, 8][:world]
    for result in run_ranks(run_layer, world, counts, MIXTRAL, settings):
        for one in result[1:]:
            assert torch.equal(one["out"], result[0]["out"])
            assert (one["bytes"], one["collectives"]) == (
                result[0]["bytes"],
                result[0]["collectives"],
            )


def test_11_extras_send_no_byte():
    settings = [
        {"policy": policy, "factor": "1", "consensus": consensus}
        for consensus in ("global", "quota", "local")
        for policy in ("token_drop", "expanded_drop")
    ]
    results = run_ranks(run_layer, 3, [16, 9, 12], OLMOE, settings)
    for result in results:
        for dropped, expanded in zip(result[::2], result[1::2], strict=True):
            assert dropped["bytes"] == expanded["bytes"]
    added = sum(result[1]["account"]["added"] for result in results)
    assert added > 0


def test_capacity_costs_global_and_quota_no_collective_more_than_dropless():
    base = {"policy": "token_drop", "factor": "1"}
    settings = [{"policy": "none"}, base, base | {"consensus": "quota"}]
    settings += [base | {"consensus": "local"}, base | {"selection": "radix"}]
    for result in run_ranks(run_layer, 2, [16, 9], MIXTRAL, settings):
        # counts, out, back; radix: loads, four histograms, counts, out, back
        assert [one["collectives"] for one in result] == [3, 3, 3, 3, 8]
        assert result[1]["bytes"] > 0


@pytest.mark.parametrize("consensus", ["global", "quota", "local"])
def test_scores_that_are_not_finite_stop_every_rank_and_name_layer_and_rank(consensus):
    settings = [{"policy": "token_drop", "factor": "1", "consensus": consensus}]
    with pytest.raises(RanksFailed) as caught:
        run_ranks(run_layer, 3, [6, 7, 5], MIXTRAL, settings, 1, False, 1)
    text = str(caught.value)
    assert text.count("layer 3: router scores are NaN or infinite on rank 1") == 3


def buffers_of(rank: int, settings: dict) -> tuple[int, int, list[int], int, int]:
    """Peak rows of several random steps against the bound, and how often buffers grew."""
    config = Config(model=ModelConfig(path="unused"))
    topology = bootstrap.start(config)
    layer = build(topology, config, MIXTRAL, None)
    capacity = CapacityConfig(**settings)
    layer.set_capacity(capacity)
    most = 40
    shape = MoEShape(
        num_ranks=2,
        top_k=2,
        num_experts=8,
        num_local_experts=len(layer.local_experts),
        hidden=HIDDEN,
        ffn=FFN,
    )
    bound = row_bound(shape, capacity, most, max_sequences=0)
    layer.reserve(bound.sent, bound.received, most)
    before = layer.row_buffers.num_bytes
    rows = []
    for step in range(6):
        counts = [most, most] if step == 0 else np.random.default_rng(step).integers(0, most + 1, 2)
        counts = [int(count) for count in counts]
        layer(tokens_of(10 * step + rank, counts[rank]), step_of(topology, counts, 1))
        rows += layer.telemetry.loads.take_rows()
    growths, after = layer.row_buffers.num_growths, layer.row_buffers.num_bytes
    bootstrap.stop(topology)
    return growths, bound.received, rows, before, after


@pytest.mark.parametrize("settings", SETTINGS)
def test_buffers_of_the_bound_are_never_outgrown(settings):
    for growths, bound, rows, before, after in run_ranks(buffers_of, 2, settings):
        assert growths == 0 and before == after
        assert max(rows) <= bound
        # A dispatched row has 16 bytes more, for the bitmap of its experts.
        row, dispatched = HIDDEN * 4, 40 * 2 + bound + _extra_sent(settings, bound)
        assert before == dispatched * (row + 16) + bound * row + 2 * 16


def _extra_sent(settings: dict, bound: int) -> int:
    """Rows of extras in the send buffer: what this rank's own experts may add."""
    return min(bound, 40 * 4) if settings["policy"] == "expanded_drop" else 0


def test_a_bounded_rank_needs_less_than_a_dropless_one():
    shape = MoEShape(
        num_ranks=8, top_k=2, num_experts=8, num_local_experts=1, hidden=4096, ffn=14336
    )
    capped = row_bound(shape, CapacityConfig(policy="token_drop", factor="1.5"), 8192, 0)
    dropless = row_bound(shape, CapacityConfig(), 8192, 0)
    assert (capped.received, dropless.received) == (24576, 32768)
    assert dropless.has_rounds and not capped.has_rounds
    inner = 3 * 14336
    rows = (8192 * 2 + 2 * 24576) * 4096 + 24576 * inner
    assert capped.activation_bytes(shape, torch.bfloat16, is_cuda=False) == rows * 2
    rows = (2 * 8192 * 2 + 3 * 32768) * 4096 + 32768 * inner
    assert dropless.activation_bytes(shape, torch.bfloat16, is_cuda=True) == rows * 2
    local = CapacityConfig(policy="token_drop", factor="1.5", consensus="local")
    assert row_bound(shape, local, 8192, 0).received == 24576 + 7
    # Decode tokens pass: at most one row each here, where each rank has one expert.
    assert row_bound(shape, CapacityConfig(policy="token_drop"), 8192, 64).received == 24576 + 512
    both = CapacityConfig(policy="token_drop", phases=("prefill", "decode"))
    assert row_bound(shape, both, 8192, 64).received == 24576
    assert row_bound(shape, CapacityConfig(policy="token_drop", factor="4"), 8192, 0) == dropless
