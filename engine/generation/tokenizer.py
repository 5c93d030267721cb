"""Tokenizer: the checkpoint's own, loaded by transformers; a checkpoint without one is valid."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config import ModelConfig
from engine.config.checkpoint_files import is_there, read_json_object
from engine.config.tokenizer_files import FILES, check_tokenizer_files
from engine.request import ErrorCode, RequestError

_SETTINGS = "tokenizer_config.json"


def has_tokenizer(config: ModelConfig) -> bool:
    """Return whether there are tokenizer files to load, or model.tokenizer names where."""
    return config.tokenizer is not None or _holds_tokenizer(Path(config.path))


def _holds_tokenizer(folder: Path) -> bool:
    """Return whether a folder has a tokenizer, other than code of its own (Kimi-K2)."""
    held = [name for name in FILES if is_there(folder / name)]
    if held != [_SETTINGS]:
        return bool(held)
    try:
        settings = read_json_object(folder / _SETTINGS)
    except ValueError:
        return True  # which `load_tokenizer` explains
    auto_map = settings.get("auto_map")
    return not (isinstance(auto_map, Mapping) and "AutoTokenizer" in auto_map)


def load_tokenizer(config: ModelConfig) -> Any:
    """Return the transformers tokenizer of model.tokenizer, by default that of model.path.

    None when model.path has no tokenizer files, or no tokenizer but code of its own, and
    model.tokenizer is not set.

    Raises:
        ValueError: when model.tokenizer has no tokenizer files, or one cannot be read; names the
            file.
    """
    path = Path(config.tokenizer or config.path)
    if not has_tokenizer(config):
        return None
    if not any(is_there(path / name) for name in FILES):
        raise ValueError(
            f"model.tokenizer: {config.tokenizer!r} holds none of {', '.join(FILES)}; name a "
            "Hugging Face tokenizer directory"
        )
    try:
        check_tokenizer_files(path)
    except ValueError as error:
        raise ValueError(f"model.tokenizer: {error}") from error
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except BaseException as error:  # tokenizers raises a bare Exception, and panics of Rust
        if "trust_remote_code" in str(error):  # transformers' advice to run it
            raise ValueError(
                f"model.tokenizer: the tokenizer in {path} is code of its own, which is never run; "
                "name one with a tokenizer.json, or give prompt_token_ids"
            ) from error
        what = f"model.tokenizer: cannot read {_file_at_fault(path)}"
        failure = tokenizer_failure("tokenizer_failed", what, error)
        raise ValueError(f"{failure}; download its files again") from error


def _file_at_fault(path: Path) -> str:
    """Return the file that cannot be made a tokenizer, else their folder in words."""
    file = path / "tokenizer.json"
    if is_there(file):
        import tokenizers

        try:
            tokenizers.Tokenizer.from_file(str(file))
        except BaseException as error:
            tokenizer_failure(
                "tokenizer_failed", "", error
            )  # raises it again where it asks the process to stop
            return str(file)
    return f"the tokenizer in {path}"


def tokenizer_failure(code: ErrorCode, what: str, error: BaseException) -> RequestError:
    """Return the error to raise for whatever the code of a tokenizer has raised.

    Args:
        code: of the error record.
        what: could not be done.
        error: raised again where it asks the process to stop and is no failure.
    """
    # A panic of Rust arrives as an exception that is no Exception.
    kind = type(error).__name__
    if not isinstance(error, Exception) and kind != "PanicException":
        raise error
    text = " ".join(str(error).split())
    if len(text) > 300:
        text = f"{text[:297]}..."
    named = f"{kind}: {text}" if type(error) not in (Exception, ValueError) else text
    return RequestError(code, f"{what}: {named if text else kind}")
