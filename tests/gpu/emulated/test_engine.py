"""The real engine on emulated CUDA: the CPU's tokens, and nothing that CUDA would refuse.

Run: pytest tests/gpu/emulated/test_engine.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.emulated.guard import obstacle
from tests.gpu.emulated.runs import Result, on_both
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=f"not emulated: {obstacle()}")


@pytest.fixture
def tokens_match(guard: Path, checkpoint: Callable[[str], Path]):
    def run(
        family: str, settings: dict[str, Any], *, world: int = 2, **sampling: Any
    ) -> list[tuple[Result, Result]]:
        """Run a job on both devices; return each rank's results."""
        results = run_ranks(
            on_both, world, guard, checkpoint(family), settings, sampling, timeout=120
        )
        for cpu, cuda in results:
            assert cuda.kernels > 0 == cpu.kernels
            assert cuda.done == cpu.done
            assert not any("error" in record for record in cuda.done)
        return results

    return run


def test_mixtral_on_two_expert_parallel_ranks(tokens_match) -> None:
    for _, cuda in tokens_match("mixtral", {}):
        assert cuda.dispatched > 0
