"""tools/bench_split.py: its placement, and a short real run.

Run: pytest tests/tools/test_bench_split.py
"""

from __future__ import annotations

import json

import bench_split
import numpy as np
import pytest


def test_copies_go_to_the_coldest_rank_and_every_rank_gets_as_many():
    hosts = bench_split.place(np.array([8.0, 1.0, 4.0, 1.0]), num_ranks=4, copies=4)
    copies = np.stack((hosts.expert_I, hosts.rank_I), axis=1)[~hosts.home_I].tolist()
    assert sorted(rank for _, rank in copies) == [0, 1, 2, 3]
    assert [0, 1] in copies  # the hottest expert, first onto the coldest rank


def test_a_short_run_prints_its_cases_and_one_json_line(capsys):
    bench_split.main(["--cases", "2x4+2,3x6+0", "--zipf", "1", "--tokens", "64", "--repeats", "1"])
    *text, last = capsys.readouterr().out.splitlines()
    assert any(line.startswith("2x4+2") for line in text)
    record = json.loads(last)
    assert record["bench"] == "split" and len(record["cases"]) == 2
    assert set(record["cases"][0]["us"]) == set(bench_split.COLUMNS)
    assert 0 < record["cases"][0]["share"] <= 1


def test_a_case_written_otherwise_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench_split.main(["--cases", "64-256"])
    assert "write RANKSxEXPERTS+COPIES" in capsys.readouterr().err
