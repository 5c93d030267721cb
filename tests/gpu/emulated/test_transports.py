"""Transports on emulated CUDA: the completions of nccl, with no count read on the host.

Run: pytest tests/gpu/emulated/test_transports.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.moe.capacity.device_agreement import DeviceAgreement
from engine.moe.dispatch.transports.symmetric import SymmetricTransport
from engine.moe.experts import GroupedMMExperts
from tests.gpu.emulated.guard import obstacle
from tests.gpu.emulated.runs import PROMPTS, SCATTERED, Job, Placed, Result, run
from tests.helpers.ranks import run_ranks
from tools.make_random_checkpoint import make_checkpoint

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=f"not emulated: {obstacle()}")

SYMMETRIC = (
    (SymmetricTransport, "dispatch"),
    (SymmetricTransport, "combine"),
    (GroupedMMExperts, "run_bounded"),
)
DECIDED = ((DeviceAgreement, "decide_on_device"),)
SHORT = [[7], [3, 5], [1, 2, 3]]  # ranks from the fourth on have no request


def job(family: str, transport: str, moe: dict[str, Any], **more: Any) -> Job:
    used = more.pop("uses", ())
    settings = {
        "model": {"dtype": "bfloat16"},
        "moe": {
            "experts": {"backend": "grouped_mm"},
            **moe,
            "dispatch": {"transport": transport, "deduplicate": False, **moe.get("dispatch", {})},
        },
    }
    uses = (*SYMMETRIC, *used) if transport == "symmetric" else ()
    return Job(family, settings, uses=uses, **more)


def both(rank: int, guard: Path, path: Path, jobs: tuple[Job, Job]) -> tuple[Result, Result]:
    """Run a job with nccl and with symmetric memory."""
    first, second = (run(rank, guard, path, each) for each in jobs)
    return first, second


def drop(**capacity: Any) -> dict[str, Any]:
    return {"capacity": {"policy": "token_drop", "factor": "1", **capacity}}


JOBS: dict[str, tuple[int, str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": (2, "mixtral", {}, {}),
    "olmoe, uneven experts": (3, "olmoe", {}, {}),
    "mixtral, ranks without tokens": (4, "mixtral", {}, {"prompts": SHORT}),
    "token_drop gather": (2, "mixtral", drop(selection="gather"), {"uses": DECIDED}),
    "token_drop gather, decode too": (
        3,
        "olmoe",
        drop(selection="gather", phases=["prefill", "decode"]),
        {"uses": DECIDED},
    ),
    "token_drop radix": (2, "mixtral", drop(selection="radix"), {"uses": DECIDED}),
    "token_drop quota": (2, "olmoe", drop(consensus="quota", scope="rank"), {"uses": DECIDED}),
    "token_drop local": (2, "olmoe", drop(consensus="local"), {"uses": DECIDED}),
    "homes anywhere": (2, "qwen3_moe", {}, {"placement": Placed(SCATTERED)}),
    "shared expert": (2, "qwen2_moe", {}, {}),
    "static decode": (2, "olmoe", {"dispatch": {"exchange": "auto"}}, {}),
}
LONG = {
    "olmoe, uneven experts",
    "token_drop gather, decode too",
    "mixtral, ranks without tokens",
    "token_drop radix",
    "token_drop quota",
    "token_drop local",
    "homes anywhere",
    "shared expert",
    "static decode",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in JOBS]
)
def test_completions_equal_those_of_nccl(name: str, guard: Path, tmp_path: Path) -> None:
    world, family, moe, more = JOBS[name]
    make_checkpoint(family, tmp_path, overrides={"vocab_size": 97, "num_hidden_layers": 2})
    jobs = tuple(job(family, transport, moe, **more) for transport in ("nccl", "symmetric"))
    results = run_ranks(both, world, guard, tmp_path, jobs, timeout=120)
    for nccl, symmetric in results:
        assert symmetric.done == nccl.done
        uses = [record["capacity"] for record in symmetric.done]
        assert any(use["dropped"] for use in uses) == ("capacity" in moe)
        assert len(symmetric.done) == len(more.get("prompts", PROMPTS))
        assert not _syncs_of_layers(symmetric)
        assert _syncs_of_layers(nccl)


def _syncs_of_layers(result: Result) -> list[str]:
    """Return where MoE layers made the host wait; drops are read once, for the report."""
    return [line for line in result.syncs if "/moe/" in line and "/moe/stats.py" not in line]


def refused(rank: int, guard: Path | None, path: Path, given: Job) -> str:
    try:
        run(rank, guard, path, given)
    except ValueError as error:
        return str(error)
    return ""


def test_the_cpu_is_refused_on_every_rank_before_weights_are_read(tmp_path: Path) -> None:
    make_checkpoint("mixtral", tmp_path, overrides={"vocab_size": 97, "num_hidden_layers": 2})
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    texts = run_ranks(refused, 2, None, tmp_path, job("mixtral", "symmetric", {}), timeout=60)
    for text in texts:
        assert "moe.dispatch.transport = 'symmetric': it runs on CUDA devices alone" in text
