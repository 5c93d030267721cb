"""Which job an output belongs to, and what to do with what lies there: start, resume or refuse.

A job is its input's content and the settings that change results; the number of ranks, the device
and the like may change between runs. Beside a finished output stands `<output>.job.json`, the
manifest of the job that made it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from engine.batch.atomic_files import read_json, write_json
from engine.batch.input_index import InputIndex
from engine.batch.ledger import Ledger
from engine.config import Config, DispatchConfig

VERSION = 1


class JobError(ValueError):
    """The job cannot be run as asked; the message says why and what to do."""


def beside(output: Path, suffix: str) -> Path:
    """Return the file `<output>.<suffix>`."""
    return output.with_name(f"{output.name}.{suffix}")


def make_manifest(index: InputIndex, config: Config) -> dict[str, Any]:
    """Describe a job; JSON-ready."""
    settings = result_settings(config)
    canonical = json.dumps(settings, sort_keys=True).encode()
    return {
        "version": VERSION,
        "input": {
            "path": str(index.path),
            "size": index.size,
            "sha256": index.sha256,
            "requests": len(index),
        },
        "settings": settings,
        "settings_sha256": hashlib.sha256(canonical).hexdigest(),
    }


def result_settings(config: Config) -> dict[str, Any]:
    """Return the settings that change results, by dotted name; JSON-ready.

    Those of moe.dispatch stand there only where they are not the default: ledgers from before they
    counted still resume. moe.overlap.by = tokens is left out, though it may change results by
    rounding where the GEMM library picks its kernel by the number of rows.
    """
    tree: dict[str, Any] = {
        "model": asdict(config.model),
        "moe": {"capacity": asdict(config.moe.capacity)},
        "sampling": asdict(config.sampling),
    }
    for key in ("path", "tokenizer"):
        if tree["model"][key] is not None:
            tree["model"][key] = str(Path(tree["model"][key]).resolve())
    if config.model.load_format == "dummy":
        tree["runtime"] = {"seed": config.runtime.seed}
    dispatch, default = config.moe.dispatch, DispatchConfig()
    tree["moe"]["dispatch"] = {
        key: getattr(dispatch, key)
        for key in ("dtype", "partial_sums")  # deduplicate changes no bit
        if getattr(dispatch, key) != getattr(default, key)
    }
    return json.loads(json.dumps(_flat(tree)))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Say what makes `new` another job than `old`; empty when they are the same job."""
    if old.get("version") != new["version"]:
        return [f"its format is version {old.get('version')}, this program writes {new['version']}"]
    found = []
    before, now = old["input"], new["input"]
    if (before["size"], before["sha256"]) != (now["size"], now["sha256"]):
        found.append(
            f"the input was {before['path']}, {before['size']} bytes, sha256 "
            f"{before['sha256'][:12]}, is {now['path']}, {now['size']} bytes, sha256 "
            f"{now['sha256'][:12]}"
        )
    was, is_ = old["settings"], new["settings"]
    for key in sorted(was.keys() | is_.keys()):
        if was.get(key) != is_.get(key):
            found.append(f"{key} was {json.dumps(was.get(key))}, is {json.dumps(is_.get(key))}")
    return found


def admit(
    ledger: Ledger, manifest: dict[str, Any], *, overwrite: bool
) -> Literal["complete", "resume", "fresh"]:
    """Decide what a run of `manifest` does about what lies at the output, and prepare the ledger.

    complete: nothing is left to do, the parts are gone. resume: the ledger holds records of this
    job. fresh: the ledger is empty. `overwrite` replaces a finished output and another job's
    records, never the unfinished records of this very job, so the same command always resumes.
    Raises JobError for what `overwrite` would have to discard.
    """
    held, made = _manifest(ledger.parts / "manifest.json"), _manifest(_job_file(ledger.output))
    finished = ledger.output.exists()
    obstacle = None
    if (
        finished
        and isinstance(made, dict)
        and not (changes := _changes(ledger.output, made, manifest))
    ):
        if not overwrite:
            ledger.remove()
            return "complete"
    elif isinstance(held, dict) and not differences(held, manifest):
        _job_file(ledger.output).unlink(missing_ok=True)
        return "resume"
    elif held is not None and (num_records := ledger.count()):
        why = held if isinstance(held, str) else "; ".join(differences(held, manifest))
        obstacle = f"{ledger.parts} holds {num_records} finished records of another job: {why}"
    elif finished:
        why = "nothing says which job made it" if made is None else made
        why = why if isinstance(why, str) else "; ".join(changes)
        obstacle = f"--output {ledger.output} exists and is not this job's: {why}"
    if obstacle and not overwrite:
        if held is None:
            ledger.remove()
        raise JobError(f"{obstacle}. Use --overwrite to replace it, or another --output")
    ledger.start_over(manifest)
    _job_file(ledger.output).unlink(missing_ok=True)
    return "fresh"


def finished_as(output: Path, manifest: dict[str, Any]) -> list[str] | None:
    """What keeps an output from being the finished result of `manifest`: [] if it is, None without
    an output.
    """
    if not output.exists():
        return None
    made = _manifest(_job_file(output))
    if not isinstance(made, dict):
        return ["nothing says which job made it" if made is None else made]
    return _changes(output, made, manifest)


def seal(ledger: Ledger, manifest: dict[str, Any], num_errors: int) -> None:
    """Declare the merged output complete and remove the parts. Raises OSError."""
    result = {"size": ledger.output.stat().st_size, "errors": num_errors}
    write_json(_job_file(ledger.output), {**manifest, "output": result})
    ledger.remove()


def _changes(output: Path, made: dict[str, Any], manifest: dict[str, Any]) -> list[str]:
    """Say what keeps a finished output from being the result of `manifest`."""
    changes = differences(made, manifest)
    if output.stat().st_size != made["output"]["size"]:
        changes.append("it was changed after the job finished")
    return changes


def _job_file(output: Path) -> Path:
    return beside(output, "job.json")


def _manifest(path: Path) -> dict[str, Any] | str | None:
    """Return the manifest in a file, None without a file, the complaint where it is damaged."""
    try:
        value = read_json(path)
    except ValueError as error:
        return str(error)
    keys = {"version", "input", "settings"}
    return f"{path}: is damaged (must hold {keys})" if value and not keys <= value.keys() else value
