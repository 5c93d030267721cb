"""The bench of big inputs: its idle share by hand, its filled ledger as the engine reads it.

python -m pytest tests/tools/test_bench_big_input.py
"""

from __future__ import annotations

import json
from pathlib import Path

import bench_big_input
import pytest

from engine.batch.input.index import scan_input
from engine.batch.ledger import Ledger


def spans(folder: Path, rank: int, steps: list[tuple[int, int]]) -> None:
    """A span file of (prefill tokens of the group, this rank's tokens) a step."""
    lines: list[dict] = [{"rank": rank, "phases": ["attention", "gate"]}]
    lines += [
        {
            "step": n,
            "prefill": prefill,
            "spans": [[0, 0, 0, 9, 99], [1, 0, 0, 5, own], [1, 1, 0, 5, 7]],
        }
        for n, (prefill, own) in enumerate(steps)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / f"rank-{rank}.jsonl").write_text(text)


def test_idle_counts_steps_without_a_token_until_the_last_request_starts(tmp_path):
    spans(tmp_path, 0, [(8, 8), (0, 2), (4, 2), (0, 2), (0, 0)])
    spans(tmp_path, 1, [(8, 0), (0, 1), (4, 5), (0, 0), (0, 0)])
    idle, tokens = bench_big_input.idle_share(tmp_path)
    assert idle == pytest.approx(1 / 6)  # rank 1 in the first of three steps, on two ranks
    assert tokens == [12, 6]


def test_the_filled_ledger_is_one_that_the_engine_resumes_from(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bench_big_input.make_input(source, 40, (3, 5), (16, 16))
    bench_big_input.fill_ledger(source, output, left=7)
    ledger = Ledger(output)
    done = ledger.done(len(scan_input(source)))
    ledger.close()
    assert done.sum() == 33 and not done[-7:].any()
