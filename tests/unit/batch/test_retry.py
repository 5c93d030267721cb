"""Retry of error records: each line again once per request, whatever is killed, nothing else.

Jobs here are real files and a `FileJob`, run in child processes that die at any operation on the
file system. In place of the engine, line n fails until it has run often enough.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.batch import atomic_files, ledger
from engine.batch.file_job import FileJob
from engine.batch.input.shards import InputShard
from engine.batch.ledger import shards_dir
from engine.batch.manifest import JobError, sibling_path
from engine.batch.retry_rounds import RetryRequest
from engine.config.loader import config_from_tree
from engine.distributed.groups import Group, Topology
from engine.request import Completion, RequestError

# Ids of the lines: one is given twice, one is null. A line fails until it has run that often.
IDS = ["a", "b", "a", None, "c", 7, "d"]
NEEDS = [1, 2, 99, 99, 1, 3, 1]
ERRORS = [1, 2, 3, 5]
KILLED = 9


def topology() -> Topology:
    one = Group(0, 1, (0,), None)  # type: ignore[arg-type]
    cpu, store = torch.device("cpu"), dist.HashStore()
    return Topology(*[one] * 7, 0, 1, 0, cpu, store, 1, "host")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    lines = [{"id": name, "prompt_token_ids": [1]} for name in IDS]
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "out.jsonl"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def log(output: Path, what: str, index: int) -> None:
    with output.with_name("log").open("a") as file:
        file.write(f"{what} {index}\n")


def logged(output: Path, what: str) -> Counter[int]:
    path = output.with_name("log")
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return Counter(int(line.split()[1]) for line in lines if line.startswith(what))


def complete(output: Path, index: int) -> Completion:
    """Run a line: fail until it has begun as often as it needs."""
    log(output, "begun", index)
    number = logged(output, "begun")[index]
    if number < NEEDS[index]:
        error = RequestError("invalid_value", f"attempt {number}")
        return Completion.failure(index, IDS[index], error)
    text = f"attempt {number}"
    return Completion(index, IDS[index], text, [1], "stop", prompt_tokens=1, completion_tokens=1)


def run(
    output: Path,
    *,
    retry: RetryRequest | bool = False,
    shard: InputShard | None = None,
    limit: int = 99,
    overwrite: bool = False,
    source: Path | list[Path] | None = None,
    **sections: Any,
) -> str:
    """Run a job up to `limit` lines; return what it prints where it does not run."""
    config = config_from_tree({"model": {"path": "model"}, **sections})
    request = RetryRequest.of_process({}) if retry is True else retry or None
    job = FileJob(
        config, topology(), source or output.with_name("in.jsonl"), output, shard, retry=request
    )
    if done := job.open("key", overwrite=overwrite):
        return done
    try:
        for place in range(min(len(job.lines), limit)):
            index = job.lines[place].index
            job.write([complete(output, index)])
            log(output, "durable", index)
        job.close()
        if len(job.lines) <= limit:
            errors = job.merge()
            report = {"total": job.num_total, "errors": errors, "retried": job.num_retried}
            sibling_path(job.output, "config.yaml").write_text("")
            sibling_path(job.output, "report.json").write_text(json.dumps(report))
            job.finalize(errors)
        return ""
    finally:
        if job._ledger is not None:
            with contextlib.suppress(OSError):
                job._ledger.close()


def killed(number: int, work: Callable[[], object]) -> bool:
    """Do the work in a child that dies at its `number`-th change of a file; return if it did."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            die_at(number)
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, KILLED)
    return status != 0


def die_at(number: int) -> None:
    """End the process at the `number`-th operation: before it, or in the middle of a write."""
    left = number

    def guard(function: Any, torn: bool = False) -> Any:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                if torn:
                    function(args[0], bytes(args[1])[: len(args[1]) // 2])
                os._exit(KILLED)
            return function(*args, **kwargs)

        return guarded

    for name in ("replace", "unlink", "rmdir", "fsync", "mkdir"):
        setattr(os, name, guard(getattr(os, name)))
    for name in ("unlink", "rmdir", "mkdir", "touch"):
        setattr(Path, name, guard(getattr(Path, name)))
    os.write = guard(os.write, torn=True)
    atomic_files.DurableWriter.write = guard(atomic_files.DurableWriter.write)
    atomic_files.DurableWriter.sync = guard(atomic_files.DurableWriter.sync)
    ledger.ShardWriter.append = guard(ledger.ShardWriter.append)


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text().splitlines()]


def attempts(output: Path) -> list[str]:
    """Return each record's attempt, in input order; check that there is one record per line."""
    found = records(output)
    assert [record["id"] for record in found] == IDS
    return [record["text"] or record["error"]["message"] for record in found]


def job_file(output: Path) -> dict[str, Any]:
    return json.loads(sibling_path(output, "job.json").read_text())


ONCE = [f"attempt {1}"] * len(IDS)
TWICE = ["attempt 2" if index in ERRORS else "attempt 1" for index in range(len(IDS))]


def test_error_records_are_run_again_in_place_and_the_others_are_the_same_bytes(output):
    run(output)
    before = output.read_bytes().splitlines()
    assert attempts(output) == ONCE
    assert run(output, retry=True) == ""
    assert attempts(output) == TWICE
    after = output.read_bytes().splitlines()
    assert all(before[i] == after[i] for i in range(len(IDS)) if i not in ERRORS)
    errors = {i: record["error"]["line"] for i, record in enumerate(records(output)) if i in (2, 5)}
    assert errors == {2: 3, 5: 6}
    assert not shards_dir(output).exists()
    made = job_file(output)
    assert made["output"]["errors"] == 3
    assert made["retries"] == [{"round": 1, "records": 4, "requests": []}]
    assert json.loads(sibling_path(output, "report.json").read_text())["retried"] == 4


def test_each_request_runs_what_failed_once_more(output):
    run(output)
    run(output, retry=True)
    assert run(output, retry=True) == ""
    assert logged(output, "begun") == {0: 1, 1: 2, 2: 3, 3: 3, 4: 1, 5: 3, 6: 1}
    assert [each["records"] for each in job_file(output)["retries"]] == [4, 3]
    assert [each["round"] for each in job_file(output)["retries"]] == [1, 2]


def test_a_complete_output_says_how_many_errors_it_has_and_names_the_flag(output):
    run(output)
    assert run(output) == (
        f"{output} is already complete; 4 of its 7 records are errors: --retry-errors runs their "
        "lines again, --overwrite runs the job again"
    )


def test_without_errors_there_is_nothing_to_retry_and_nothing_changes(output, monkeypatch):
    monkeypatch.setattr("tests.unit.batch.test_retry.NEEDS", [1] * len(IDS))
    run(output)
    before = {path: path.read_bytes() for path in output.parent.iterdir()}
    again = "--overwrite runs the job again"
    done = run(output, retry=True)
    assert done == f"{output} is already complete; no error records to run again; {again}"
    assert run(output) == f"{output} is already complete; {again}"
    assert before == {path: path.read_bytes() for path in output.parent.iterdir()}


def test_the_errors_of_an_unfinished_job_are_run_again_with_the_rest(output):
    run(output, limit=4)
    assert run(output, retry=True, limit=2) == ""
    assert logged(output, "begun") == {0: 1, 1: 2, 2: 2, 3: 1}
    assert run(output, retry=True, limit=2) == "", "the same round"
    assert run(output) == "", "which a run without the flag continues, too"
    assert logged(output, "begun") == {0: 1, 1: 2, 2: 2, 3: 2, 4: 1, 5: 1, 6: 1}
    assert attempts(output)[1:4] == ["attempt 2"] * 3
    assert job_file(output)["retries"] == [{"round": 1, "records": 3, "requests": []}]
    assert run(output, retry=True) == ""
    assert logged(output, "begun") == {0: 1, 1: 2, 2: 3, 3: 3, 4: 1, 5: 2, 6: 1}


def test_a_job_that_begins_with_the_flag_does_not_run_its_own_errors_again(output):
    run(output, retry=True, limit=3)
    run(output, retry=True)
    assert set(logged(output, "begun").values()) == {1}
    assert attempts(output) == ONCE
    assert job_file(output)["retries"] == [{"round": 1, "records": 0, "requests": []}]


@pytest.mark.parametrize("with_flag", [True, False])
@pytest.mark.parametrize("unfinished", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_retry_that_is_killed_anywhere_is_completed_by_the_next_run(
    output, with_flag, unfinished
):
    """At every operation that changes a file: no record is lost or doubled, each error line runs
    again once, and the old output stays until the new one is complete.
    """
    run(output, limit=5 if unfinished else 99)
    done = [index for index in ERRORS if index < 5] if unfinished else ERRORS
    template = output.parent.with_name("template")
    shutil.copytree(output.parent, template)
    finished = "" if unfinished else output.read_text()
    number, num_begun = 0, 0
    while True:
        number += 1
        shutil.rmtree(output.parent)
        shutil.copytree(template, output.parent)
        if not killed(number, lambda: run(output, retry=True)):
            break
        where = f"killed at operation {number}"
        if output.exists() and output.read_text() != finished:
            assert attempts(output)[1:4] == TWICE[1:4], where
        assert output.exists() or unfinished, where
        durable = logged(output, "durable")
        in_flight = logged(output, "begun") - durable
        assert sum(in_flight.values()) <= 1, where
        rounds = json.loads(text).get("retries") if (text := manifest_text(output)) else None
        if rounds and not shards_dir(output).joinpath("manifest.json").exists():
            # Killed after it was done: with the flag, the next run would be another request.
            assert attempts(output)[1:4] == TWICE[1:4] and not in_flight, where
            assert run(output) and not shards_dir(output).exists(), where
            continue
        message = run(output, retry=with_flag)
        begun = logged(output, "begun")
        if not with_flag and not rounds:  # killed before the round began: as if never asked for
            assert message == "" if unfinished else "4 of its 7 records are errors" in message
            assert begun == Counter(range(len(IDS))), where
            assert attempts(output) == ONCE, where
        else:
            num_begun += 1
            for index in range(len(IDS)):
                expected = 1 + (index in done)
                # A line that was running when the job was killed has no record, and runs again.
                again = begun[index] - expected
                assert again == 0 or (again == 1 and in_flight[index] == 1), where
            assert not in_flight or logged(output, "durable") + in_flight == begun, where
            found = [int(text.split()[1]) for text in attempts(output)]
            assert found == [begun[index] for index in range(len(IDS))], where
        assert not shards_dir(output).exists(), where
        left = [path.name for path in output.parent.iterdir() if ".tmp" in path.name]
        assert not left, where
    assert attempts(output)[1:4] == TWICE[1:4]
    assert num_begun > 20


def manifest_text(output: Path) -> str:
    """Return the manifest that counts: the finished output's, else that of the ledger."""
    for path in (sibling_path(output, "job.json"), shards_dir(output) / "manifest.json"):
        if path.exists():
            return path.read_text()
    return ""


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda text: text[:-20], "it was changed after the job finished"),
        (lambda text: text.replace("attempt", "ATTEMPT"), "its checksum is another one"),
        (lambda text: text.replace('"id":"b"', '"id":"x"'), "its checksum is another one"),
        (lambda text: text.replace("\n", " ", 1), "line 1 is no record|it has 6 lines|checksum"),
        (lambda text: text[:-1] + " ", "its line 7 is no record of this job"),
    ],
)
def test_an_output_that_was_changed_is_refused_in_words_and_left_alone(output, change, why):
    run(output)
    changed = change(output.read_text())
    output.write_text(changed)
    with pytest.raises(JobError, match=f"exists and is not this job's: .*({why}).*--overwrite"):
        run(output, retry=True)
    assert output.read_text() == changed and sibling_path(output, "job.json").exists()
    assert not shards_dir(output).exists()


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda lines: [*lines[:2], lines[4], lines[3], lines[2], *lines[5:]], "its line 3 is not"),
        (lambda lines: [*lines[:6], b"x" * (len(lines[6]) - 2) + b"}\n"], "its line 7 is not"),
        (lambda lines: [line.replace(b'"error"', b'"error1') for line in lines], "is not|error"),
    ],
)
def test_an_output_of_an_older_version_has_no_checksum_and_is_compared_with_the_input(
    output, change, why
):
    run(output)
    made = job_file(output)
    del made["output_crc32"]
    sibling_path(output, "job.json").write_text(json.dumps(made))
    whole = output.read_bytes()
    output.write_bytes(b"".join(change(whole.splitlines(keepends=True))))
    with pytest.raises(JobError, match=why):
        run(output, retry=True)
    output.write_bytes(whole)
    assert run(output, retry=True) == "" and attempts(output) == TWICE


def test_other_settings_or_another_input_are_refused_with_the_flag_too(output):
    run(output)
    for retry in (False, True):
        with pytest.raises(JobError, match="sampling.temperature was 0.0, is 0.5"):
            run(output, retry=retry, sampling={"temperature": 0.5})
    run(output, retry=True, limit=2)
    with pytest.raises(JobError, match=r"of another job: sampling.temperature was 0.0, is 0.5"):
        run(output, retry=True, sampling={"temperature": 0.5})
    assert run(output, overwrite=True) == "", "an unfinished retry is never discarded"
    assert attempts(output) == TWICE


def test_a_full_disk_before_the_round_begins_leaves_the_output_complete(output, monkeypatch):
    run(output)
    before = {path: path.read_bytes() for path in output.parent.iterdir()}

    def full(self: Any, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(atomic_files.DurableWriter, "write", full)
        with pytest.raises(JobError, match=r"part-00000.jsonl: No space left on device"):
            run(output, retry=True)
    assert before == {path: path.read_bytes() for path in output.parent.iterdir()}
    assert run(output, retry=True) == "" and attempts(output) == TWICE


def slurm(restarts: int, job: str = "12", step: str = "0", **more: str) -> RetryRequest:
    environ = {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step} | more
    return RetryRequest.of_process(environ | {"SLURM_RESTART_COUNT": str(restarts)})


def test_a_requeued_job_whose_retry_is_complete_does_not_begin_another(output):
    run(output)
    run(output, retry=slurm(0), limit=2)
    assert run(output, retry=slurm(1)) == ""
    once = logged(output, "begun")
    message = run(output, retry=slurm(2))
    assert "after this request's retry, 3 of its 7 records are errors" in message
    assert logged(output, "begun") == once and attempts(output) == TWICE
    assert run(output, retry=slurm(2, job="13")) == "", "another job is another request"
    assert logged(output, "begun")[5] == 3
    assert "after this request" in run(output, retry=slurm(3)), "of all rounds, not only the last"
    assert run(output, retry=slurm(3, step="1")) == "", "as is another srun of one allocation"


def test_a_request_that_continues_another_ones_round_has_had_it_when_it_is_requeued(output):
    run(output)
    run(output, retry=slurm(0), limit=1)
    assert run(output, retry=slurm(0, job="13")) == ""
    once = logged(output, "begun")
    assert "after this request's retry" in run(output, retry=slurm(1, job="13"))
    assert "after this request's retry" in run(output, retry=slurm(1))
    assert logged(output, "begun") == once


def test_the_same_command_twice_in_one_allocation_is_two_requests(output):
    run(output)
    for _ in range(2):
        assert run(output, retry=slurm(0)) == ""
    assert logged(output, "begun")[5] == 3


def test_a_worker_that_torchrun_starts_again_belongs_to_the_request_of_its_agent(output):
    def request(restarts: int) -> RetryRequest:
        environ = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": str(restarts)}
        return RetryRequest.of_process(environ)

    run(output)
    assert run(output, retry=request(0)) == ""
    assert "after this request's retry" in run(output, retry=request(1))
    assert run(output, retry=request(0)) == "", "a first start is a new request"
    rounds = job_file(output)["retries"]
    assert request(1).is_restart_of(rounds)
    name, restarts = rounds[-1]["requests"][0]["torchrun"]
    assert not RetryRequest({"torchrun": [name + "1", restarts + 1]}).is_restart_of(rounds)


def test_a_manifest_with_odd_retries_is_no_reason_to_fail(output):
    run(output)
    for odd in ({}, "x", [1], [{"round": "x", "requests": 3}], [{"requests": [{"slurm": [1]}, 2]}]):
        sibling_path(output, "job.json").write_text(json.dumps(job_file(output) | {"retries": odd}))
        assert run(output, retry=slurm(1)) == ""


SHARDS = [InputShard(index, 3) for index in range(3)]


def test_a_complete_shard_is_retried_before_the_merge_and_keeps_its_round(output):
    for shard in SHARDS[:2]:
        run(output, shard=shard)
    assert "slices 2 of 3 are not complete" in (message := run(output, shard=SHARDS[0]))
    assert (
        "2 of the slice's 3 records are errors: --slice 0/3 --retry-errors runs their lines again"
        in message
    )
    assert run(output, shard=SHARDS[0], retry=slurm(0), limit=1) == ""
    run(output, shard=SHARDS[2])
    assert not output.exists(), "a slice with an unfinished retry is not merged"
    assert run(output, shard=SHARDS[0], retry=slurm(1)) == ""
    assert attempts(output) == [*TWICE[:3], *ONCE[3:]]
    made = job_file(output)
    requests = [{"slurm": ["12.0", restarts]} for restarts in (0, 1)]
    assert made["retries"] == [{"round": 1, "records": 2, "requests": requests, "slice": 0}]
    assert made["output"]["errors"] == 3 and "output_crc32" in made
    message = run(output, shard=SHARDS[0], retry=slurm(2))
    assert message.startswith("after this request's retry, 3 of the 7 records are errors: ")
    assert message.endswith(f"without --slice runs their lines again; {output} is already complete")
    with pytest.raises(JobError, match="the slices are merged into .* without --slice"):
        run(output, shard=SHARDS[0], retry=slurm(0, job="13"))
    assert run(output, retry=True) == ""
    assert logged(output, "begun") == {0: 1, 1: 2, 2: 3, 3: 2, 4: 1, 5: 2, 6: 1}
    assert [each["round"] for each in job_file(output)["retries"]] == [1, 2]


def test_a_shard_that_is_merged_while_its_retry_begins_is_refused_and_nothing_is_lost(
    output, monkeypatch
):
    for shard in SHARDS[:2]:
        run(output, shard=shard)
    real = atomic_files.DurableWriter.sync

    def merged_meanwhile(self: Any) -> None:
        real(self)
        monkeypatch.undo()
        monkeypatch.setattr(os, "fsync", lambda fd: None)
        run(output, shard=SHARDS[2])

    monkeypatch.setattr(atomic_files.DurableWriter, "sync", merged_meanwhile)
    with pytest.raises(JobError, match="the slices are merged into"):
        run(output, shard=SHARDS[0], retry=True)
    assert attempts(output) == ONCE
    left = {path.name for path in output.parent.iterdir()} - {"in.jsonl", "log"}
    assert left == {f"out.jsonl{suffix}" for suffix in ("", ".config.yaml", ".job.json")} | {
        "out.jsonl.report.json"
    }
    assert run(output, retry=True) == "" and attempts(output) == TWICE


def test_a_retry_of_a_shard_that_is_killed_anywhere_is_merged_once_it_is_complete(output):
    for shard in SHARDS[:2]:
        run(output, shard=shard)
    template = output.parent.with_name("template")
    shutil.copytree(output.parent, template)
    number = 0
    while True:
        number += 1
        shutil.rmtree(output.parent)
        shutil.copytree(template, output.parent)
        if not killed(number, lambda: run(output, shard=SHARDS[0], retry=True)):
            break
        run(output, shard=SHARDS[0], retry=True)
        begun = logged(output, "begun")
        assert [begun[index] for index in (0, 3, 4)] == [1, 1, 1]
        assert sum(begun.values()) - 5 in (2, 3), f"killed at operation {number}"
        run(output, shard=SHARDS[2])
        found = [int(text.split()[1]) for text in attempts(output)]
        assert found == [logged(output, "begun")[index] for index in range(len(IDS))]
    assert number > 20


def test_a_retry_of_shards_that_are_not_merged_needs_the_shard(output):
    run(output, shard=SHARDS[0])
    before = {path.name for path in output.parent.iterdir()}
    with pytest.raises(JobError, match="--retry-errors: next to .* are slices of 3, .*--slice I/3"):
        run(output, retry=True)
    assert before == {path.name for path in output.parent.iterdir()}


def test_an_output_without_recorded_model_files_is_retried_with_one_warning(output, caplog):
    run(output)
    made = job_file(output)
    files = made.pop("files")
    sibling_path(output, "job.json").write_text(json.dumps(made))
    assert run(output, retry=True, limit=1) == ""
    run(output, retry=True)
    assert caplog.text.count("did not record the model's files") == 1
    assert job_file(output)["files"] == files and attempts(output) == TWICE


def test_a_retry_on_other_ranks_continues_the_ledger_of_the_first(output):
    """A round that was begun in a ledger of two shards is continued with one."""
    run(output, limit=4)
    parts = shards_dir(output)
    whole = (parts / "part-00000.jsonl").read_bytes().splitlines(keepends=True)
    (parts / "part-00000.jsonl").write_bytes(b"".join(whole[:2]))
    (parts / "part-00001.jsonl").write_bytes(b"".join(whole[2:]) + b'{"index": 4, "crc')
    run(output, retry=True, limit=2)
    assert logged(output, "begun") == {0: 1, 1: 2, 2: 2, 3: 1}
    assert run(output) == ""
    assert attempts(output)[1:4] == TWICE[1:4]
