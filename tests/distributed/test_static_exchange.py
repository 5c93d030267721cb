"""The static exchange of small steps, on real gloo ranks: the results of the counted way.

Run: pytest tests/distributed/test_static_exchange.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.config import (
    Config,
    DispatchConfig,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    RuntimeConfig,
)
from engine.distributed import bootstrap
from engine.layers.mlp import DenseMLP
from engine.moe.dispatch.row_format import RowFormats
from engine.moe.dispatch.static_layout import bucket_for
from engine.moe.dispatch.two_batch import run_to_end
from engine.moe.placement.placement import LayerPlacement
from engine.moe.router import RouterSpec
from tests.helpers.layer_cases import (
    CAPPED,
    DEEPSEEK,
    FFN,
    HIDDEN,
    MIXTRAL,
    OLMOE,
    Doubled,
    build,
    tokens_of,
)
from tests.helpers.ranks import run_ranks

ONE_EACH = RouterSpec(num_experts=3, top_k=2)  # one expert per rank
TOP_1 = RouterSpec(num_experts=8, top_k=1)
MANY = RouterSpec(num_experts=8, top_k=6)  # more per token than a rank has
ZEROS = RouterSpec(num_experts=8, top_k=3, num_zero_experts=3)


def outputs(
    rank: int,
    counts: list[int],
    spec: RouterSpec,
    dispatch: dict[str, Any],
    tensor: int,
    placement: LayerPlacement | None,
    native: bool,
) -> dict[str, Any]:
    """Both ways of one layer, with what each called and counted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCKSTEP_NATIVE", str(int(native)))
        if dispatch:  # rows of 64 bytes are deduplicated as if they were longer
            patch.setattr(RowFormats, "dispatch_bytes", property(lambda _: 10**6))
        config = Config(
            model=ModelConfig(path="unused"),
            moe=MoEConfig(dispatch=DispatchConfig(exchange="static", **dispatch)),
            parallel=ParallelConfig(tensor=tensor),
            runtime=RuntimeConfig(shared_memory=False),
        )
        topology = bootstrap.start(config)
        x = tokens_of(topology.data_rank, counts[topology.data_rank])
        layer = build(topology, config, spec, Doubled(), placement=placement)
        bucket = bucket_for(-(-max(counts) // tensor))
        found = {}
        # Many tokens over all ranks: rows are deduplicated where they can be.
        for name, taken in (("counted", None), ("static", bucket)):
            calls, loads = layer.num_collectives, layer.telemetry.loads
            loads.clear()
            out = run_to_end(layer.steps(x, None, 10**9, bucket=taken))
            found[name] = {
                "out": out,
                "collectives": layer.num_collectives - calls,
                "experts": loads.layers[3].experts.tolist(),
                "own": loads.layers[3].own_after.tolist(),
                "rows": loads.take_rows()[0],
            }
        # Padded by the caller, with tokens that do not exist between those that do.
        holes = torch.zeros(2 * len(x), HIDDEN).index_copy_(0, 2 * torch.arange(len(x)), x) + 1e-3
        live = torch.arange(2 * len(x)) % 2 == 0
        holes[live] = x
        layer.telemetry.loads.clear()
        wide = bucket_for(-(-2 * max(counts) // tensor))
        out = run_to_end(layer.steps(holes, None, 10**9, bucket=wide, live_T=live))
        found["holes"] = {
            "out": out[live],
            "own": layer.telemetry.loads.layers[3].own_after.tolist(),
        }
        bootstrap.stop(topology)
    return found


CASES = [
    ([13, 9], MIXTRAL, 1),
    ([7, 0, 12], OLMOE, 1),
    ([5, 1, 3], ONE_EACH, 1),
    ([0, 0], MIXTRAL, 1),
    ([1, 0, 2, 30], DEEPSEEK, 1),
    ([1, 1, 1, 1], MANY, 1),
    ([4, 9, 0, 2], TOP_1, 1),
    ([6, 3], CAPPED, 1),
    ([20], MIXTRAL, 1),
    ([9, 4], OLMOE, 2),
    ([5, 0, 8], ZEROS, 1),
]


def run_case(counts, spec, tensor=1, dispatch=None, placement=None, native=True):
    world = len(counts) * tensor
    args = counts, spec, dispatch or {}, tensor, placement, native
    return run_ranks(outputs, world, *args, timeout=120)


@pytest.mark.parametrize(
    ("counts", "spec", "tensor"),
    [
        each if n < 5 else pytest.param(*each, marks=pytest.mark.long)
        for n, each in enumerate(CASES)
    ],
)
def test_no_bit_of_a_result_and_no_load_differs_from_the_counted_way(counts, spec, tensor):
    for result in run_case(counts, spec, tensor):
        counted, static = result["counted"], result["static"]
        assert torch.equal(static["out"], counted["out"])
        assert [static[name] for name in ("experts", "own", "rows")] == [
            counted[name] for name in ("experts", "own", "rows")
        ]
        assert static["collectives"] == (2 if len(counts) * tensor > 1 else 0)
        assert result["holes"]["own"] == static["own"], "tokens that do not exist have no rows"
        assert torch.equal(result["holes"]["out"], static["out"])


@pytest.mark.parametrize("native", [pytest.param(False, marks=pytest.mark.long), True])
@pytest.mark.parametrize(
    ("counts", "spec"), [([13, 9], MIXTRAL), ([7, 0, 12], OLMOE), ([1, 5, 2, 30], MANY)]
)
def test_with_partial_sums_it_is_what_they_are_of_deduplicated_rows(counts, spec, native):
    for result in run_case(counts, spec, dispatch={"partial_sums": True}, native=native):
        assert torch.equal(result["static"]["out"], result["counted"]["out"])
        assert result["static"]["collectives"] == 2


def test_copies_take_rows_by_the_deal_and_change_no_bit():
    # Experts 0 and 1 have copies elsewhere; homes are in no order.
    placement = LayerPlacement((0, 2, 1, 0, 2, 1, 1, 2), ((1, 2), (0,), (), (), (), (), (), ()))
    counts = [7, 4, 11]
    results = run_case(counts, MIXTRAL, placement=placement)
    taken = 0
    for result in results:
        assert torch.equal(result["static"]["out"], result["counted"]["out"])
        assert result["static"]["experts"] == result["counted"]["experts"]
        taken += sum(result["static"]["own"])
    assert taken == MIXTRAL.top_k * sum(counts)
    # Instances of rank 0: experts 0 and 3, and the copy of 1, of which it takes about half.
    own, copy = results[0]["static"]["own"][0], results[0]["static"]["own"][2]
    everything = results[0]["static"]["experts"]
    assert 0 < own < everything[0] and 0 < copy < everything[1]


def refused(rank: int, moe: MoEConfig, shared: bool) -> str:
    config = Config(model=ModelConfig(path="unused"), moe=moe)
    topology = bootstrap.start(config)
    mlp = DenseMLP(HIDDEN, FFN, topology.device, torch.float32) if shared else None
    with pytest.raises(ValueError) as error:
        build(topology, config, MIXTRAL, mlp)
    bootstrap.stop(topology)
    return str(error.value)


def test_a_layer_that_needs_counts_is_refused_in_words_on_every_rank():
    sums = DispatchConfig(exchange="static", partial_sums=True)
    balanced = MoEConfig(dispatch=sums, shared_expert="balanced")
    rounded = MoEConfig(dispatch=DispatchConfig(exchange="static", dtype="bf16"))
    for moe, shared, words in (
        (balanced, True, "moe.shared_expert = balanced"),
        (rounded, False, "moe.dispatch.dtype"),
    ):
        for text in run_ranks(refused, 2, moe, shared):
            assert text.startswith(f"moe.dispatch.exchange = 'static': {words}")
            assert text.endswith("; use auto")
