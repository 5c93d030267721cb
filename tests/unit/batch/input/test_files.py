"""What `--input` names becomes one job: packed files, folders, several files, standard input.

With the jobs and the children that die of `test_retry.py`.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard

from engine.batch.input.files import STDIN, LineNames
from engine.batch.input.shards import InputShard
from engine.batch.ledger import shards_dir
from engine.batch.manifest import JobError
from tests.unit.batch.test_retry import IDS, attempts, killed, logged, records, run, topology

TEXT = "".join(json.dumps({"id": name, "prompt_token_ids": [1]}) + "\n" for name in IDS).encode()
LINES = TEXT.splitlines(keepends=True)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "job").mkdir()
    return tmp_path / "job" / "out.jsonl"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def pack(kind: str, content: bytes) -> bytes:
    if kind == "gz":
        half = len(content) // 2
        return gzip.compress(content[:half]) + gzip.compress(content[half:])
    frames = (content[:9], content[9:])
    return b"".join(zstandard.ZstdCompressor().compress(frame) for frame in frames)


def pipe(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def left(output: Path) -> set[str]:
    return {path.name for path in output.parent.iterdir() if "input" in path.name}


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("name", ["in.jsonl.%s", "in"])
def test_a_packed_file_is_the_same_job_as_the_file_in_it(kind, name, output):
    packed = output.with_name(name % kind if "%" in name else name)
    packed.write_bytes(pack(kind, TEXT))
    run(output, source=packed, limit=2)
    assert left(output) == {"out.jsonl.input.jsonl", "out.jsonl.input.json"}
    output.with_name("in.jsonl").write_bytes(TEXT)
    assert run(output) == "" and len(attempts(output)) == len(IDS)
    assert logged(output, "begun") == dict.fromkeys(range(len(IDS)), 1)
    run(output, source=packed)
    assert left(output) == set()


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("change", [lambda data: data[:-7], lambda data: data[:20] + b"xxxx"])
def test_a_damaged_packed_file_is_refused_in_words(kind, change, output):
    packed = output.with_name(f"in.jsonl.{kind}")
    packed.write_bytes(change(pack(kind, TEXT * 50)))
    with pytest.raises(JobError, match="is damaged or cut off"):
        run(output, source=packed)
    assert left(output) == set() and not shards_dir(output).exists()


def test_a_packed_file_of_another_format_is_refused(output):
    packed = output.with_name("in.gz")
    packed.write_bytes(gzip.compress(b"id,prompt\n1,hello\n"))
    with pytest.raises(JobError, match="in.gz: seems to be CSV"):
        run(output, source=packed)


def test_several_files_are_one_job_and_errors_name_the_file_and_its_line(output):
    folder = output.parent / "inputs"
    folder.mkdir()
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"\n" + b"".join(LINES[2:4])))
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"".join(LINES[:2])[:-1])
    (folder / "notes.txt").write_text("not read")
    more = output.with_name("more.jsonl")
    more.write_bytes(b"".join(LINES[4:]))
    run(output, source=[folder, more])
    assert len(attempts(output)) == len(IDS)
    errors = [record["error"] for record in records(output) if "error" in record]
    assert [(error["line"], Path(error["file"]).name) for error in errors] == [
        (2, "a.jsonl"),
        (2, "b.jsonl.gz"),
        (3, "b.jsonl.gz"),
        (2, "more.jsonl"),
    ]
    assert left(output) == {"inputs"}


def test_an_id_that_another_file_has_is_a_duplicate_and_the_message_names_that_file(output):
    from engine.batch.file_job import FileJob
    from engine.config.loader import config_from_tree

    for name in ("a.jsonl", "b.jsonl"):
        output.with_name(name).write_bytes(LINES[0])
    config = config_from_tree({"model": {"path": "model"}})
    sources = [output.with_name("a.jsonl"), output.with_name("b.jsonl")]
    job = FileJob(config, topology(), sources, output)
    assert job.open("key", overwrite=False) == ""
    assert job.lines[1].earlier == f"line 1 of {sources[0]}"


def test_lines_of_both_formats_in_two_files_are_refused_with_file_and_line(output):
    output.with_name("a.jsonl").write_bytes(LINES[0])
    output.with_name("b.jsonl").write_bytes(b'\n{"custom_id": "x", "body": {"prompt": [1]}}\n')
    sources = [output.with_name("a.jsonl"), output.with_name("b.jsonl")]
    with pytest.raises(JobError, match=r"line 2 of \S+b.jsonl is in OpenAI's.* line 1 of \S+a.js"):
        run(output, source=sources)
    assert left(output) == set()


def test_standard_input_is_kept_until_the_job_is_complete(output, monkeypatch):
    pipe(monkeypatch, TEXT)
    run(output, source=STDIN, limit=2)
    pipe(monkeypatch, b"")
    run(output, source=STDIN, limit=2)
    pipe(monkeypatch, TEXT)
    assert run(output, source=STDIN) == ""
    assert len(attempts(output)) == len(IDS) and left(output) == set()
    assert set(logged(output, "begun").values()) == {1}


def test_other_requests_on_standard_input_are_another_job(output, monkeypatch):
    pipe(monkeypatch, TEXT)
    run(output, source=STDIN, limit=2)
    pipe(monkeypatch, LINES[0])
    with pytest.raises(JobError, match="of another job: the input was -, .* is -, "):
        run(output, source=STDIN)
    pipe(monkeypatch, TEXT)
    assert run(output, source=STDIN) == "" and set(logged(output, "begun").values()) == {1}


def test_a_run_that_is_refused_leaves_the_requests_of_an_earlier_one(output, monkeypatch):
    pipe(monkeypatch, TEXT)
    run(output, source=STDIN, limit=2)
    for refused in (LINES[0], b"[]", b"PAR1"):
        pipe(monkeypatch, refused)
        with pytest.raises(JobError):
            run(output, source=STDIN)
    pipe(monkeypatch, b"")
    assert run(output, source=STDIN) == "" and left(output) == set()
    assert len(attempts(output)) == len(IDS)


def test_what_cannot_be_an_input_is_refused_before_anything_is_written(output, monkeypatch):
    pipe(monkeypatch, b"")
    empty, packed = output.with_name("empty"), output.with_name("in.gz")
    empty.mkdir()
    packed.write_bytes(gzip.compress(TEXT))
    cases: list[tuple[Any, str]] = [
        (STDIN, "standard input is empty"),
        ([STDIN, packed], "cannot be one of several"),
        (empty, "holds no file"),
        ([packed, output.with_name("nothere")], "nothere: does not exist"),
        (output.parent, "is in the folder that is the input"),
    ]
    before = set(output.parent.iterdir())
    for source, why in cases:
        with pytest.raises(JobError, match=why):
            run(output, source=source)
    assert set(output.parent.iterdir()) == before


def test_a_file_that_changed_since_is_another_job(output):
    packed = output.with_name("in.gz")
    packed.write_bytes(gzip.compress(TEXT))
    run(output, source=packed, limit=2)
    packed.write_bytes(gzip.compress(TEXT + b"\n"))
    with pytest.raises(JobError, match="of another job: the input was"):
        run(output, source=packed)


def test_slices_of_a_packed_file_leave_one_output(output):
    packed = output.with_name("in.gz")
    packed.write_bytes(gzip.compress(TEXT))
    for index in range(3):
        run(output, source=packed, shard=InputShard(index, 3))
    assert len(attempts(output)) == len(IDS) and left(output) == set()
    assert not [path for path in output.parent.iterdir() if "slice" in path.name]


def test_slices_of_a_packed_file_do_not_replace_a_foreign_output(output):
    packed = output.with_name("in.gz")
    packed.write_bytes(gzip.compress(TEXT))
    output.write_text("mine\n")
    with pytest.raises(JobError, match="exists and is not this job's"):
        run(output, source=packed, shard=InputShard(0, 3))
    assert output.read_text() == "mine\n"


def test_a_job_of_packed_files_that_is_killed_anywhere_is_completed_by_the_next_run(output):
    packed = output.with_name("in.gz")
    packed.write_bytes(gzip.compress(TEXT))
    template = output.parent.with_name("template")
    shutil.copytree(output.parent, template)
    number = 0
    while True:
        number += 1
        shutil.rmtree(output.parent)
        shutil.copytree(template, output.parent)
        os.utime(output.with_name("in.gz"), ns=(10**18, 10**18))
        if not killed(number, lambda: run(output, source=packed)):
            break
        run(output, source=packed)
        begun = logged(output, "begun")
        durable = logged(output, "durable")
        assert all(begun[index] - durable[index] in (0, 1) for index in range(len(IDS)))
        assert len(records(output)) == len(IDS), f"killed at operation {number}"
        assert left(output) == set(), f"killed at operation {number}"
        assert not [path for path in output.parent.iterdir() if ".tmp" in path.name]
    assert number > 20


def test_numbers_of_lines_are_those_of_their_own_files():
    names = LineNames([(1, "a"), (4, "b"), (4, "empty"), (5, "c")])
    assert [names.place(number) for number in (1, 3, 5, 9)] == [
        (1, "a"),
        (3, "a"),
        (1, "c"),
        (5, "c"),
    ]
    assert LineNames().place(7) == (7, None) and LineNames().describe(7) == "line 7"
