"""Faults planted into the engine that only a GPU would show: the emulation catches each.

Run: pytest tests/gpu/emulated/test_faults.py
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.gpu.emulated import faults
from tests.gpu.emulated.device import DeviceError
from tests.gpu.emulated.guard import obstacle
from tests.gpu.emulated.runs import Job, Placed, run
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=f"not emulated: {obstacle()}")

Fault = Callable[[pytest.MonkeyPatch], None]
SHORT = {"max_new_tokens": 2}
JOB = Job("mixtral", sampling=SHORT)
COPIES_JOB = Job(
    "mixtral", sampling=SHORT, placement=Placed(copied=tuple(range(8)), precision="int4")
)
FAULTS = faults.FAULTS | faults.COPIES_FAULTS


def outcome(rank: int, guard: Path, path: Path, fault: Fault) -> str:
    """Run a job with a fault; return the error, or the tokens."""
    try:
        job = COPIES_JOB if fault in faults.COPIES_FAULTS else JOB
        result = run(rank, guard, path, job, fault)
    except DeviceError as error:
        return f"{type(error).__name__}: {error}"
    return str([record["token_ids"] for record in result.done])


def outcomes(rank: int, guard: Path, path: Path, planted: list[Fault]) -> list[str]:
    """Run a job with each fault, one after the other."""
    found = []
    for fault in planted:
        found.append(outcome(rank, guard, path, fault))
        if dist.is_initialized():
            dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def found(guard: Path, checkpoint: Callable[[str], Path]) -> list[dict[Fault, str]]:
    """What each of two ranks said of every fault."""
    planted = [faults.no_fault, faults.unread_copy_to_the_host, *FAULTS]
    results = run_ranks(outcomes, 2, guard, checkpoint("mixtral"), planted, timeout=170)
    return [dict(zip(planted, texts, strict=True)) for texts in results]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_caught_on_every_rank(fault: Fault, found: list[dict[Fault, str]]) -> None:
    for texts in found:
        assert re.match(FAULTS[fault], texts[fault]), texts[fault]


def test_a_result_that_is_read_before_it_arrives_gives_other_tokens(
    found: list[dict[Fault, str]],
) -> None:
    for texts in found:
        assert texts[faults.no_fault].startswith("[[")
        assert texts[faults.unread_copy_to_the_host].startswith("[[")
        assert texts[faults.unread_copy_to_the_host] != texts[faults.no_fault]
