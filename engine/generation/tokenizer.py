"""Tokenizer: the checkpoint's own, loaded by transformers. A checkpoint without one is valid."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from engine.config import ModelConfig

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
