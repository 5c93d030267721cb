"""Checks before a job reads its input: where it writes, and whether text has a tokenizer."""

from __future__ import annotations

from pathlib import Path

from engine.batch.input.files import STDIN
from engine.batch.input.format import count_text_lines
from engine.batch.manifest import JobError
from engine.batch.records.job_format import error_file
from engine.config import ModelConfig
from engine.generation.tokenizer import has_tokenizer


def check_output(output: Path, input_path: Path | None = None) -> None:
    """Raise JobError where no output can be written."""
    if input_path == STDIN:
        input_path = None
    if input_path is not None and input_path.is_dir() and output.parent.is_dir():
        if output.parent.samefile(input_path):
            raise JobError(
                f"--output {output}: is in the folder that is the input, and would be read as "
                "input by the next run; name another folder"
            )
    elif input_path is not None and input_path.exists():
        errors = error_file(output)
        if errors.exists() and errors.samefile(input_path):
            raise JobError(
                f"--output {output}: its error records would go to {errors}, which is the input; "
                "name another file"
            )
    if not output.parent.is_dir():
        raise JobError(f"--output {output}: the directory {output.parent} does not exist; make it")
    if output.exists():
        if not output.is_file():
            raise JobError(f"--output {output}: is not a regular file; name a file")
        if input_path is not None and input_path.exists() and output.samefile(input_path):
            raise JobError(f"--output {output}: is the input; name another file")


def check_tokenizer(model: ModelConfig, input_path: Path, names: str) -> None:
    """Raise JobError where the first lines are all text and there is no tokenizer for it.

    Args:
        model: settings of the model.
        input_path: the input as one file.
        names: of the files that the user gave.
    """
    if not has_tokenizer(model) and (num_lines := count_text_lines(input_path)):
        raise JobError(
            f"--input {names}: its first {num_lines} requests are text and "
            f"model.path = {model.path!r} has no tokenizer; set model.tokenizer to a folder "
            "that has one, or give prompt_token_ids"
        )
