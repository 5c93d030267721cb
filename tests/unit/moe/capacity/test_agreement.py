"""The engine's decisions against the slow reference, on 1 to 8 ranks. Run: pytest
tests/unit/moe/capacity/test_agreement.py
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from engine.config import CapacityConfig
from engine.distributed.collectives import Pending
from engine.moe.capacity.agreement import CapacityAgreement
from engine.moe.dispatch.chunk_layout import ExpertLayout
from engine.moe.dispatch.plan import ExpertOrder
from engine.moe.router import RouterSpec, route
from engine.moe.step import MoEStep
from engine.profiling.device_clocks import NoClock
from tests.helpers.capacity_cases import Case, cases, expected, make_tokens, run_engine

MANY = settings(
    max_examples=350,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def assert_same(case: Case) -> None:
    tokens = make_tokens(case)
    outcome = expected(case, tokens)
    decisions = run_engine(case, tokens)
    bounds = case.bounds
    for rank, (decision, wanted) in enumerate(zip(decisions, outcome.ranks, strict=True)):
        if decision is None:
            assert wanted.keep.all() and not any(wanted.extras), "nothing could be dropped or added"
            continue
        np.testing.assert_array_equal(decision.keep_TK.numpy(), wanted.keep)
        mine = tokens.routing.zero_weight_T
        if mine is not None:
            own = mine[torch.from_numpy(tokens.owner == rank)].tolist()
            assert own == pytest.approx(wanted.own, rel=1e-5)
        got = [[] for _ in wanted.extras]
        if decision.extra_Te is not None:
            for t, e in decision.extra_Te.nonzero().tolist():
                got[t].append(e + bounds[rank])
        assert got == wanted.extras
        for t, weights in enumerate(wanted.weights):
            ids, values = decision.ids_TM[t].tolist(), decision.weights_TM[t].tolist()
            computed = {e: v for e, v in zip(ids, values, strict=True) if e >= 0}
            assert computed == pytest.approx(weights, rel=1e-5)
            assert all(v == 0.0 for e, v in zip(ids, values, strict=True) if e < 0)
    if all(decision is not None for decision in decisions):
        for rank, decision in enumerate(decisions):
            zero = int((tokens.chosen.topk_ids_TK >= case.num_experts).sum())
            assert decision.before_WE.sum() == sum(case.tokens) * case.top_k - zero
            own = slice(bounds[rank], bounds[rank + 1])
            # Extras stay on their rank, so each rank knows its own experts' rows exactly.
            received = decision.counts_WE.sum(0)[own]
            assert received.tolist() == outcome.computed[own]


@MANY
@given(cases())
def test_every_decision_is_the_references(case):
    assert_same(case)


@MANY
@given(cases(policy="token_drop", consensus="global"))
def test_token_drop_by_global_consensus_is_the_references(case):
    assert_same(case)


@MANY
@given(cases(policy="expanded_drop"))
def test_expanded_drop_is_the_references(case):
    assert_same(case)


@MANY
@given(cases(shares="drawn"))
def test_capacity_shared_out_by_speed_is_the_references(case):
    assert_same(case)


@settings(MANY, max_examples=150)
@given(cases(zero_experts="drawn"))
def test_with_zero_experts_every_decision_is_the_references(case):
    assert_same(case)


@pytest.mark.slow
@settings(MANY, max_examples=250)
@given(cases(consensus="global"))
def test_gather_and_radix_find_identical_sets(case):
    tokens = make_tokens(case)
    gather = run_engine(dataclasses.replace(case, selection="gather"), tokens)
    radix = run_engine(dataclasses.replace(case, selection="radix"), tokens)
    for one, other in zip(gather, radix, strict=True):
        if one is None:
            assert other is None
            continue
        np.testing.assert_array_equal(one.ids_TM.numpy(), other.ids_TM.numpy())
        np.testing.assert_array_equal(one.weights_TM.numpy(), other.weights_TM.numpy())


class Unfinished:
    """Collectives of a group of one that end when somebody waits; fails: with an error."""

    rank, size, bytes_sent, num_collectives = 0, 1, 0, 0

    def __init__(self, fails: bool) -> None:
        self.fails = fails
        self.started = self.waited = 0

    def all_gather(self, part: torch.Tensor) -> Pending:
        return self._start(part[None])

    def all_reduce(self, part: torch.Tensor) -> Pending:
        return self._start(part)

    def _start(self, result: torch.Tensor) -> Pending:
        self.started += 1
        outer = self

        class Late:
            def wait(self) -> torch.Tensor:
                outer.waited += 1
                if outer.fails:
                    raise RuntimeError("another rank has left")
                return result

        return Late()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    "rules",
    [
        {"consensus": "global", "selection": "gather"},
        {"consensus": "global", "selection": "radix"},
        {"consensus": "quota"},
        {"consensus": "local"},
    ],
)
def test_overlapped_work_that_fails_leaves_no_collective_in_flight(rules, fails):
    spec = RouterSpec(num_experts=4, top_k=2, normalize=True, scale=1.0, score="softmax")
    collectives = Unfinished(fails)
    agreement = CapacityAgreement(
        spec,
        CapacityConfig(policy="token_drop", factor="0.5", **rules),
        layer=0,
        layout=ExpertLayout([0, 4], 1),
        collectives=collectives,
    )
    numbers = torch.arange(6, dtype=torch.int32)
    step = MoEStep(
        request_T=numbers,
        position_T=numbers,
        eligible_T=None,
        num_own_eligible=6,
        num_tokens_W=(6,),
        num_eligible=6,
    )

    def work() -> None:
        assert (collectives.started, collectives.waited) == (communicates, 0)
        raise MemoryError("the shared expert does not fit")

    communicates = rules["consensus"] != "local"
    with pytest.raises(MemoryError, match="does not fit"):
        agreement.decide(route(torch.randn(6, 4), spec), step, overlap=work)
    assert collectives.waited == collectives.started


class Watched:
    """Collectives of one rank that record when a gather is waited for."""

    rank, size, bytes_sent = 0, 1, 0

    def __init__(self, events: list[str]) -> None:
        self._events = events

    def all_gather(self, part: torch.Tensor) -> Pending:
        events = self._events
        events.append("start")

        class Gather:
            def wait(self) -> torch.Tensor:
                events.append("wait")
                return part[None]

        return Gather()

    def all_reduce(self, part: torch.Tensor) -> Pending:
        return self.all_gather(part)


@pytest.mark.parametrize("binds", [False, True])
def test_the_order_is_known_before_the_counts_of_all_are_read(binds):
    """A GPU packs the rows while the counts travel."""
    events: list[str] = []
    config = CapacityConfig(policy="token_drop", factor="0.5", consensus="quota")
    layout = ExpertLayout([0, 4], 1)
    router = RouterSpec(num_experts=4, top_k=2)
    watched: Any = Watched(events)
    agreement = CapacityAgreement(router, config, layer=0, layout=layout, collectives=watched)
    routing = route(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), router)

    def on_order(order: ExpertOrder) -> None:
        events.append("order")

    if binds:
        step = MoEStep.whole(torch.zeros(6), torch.arange(6), (6,))
        read = torch.Tensor.cpu
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "cpu", lambda self: events.append("read") or read(self))
            agreement.decide(routing, step, layout=layout, on_order=on_order)
        assert events.index("order") < events.index("read")
    else:
        agreement.keep_all(routing, clock=NoClock(), overlap=None, layout=layout, on_order=on_order)
        assert events == ["start", "order", "wait"]


@pytest.mark.parametrize("selection", ["gather", "radix"])
def test_after_equal_claims_the_next_calls_need_no_second_selection(selection):
    """As of requests that share a prefix: all scores are equal."""
    events: list[str] = []
    config = CapacityConfig(policy="token_drop", factor="0.5", selection=selection)
    layout = ExpertLayout([0, 4], 1)
    router = RouterSpec(num_experts=4, top_k=2)
    watched: Any = Watched(events)
    agreement = CapacityAgreement(router, config, layer=0, layout=layout, collectives=watched)
    routing = route(torch.zeros(6, 4), router)
    step = MoEStep.whole(torch.zeros(6), torch.arange(6), (6,))
    decisions, selections = [], []
    for _ in range(70):
        orders: list[ExpertOrder] = []
        decisions.append(agreement.decide(routing, step, layout=layout, on_order=orders.append))
        selections.append(len(orders))
    assert selections[:2] == [2, 1] and selections.count(2) == 2, "again after 64 calls"
    for decision in decisions[1:]:
        assert torch.equal(decision.ids_TM, decisions[0].ids_TM)
