"""DeepEP and Transformer Engine's EP by fakes of their contracts on emulated CUDA, beside NCCL.

Run: pytest tests/gpu/emulated/test_library_transports.py
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from engine.config.loader import config_from_tree
from engine.distributed import bootstrap
from engine.moe.dispatch.transports import deep_ep, te_ep
from engine.moe.dispatch.transports.deep_ep import DeepEP
from engine.moe.dispatch.transports.te_ep import TransformerEngineEP
from tests.gpu.emulated.cuda import emulated_cuda
from tests.gpu.emulated.device import DEVICE
from tests.gpu.emulated.ep_libraries import patch_libraries
from tests.gpu.emulated.guard import obstacle
from tests.gpu.emulated.runs import Job, Result, run
from tests.helpers import fake_deep_ep
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

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=f"not emulated: {obstacle()}")

CASES = {
    "some dropped": Case((0, 4, 8), 3, (7, 2), dropped=0.4),
    "unequal ranks": Case((0, 2, 7), 3, (6, 0), dropped=0.1),
}
TREE = {
    "model": {"path": "unused"},
    "runtime": {"device": "cuda", "shared_memory": False, "timeout_s": 30.0},
}


def results(rank: int, guard: Path, case: Case) -> dict[str, Any]:
    """Run a call by each transport; return the sums, those of NCCL, the waits and the launches."""
    config = config_from_tree(TREE)
    made = {}
    with emulated_cuda(guard), pytest.MonkeyPatch.context() as patch:
        patch_libraries(patch)
        patch.setattr(fake_deep_ep, "HIDDEN", (WIDTH,))
        topology = bootstrap.start(config)
        setup = setup_of(case, topology.expert, topology.device)
        outgoing = routed(case, rank, device="cuda")
        whole, _ = by_nccl(setup, outgoing)
        for kind in ("throughput", "low latency", "te_ep"):
            patch.setattr(deep_ep, "LOW_LATENCY_WIDTHS", (WIDTH,) * (kind == "low latency"))
            module = te_ep if kind == "te_ep" else deep_ep
            assert module.obstacle(setup, config.moe) is None
            transport = module.make(setup)
            transport.reserve(limits_of(case))
            DEVICE.reset_counts()
            sums = by_transport(transport, setup, outgoing)
            counts = dict(DEVICE.syncs), sum(DEVICE.kernels.values())
            made[kind] = sums.cpu(), whole.cpu(), *counts
        bootstrap.stop(topology)
    return made


@pytest.mark.parametrize(
    "name", ["some dropped", pytest.param("unequal ranks", marks=pytest.mark.long)]
)
def test_sums_are_those_of_nccl_and_the_host_reads_nothing(name: str, guard: Path) -> None:
    for of_rank in run_ranks(results, 2, guard, CASES[name], timeout=120):
        for kind, (sums, whole, syncs, kernels) in of_rank.items():
            torch.testing.assert_close(sums, whole, rtol=2**-6, atol=2**-5)
            assert not syncs, kind
            assert 0 < kernels < 50, kind
            if kind == "low latency":
                assert torch.equal(sums, whole)


def with_libraries(patch: pytest.MonkeyPatch, widths: tuple[int, ...]) -> None:
    """Put the libraries there, DeepEP's low latency with kernels for these widths."""
    patch_libraries(patch)
    patch.setattr(deep_ep, "LOW_LATENCY_WIDTHS", widths)
    patch.setattr(fake_deep_ep, "HIDDEN", widths)


def job(transport: str, moe: dict[str, Any]) -> Job:
    dispatch = {"transport": transport}
    settings = {
        "model": {"dtype": "bfloat16"},
        "moe": {"experts": {"backend": "grouped_mm"}, "dispatch": dispatch, **moe},
    }
    uses = {"deepep": ((DeepEP, "combine"),), "te_ep": ((TransformerEngineEP, "combine"),)}
    return Job("mixtral", settings, uses=uses.get(transport, ()))


def of_jobs(
    rank: int, guard: Path, path: Path, transport: str, widths: tuple[int, ...], moe: dict[str, Any]
) -> tuple[Result, Result]:
    """Run a job by NCCL and by a library."""
    plain = run(rank, guard, path, job("nccl", moe))
    made = run(rank, guard, path, job(transport, moe), plant=partial(with_libraries, widths=widths))
    return plain, made


DROPS = {"capacity": {"policy": "token_drop", "factor": "1"}}


@pytest.mark.long
@pytest.mark.parametrize("moe", [{}, DROPS], ids=["dropless", "token_drop"])
@pytest.mark.parametrize("kind", ["throughput", "low latency", "te_ep"])
def test_completions_are_those_of_nccl(kind, moe, guard, checkpoint) -> None:
    path = checkpoint("mixtral")
    widths = (AutoConfig.from_pretrained(path).hidden_size,) if kind == "low latency" else ()
    transport = "te_ep" if kind == "te_ep" else "deepep"
    args = (guard, path, transport, widths, moe)
    for plain, made in run_ranks(of_jobs, 2, *args, timeout=200):
        assert made.done
        for one, other in zip(plain.done, made.done, strict=True):
            if kind == "low latency":  # sums in the router's order, to the bit
                assert one == other
            else:
                assert abs(one["logprobs"][0] - other["logprobs"][0]) < 0.1
