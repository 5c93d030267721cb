"""The batch job with steps in flight: the records of the synchronous one, each exactly once.

Run: pytest tests/distributed/test_async_job.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.batch.ledger import shards_dir
from tests.helpers.batch_case import ALL, command, committed, records, report, run
from tests.helpers.ranks import RanksFailed

ON = ("--set", "scheduler.async_scheduling=on")


def stops(record: dict) -> tuple:
    return tuple(record.get(key) for key in ("id", "text", "token_ids", "finish_reason"))


@pytest.mark.parametrize(
    "event", ["kill before", pytest.param("kill after", marks=pytest.mark.long)]
)
def test_a_killed_job_resumes_with_nothing_lost_doubled_or_redone(
    job, undisturbed, tmp_path, event
):
    output = tmp_path / "out.jsonl"
    with pytest.raises(RanksFailed, match="rank 1: exited without a result, exit code -9"):
        run(2, command(job, output, *ON), (1, 3, event))
    done = committed(output, 2)
    assert 0 < len(done) < ALL and not output.exists()
    for code, _, err in run(2, command(job, output, *ON)):
        assert code == 0, err
    assert records(output) == undisturbed
    values = report(output)
    assert (values["resumed"], values["requests"]) == (len(done), ALL - len(done))
    assert all(rank["resolved"]["scheduler.async_scheduling"] for rank in values["run"]["ranks"])
    assert not shards_dir(output).exists()


@pytest.mark.parametrize("drain_s", [pytest.param(20, marks=pytest.mark.long), 0])
def test_a_signal_ends_all_ranks_after_what_is_done_is_written(job, undisturbed, tmp_path, drain_s):
    output = tmp_path / "out.jsonl"
    argv = command(job, output, *ON, "--set", f"runtime.drain_s={drain_s}")
    outcomes = run(2, argv, (1, 2, "SIGTERM"))
    assert [status for status, _, _ in outcomes] == [143, 143], "both exit at the same step"
    assert all("SIGTERM" in err and "Traceback" not in err for _, _, err in outcomes)
    done = committed(output, 2)
    assert done and not output.exists()
    assert (done == set(range(len(done)))) == (drain_s > 0), sorted(done)
    assert [item[0] for item in run(2, argv)] == [0, 0]
    assert records(output) == undisturbed and report(output)["resumed"] == len(done)


def test_stop_strings_and_ends_in_the_middle_cut_the_same_texts(job, tmp_path: Path):
    lines = []
    for number in range(20):
        prompt = "abcdefgh ."[number % 10] * (1 + number % 7)
        line = {"id": number, "prompt": prompt, "max_new_tokens": 24, "ignore_eos": False}
        if number % 3:
            line["stop"] = ["e", "a", " ", "0", "Z", "x"] if number % 3 == 1 else ["\u00e9", "t"]
        lines.append(json.dumps(line))
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    found = []
    for setting in ("off", "on"):
        output = tmp_path / f"{setting}.jsonl"
        argv = ["--config", str(job / "config.yaml"), "--input", str(tmp_path / "in.jsonl")]
        argv += ["--output", str(output), "--set", f"scheduler.async_scheduling={setting}"]
        for code, _, err in run(2, argv):
            assert code == 0, err
        found.append((records(output), report(output)["run"]))
    (off, _), (on, of_run) = found
    assert list(map(stops, on)) == list(map(stops, off))
    assert {each["finish_reason"] for each in on} == {"stop", "length"}
    assert any(rank.get("surplus_rows", 0) for rank in of_run["ranks"])
