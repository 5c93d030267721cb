"""The checkpoint's tokenizer, by transformers; none is a valid answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.config import ModelConfig

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_tokenizer(config: ModelConfig) -> Any:
    """Return the transformers tokenizer of `model.tokenizer` or `model.path`, None where there are
    no tokenizer files.

    Raises:
        ValueError: when the files are there and cannot be read, naming the directory.
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
