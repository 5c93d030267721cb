"""A job in input shards, each a run of its own: together they leave what one run leaves.

python -m pytest tests/distributed/test_slices.py
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.helpers.batch_case import ALL, command, run
from tests.helpers.ranks import RanksFailed

COUNT = 3


def run_shard(world: int, job: Path, output: Path, index: int, trap: object = None) -> str:
    """Run an input shard to its end; return what rank 0 printed."""
    outcomes = run(world, command(job, output, "--slice", f"{index}/{COUNT}"), trap)
    assert [code for code, _, _ in outcomes] == [0] * world, outcomes
    return " ".join(outcomes[0][1].split())


@pytest.fixture(scope="module")
def whole(job: Path, undisturbed: list) -> bytes:
    """The output of a run without shards, byte for byte."""
    assert len(undisturbed) == ALL
    return (job / "undisturbed.jsonl").read_bytes()


def test_shards_on_any_ranks_killed_and_run_twice_leave_the_bytes_of_one_run(job, whole, tmp_path):
    output = tmp_path / "out.jsonl"
    assert "slices 0, 1 of 3 are not complete yet" in run_shard(1, job, output, 2)
    with pytest.raises(RanksFailed, match="exited without a result, exit code -9"):
        run(2, command(job, output, "--slice", f"0/{COUNT}"), (1, 2, "kill inside"))
    assert not output.exists()
    assert "by earlier runs" in run_shard(2, job, output, 0)
    again = run_shard(1, job, output, 0)
    assert "slice 0/3 is complete; slices 1 of 3 are not complete yet" in again
    assert "3 slices, merged" in run_shard(1, job, output, 1)
    assert output.read_bytes() == whole
    assert run_shard(1, job, output, 1).endswith("is already complete")
    suffixes = ("", ".config.yaml", ".job.json", ".report.json")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"out.jsonl{suffix}" for suffix in suffixes}


def test_the_last_two_shards_finish_at_once_and_merge_once(job, whole, tmp_path):
    output = tmp_path / "out.jsonl"
    run_shard(1, job, output, 1)
    printed: list[str] = []
    threads = [
        threading.Thread(target=lambda i=index: printed.append(run_shard(1, job, output, i)))
        for index in (0, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(printed) == 2 and sum("3 slices, merged" in text for text in printed) == 1
    assert output.read_bytes() == whole


@pytest.mark.parametrize(
    "more, message",
    [
        (["--slice", "3/3"], "--slice 3/3: must be I/N with 0 <= I < N"),
        (["--slice", "0/3", "--overwrite"], "--overwrite: would discard what other slices"),
    ],
)
def test_a_wrong_shard_is_refused_on_all_ranks_before_anything_runs(job, tmp_path, more, message):
    outcomes = run(2, command(job, tmp_path / "out.jsonl", *more))
    assert [code for code, _, _ in outcomes] == [2, 2]
    assert message in outcomes[0][2] and outcomes[1][2] == ""
    assert list(tmp_path.iterdir()) == []


def test_a_shard_of_the_built_in_prompts_is_refused(job):
    ((code, _, err),) = run(1, ["--config", str(job / "config.yaml"), "--slice", "0/2"])
    assert code == 2 and "--slice 0/2 needs --input" in err
