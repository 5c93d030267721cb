"""DeepEP and Transformer Engine's EP by fakes of their contracts, on real gloo ranks, beside NCCL.

Run: pytest tests/distributed/test_library_transports.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.config import Config, ModelConfig, RuntimeConfig
from engine.distributed import bootstrap
from engine.distributed.groups import Topology
from engine.moe.dispatch.transports import deep_ep
from engine.moe.dispatch.transports.deep_ep import DeepEP
from engine.moe.dispatch.transports.te_ep import TransformerEngineEP
from engine.moe.dispatch.transports.transport import DeviceTransport, Limits, Setup
from tests.helpers import fake_deep_ep, fake_te_ep
from tests.helpers.fake_transport import ContractError
from tests.helpers.ranks import run_ranks
from tests.helpers.transport_cases import (
    WIDTH,
    Case,
    by_nccl,
    by_transport,
    limits_of,
    routed,
    setup_of,
)

CASES = {
    "one expert per rank": Case((0, 1, 2), 2, (5, 3)),
    "top-1": Case((0, 4, 8), 1, (6, 9)),
    "some dropped": Case((0, 4, 8), 3, (7, 2), dropped=0.4),
    "a rank without tokens": Case((0, 4, 8), 2, (0, 8), dropped=0.2),
    "unequal ranks": Case((0, 2, 7), 3, (6, 6), dropped=0.1),
    "four ranks": Case((0, 2, 4, 7, 9), 3, (3, 0, 5, 4)),
}
ROUNDED = {"rtol": 2**-6, "atol": 2**-5}


def make(kind: str, setup: Setup, patch: pytest.MonkeyPatch) -> DeviceTransport:
    """Return a transport over its fake; low latency takes the small width of the cases."""
    if kind == "te_ep":
        return TransformerEngineEP(
            setup, fake_te_ep.fake_modules()["transformer_engine.pytorch.ep"]
        )
    widths = (WIDTH,) if kind == "low latency" else ()
    patch.setattr(deep_ep, "LOW_LATENCY_WIDTHS", widths)
    patch.setattr(fake_deep_ep, "HIDDEN", widths)
    return DeepEP(setup, fake_deep_ep.fake_module())


KINDS = ("throughput", "low latency", "te_ep")


def _topology() -> Topology:
    runtime = RuntimeConfig(device="cpu", shared_memory=False)
    return bootstrap.start(Config(model=ModelConfig(path="unused"), runtime=runtime))


def results(rank: int, case: Case) -> dict[str, tuple[Any, ...]]:
    """Run two calls per kind with other tokens, and return what came of the second."""
    setup = setup_of(case, _topology().expert)
    made = {}
    for kind in KINDS:
        with pytest.MonkeyPatch.context() as patch:
            transport = make(kind, setup, patch)
            assert transport.reserve(limits_of(case)) > 0
            # The first call is one of throughput, after which low latency needs a clean buffer.
            by_transport(transport, setup, routed(case, rank)._replace(most_tokens=None))
            outgoing = routed(case, rank, seed=1)
            sums = by_transport(transport, setup, outgoing)
            one = (outgoing.ids_TK >= 0).sum(1) <= 1
            made[kind] = (sums, *by_nccl(setup, outgoing), one)
    return made


@pytest.mark.parametrize("name", CASES)
def test_sums_are_those_of_nccl_up_to_the_rounding_of_partial_sums(name: str) -> None:
    case = CASES[name]
    most = max(b - a for a, b in zip(case.first_experts, case.first_experts[1:], strict=False))
    for of_rank in run_ranks(results, len(case.counts), case):
        for kind, (sums, whole, partial, one) in of_rank.items():
            torch.testing.assert_close(sums, whole, **ROUNDED)
            assert torch.equal(sums[one], whole[one])
            if kind == "low latency":  # the token's own rank sums, in the router's order
                assert torch.equal(sums, whole)
            # Two ranks' sums are the same in either order.
            exact = kind == "throughput" or (kind == "te_ep" and most == 1)
            if exact and len(case.counts) == 2:
                assert torch.equal(sums, partial)


def refused(rank: int, kind: str, received: int) -> str:
    """Dispatch within a limit of rows received; return what was refused."""
    case = Case((0, 4, 8), 2, (4, 4))
    setup = setup_of(case, _topology().expert)
    with pytest.MonkeyPatch.context() as patch:
        transport = make(kind, setup, patch)
        transport.reserve(Limits(tokens=4, sent=8, received=received))
        try:
            transport.dispatch(routed(case, rank)._replace(most_received=None, most_tokens=None))
        except ContractError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(("kind", "word"), [("throughput", "tokens arrive"), ("te_ep", "capacity")])
def test_buffers_have_room_for_the_bound_and_no_more(kind: str, word: str) -> None:
    assert run_ranks(refused, 2, kind, 16) == ["", ""]
    assert word in "".join(run_ranks(refused, 2, kind, 4))
