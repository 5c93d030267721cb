"""The parts of tools/gpu_suite.py on emulated CUDA: what they do there only, before a GPU has it.

Run: pytest -m long tests/gpu/emulated/test_gpu_suite.py
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.emulated.cuda import emulated_cuda
from tests.gpu.emulated.guard import obstacle
from tests.helpers.ranks import run_ranks

pytestmark = [
    pytest.mark.skipif(obstacle() is not None, reason=f"not emulated: {obstacle()}"),
    pytest.mark.long,
]

TOOLS = Path(__file__).resolve().parents[3] / "tools"
# Those that run in one process; the emulation is not passed on to the ranks of others. Host waits,
# which `step` is about, are refused in every run of the emulation.
PARTS = ("speed", "graphs", "experts", "pipeline", "capacity", "attention", "memory", "clocks")


class Profile:
    """A profiler of an emulated GPU, which has no events."""

    def __init__(self, **_: Any) -> None:
        self.start = self.stop = lambda: None
        self.events = list


def run_part(rank: int, guard: Path, name: str) -> list[dict[str, Any]]:
    """Run a part on an emulated GPU; return its checks."""
    os.environ["LOCKSTEP_NATIVE"] = "0"
    sys.path.insert(0, str(TOOLS))
    from gpu_checks.check import Settings
    from gpu_checks.parts import PARTS
    from make_random_checkpoint import make_checkpoint

    # transformers imports what makes a model when it makes one; with an emulated GPU it cannot.
    with tempfile.TemporaryDirectory() as folder:
        for family in ("mixtral", "deepseek_v2"):
            make_checkpoint(family, Path(folder, family))
    settings = Settings(device=torch.device("cuda"), families=("mixtral",), is_tiny=True)
    with pytest.MonkeyPatch.context() as patch, emulated_cuda(guard):
        for answer in ("max_memory_reserved", "get_sync_debug_mode", "set_sync_debug_mode"):
            patch.setattr(torch.cuda, answer, lambda *_: 0)
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        patch.setattr(torch.profiler, "profile", Profile)
        return [check.plain() for check in PARTS[name].run(settings)]


@pytest.mark.parametrize("name", PARTS)
def test_a_part_passes_on_emulated_cuda(name: str, guard: Path) -> None:
    (checks,) = run_ranks(run_part, 1, guard, name, timeout=280)
    assert checks
    if (
        name == "clocks"
    ):  # a busy machine stops the clocks' readers: that the part runs is the claim
        return
    assert not [check for check in checks if check["passed"] is False]
