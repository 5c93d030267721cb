"""Merge of input shards (`input/shards.py`): the run that finishes the last one makes the output.

A run that finishes its shard checks, under the lock of the whole output, whether all shards are
complete; the last one copies them, in order, into the output and removes them:

    1. copy      <output>.merge-<host>-<pid>-<random>.tmp, synced, renamed to <output>
    2. finalize  if it is as long as the shards, <output>.job.json: now the output is complete
    3. remove    the shards, and copies that killed merges left

Killed before 2, a rerun of any shard merges again from the start; after 2, it removes what is left.
On a file system without locks several runs may merge at once: each copies into a file of its own,
and the later ones find the output finalized.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.batch.atomic_files import (
    Busy,
    DurableWriter,
    fsync_directory,
    naming,
    read_json,
    write_text,
)
from engine.batch.input.shards import (
    SHARD_SUFFIX,
    InputShard,
    counts_beside,
    files_like,
    has_unsharded_run,
    refuse_unsharded_run,
)
from engine.batch.ledger import Ledger, shards_dir
from engine.batch.manifest import (
    JobError,
    finalize,
    output_differences,
    output_rounds,
    recorded_error_size,
    sibling_path,
)
from engine.batch.records.job_format import error_file, error_file_of
from engine.distributed.health.progress import OnProgress, ignore_progress

_COPY_BYTES = 4 << 20
_MERGE_LOCK_TIMEOUT_S = 600.0  # another run may be merging
_COPY_SUFFIX = re.compile(r"\.merge-(.+)-(\d{1,9})-[0-9a-f]{8}\.tmp")
_TOKENS = ("prompt_tokens", "generated_tokens", "cached_tokens")
_SUMS = ("total", "resumed", "errors", "requests", *_TOKENS)


def is_merged(output: Path, shard: InputShard, manifest: dict[str, Any]) -> bool:
    """Return whether the whole output is complete; if so, remove what is left of its shards.

    Args:
        output: the whole output.
        shard: about to be run.
        manifest: of the whole job.

    Raises:
        JobError: `shard` must not be run, as another job's output or ledger, or shards of another
            division, are in its place.
    """
    differences = output_differences(output, manifest)
    if differences == []:
        _remove_shards(output)
        return True
    counts = counts_beside(output)
    refuse_unsharded_run(output)
    if differences is not None and not counts:
        raise JobError(
            f"--slice {shard}: --output {output} exists and is not this job's: "
            f"{'; '.join(differences)}. Remove it, or use another --output"
        )
    errors = error_file_of(output, manifest)
    if errors is not None and errors.exists() and not counts:
        raise JobError(
            f"--slice {shard}: {errors}, where error records go, exists and is of unknown origin. "
            "Remove it, or use another --output"
        )
    if others := sorted(count for count in counts if count != shard.count):
        raise JobError(
            f"--slice {shard}: next to {output} are slices of {others[0]}; continue with "
            f"--slice I/{others[0]}, remove {output.name}.slice-*, or use another --output"
        )
    return False


def merge_if_complete(
    output: Path, count: int, manifest: dict[str, Any], report: OnProgress = ignore_progress
) -> str:
    """Merge the shards into `output` if all are complete; return a sentence with the outcome.

    Args:
        output: the whole output.
        count: number of shards.
        manifest: of the whole job.
        report: called at intervals, also while another run holds the lock.

    Raises:
        OSError: a file cannot be read or written.
        JobError: a shard is another job's.
    """
    with merge_lock(output, report) as ledger:
        refuse_unsharded_run(output)
        if output_differences(output, manifest) == []:
            _remove_shards(output)
            return f"{output} is complete"
        shards = [InputShard(index, count) for index in range(count)]
        missing = [shard.index for shard in shards if not _is_complete(shard, output, manifest)]
        if missing:
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            return f"slices {shown} of {count} are not complete yet; the last one merges all"
        try:
            _merge([shard.output(output) for shard in shards], output, ledger, manifest, report)
        except FileNotFoundError:
            # Without locks another run may have finalized the output and begun to remove.
            if output_differences(output, manifest) != []:
                raise
        _remove_shards(output)
        return f"{output} is complete: {count} slices, merged"


def _merge(
    shards: list[Path], output: Path, ledger: Ledger, manifest: dict[str, Any], report: OnProgress
) -> None:
    """Copy the shards and finalize. Raises JobError, with the shards kept, for a wrong size."""
    size = sum(path.stat().st_size for path in shards)
    total = _total([read_json(sibling_path(path, "report.json")) for path in shards])
    config = sibling_path(shards[0], "config.yaml").read_text(encoding="utf-8")
    rounds = [
        {**each, "slice": index}
        for index, path in enumerate(shards)
        for each in output_rounds(path)
    ]
    if (errors := error_file_of(output, manifest)) is not None:
        # By what the shards recorded: another run may be removing them.
        sources = [error_file(path) for path in shards if recorded_error_size(path)]
        size_of_errors = sum(path.stat().st_size for path in sources)
        ledger.error_file = errors
        if sources:  # before the output, whose presence means that the job is complete
            ledger.error_crc32 = _copy(sources, errors, report)
            _check_size(errors, size_of_errors)
        else:
            errors.unlink(missing_ok=True)
    ledger.output_crc32 = _copy(shards, output, report)
    write_text(sibling_path(output, "config.yaml"), config)
    write_text(sibling_path(output, "report.json"), json.dumps(total, indent=2) + "\n")
    _check_size(output, size)
    finalize(ledger, manifest, total["errors"], rounds)


def _check_size(merged: Path, size: int) -> None:
    if (copied := merged.stat().st_size) != size:
        raise JobError(
            f"{merged} is {copied} bytes, its slices are {size}: something else has written to one "
            "of them. The slices are kept; run any of them again to repeat the merge"
        )


@contextmanager
def merge_lock(output: Path, report: OnProgress) -> Iterator[Ledger]:
    """Keep other runs from merging the shards: hold the whole output's ledger, a lock only here.

    Raises OSError and Busy.
    """
    deadline = time.monotonic() + _MERGE_LOCK_TIMEOUT_S
    while True:
        try:
            ledger = Ledger(output)
            break
        except Busy:
            if time.monotonic() >= deadline:
                raise
        report()
        time.sleep(0.2)
    try:
        yield ledger
    finally:
        if ledger.directory.exists() and not has_unsharded_run(output):
            ledger.remove()
        ledger.close()


def _is_complete(shard: InputShard, output: Path, manifest: dict[str, Any]) -> bool:
    """Return whether a shard is finalized. Raises JobError if it is another job's."""
    own = shard.output(output)
    # Its run may be between output and finalize. Checked first: a run that has removed its ledger
    # has finalized its output.
    is_running = shards_dir(own).exists()
    differences = output_differences(own, manifest)
    if differences and not is_running:
        raise JobError(f"{own}: is no slice of this job: {'; '.join(differences)}; remove it")
    return differences == []


def _copy(sources: list[Path], output: Path, report: OnProgress) -> int:
    """Copy the sources, in order, to the output; return its checksum."""
    host = socket.gethostname()
    for path, match in files_like(_COPY_SUFFIX, output):
        if match[1] == host and not _is_alive(int(match[2])):
            path.unlink(missing_ok=True)  # before it takes the space that this copy needs
    own = f"{output.name}.merge-{host}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    temporary = output.with_name(own)
    try:
        with naming(temporary), temporary.open("wb") as target:
            out = DurableWriter(target, report)
            for source in sources:
                with naming(source), source.open("rb") as file:
                    while block := file.read(_COPY_BYTES):
                        out.write(block)
            out.sync()
        os.replace(temporary, output)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(output.parent)
    return out.crc32


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True


def _total(reports: list[dict[str, Any] | None]) -> dict[str, Any]:
    """Return one report of all shards: their sums, then the report of each."""
    present = [report or {} for report in reports]
    sums = {key: sum(report.get(key, 0) for report in present) for key in _SUMS}
    if retried := sum(report.get("retried", 0) for report in present):
        sums["retried"] = retried
    return {**sums, "capacity": present[0].get("capacity"), "slices": present}


def _remove_shards(output: Path) -> None:
    """Remove the shards of a finalized output, and copies that other merges left."""
    copies = files_like(_COPY_SUFFIX, output) + files_like(_COPY_SUFFIX, error_file(output))
    for path, _ in files_like(SHARD_SUFFIX, output) + copies:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # a ledger that another run has just left
        else:
            path.unlink(missing_ok=True)
