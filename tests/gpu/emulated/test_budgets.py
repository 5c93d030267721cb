"""No step launches, records, waits or communicates more than budgets.txt says.

Run: pytest tests/gpu/emulated/test_budgets.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.emulated.budgets import (
    ROWS,
    Step,
    cells,
    count_all,
    per_layer,
    table_lines,
)
from tests.gpu.emulated.guard import obstacle
from tools.gpu_checks.launches import COLUMNS, read_table

pytestmark = [
    pytest.mark.skipif(obstacle() is not None, reason=f"not emulated: {obstacle()}"),
    pytest.mark.slow,
]


def exceeding(counted: dict[str, tuple[Step, Step]], budgets: dict[str, list[float]]) -> list[str]:
    """Return what exceeds its budget, each row with the lines of the source."""
    names = [f"{column} per {each}" for each in ("layer", "step") for column in COLUMNS]
    found = []
    for row in ROWS:
        numbers = zip(names, cells(counted[row.name]), budgets[row.name], strict=True)
        over = [f"{what} {now:g}, budget {most:g}" for what, now, most in numbers if now > most]
        if over:
            found += [f"{row.name}: {'; '.join(over)}; of a layer:", *per_layer(counted[row.name])]
    return found


@pytest.mark.long
def test_no_step_exceeds_its_budget(guard: Path, tmp_path: Path) -> None:
    """One test, so that the steps are counted once however many processes run tests."""
    counted = count_all(tmp_path, guard)
    layers = {
        name: dict(zip(COLUMNS, cells(steps), strict=False)) for name, steps in counted.items()
    }
    for name, layer in layers.items():
        # Where claims decide which rows copies take, the host splits before the counts are known.
        by_claims = name.endswith(("token_drop with copies", "int4 copies"))
        is_static = ", static" in name
        on_device = name.endswith("symmetric")
        assert layer["syncs"] == (0 if is_static or on_device else 2 if by_claims else 1), name
        if is_static:
            assert layer["collectives"] == 2, name
        # A half would mean that a rank had no rows in some layer, and left its work out.
        assert layer["kernels"] == int(layer["kernels"]), name

    first, budgets = read_table()
    if table_lines(counted)[0] != first:
        pytest.skip(f"counted with another torch than the table: {first}")
    raised = exceeding(counted, budgets)
    assert not raised, "\n".join(raised)

    # By hand: norms with residuals 2, projections of attention 2, rotary with the KV store 1,
    # attention 1, gate and choice 2, sort by expert 1, counts, dispatch and combine 3, rows
    # gathered and combined 2, two grouped_mm 4, SwiGLU 1, the ends of the experts' rows 1.
    plain = layers["mixtral decode, one expert per rank"]["kernels"]
    assert plain <= 2 + 2 + 1 + 1 + 2 + 1 + 3 + 2 + 4 + 1 + 1
    # What a decode step may launch per layer, and a prefill under a capacity policy.
    assert plain <= 30 and layers["qwen3_moe decode"]["kernels"] <= 34
    assert layers["qwen3_moe decode, deduplicated"]["kernels"] <= 40
    assert layers["mixtral prefill, token_drop gather"]["kernels"] <= 90
    # Of linear attention: projections 2, convolution, delta rule, norm with its gate.
    others = layers["qwen2_moe decode"]["kernels"] - 4
    assert layers["qwen3_next decode, linear layers"]["kernels"] <= others + 5
    # Without counts: of the ranks' exchange and the copy of the plan nothing is left; headers are
    # written and read, and results laid out for their tokens.
    for name in ("mixtral decode, static, one expert", "olmoe decode, static"):
        assert layers[name]["kernels"] <= plain + 10
    # Homes anywhere and copies without rows: experts' numbers are looked up. Rows by counts: the
    # ends of the hosts' rows, the dealing, the new order, and the rows gathered once more.
    decode = layers["qwen3_moe decode"]["kernels"]
    assert layers["qwen3_moe decode, scattered homes"]["kernels"] <= decode + 1
    assert layers["qwen3_moe decode, copies without rows"]["kernels"] <= decode + 1
    assert layers["qwen3_moe decode, copies with rows"]["kernels"] <= decode + 8
    prefill = layers["mixtral prefill"]["kernels"]
    assert layers["mixtral prefill, copies with rows"]["kernels"] <= prefill + 8

    # What exceeds its budget is named with the lines of the source.
    kernels = layers["olmoe decode"]["kernels"]
    budgets["olmoe decode"][0] = kernels - 1
    head, *lines = exceeding(counted, budgets)
    assert head.startswith(f"olmoe decode: kernels per layer {kernels:g}, budget {kernels - 1:g};")
    assert any("attention.py:" in line for line in lines)
    assert any("a copy to the host @" in line for line in lines)
