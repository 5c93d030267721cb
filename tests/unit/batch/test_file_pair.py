"""A job in OpenAI's form has two files: every line is in one of them, whatever is killed.

With the files, the children that die and the lines that fail at first of `test_retry.py`.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.batch.input.shards import InputShard
from engine.batch.ledger import shards_dir
from engine.batch.manifest import JobError, sibling_path
from engine.batch.records.job_format import error_file
from tests.unit.batch.test_retry import ERRORS, IDS, job_file, killed, logged, run

OURS = {"batch": {"format": "lockstep"}}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    lines = [{"custom_id": name, "body": {"prompt": [1]}} for name in IDS]
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "out.jsonl"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def attempts(output: Path) -> list[int]:
    """Return each line's attempt, in input order; check that each is in one file, in order."""
    good, bad = lines_of(output), lines_of(error_file(output))
    assert all(each["response"]["status_code"] == 200 for each in good)
    assert all(each["response"]["status_code"] == 400 for each in bad)
    found: dict[int, int] = {}
    for records in (good, bad):
        indices = [int(each["id"][-8:], 16) for each in records]
        assert indices == sorted(indices)
        for index, record in zip(indices, records, strict=True):
            assert index not in found, "twice"
            assert record["custom_id"] == IDS[index]
            body = record["response"]["body"]
            text = body["error"]["message"] if "error" in body else body["choices"][0]["text"]
            found[index] = int(text.removeprefix("attempt "))
    assert sorted(found) == list(range(len(IDS)))
    return [found[index] for index in range(len(IDS))]


def both(output: Path) -> tuple[bytes, bytes]:
    errors = error_file(output)
    return output.read_bytes(), errors.read_bytes() if errors.exists() else b""


ONCE = [1] * len(IDS)
TWICE = [2 if index in ERRORS else 1 for index in range(len(IDS))]


def test_what_succeeded_and_what_failed_are_in_two_files(output):
    run(output)
    assert attempts(output) == ONCE
    assert [each["custom_id"] for each in lines_of(output)] == ["a", "c", "d"]
    assert [each["custom_id"] for each in lines_of(error_file(output))] == ["b", "a", None, 7]
    assert error_file(output).name == "out.errors.jsonl"
    assert not shards_dir(output).exists()
    assert "4 of its 7 records are errors" in run(output)


def test_a_retried_line_that_succeeds_moves_to_the_output_and_the_others_keep_their_bytes(output):
    run(output)
    before = output.read_bytes().splitlines()
    assert run(output, retry=True) == ""
    assert attempts(output) == TWICE
    assert [each["custom_id"] for each in lines_of(output)] == ["a", "b", "c", "d"]
    assert set(before) < set(output.read_bytes().splitlines())


def test_without_errors_there_is_no_error_file(output, monkeypatch):
    run(output)
    monkeypatch.setattr("tests.unit.batch.test_retry.NEEDS", ONCE)
    assert run(output, retry=True) == ""
    assert attempts(output) == TWICE
    assert not error_file(output).exists()
    assert "error_file" not in job_file(output)["output"]


def test_a_job_that_is_interrupted_ends_with_the_same_bytes(output, monkeypatch):
    clock = iter(range(1_800_000_000, 1_900_000_000))
    monkeypatch.setattr("engine.batch.records.job_format.time.time", lambda: next(clock))
    run(output)
    whole, created = both(output), job_file(output)["created"]
    run(output, overwrite=True)
    assert job_file(output)["created"] != created
    output.with_name("log").unlink()
    other = output.with_name("other.jsonl")
    for limit in (2, 1, 0, 99):
        run(other, limit=limit)
    made = [part.replace(b'"created":%d' % created, b"") for part in whole]
    then = job_file(other)["created"]
    assert [part.replace(b'"created":%d' % then, b"") for part in both(other)] == made


@pytest.mark.parametrize("unfinished", [False, True])
def test_a_retry_that_is_killed_anywhere_loses_and_doubles_nothing(output, unfinished):
    """Also between the renames of the two files: then neither counts until both are new."""
    run(output, limit=5 if unfinished else 99)
    template = output.parent.with_name("template")
    shutil.copytree(output.parent, template)
    number = 0
    while True:
        number += 1
        shutil.rmtree(output.parent)
        shutil.copytree(template, output.parent)
        if not killed(number, lambda: run(output, retry=True)):
            break
        where = f"killed at operation {number}"
        complete = sibling_path(output, "job.json").exists()
        if complete:
            assert attempts(output)[1:4] in (ONCE[1:4], TWICE[1:4]), where
        else:
            assert (shards_dir(output) / "manifest.json").exists(), where
        run(output)
        begun = logged(output, "begun")
        assert attempts(output) == [begun[index] for index in range(len(IDS))], where
        assert not shards_dir(output).exists(), where
        assert not [path for path in output.parent.iterdir() if ".tmp" in path.name], where
    assert attempts(output)[1:4] == TWICE[1:4]
    assert number > 20


@pytest.mark.parametrize("format_", ["openai", "lockstep"])
def test_an_overwrite_that_is_killed_anywhere_is_completed_by_the_next_run(output, format_):
    run(output)
    template = output.parent.with_name("template")
    shutil.copytree(output.parent, template)
    batch, number = {"batch": {"format": format_}}, 0
    while True:
        number += 1
        shutil.rmtree(output.parent)
        shutil.copytree(template, output.parent)
        if not killed(number, lambda: run(output, overwrite=True, **batch)):
            break
        run(output, overwrite=True, **batch)
        where = f"killed at operation {number}"
        assert len(lines_of(output)) + len(lines_of(error_file(output))) == len(IDS), where
        if format_ == "lockstep":
            assert [each["id"] for each in lines_of(output)] == IDS, where
    assert number > 10


def drop_last_line(text: str) -> str:
    return "".join(text.splitlines(keepends=True)[:-1])


@pytest.mark.parametrize("change", [drop_last_line, lambda text: "", lambda text: text + "{}\n"])
@pytest.mark.parametrize("retry", [False, True])
def test_an_error_file_of_another_size_is_refused_and_left_alone(output, change, retry):
    run(output)
    changed = change(error_file(output).read_text())
    error_file(output).write_text(changed)
    with pytest.raises(JobError, match="out.errors.jsonl was changed or removed after the job"):
        run(output, retry=retry)
    assert error_file(output).read_text() == changed
    assert run(output, overwrite=True) == ""


def test_an_error_file_with_other_content_is_no_base_for_a_retry(output):
    run(output)
    text = error_file(output).read_text()
    for changed, why in (
        (text.replace("attempt", "ATTEMPT"), "of out.errors.jsonl, the checksum is another one"),
        (text.replace("batch_req_", "batch_rex_", 1), "line 2 of the job has no record"),
    ):
        error_file(output).write_text(changed)
        with pytest.raises(JobError, match=why):
            run(output, retry=True)
    error_file(output).write_text(text)
    assert run(output, retry=True) == "" and attempts(output) == TWICE


def test_an_error_file_of_unknown_origin_is_refused_before_anything_runs(output):
    error_file(output).write_text("mine\n")
    with pytest.raises(JobError, match="out.errors.jsonl, where error records go, exists"):
        run(output)
    with pytest.raises(JobError, match="out.errors.jsonl, where error records go, exists"):
        run(output, shard=InputShard(0, 2))
    assert error_file(output).read_text() == "mine\n" and not logged(output, "begun")
    assert run(output, **OURS) == "", "there it is not in the way"
    assert error_file(output).read_text() == "mine\n"


def test_an_input_that_the_error_file_would_replace_is_refused(output):
    other = output.with_name("in.errors.jsonl")
    output.with_name("in.jsonl").rename(other)
    output.with_name("in.jsonl").symlink_to(other)
    with pytest.raises(JobError, match="which is the input; name another file"):
        run(output.with_name("in"))


def older(manifest: Path) -> None:
    """Make a manifest one of a version that knew one form only."""
    kept = {k: v for k, v in json.loads(manifest.read_text()).items() if k != "format"}
    assert "created" not in kept
    manifest.write_text(json.dumps(kept))


def test_a_job_begun_by_an_older_version_ends_in_its_form(output):
    run(output, limit=3, **OURS)
    older(shards_dir(output) / "manifest.json")
    part = shards_dir(output) / "part-00000.jsonl"
    assert part.exists()
    run(output)
    assert [each["id"] for each in lines_of(output)] == IDS
    assert not error_file(output).exists()
    assert "4 of its 7 records are errors" in run(output)
    assert run(output, retry=True) == ""
    assert [each["id"] for each in lines_of(output)] == IDS
    assert run(output, overwrite=True) == ""
    assert lines_of(error_file(output)), "begun anew, it has the form of its input"


def test_slices_begun_by_an_older_version_end_in_its_form(output):
    run(output, shard=InputShard(1, 3), **OURS)
    for index in (0, 2):
        run(output, shard=InputShard(index, 3))
    assert [each["id"] for each in lines_of(output)] == IDS
    assert not error_file(output).exists()


def test_another_format_is_another_job(output):
    run(output, limit=3)
    with pytest.raises(JobError, match="batch.format was openai, is lockstep.*--overwrite"):
        run(output, **OURS)
    run(output, overwrite=True, **OURS)
    with pytest.raises(JobError, match="batch.format was lockstep, is openai.*--overwrite"):
        run(output, batch={"format": "openai"})
    assert "is already complete" in run(output)


@pytest.mark.parametrize("kinds, first", [("ooxp", 4), ("xpo", 3), ("poo", 2)])
def test_a_mixed_file_is_refused_with_the_line(output, kinds, first):
    lines = {"o": {"custom_id": "%d", "body": {"prompt": [1]}}, "p": {"id": "%d", "prompt": [1]}}
    texts = ["{broken" if k == "x" else json.dumps(lines[k]) % n for n, k in enumerate(kinds)]
    output.with_name("in.jsonl").write_text("\n".join(texts))
    with pytest.raises(JobError, match=rf"in.jsonl: line {first} is in .*batch.format=lockstep"):
        run(output)
    assert not shards_dir(output).exists() and not output.exists()
    if "p" in kinds:
        with pytest.raises(JobError, match="batch.format = openai"):
            run(output, batch={"format": "openai"})


SHARDS = [InputShard(index, 3) for index in range(3)]


def test_slices_are_merged_into_both_files_and_retried_after_the_merge(output):
    for shard in SHARDS:
        run(output, shard=shard)
    assert attempts(output) == ONCE
    left = {path.name for path in output.parent.iterdir()} - {"in.jsonl", "log"}
    suffixes = ("", ".config.yaml", ".job.json", ".report.json")
    assert left == {"out.errors.jsonl", *(f"out.jsonl{suffix}" for suffix in suffixes)}
    assert run(output, retry=True) == "" and attempts(output) == TWICE


def test_a_slice_without_errors_has_no_error_file_and_all_share_one_time(output, monkeypatch):
    monkeypatch.setattr("tests.unit.batch.test_retry.NEEDS", [2, *ONCE[1:]])
    clock = iter(range(1_800_000_000, 1_900_000_000))
    monkeypatch.setattr("engine.batch.records.job_format.time.time", lambda: next(clock))
    for shard in SHARDS:
        run(output, shard=shard)
    assert len(lines_of(error_file(output))) == 1 and attempts(output) == ONCE
    assert len({each["response"]["body"]["created"] for each in lines_of(output)}) == 1


@pytest.mark.long
def test_a_merge_of_slices_that_is_killed_anywhere_is_completed_by_any_slice(output):
    for shard in SHARDS[:2]:
        run(output, shard=shard)
    template = output.parent.with_name("template")
    shutil.copytree(output.parent, template)
    number = 0
    while True:
        number += 1
        shutil.rmtree(output.parent)
        shutil.copytree(template, output.parent)
        if not killed(number, lambda: run(output, shard=SHARDS[2])):
            break
        for shard in SHARDS:
            run(output, shard=shard)
        found = [logged(output, "begun")[index] for index in range(len(IDS))]
        assert attempts(output) == found, f"killed at operation {number}"
        left = [path.name for path in output.parent.iterdir() if "slice" in path.name]
        assert not left, f"killed at operation {number}"
    assert attempts(output) == ONCE and number > 20
