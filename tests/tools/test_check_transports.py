"""tools/check_transports.py: what it says without GPUs, and its ranks on emulated CUDA."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.emulated.cuda import emulated_cuda
from tests.gpu.emulated.ep_libraries import patch_libraries
from tests.gpu.emulated.guard import compile_guard, obstacle
from tests.helpers.ranks import run_ranks
from tools import check_transports


def test_without_gpus_each_transport_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_transports.main(["--transports", "deepep,te_ep"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["transport"] for line in lines] == ["deepep", "te_ep"]
    assert all(line["not_here"].startswith("it needs two GPUs or more, and 0") for line in lines)


def test_an_unknown_transport_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check_transports.main(["--transports", "nccl"])
    assert "nccl; known are symmetric, deepep, te_ep" in capsys.readouterr().err


def checked(rank: int, guard: Path, name: str, wrong: bool) -> int:
    """Be a rank of the check on emulated CUDA; return the exit code."""
    options = argparse.Namespace(width=16, experts_per_rank=4, top_k=2, tokens=6)
    with emulated_cuda(guard), pytest.MonkeyPatch.context() as patch:
        patch_libraries(patch)
        patch.setattr(torch.cuda, "set_sync_debug_mode", lambda _: None)
        patch.setattr(check_transports, "ROUNDS", 1)
        if wrong and rank == 1:
            expected = check_transports._expected
            patch.setattr(check_transports, "_expected", lambda given: expected(given) * 1.1)
        return check_transports._rank(name, options)


@pytest.mark.long
@pytest.mark.skipif(obstacle() is not None, reason=f"not emulated: {obstacle()}")
@pytest.mark.parametrize(("name", "wrong"), [("deepep", True), ("te_ep", False)])
def test_ranks_agree_whether_the_sums_are_right(name: str, wrong: bool, tmp_path: Any) -> None:
    guard = compile_guard(tmp_path)
    assert run_ranks(checked, 2, guard, name, wrong, timeout=120) == [int(wrong)] * 2
