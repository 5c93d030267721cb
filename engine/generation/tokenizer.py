"""Tokenizer: the checkpoint's own, loaded by transformers; a checkpoint without one is valid.

`PromptEncoder` turns prompts into token ids, for the batch job and for Python, and checks them
against the model's vocabulary: a tokenizer may have more tokens than the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import ModelConfig
from engine.config.checkpoint_files import is_there
from engine.config.tokenizer_files import FILES, check_tokenizer_files
from engine.request import check_token_ids


def has_tokenizer(config: ModelConfig) -> bool:
    """Return whether there are tokenizer files to load, or model.tokenizer names where."""
    return config.tokenizer is not None or any(is_there(Path(config.path, name)) for name in FILES)


def load_tokenizer(config: ModelConfig) -> Any:
    """Return the transformers tokenizer of model.tokenizer, by default that of model.path.

    None when model.path has no tokenizer files and model.tokenizer is not set.

    Raises:
        ValueError: when model.tokenizer has no tokenizer files, or one cannot be read; names the
            file.
    """
    path = Path(config.tokenizer or config.path)
    if not any(is_there(path / name) for name in FILES):
        if config.tokenizer is None:
            return None
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
                "name one with a tokenizer.json"
            ) from error
        what = f"model.tokenizer: cannot read {_file_at_fault(path)}"
        failure = tokenizer_failure(what, error)
        raise ValueError(f"{failure}; download its files again") from error


def _file_at_fault(path: Path) -> str:
    """Return the file that cannot be made a tokenizer, else their folder in words."""
    file = path / "tokenizer.json"
    if is_there(file):
        import tokenizers

        try:
            tokenizers.Tokenizer.from_file(str(file))
        except BaseException as error:
            tokenizer_failure("", error)  # raises it again where it asks the process to stop
            return str(file)
    return f"the tokenizer in {path}"


def tokenizer_failure(what: str, error: BaseException) -> ValueError:
    """Return the ValueError to raise for whatever the code of a tokenizer has raised.

    Args:
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
    return ValueError(f"{what}: {named if text else kind}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptEncoder:
    """Turns prompts into token ids that the model has."""

    tokenizer: Any  # transformers', or None
    vocab_size: int  # of the model: token ids are below it

    def encode(self, key: str, prompt: Any) -> Sequence[int]:
        """Return the token ids of a prompt that is text, or token ids already.

        Args:
            key: what the errors call the prompt.
            prompt: as a user gave it.

        Raises:
            ValueError: it cannot run; says why.
        """
        if isinstance(prompt, str):
            return self.encode_text(key, prompt)
        kind = "text or a list of token ids"
        return check_token_ids(key, prompt, self.vocab_size, kind=kind)

    def encode_text(self, key: str, text: str, **options: Any) -> list[int]:
        """Return the token ids of a text; `options` are the tokenizer's.

        Raises:
            ValueError: it cannot run, whatever the tokenizer raises included; says why.
        """
        if self.tokenizer is None:
            raise ValueError(
                f"{key}: needs a tokenizer and the model has none; use prompt_token_ids, or set "
                "model.tokenizer to a directory that has one"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{key}: character {error.start} is half of a surrogate pair, which is no text"
            ) from error
        if not text:
            raise ValueError(f"{key}: is empty; give at least one token")
        try:
            ids = list(self.tokenizer(text, **options)["input_ids"])
        except BaseException as error:
            raise tokenizer_failure(f"{key}: the tokenizer cannot encode it", error) from error
        if not ids:
            raise ValueError(f"{key}: is empty; give at least one token")
        for place, token in enumerate(ids):
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"{key}: its token {place}{self._name(token)} has the id {token}, which must "
                    f"be from 0 to {self.vocab_size - 1}, the model's vocabulary; leave it out, or "
                    "set model.tokenizer to the tokenizer that the model was trained with"
                )
        return ids

    def _name(self, token: Any) -> str:
        """Return how the tokenizer writes a token id, in parentheses, "" where it cannot."""
        with suppress(Exception):
            return f" ({self.tokenizer.convert_ids_to_tokens(token)!r})"
        return ""
