"""`tools/straggler_report.py` with experts placed anywhere and copies: span files of version 2.

4 experts on 2 ranks, 2 steps; rows of all ranks, of both steps together:

    layer  homes    copies            before       after
    1      0 1 1 1  expert 1 on 0     8 20 4 2     rank 0: 8, copy of 1: 9 | rank 1: 11 4 2
    3      1 0 0 1  none              2 2 6 6      rank 0: 2 6 | rank 1: 2 6
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tools.test_straggler_report import PHASES, browse, page_data, run_tool

OWN = [{"1": [0, 1], "3": [1, 2]}, {"1": [1, 2, 3], "3": [0, 3]}]
HOMES = [{"1": 1, "3": 2}, {"1": 3, "3": 2}]
BEFORE = [{"1": [5, 8, 3, 2], "3": [1, 1, 3, 3]}, {"1": [3, 12, 1, 0], "3": [1, 1, 3, 3]}]
AFTER = [
    [{"1": [5, 4], "3": [1, 3]}, {"1": [3, 5], "3": [1, 3]}],
    [{"1": [4, 3, 2], "3": [1, 3]}, {"1": [7, 1, 0], "3": [1, 3]}],
]


def header(rank: int) -> dict[str, Any]:
    return {
        "format": "lockstep-spans",
        "version": 2,
        "rank": rank,
        "host": "node",
        "world_size": 2,
        "group": [0, 1],
        "clock_offset_ns": 0,
        "clock_error_ns": 1000,
        "phases": PHASES,
        "num_layers": 4,
        "num_experts": 4,
        "own_experts": OWN[rank],
        "num_homes": HOMES[rank],
        "num_copies": {"1": 1, "3": 0},
        "policy": "none",
    }


def write_rank(folder: Path, rank: int, **changes: Any) -> None:
    lines: list[Any] = [header(rank) | changes]
    for step in (0, 1):
        spans = [[PHASES.index("combine"), 1, 0, 500_000, 8, 4096, 0]]
        record = {"step": step + 1, "start_ns": step * 10_000_000, "prefill": 8, "decode": 0}
        lines.append({**record, "spans": spans, "before": BEFORE[step], "after": AFTER[rank][step]})
    text = "\n".join(map(json.dumps, lines)) + "\n"
    (folder / f"spans.rank{rank:05d}.jsonl").write_text(text)


@pytest.fixture
def placed(tmp_path: Path) -> Path:
    folder = tmp_path / "placed"
    folder.mkdir()
    for rank in (0, 1):
        write_rank(folder, rank)
    return folder


def test_rows_of_homes_and_copies_are_told_apart_with_any_homes(placed, tmp_path):
    loads = page_data(placed, page=tmp_path / "page.html")["loads"]
    assert loads["before"] == [[8, 20, 4, 2], [2, 2, 6, 6]]
    assert loads["after"] == [[8, 20, 4, 2], [2, 2, 6, 6]], "home and copy of an expert together"
    # Before: the experts whose home a rank is; after: what it computed.
    assert loads["imbalance"] == [[round(26 / 17, 4), 1.0], [1.0, 1.0]]
    assert loads["by_rank"] == [{"homes": 16, "copies": 9}, {"homes": 25, "copies": 0}]
    assert loads["copies"] == [{"layer": 1, "expert": 1, "rank": 0, "home": 1, "rows": 9, "of": 20}]
    assert loads["experts"] == [[[0, 1], [1, 2]], [[1, 2, 3], [0, 3]]]
    assert loads["num_homes"] == [[1, 2], [3, 2]]
    assert loads["rows"] == [[[8, 9], [2, 6]], [[11, 4, 2], [2, 6]]]


@pytest.mark.parametrize("copies", [0, 1])
def test_the_share_of_perfect_balance_is_a_fact_where_there_are_copies(placed, tmp_path, copies):
    placement = {"copies": copies, "share": 0.6538, "share_after": 1.0}
    run = {"ranks": [{"rank": rank} for rank in (0, 1)], "layers": [], "seconds": 2.0, "steps": 2}
    report = tmp_path / "out.report.json"
    report.write_text(json.dumps({"run": run | {"placement": placement}}))
    data = page_data(placed, "--report", report, page=tmp_path / "page.html")
    found = dict(data["facts"]).get("share of perfect balance")
    assert found == ("65.4% by homes alone, 100.0% with copies" if copies else None)


def test_a_browser_draws_every_copy_with_its_expert_and_the_rows_by_rank(placed, tmp_path):
    page = tmp_path / "page.html"
    assert run_tool(placed, "--html", page).returncode == 0
    dom = browse(page, tmp_path / "profile")
    assert 'data-ready="yes"' in dom, "the page's script did not reach its end"
    assert "layer 1, copy of expert 1 on rank 0: 9 rows" in dom
    assert "layer 1, expert 1 on rank 1: 11 rows" in dom
    assert dom.count('class="cell"') == 8 + 9 and dom.count('class="copy"') == 1
    assert "<td>rank 0</td><td>16</td><td>9</td><td>36%</td>" in dom
    assert "<td>layer 1, expert 1</td><td>rank 0</td><td>rank 1</td><td>9</td><td>45%</td>" in dom


def test_what_a_missing_rank_may_have_computed_is_not_taken_for_dropped(placed, tmp_path):
    (placed / "spans.rank00000.jsonl").unlink()
    data = page_data(placed, page=tmp_path / "page.html")
    # Of layer 1 the copy is on the missing rank, of whichever expert; layer 3 has none.
    assert data["loads"]["after"] == [[-1, -1, -1, -1], [2, -1, -1, 6]]
    assert data["loads"]["missing"] == [[0], [1, 2]]
    assert [each["drop_rate"] for each in data["drops"]["layers"]] == [0.0, 0.0]
    assert "no files" in browse(tmp_path / "page.html", tmp_path / "profile")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"own_experts": {"1": [0, 4], "3": [1, 2]}}, "experts [0, 4]"),
        ({"own_experts": {"1": [0, 0], "3": [1, 2]}}, "experts [0, 0]"),
        ({"num_homes": {"1": 3, "3": 2}}, "homes 3"),
        ({"num_homes": {"3": 2}}, "KeyError"),
        ({"num_copies": {"1": 0, "3": 0}}, "experts [0, 1], homes 1"),
        ({"own_experts": {"3": [1, 2]}}, "experts of each layer in the header"),
        ({"own_experts": None}, "own_experts is None"),
        ({"version": 3}, "version 3 of the format, this tool reads 1 and 2"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused_by_file_and_line(placed, changes, named):
    write_rank(placed, 0, **changes)
    done = run_tool(placed)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "spans.rank00000.jsonl:" in done.stderr and named in done.stderr
