"""Retry of error records: their lines run again, every other record is kept byte for byte.

The records that succeeded stay in the ledger, so what is left is an unfinished job, which resumes,
merges and is killed like any other. How the ledger comes to hold just these:

    unfinished output   its ledger gets a round (`retry_rounds.py`) in its manifest, in one write:
                        from then on, the error records that were there before do not count
    finished output     has no ledger, so one is built from it:
        1. copy     the records that succeeded, with checksums, synced
        2. write    the ledger's manifest, with the round
        3. begin    remove <output>.job.json: now the job is unfinished

Killed before 3, the output is still complete and the next run discards the copy; after 3, the next
run continues the round. The old output stays until the merge replaces it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from engine.batch.atomic_files import (
    DurableWriter,
    fsync_directory,
    naming,
    read_json,
    write_json,
)
from engine.batch.input.index import InputIndex, line_id
from engine.batch.ledger import Ledger, encode_record, shard_path
from engine.batch.manifest import JobError, sibling_path, warn_without_files
from engine.batch.records.job_format import error_file_of, job_number
from engine.batch.records.marks import is_error, line_of
from engine.batch.retry_rounds import (
    KEY,
    RetryRequest,
    rounds_of,
    void_before,
    with_request,
    with_round,
)
from engine.distributed.health.progress import OnProgress, ignore_progress

_CHUNK = 1 << 20
_RECORDS_PER_REPORT = 4096


class ShardIsMerged(JobError):
    """The output to be retried was an input shard's, and is merged by now."""


def begin_from_output(
    ledger: Ledger,
    manifest: dict[str, Any],
    request: RetryRequest,
    index: InputIndex,
    lines: range,
    begin_lock: AbstractContextManager[object],
    report: OnProgress = ignore_progress,
) -> None:
    """Turn a finished output into an unfinished job without its error records.

    Args:
        ledger: of the output; what it holds is discarded.
        manifest: of the job, which is that of the output.
        request: for the round.
        index: of the whole input.
        lines: indices of the requests in the output.
        begin_lock: held while the job becomes unfinished.
        report: called once per 4096 records.

    Raises:
        JobError: the output was changed since it was made; it is as it was.
        ShardIsMerged: another run has merged and removed it.
        OSError: a file cannot be read or written.
    """
    job_file, begun = sibling_path(ledger.output, "job.json"), False
    try:
        of_output = read_json(job_file)
        if of_output is None:
            raise FileNotFoundError(job_file)
        ledger.discard()
        num_errors = _copy_successes(ledger, of_output, index, lines, report)
        rounds = with_round(rounds_of(of_output), request, num_errors, {})
        write_json(ledger.directory / "manifest.json", {**manifest, KEY: rounds})
        with begin_lock:
            job_file.unlink()
            begun = True
        fsync_directory(ledger.output.parent)
    except Exception as error:
        if not begun:
            with suppress(OSError):  # the merge of all shards may have removed it
                ledger.remove()
        if isinstance(error, FileNotFoundError) and not begun and not job_file.exists():
            raise ShardIsMerged(f"{ledger.output}: was merged by another run") from error
        raise
    warn_without_files(ledger, of_output, manifest)


def continue_or_begin(
    ledger: Ledger, request: RetryRequest | None, report: OnProgress = ignore_progress
) -> list[dict[str, Any]]:
    """Apply the rounds of a ledger to it, and begin one if it has none; return them.

    Args:
        ledger: unfinished, with its torn tails truncated.
        request: for a round; None: only apply.
        report: called once per 4096 records.

    Raises:
        OSError: a file cannot be read or written.
    """
    path = ledger.directory / "manifest.json"
    manifest = read_json(path) or {}
    rounds = rounds_of(manifest)
    before = rounds
    if request is not None and rounds:
        rounds = with_request(rounds, request)
    elif request is not None:
        num_errors, sizes = ledger.count_errors(report), ledger.sizes()
        rounds = with_round([], request, num_errors, sizes)
    if rounds != before:
        write_json(path, {**manifest, KEY: rounds})
    ledger.void_before = void_before(rounds)
    return rounds


def _copy_successes(
    ledger: Ledger,
    of_output: dict[str, Any],
    index: InputIndex,
    lines: range,
    report: OnProgress,
) -> int:
    """Copy the records that succeeded to the ledger's first shard; return how many did not."""
    checksum = of_output.get("output_crc32")
    output = _Checked(ledger.output, report)
    files, records = [output], _records(output, lines)
    if (path := error_file_of(ledger.output, of_output)) is not None:
        errors = _Checked(path, report)
        files.append(errors)
        records = _pair_records(output, errors, job_number(of_output), lines)
    if checksum is None:  # made by an older version
        records = _check_ids(ledger.output, records, index)
    num_errors = 0
    path = shard_path(ledger.directory, 0)
    with naming(path), path.open("wb", buffering=_CHUNK) as file:
        out = DurableWriter(file, report)
        for number, body in records:
            if is_error(body):
                num_errors += 1
            else:
                out.write(encode_record(number, body))
        out.sync()
    expected = [checksum, of_output["output"].get("error_file", {}).get("crc32", 0)]
    for each, crc32 in zip(files, expected, strict=False):
        if crc32 is not None and crc32 != each.crc32:
            raise _changed(ledger.output, f"{each.what} checksum is another one")
    if num_errors != of_output["output"].get("errors"):
        raise _changed(ledger.output, f"it has {num_errors} error records, and had another number")
    return num_errors


class _Checked:
    """The lines of a file of records, and their checksum as they are read."""

    def __init__(self, path: Path, report: OnProgress) -> None:
        """Describe the file; one that is missing has no lines."""
        self.path, self._report = path, report
        self.crc32 = 0  # of what has been read
        self.num_lines = 0
        self.what = "its"

    def __iter__(self) -> Iterator[bytes]:
        if not self.path.exists():
            return
        with naming(self.path), self.path.open("rb", buffering=_CHUNK) as file:
            for raw in file:
                if self.num_lines % _RECORDS_PER_REPORT == 0:
                    self._report()
                self.num_lines += 1
                self.crc32 = zlib.crc32(raw, self.crc32)
                yield raw


def _pair_records(
    output: _Checked, errors: _Checked, job: str, lines: range
) -> Iterator[tuple[int, bytes]]:
    """Yield (index, record) for each line of a job whose errors have a file of their own.

    Both files are in input order, and a record's id says which line it is of.
    """
    errors.what = f"of {errors.path.name}, the"
    files = ((iter(output), output), (iter(errors), errors))
    heads = [next(file, b"") for file, _ in files]
    for index in lines:
        for place, (file, _) in enumerate(files):
            if heads[place].endswith(b"}\n") and line_of(heads[place]) == (job, index):
                yield index, heads[place][:-1]
                heads[place] = next(file, b"")
                break
        else:
            raise _changed(output.path, f"line {index + 1} of the job has no record")
    for head, (_, checked) in zip(heads, files, strict=True):
        if head:
            what = f"line {checked.num_lines} of {checked.path.name} is no record of this job"
            raise _changed(output.path, what)


def _records(output: _Checked, lines: range) -> Iterator[tuple[int, bytes]]:
    """Yield (index, record) for each line of an output."""
    for raw in output:
        if output.num_lines > len(lines) or not raw.endswith(b"}\n"):
            raise _changed(output.path, f"its line {output.num_lines} is no record of this job")
        yield lines[output.num_lines - 1], raw[:-1]
    if output.num_lines < len(lines):
        raise _changed(output.path, f"it has {output.num_lines} lines, and had {len(lines)}")


def _check_ids(
    output: Path, records: Iterator[tuple[int, bytes]], index: InputIndex
) -> Iterator[tuple[int, bytes]]:
    """Yield the records of an output without a recorded checksum; each must have its line's id."""
    first = None
    with naming(index.path), index.path.open("rb") as file:
        for number, body in records:
            first = number if first is None else first
            file.seek(int(index.offsets_n[number]))
            name: object = line_id(file.readline())
            try:
                found = json.loads(body)
            except (ValueError, RecursionError):
                found = None
            record: dict[str, Any] = {}
            if isinstance(found, dict) and ("finish_reason" in found or "choices" in found):
                record = found
            other = record.get("id", record)  # a missing id equals none
            if type(other) is not type(name) or other != name:
                line = number - first + 1
                raise _changed(output, f"its line {line} is not the record of id {name!r}")
            yield number, body


def _changed(output: Path, why: str) -> JobError:
    return JobError(
        f"--output {output} exists and is not this job's: it was changed after the job finished: "
        f"{why}. Use --overwrite to replace it, or another --output"
    )
