"""lockstep doctor on emulated CUDA: what it runs there, and that it fails where a kernel is wrong.

Run: pytest tests/gpu/emulated/test_doctor.py
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from engine.doctor import checks, report
from engine.ops import silu_and_mul
from tests.gpu.emulated.cuda import emulated_cuda
from tests.helpers.ranks import run_ranks


def run_on_a_rank(rank: int, guard: Path, is_wrong: bool) -> tuple[int, str]:
    with emulated_cuda(guard), contextlib.redirect_stdout(io.StringIO()) as printed:
        if is_wrong and rank == 1:
            right = silu_and_mul.silu_and_mul
            checks.silu_and_mul.silu_and_mul = lambda rows: right(rows) + 1
        code = report.run()
    return code, printed.getvalue()


def test_backends_kernels_and_collectives_run_on_the_gpu(guard):
    (code, text), (other, _) = run_ranks(run_on_a_rank, 2, guard, False)
    assert code == other == 0, text
    for expected in ("ranks: 2, NCCL", "ok    bfloat16 on cuda", "silu_and_mul, combine_rows"):
        assert expected in text
    assert "FAILS" not in text


def test_a_kernel_that_is_wrong_on_one_rank_fails_on_all(guard):
    (code, text), (other, _) = run_ranks(run_on_a_rank, 2, guard, True)
    assert code == other == 1
    assert "FAILS rank 1: silu_and_mul: its numbers are wrong" in text
