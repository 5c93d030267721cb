"""Manifest: which job an output belongs to, and whether a run starts, resumes or is refused.

What a manifest says of a job, and how two differ, is in `job_identity.py`. A finished output has
the manifest of the job that made it next to it, as `<output>.job.json`; an unfinished one has it in
its ledger (`ledger.py`).
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any, Literal

from engine.batch.atomic_files import read_json, write_json
from engine.batch.job_identity import differences, has_files
from engine.batch.ledger import Ledger, shards_dir
from engine.batch.records.job_format import error_file, error_file_of, format_of
from engine.batch.retry_rounds import KEY, RetryRequest, finished, rounds_of

_PLACEMENTS = "placements"  # key of the changes of copies while the job ran

logger = logging.getLogger(__name__)


class JobError(ValueError):
    """The job cannot be run as asked; the message has the reason and what to do."""


def sibling_path(output: Path, suffix: str) -> Path:
    """Return the file `<output>.<suffix>`."""
    return output.with_name(f"{output.name}.{suffix}")


def earlier_manifests(
    output: Path, manifest: dict[str, Any], *, overwrite: bool = False
) -> list[dict[str, Any]]:
    """Return the manifests of the same job, in whichever form, at an output.

    Args:
        output: of the job or of an input shard.
        manifest: of the job.
        overwrite: a finished output does not count, as the job then begins anew.
    """
    found = []
    for path in (_job_file(output), shards_dir(output) / "manifest.json"):
        earlier = _manifest(path)
        if not isinstance(earlier, dict) or not _is_same_job(earlier, manifest):
            continue
        if path == _job_file(output):
            if not output.exists() or _file_changes(output, earlier):
                continue
            if overwrite:
                return []
        found.append(earlier)
    return found


def _is_same_job(earlier: dict[str, Any], manifest: dict[str, Any]) -> bool:
    """Return whether two manifests differ in nothing but the form of the records."""
    return not differences({**earlier, "format": format_of(manifest)}, manifest)


def decide_start_or_resume(
    ledger: Ledger,
    manifest: dict[str, Any],
    *,
    overwrite: bool,
    retry: RetryRequest | None = None,
) -> Literal["complete", "retry", "resume", "fresh"]:
    """Compare a job with what exists at its output, and prepare the ledger.

    Args:
        ledger: of the output.
        manifest: of the job to run.
        overwrite: replace a finished output and another job's records; never the unfinished records
            of this very job, so the same command always resumes.
        retry: runs the error records of a finished output again.

    Returns:
        complete: nothing is left to run, the ledger is removed. retry: the output is finished and
        has error records to run again; nothing has been changed. resume: the ledger holds records
        of this job. fresh: the ledger is empty.

    Raises:
        JobError: `overwrite` is needed to discard what exists.
        OSError: a file cannot be read or written.
    """
    of_ledger = _manifest(ledger.directory / "manifest.json")
    of_output = _manifest(_job_file(ledger.output))
    exists = ledger.output.exists()
    obstacle = None
    if (
        exists
        and isinstance(of_output, dict)
        and not (changes := _changes(ledger.output, of_output, manifest))
    ):
        if not overwrite:
            if retry is not None and _is_due(retry, of_output, of_ledger):
                return "retry"
            ledger.remove()
            return "complete"
    elif isinstance(of_ledger, dict) and not (found := differences(of_ledger, manifest)):
        _job_file(ledger.output).unlink(missing_ok=True)
        if has_files(manifest) and not has_files(of_ledger):
            write_json(
                ledger.directory / "manifest.json", {**of_ledger, "files": manifest["files"]}
            )
        warn_without_files(ledger, of_ledger, manifest)
        return "resume"
    elif of_ledger is not None and (num_records := ledger.count()):
        why = of_ledger if isinstance(of_ledger, str) else "; ".join(found)
        obstacle = f"{ledger.directory} holds {num_records} finished records of another job: {why}"
    elif exists:
        why = "no manifest records which job made it" if of_output is None else of_output
        why = why if isinstance(why, str) else "; ".join(changes)
        obstacle = f"--output {ledger.output} exists and is not this job's: {why}"
    elif (errors := error_file_of(ledger.output, manifest)) is not None and errors.exists():
        obstacle = f"{errors}, where error records go, exists and is of unknown origin"
    if obstacle and not overwrite:
        if of_ledger is None:
            ledger.remove()
        raise JobError(f"{obstacle}. Use --overwrite to replace it, or another --output")
    replaced = [each for each in (of_output, of_ledger) if isinstance(each, dict)]
    if format_of(manifest) != "openai" and any(format_of(each) == "openai" for each in replaced):
        # No merge of this job would replace it. First: later, nothing would tell whose it is.
        error_file(ledger.output).unlink(missing_ok=True)
    ledger.start_over(manifest)
    _job_file(ledger.output).unlink(missing_ok=True)
    return "fresh"


def warn_without_files(ledger: Ledger, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Warn where only the newer of a job's manifests has the files of the checkpoint."""
    if has_files(now) and not has_files(before):
        logger.warning(
            f"warning: {ledger.directory}: this job was begun by a version that did not record "
            "the model's files, so they may have changed since; a change from now on is noticed"
        )


def output_differences(output: Path, manifest: dict[str, Any]) -> list[str] | None:
    """Return why an output is not the finished result of `manifest`: [] if it is, None without an
    output.
    """
    if not output.exists():
        return None
    of_output = _manifest(_job_file(output))
    if not isinstance(of_output, dict):
        return ["no manifest records which job made it" if of_output is None else of_output]
    return _changes(output, of_output, manifest)


def finished_errors(output: Path) -> int:
    """Return how many records of a finished output are errors."""
    of_output = _manifest(_job_file(output))
    result = of_output.get("output") if isinstance(of_output, dict) else None
    return int(result.get("errors", 0)) if isinstance(result, dict) else 0


def recorded_error_size(output: Path) -> int:
    """Return how many bytes the error file of a finished output had, 0 without one.

    Raises FileNotFoundError where the output is not finished.
    """
    if not isinstance(of_output := _manifest(_job_file(output)), dict):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(_job_file(output)))
    return _error_size(of_output)


def output_rounds(output: Path) -> list[dict[str, Any]]:
    """Return the retry rounds that a finished output has had."""
    return rounds_of(_manifest(_job_file(output)))


def finalize(
    ledger: Ledger,
    manifest: dict[str, Any],
    num_errors: int,
    rounds: list[dict[str, Any]] | None = None,
) -> None:
    """Write the manifest of a merged output, which marks it complete, and remove the ledger.

    Args:
        ledger: of the output.
        manifest: of the job.
        num_errors: error records in the output.
        rounds: retry rounds of the job; None: those of the ledger.

    Raises:
        OSError: a file cannot be read or written.
    """
    value = {
        **manifest,
        "output": {"size": ledger.output.stat().st_size, "errors": num_errors},
    }
    if ledger.error_file is not None and num_errors:
        size = ledger.error_file.stat().st_size
        value["output"]["error_file"] = {"size": size, "crc32": ledger.error_crc32}
    if ledger.output_crc32 is not None:
        value["output_crc32"] = ledger.output_crc32
    if placements := _placements(ledger):
        value[_PLACEMENTS] = placements
    if rounds is None:
        rounds = rounds_of(_manifest(ledger.directory / "manifest.json"))
    if rounds:
        value[KEY] = finished(rounds)
    write_json(_job_file(ledger.output), value)
    ledger.remove()


def note_placement(ledger: Ledger, change: dict[str, Any]) -> None:
    """Append a change of the copies to the manifest of an unfinished job.

    A run that resumes begins with the placement file again; the list tells what computed the
    records before.

    Args:
        ledger: of the output.
        change: JSON-ready.

    Raises:
        OSError: a file cannot be read or written.
    """
    path = ledger.directory / "manifest.json"
    if isinstance(manifest := _manifest(path), dict):
        write_json(path, {**manifest, _PLACEMENTS: [*_placements(ledger), change]})


def _placements(ledger: Ledger) -> list[dict[str, Any]]:
    """Return the changes of copies that an unfinished job has noted."""
    manifest = _manifest(ledger.directory / "manifest.json")
    found = manifest.get(_PLACEMENTS) if isinstance(manifest, dict) else None
    return found if isinstance(found, list) else []


def _is_due(retry: RetryRequest, of_output: dict[str, Any], of_ledger: Any) -> bool:
    """Return whether a finished output has errors that this request has not run again yet."""
    rounds, rounds_left = rounds_of(of_output), rounds_of(of_ledger)
    # A ledger with the same rounds is that of a run that was killed before it could remove it; one
    # with more is that of a request that was killed before it began its round.
    was_killed = bool(rounds) and len(rounds) == len(rounds_left)
    has_errors = bool(of_output["output"].get("errors"))
    return has_errors and not was_killed and not retry.is_restart_of(rounds)


def _changes(output: Path, of_output: dict[str, Any], manifest: dict[str, Any]) -> list[str]:
    """Return why a finished output is not the result of `manifest`."""
    return differences(of_output, manifest) + _file_changes(output, of_output)


def _file_changes(output: Path, of_output: dict[str, Any]) -> list[str]:
    """Return why the files of a finished job are not as it wrote them, by their sizes."""
    changes, result = [], of_output["output"]
    if output.stat().st_size != result["size"]:
        changes.append("it was changed after the job finished")
    errors = error_file_of(output, of_output)
    if errors is not None and _size(errors) != _error_size(of_output):
        changes.append(f"{errors.name} was changed or removed after the job finished")
    return changes


def _error_size(of_output: dict[str, Any]) -> int:
    return of_output["output"].get("error_file", {}).get("size", 0)


def _size(path: Path) -> int:
    """Return the size of a file in bytes, 0 without one."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _job_file(output: Path) -> Path:
    return sibling_path(output, "job.json")


def _manifest(path: Path) -> dict[str, Any] | str | None:
    """Return the manifest in a file, None without a file, an error text where it is damaged."""
    try:
        value = read_json(path)
    except ValueError as error:
        return str(error)
    keys = {"version", "input", "settings"}
    return f"{path}: is damaged (must hold {keys})" if value and not keys <= value.keys() else value
