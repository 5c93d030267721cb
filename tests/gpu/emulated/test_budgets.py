"""No step launches, records, waits or communicates more than budgets.txt says.

Run: pytest tests/gpu/emulated/test_budgets.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.emulated.budgets import (
    COLUMNS,
    ROWS,
    Step,
    cells,
    count_all,
    per_layer,
    read_table,
    table_lines,
)
from tests.gpu.emulated.guard import obstacle

pytestmark = [
    pytest.mark.skipif(obstacle() is not None, reason=f"not emulated: {obstacle()}"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def counted(guard: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Step, Step]]:
    """What each row's steps counted."""
    return count_all(tmp_path_factory.mktemp("budgets"), guard)


def test_no_step_exceeds_its_budget(counted: dict[str, tuple[Step, Step]]) -> None:
    first, budgets = read_table()
    if table_lines(counted)[0] != first:
        pytest.skip(f"counted with another torch than the table: {first}")
    names = [f"{column} per {each}" for each in ("layer", "step") for column in COLUMNS]
    raised = []
    for row in ROWS:
        found = cells(counted[row.name])
        over = [
            f"{what} {now:g}, budget {budget:g}"
            for what, now, budget in zip(names, found, budgets[row.name], strict=True)
            if now > budget
        ]
        if over:
            raised += [f"{row.name}: {'; '.join(over)}; of a layer:", *per_layer(counted[row.name])]
    assert not raised, "\n".join(raised)


def test_a_layer_waits_once_and_counts_whole_kernels(
    counted: dict[str, tuple[Step, Step]],
) -> None:
    """A fraction would mean that a rank had no rows in a layer, so that work is left out."""
    for name, steps in counted.items():
        kernels, _, syncs, _ = cells(steps)[: len(COLUMNS)]
        assert syncs == 1, name
        assert kernels == int(kernels), name


def test_the_rule_counts_a_plain_mixtral_layer_by_hand(
    counted: dict[str, tuple[Step, Step]],
) -> None:
    """Norms with residuals 18, sort by expert 18, rotary 12, attention and KV store 2, their
    projections 2, gate, its cast and choice 3, counts, dispatch and combine 3, gather and combine
    rows 2, two grouped_mm 4 with SwiGLU 1 and their ends 1.
    """
    kernels = cells(counted["mixtral decode, one expert per rank"])[0]
    assert kernels <= 18 + 18 + 12 + 2 + 2 + 3 + 3 + 2 + 4 + 1 + 1 == 66
