"""Copies of experts of the bundled tiny Mixtral: what a run of two ranks reports of them.

Run: pytest tests/distributed/test_placement_report.py
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.config.loader import load_config
from engine.llm import LLM
from engine.moe.placement.placement import LayerPlacement, Placement, Precision
from engine.moe.placement.placement_file import digest, write_placement
from engine.profiling.report import RunReport
from engine.reporting.summary import Summary
from engine.request import SamplingParams
from tests.helpers.ranks import run_ranks
from tests.tools.test_straggler_report import page_data

PROMPTS = [
    [random.Random(seed).randrange(4, 2000) for _ in range(length)]
    for seed, length in enumerate([15, 37, 9, 60, 8, 12, 33, 21])
]
EXPERTS, WIDTHS = 8, (256, 144)
HOMES = (0, 1, 0, 1, 1, 0, 1, 1)  # 3 of rank 0, 5 of rank 1
COPIES: dict[int, dict[int, tuple[int, ...]]] = {0: {1: (0,), 3: (0,)}, 2: {4: (0,), 0: (1,)}}


def placement(precision: Precision) -> Placement:
    layers = {
        layer: LayerPlacement(HOMES, tuple(copies.get(expert, ()) for expert in range(EXPERTS)))
        for layer, copies in COPIES.items()
    }
    return Placement(2, EXPERTS, layers, precision)


def generate(rank: int, settings: list[str]) -> tuple[list[list[int]], RunReport]:
    llm = LLM(load_config("tiny_mixtral_ep2", settings))
    done = llm.generate(PROMPTS, SamplingParams(max_new_tokens=4, ignore_eos=True))
    assert llm.report is not None
    llm.close()
    return [list(item.token_ids) for item in done], llm.report


def run(*settings: str) -> list[tuple[list[list[int]], RunReport]]:
    always = ("model.max_model_len=96", "scheduler.kv_cache_blocks=64", "runtime.device=cpu")
    return run_ranks(generate, 2, [*always, *settings], timeout=120)


@pytest.fixture(scope="module")
def contiguous() -> tuple[list[list[int]], RunReport]:
    return run()[0]


@pytest.mark.parametrize("precision", ["model", "int4"])
def test_the_rows_of_homes_and_copies_add_up(precision, contiguous, tmp_path):
    file = tmp_path / "placement.yaml"
    write_placement(placement(precision), file)
    settings = (f"moe.placement={file}", "moe.copies.target=1.0", f"profiler.spans={tmp_path}/s")
    (tokens, report), (_, other) = run(*settings)
    assert [each.placement for each in report.layers] == [each.placement for each in other.layers]
    if precision == "model":
        assert tokens == contiguous[0]
        assert [each.expert_loads for each in report.layers] == [
            each.expert_loads for each in contiguous[1].layers
        ]
    placed = report.placement
    assert placed is not None and placed == other.placement
    assert (placed.file, placed.digest) == (str(file), digest(placement(precision)))
    assert (placed.precision, placed.copies) == (precision, 4)
    # Nothing is dropped: every row is computed by a home or a copy, and counted once.
    for layer in report.layers:
        assert layer.expert_loads_after == layer.expert_loads
        assert (layer.placement is not None) == (layer.layer in COPIES)
        if layer.placement is not None:
            by_expert = layer.placement.expert_copied_rows
            assert {e for e, rows in enumerate(by_expert) if rows} <= set(COPIES[layer.layer])
            assert all(map(int.__le__, by_expert, layer.expert_loads))
            assert layer.placement.share == pytest.approx(1 / layer.rank_max_over_mean)
            assert layer.placement.share_after == pytest.approx(1 / layer.rank_max_over_mean_after)
            assert layer.placement.share_after >= layer.placement.share
    copied = [each.placement.copied_rows for each in report.ranks if each.placement]
    assert sum(copied) == placed.copied_rows > 0
    assert placed.copied_rows == sum(
        each.placement.copied_rows for each in report.layers if each.placement
    )
    assert sum(rank.expert_rows for rank in report.ranks) == sum(
        sum(layer.expert_loads) for layer in report.layers
    )
    assert placed.share == pytest.approx(1 / report.max_over_mean)
    assert placed.share_after == pytest.approx(1 / report.max_over_mean_after)
    assert placed.share_after > placed.share
    # 3 copies on rank 0 and 1 on rank 1; three matrices of each, in float32 or some 5 bits.
    sizes = [each.placement.copy_bytes for each in report.ranks if each.placement]
    each = 3 * WIDTHS[0] * WIDTHS[1] * (4 if precision == "model" else 5 / 8)
    assert sizes == pytest.approx([3 * each, each], rel=0.05)
    check_page(tmp_path / "s", report)


def check_page(spans: Path, report: RunReport) -> None:
    """The span files of the run tell the same rows, rank by rank and copy by copy."""
    loads: dict[str, Any] = page_data(spans, page=spans / "page.html")["loads"]
    assert loads["before"] == [layer.expert_loads for layer in report.layers]
    assert loads["after"] == [layer.expert_loads_after for layer in report.layers]
    for index, rank in enumerate(report.ranks):
        assert rank.placement is not None
        rows = loads["by_rank"][index]
        assert rows["copies"] == rank.placement.copied_rows
        assert rows["homes"] == rank.expert_rows - rank.placement.copied_rows
    by_copy = {(each["layer"], each["expert"]): each["rows"] for each in loads["copies"]}
    assert set(by_copy) == {(layer, e) for layer, copies in COPIES.items() for e in copies}
    for layer in report.layers:
        if layer.placement is not None:
            for expert in COPIES[layer.layer]:
                assert by_copy[layer.layer, expert] == layer.placement.expert_copied_rows[expert]


def test_without_a_placement_the_report_file_has_no_key_of_one(contiguous):
    summary = Summary(
        total=8,
        resumed=0,
        errors=0,
        requests=8,
        prompt_tokens=0,
        generated_tokens=0,
        run=replace(contiguous[1], latencies={}),
    )
    found = json.loads(summary.to_json())["run"]
    for part in (found, *found["ranks"], *found["layers"]):
        assert "placement" not in part
