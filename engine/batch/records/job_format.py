"""Job format: whether a job's records are in OpenAI's form or our own, and in which files they are.

    our own   <output>                      every record
    OpenAI's  <output>                      what succeeded
              <output without .jsonl>.errors.jsonl   what did not; absent where all succeeded

The manifest of a job in OpenAI's form has `format` and `created`, so that every run of it, and
every input shard, writes the same bytes; one without them is in our own form, as all jobs of
versions that knew no other were.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from engine.batch.input.files import LineNames
from engine.batch.input.index import Format, InputIndex
from engine.batch.records.json_bytes import own_record
from engine.batch.records.openai_form import OpenAIRecords
from engine.request import Completion

_WORDS = {"openai": "in OpenAI's format, with custom_id", "lockstep": "in our own format, with id"}


def error_file(output: Path) -> Path:
    """Return where the error records of a job in OpenAI's form are."""
    return output.with_name(f"{output.name.removesuffix('.jsonl')}.errors.jsonl")


def error_file_of(output: Path, manifest: dict[str, Any]) -> Path | None:
    """Return the error file of a job, None where its records are all in the output."""
    return error_file(output) if format_of(manifest) == "openai" else None


def format_of(manifest: dict[str, Any]) -> Format:
    """Return the form of a job's records."""
    return "openai" if manifest.get("format") == "openai" else "lockstep"


def job_number(manifest: dict[str, Any]) -> str:
    """Return what the ids of a job's records begin with, 16 hex digits; equal for equal jobs."""
    parts = (manifest["input"]["sha256"], manifest["settings_sha256"])
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def describe_form(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """Return what every rank needs to write OpenAI's records, JSON-ready; None for our own."""
    if format_of(manifest) != "openai":
        return None
    model = Path(manifest["settings"]["model.path"]).name
    return {"job": job_number(manifest), "created": manifest["created"], "model": model}


def make_writer(form: dict[str, Any] | None, tokenizer: Any) -> Callable[[Completion], bytes]:
    """Return the writer of a job's records.

    Args:
        form: from `describe_form`.
        tokenizer: the model's, or None.
    """
    return own_record if form is None else OpenAIRecords(**form, tokenizer=tokenizer)


def choose_format(
    manifest: dict[str, Any],
    index: InputIndex,
    wanted: Literal["auto", "openai", "lockstep"],
    earlier: Iterable[dict[str, Any]],
    names: LineNames,
) -> None:
    """Write the form of a job's records into its manifest.

    Args:
        manifest: of the job.
        index: of the input.
        wanted: batch.format.
        earlier: manifests of the same job, begun before; the first one counts.
        names: where the input's lines are in the user's files.

    Raises:
        ValueError: the input has lines of a form that the job cannot have.
    """
    found = next(iter(earlier), None)
    formats: list[Format] = [*index.first_of, "lockstep"]
    first = formats[0]
    chosen = wanted if wanted != "auto" else first if found is None else format_of(found)
    is_pinned = wanted == "lockstep" or (found is not None and format_of(found) == "lockstep")
    other: Format = "openai" if chosen == "lockstep" else "lockstep"
    if (number := index.first_of.get(other)) and not (chosen == "lockstep" and is_pinned):
        why = "batch.format = openai"
        if wanted == "auto":
            why = f"{names.describe(index.first_of.get(first, 1))} is {_WORDS[first]}"
        raise ValueError(
            f"--input {manifest['input']['path']}: {names.describe(number)} is {_WORDS[other]}, "
            f"and {why}: split the file, or set batch.format=lockstep to have every record in our "
            "own format"
        )
    if chosen == "openai":
        same = found is not None and format_of(found) == "openai"
        created = found.get("created") if found is not None and same else None
        manifest["format"] = "openai"
        manifest["created"] = created if isinstance(created, int) else int(time.time())
