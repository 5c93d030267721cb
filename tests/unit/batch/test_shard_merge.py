"""Input shards: which lines each has, and a merge killed at any operation on the file system.

python -m pytest tests/unit/batch/test_shard_merge.py
"""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from engine.batch import atomic_files, shard_merge
from engine.batch.input.shards import InputShard
from engine.batch.ledger import Ledger, ShardWriter, shards_dir
from engine.batch.manifest import JobError, decide_start_or_resume, finalize
from engine.batch.shard_merge import is_merged, merge_if_complete
from engine.request import Completion, RequestError

BAD_LINE = RequestError("invalid_json", "bad line")

MANIFEST = {
    "version": 1,
    "input": {"path": "in.jsonl", "size": 10, "sha256": "abc", "requests": 5},
    "settings": {"sampling.seed": 0},
}
TOTAL = 5
COUNT = 3


WRITE = shard_merge.DurableWriter.write


class Died(BaseException):
    """In place of a kill."""


def completion(index: int) -> Completion:
    return Completion.failure(index, f"r{index}", BAD_LINE)


def finish(output: Path, shard: InputShard, manifest: dict[str, Any] = MANIFEST) -> None:
    """Run a shard to its end, without the merge."""
    ledger, errors = merged(output, shard, manifest)
    finalize(ledger, manifest, errors)
    ledger.close()


def merged(
    output: Path, shard: InputShard, manifest: dict[str, Any] = MANIFEST
) -> tuple[Ledger, int]:
    """Run a shard up to its output; return its ledger, still open, and its number of errors."""
    own = shard.output(output)
    ledger = Ledger(own)
    assert decide_start_or_resume(ledger, manifest, overwrite=False) == "fresh"
    ledger.create_shards(1)
    writer = ShardWriter(shards_dir(own), 0)
    writer.append([completion(index) for index in reversed(shard.lines(TOTAL))])
    writer.close()
    errors = ledger.merge(shard.lines(TOTAL))
    own.with_name(own.name + ".config.yaml").write_text("model: {}\n")
    report = {"total": len(shard.lines(TOTAL)), "errors": errors, "capacity": {"policy": "none"}}
    own.with_name(own.name + ".report.json").write_text(json.dumps(report))
    return ledger, errors


def ids(output: Path) -> list[str]:
    return [json.loads(line)["id"] for line in output.read_text().splitlines()]


def files(output: Path) -> set[str]:
    return {path.name for path in output.parent.iterdir()}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.mark.parametrize("text", ["", "3", "3/3", "4/3", "-1/3", "a/b", "1/0", "1 / 3", "0/100000"])
def test_what_is_no_shard_is_refused_with_the_rule(text):
    with pytest.raises(JobError, match=r"must be I/N with 0 <= I < N") as caught:
        InputShard.parse(text)
    assert text in str(caught.value)


@pytest.mark.parametrize("total, count", [(0, 3), (2, 5), (5, 3), (9, 3), (10, 1)])
def test_shards_are_contiguous_even_and_together_everything(total, count):
    shards = [InputShard(index, count).lines(total) for index in range(count)]
    assert [line for shard in shards for line in shard] == list(range(total))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_the_last_shard_merges_all_in_input_order_and_leaves_nothing_else(output):
    for index in (2, 0):
        finish(output, InputShard(index, COUNT))
        done = merge_if_complete(output, COUNT, MANIFEST)
        assert "not complete yet" in done and not output.exists()
    finish(output, InputShard(1, COUNT))
    assert merge_if_complete(output, COUNT, MANIFEST) == f"{output} is complete: 3 slices, merged"
    assert ids(output) == [f"r{index}" for index in range(TOTAL)]
    siblings = {".config.yaml", ".report.json", ".job.json"}
    assert files(output) == {"out.jsonl"} | {f"out.jsonl{suffix}" for suffix in siblings}
    report = json.loads((output.parent / "out.jsonl.report.json").read_text())
    assert (report["total"], report["errors"], len(report["slices"])) == (5, 5, 3)
    assert is_merged(output, InputShard(0, COUNT), MANIFEST)


def test_a_shard_between_its_output_and_finalize_is_not_complete_yet(output):
    """Two shards that end at once: the other one checks at this very moment."""
    ledger, errors = merged(output, InputShard(1, COUNT))
    for index in (0, 2):
        finish(output, InputShard(index, COUNT))
    assert "1 of 3 are not complete" in merge_if_complete(output, COUNT, MANIFEST)
    finalize(ledger, MANIFEST, errors)
    ledger.close()
    assert "merged" in merge_if_complete(output, COUNT, MANIFEST)


def test_a_file_in_place_of_a_shard_that_no_run_holds_is_refused(output):
    finish(output, InputShard(0, COUNT))
    InputShard(1, COUNT).output(output).write_text("mine\n")
    with pytest.raises(
        JobError, match="is no slice of this job: no manifest records which job made it"
    ):
        merge_if_complete(output, COUNT, MANIFEST)


def operations(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Die before the `number`-th operation that changes the file system."""
    left = number

    def guard(function: Any) -> Any:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise Died
            return function(*args, **kwargs)

        return guarded

    monkeypatch.setattr(os, "replace", guard(os.replace))
    monkeypatch.setattr(os, "fsync", guard(os.fsync))
    monkeypatch.setattr(Path, "unlink", guard(Path.unlink))
    monkeypatch.setattr(shard_merge.DurableWriter, "write", guard(WRITE))
    monkeypatch.setattr(shard_merge, "write_text", guard(shard_merge.write_text))
    monkeypatch.setattr(shard_merge.shutil, "rmtree", guard(shard_merge.shutil.rmtree))


def test_a_merge_that_dies_anywhere_is_done_by_the_next_one(output, monkeypatch):
    survived, number = False, 0
    while not survived:
        number += 1
        for path in output.parent.iterdir():
            path.unlink() if path.is_file() else shard_merge.shutil.rmtree(path)
        for index in range(COUNT):
            finish(output, InputShard(index, COUNT))
        with monkeypatch.context() as patch:
            operations(patch, number)
            try:
                merge_if_complete(output, COUNT, MANIFEST)
                survived = True
            except Died:
                pass
        if output.exists():
            assert ids(output) == [f"r{index}" for index in range(TOTAL)], "whole or not at all"
        merge_if_complete(output, COUNT, MANIFEST)
        assert ids(output) == [f"r{index}" for index in range(TOTAL)]
        assert is_merged(output, InputShard(1, COUNT), MANIFEST)
        rest = ("slice", "parts", "tmp")
        assert not [name for name in files(output) if any(word in name for word in rest)]
    assert number > 15, "the merge dies at many operations"


def finish_all(output: Path) -> None:
    for index in range(COUNT):
        finish(output, InputShard(index, COUNT))


def test_a_copy_of_another_size_than_its_shards_is_not_finalized_and_they_stay(output, monkeypatch):
    finish_all(output)
    shards = {name for name in files(output) if "slice" in name}
    copies = []

    def drop_the_second(self: Any, data: bytes) -> None:
        copies.append(data)
        if len(copies) != 2:
            WRITE(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(shard_merge.DurableWriter, "write", drop_the_second)
        with pytest.raises(JobError, match=r"is \d+ bytes, its slices are \d+.*slices are kept"):
            merge_if_complete(output, COUNT, MANIFEST)
    assert {name for name in files(output) if "slice" in name} == shards
    assert not output.with_name(output.name + ".job.json").exists()
    assert "merged" in merge_if_complete(output, COUNT, MANIFEST)
    assert ids(output) == [f"r{index}" for index in range(TOTAL)]


def test_a_merge_that_waits_for_another_one_reports_progress(output):
    """Without it the watchdog would take the rank for one that hangs."""
    finish_all(output)
    other, calls = Ledger(output), []

    def report() -> None:
        calls.append(1)
        if len(calls) == 3:
            other.close()

    assert "merged" in merge_if_complete(output, COUNT, MANIFEST, report)
    assert len(calls) > 3, "and also while it merges"


def test_two_merges_at_once_where_locks_do_not_work_lose_no_record(output, monkeypatch):
    """The second runs from start to end before each block that the first copies and each rename."""
    monkeypatch.setattr(atomic_files.fcntl, "flock", lambda fd, how: no_locks())
    replace, reached, place = os.replace, True, 0
    while reached:
        for path in output.parent.iterdir():
            path.unlink() if path.is_file() else shard_merge.shutil.rmtree(path)
        finish_all(output)
        left = place

        def other() -> None:
            nonlocal left
            left -= 1
            if left == -1:
                merge_if_complete(output, COUNT, MANIFEST)

        def copying(*args: Any, other: Any = other) -> None:
            other()
            WRITE(*args)

        def replacing(*args: Any, other: Any = other) -> None:
            other()
            replace(*args)

        with monkeypatch.context() as patch:
            patch.setattr(shard_merge.DurableWriter, "write", copying)
            patch.setattr(os, "replace", replacing)
            assert str(output) in merge_if_complete(output, COUNT, MANIFEST)
        assert ids(output) == [f"r{index}" for index in range(TOTAL)]
        assert is_merged(output, InputShard(0, COUNT), MANIFEST)
        siblings = {".config.yaml", ".report.json", ".job.json"}
        assert files(output) == {"out.jsonl"} | {f"out.jsonl{suffix}" for suffix in siblings}
        report = json.loads((output.parent / "out.jsonl.report.json").read_text())
        assert (report["total"], report["errors"]) == (5, 5)
        reached, place = left < 0, place + 1
    # A block of each shard; the renames of the output, its config, its report and its manifest.
    assert place - 1 == COUNT + 4


def no_locks() -> None:
    raise OSError(errno.ENOLCK, "no locks")


def test_what_killed_merges_left_is_removed_by_the_next_and_nothing_of_other_outputs(output):
    finish_all(output)
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = [
        f"out.jsonl.merge-{socket.gethostname()}-{dead.pid}-01234567.tmp",
        "out.jsonl.merge-another-host-12-89abcdef.tmp",
    ]
    others = ["out.jsonl.x.merge-another-host-12-89abcdef.tmp", "out.jsonl.merge.tmp"]
    for name in left + others:
        output.with_name(name).write_text("half")
    merge_if_complete(output, COUNT, MANIFEST)
    assert {name for name in files(output) if name.endswith(".tmp")} == set(others)


def test_shards_of_another_division_are_named(output):
    finish(output, InputShard(0, 2))
    with pytest.raises(JobError, match=r"are slices of 2; continue with --slice I/2"):
        is_merged(output, InputShard(0, 3), MANIFEST)
    assert not is_merged(output, InputShard(1, 2), MANIFEST)


def test_a_shard_of_another_job_is_named_and_nothing_is_merged(output):
    other = {**MANIFEST, "settings": {"sampling.seed": 1}}
    for index in range(COUNT):
        finish(output, InputShard(index, COUNT), other if index == 1 else MANIFEST)
    with pytest.raises(JobError, match=r"slice-00001-of-00003: is no slice.*sampling.seed was 1"):
        merge_if_complete(output, COUNT, MANIFEST)
    assert not output.exists()


def test_another_jobs_output_is_not_touched(output):
    output.write_text("mine\n")
    with pytest.raises(JobError, match="exists and is not this job's"):
        is_merged(output, InputShard(0, COUNT), MANIFEST)
    assert output.read_text() == "mine\n"


def test_the_records_of_a_run_without_shards_are_kept(output):
    ledger = Ledger(output)
    decide_start_or_resume(ledger, MANIFEST, overwrite=False)
    ledger.create_shards(1)
    writer = ShardWriter(shards_dir(output), 0)
    writer.append([completion(3)])
    writer.close()
    ledger.close()
    with pytest.raises(JobError, match="belongs to a run without --slice"):
        is_merged(output, InputShard(0, COUNT), MANIFEST)
    for index in range(COUNT):
        finish(output, InputShard(index, COUNT))
    with pytest.raises(JobError, match="belongs to a run without --slice"):
        merge_if_complete(output, COUNT, MANIFEST)
    ledger = Ledger(output)
    assert (
        ledger.count() == 1
        and decide_start_or_resume(ledger, MANIFEST, overwrite=False) == "resume"
    )
    ledger.close()
