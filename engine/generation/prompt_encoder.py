"""PromptEncoder: prompts to token ids that the model has, for the batch job and for Python.

A tokenizer may have more tokens than the model, and take minutes for a text of megabytes: ids are
checked, and a text that is far longer than the context is refused by its beginning alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from engine.generation.tokenizer import tokenizer_failure
from engine.request import RequestError, check_token_ids

# Characters per token of the context up to which a text is encoded at once: more than those of
# almost any text that fits.
_CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """Turns prompts into token ids that the model has."""

    tokenizer: Any  # transformers', or None
    vocab_size: int  # of the model: token ids are below it
    max_model_len: int  # tokens that the context holds

    def encode(self, key: str, prompt: Any) -> Sequence[int]:
        """Return the token ids of a prompt that is text, or token ids already.

        Args:
            key: what the errors call the prompt.
            prompt: as a user gave it.

        Raises:
            RequestError: it cannot run; says why.
        """
        if isinstance(prompt, str):
            return self.encode_text(key, prompt)
        kind = "text or a list of token ids"
        return check_token_ids(key, prompt, self.vocab_size, kind=kind)

    def encode_text(self, key: str, text: str, **options: Any) -> list[int]:
        """Return the token ids of a text; `options` are the tokenizer's.

        Raises:
            RequestError: it cannot run, whatever the tokenizer raises included; says why.
        """
        if self.tokenizer is None:
            raise RequestError(
                "no_tokenizer",
                f"{key}: needs a tokenizer and the model has none; use prompt_token_ids, or set "
                "model.tokenizer to a directory that has one",
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                "invalid_prompt",
                f"{key}: character {error.start} is half of a surrogate pair, which is no text",
            ) from error
        if not text:
            raise RequestError("invalid_prompt", f"{key}: is empty; give at least one token")
        self._check_length(key, text, options)
        ids = self._ids(key, text, options)
        if not ids:
            raise RequestError("invalid_prompt", f"{key}: is empty; give at least one token")
        for place, token in enumerate(ids):
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise RequestError(
                    "token_out_of_range",
                    f"{key}: its token {place}{self._name(token)} has the id {token}, which must "
                    f"be from 0 to {self.vocab_size - 1}, the model's vocabulary; leave it out, or "
                    "set model.tokenizer to the tokenizer that the model was trained with",
                )
        return ids

    def _ids(self, key: str, text: str, options: dict[str, Any]) -> list[Any]:
        try:
            return list(self.tokenizer(text, **options)["input_ids"])
        except BaseException as error:
            what = f"{key}: the tokenizer cannot encode it"
            raise tokenizer_failure("tokenizer_failed", what, error) from error

    def _check_length(self, key: str, text: str, options: dict[str, Any]) -> None:
        """Raise RequestError where the beginning of the text alone exceeds the context."""
        length = _CHARACTERS_PER_TOKEN * self.max_model_len
        # Cutting a text changes only the few tokens next to the cut.
        limit = self.max_model_len + self.max_model_len // 8 + 64
        while len(text) > length:
            if (count := len(self._ids(key, text[:length], options))) > limit:
                raise RequestError(
                    "context_length_exceeded",
                    f"{key}: the first {length} of its {len(text)} characters have {count} tokens "
                    f"and the context holds {self.max_model_len}; shorten the prompt",
                )
            length *= 4

    def _name(self, token: Any) -> str:
        """Return how the tokenizer writes a token id, in parentheses, "" where it cannot."""
        with suppress(Exception):
            return f" ({self.tokenizer.convert_ids_to_tokens(token)!r})"
        return ""
