"""Tokenizer: the checkpoint's own, loaded by transformers; a checkpoint without one is valid."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from engine.config import ModelConfig
from engine.request import ErrorCode, RequestError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def has_tokenizer(config: ModelConfig) -> bool:
    """Return whether there are tokenizer files to load, or model.tokenizer names where."""
    return config.tokenizer is not None or any(
        os.path.exists(os.path.join(config.path, name)) for name in _FILES
    )


def load_tokenizer(config: ModelConfig) -> Any:
    """Return the transformers tokenizer of model.tokenizer, by default that of model.path.

    None when model.path has no tokenizer files and model.tokenizer is not set.

    Raises:
        ValueError: when model.tokenizer has no tokenizer files, or files cannot be read; names the
            directory.
    """
    path = Path(config.tokenizer or config.path)
    if not any((path / name).exists() for name in _FILES):
        if config.tokenizer is None:
            return None
        raise ValueError(
            f"model.tokenizer: {config.tokenizer!r} holds none of {', '.join(_FILES)}; name a "
            "Hugging Face tokenizer directory"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError) as error:
        if "trust_remote_code" in str(error):  # transformers' advice to run it
            raise ValueError(
                f"model.tokenizer: the tokenizer in {path} is code of its own, which is never run; "
                "name one with a tokenizer.json"
            ) from error
        raise ValueError(
            f"model.tokenizer: cannot read the tokenizer in {path}: {error}; check its files"
        ) from error


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
