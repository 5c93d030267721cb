"""engine/reporting/copies_table.py: what is printed and written of the copies of experts."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

from rich.console import Console

from engine.profiling.report import (
    LayerPlacementReport,
    LayerReport,
    RankPlacement,
    RankReport,
    RunPlacement,
    RunReport,
)
from engine.reporting.summary import Summary, print_summary


def layer(number: int, share_after: float) -> LayerReport:
    copies = LayerPlacementReport(25, [25, 0], 0.625, share_after)
    return LayerReport(number, 1.6, 1.1, 1.5, 1.5, [75, 25], [75, 25], placement=copies)


def run_of(layers: list[LayerReport], sizes: list[int], **placement: Any) -> RunReport:
    values = {"file": "p.yaml", "digest": "1f", "precision": "int4", "copies": len(layers)}
    values |= {"copied_rows": 25 * len(layers), "share": 0.625, "share_after": 0.91}
    ranks = [
        RankReport(rank, "node", 1, 2, 100, 0, 0, 0, {}, placement=RankPlacement(3, size))
        for rank, size in enumerate(sizes)
    ]
    return RunReport(
        2.0, 7, ranks, layers, 1.6, 1.1, placement=RunPlacement(**(values | placement))
    )


def summary(run: RunReport) -> Summary:
    counts = dict.fromkeys(("total", "resumed", "errors", "requests"), 1)
    return Summary(**counts, prompt_tokens=1, generated_tokens=1, run=run)


def printed(run: RunReport) -> str:
    out = Console(file=io.StringIO(), width=120)
    print_summary(out, summary(run))
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_shares_rows_and_memory_of_copies_are_printed():
    text = printed(run_of([layer(2, 0.9)], [3 << 20, 1 << 20]))
    lines = [line.split() for line in text.splitlines()]
    assert ["layer", "2", "0.625", "->", "0.900", "25", "25.0%"] in lines
    assert ["all", "1", "0.625", "->", "0.910", "25", "25.0%"] in lines
    assert "1 copy in int4 (1.0 to 3.0 MiB per rank)" in text
    rows = [line for line in lines if line[:2] in (["0", "node"], ["1", "node"])]
    assert [row[-1] for row in rows] == ["3.0", "1.0"], "a column of the table of ranks"


def test_of_many_layers_those_furthest_from_balance_are_shown():
    text = printed(run_of([layer(n, 0.9 + n / 1000) for n in range(9)], [0, 0]))
    shown = [line.split()[1] for line in text.splitlines() if line.startswith(" layer")]
    assert shown == [str(n) for n in range(6)]
    assert "9 copies in int4 (0.0 MiB per rank)" in text
    assert "the 6 of 9 layers" in text


def test_homes_alone_print_nothing_and_are_named_in_the_file():
    plain = replace(layer(0, 1.0), placement=None)
    run = run_of([plain], [0, 0], copies=0, copied_rows=0, share=0.8, share_after=0.8)
    run = replace(run, max_over_mean=1.25)
    assert "Copies" not in printed(run) and "MiB" not in printed(run)
    found = json.loads(summary(run).to_json())["run"]
    assert found["placement"]["file"] == "p.yaml" and found["placement"]["copies"] == 0
    assert "placement" not in found["layers"][0]


def test_the_report_file_has_keys_of_the_placement_at_the_end_where_there_is_one():
    found = json.loads(summary(run_of([layer(0, 0.9)], [8, 0])).to_json())["run"]
    assert list(found)[-1] == list(found["layers"][0])[-1] == list(found["ranks"][0])[-1]
    assert list(found["placement"]) == (
        "file digest precision copies copied_rows share share_after".split()
    )
    assert found["layers"][0]["placement"] == {
        "copied_rows": 25,
        "expert_copied_rows": [25, 0],
        "share": 0.625,
        "share_after": 0.9,
    }
    assert found["ranks"][0]["placement"] == {"copied_rows": 3, "copy_bytes": 8}


def test_advice_with_copies_is_by_the_loads_that_they_left():
    run = run_of([layer(0, 0.9)], [0, 0])
    assert "most loaded rank had" not in printed(run), "1.1x is left of 1.6x"
    text = printed(replace(run, max_over_mean_after=1.4))
    assert "The most loaded rank had 1.40x the mean rows" in text and "More copies" in text
    homes = replace(run, placement=None)
    text = printed(homes)
    assert "The most loaded rank had 1.60x the mean rows" in text
    assert "Copies of hot experts" in text and "moe.capacity.policy=token_drop" in text
