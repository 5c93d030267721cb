"""Why a request cannot run: the codes, the error that carries one, and how values are shown."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any, Literal

# Why a request cannot run; docs/batch.md has the cause of each. A code that was given keeps its
# meaning: users' scripts select records by it.
ErrorCode = Literal[
    "chat_template_failed",
    "conflicting_settings",
    "context_length_exceeded",
    "decoding_failed",
    "duplicate_id",
    "invalid_id",
    "invalid_json",
    "invalid_messages",
    "invalid_prompt",
    "invalid_request",
    "invalid_value",
    "kv_cache_exceeded",
    "no_chat_template",
    "no_tokenizer",
    "non_finite_logits",
    "token_out_of_range",
    "tokenizer_failed",
    "unknown_setting",
    "unreadable_line",
    "unsupported_setting",
]


class RequestError(ValueError):
    """A request that cannot run; its error record has the message and the code."""

    def __init__(self, code: ErrorCode, message: str, prompt_tokens: int = 0) -> None:
        super().__init__(message)
        self.code: ErrorCode = code
        self.prompt_tokens = prompt_tokens  # length of the prompt, 0 where unknown


def error_record(error: RequestError, line: int | None = None) -> dict[str, Any]:
    """Return what the output has under `error`; `line` is the number of the line in the input."""
    return {"code": error.code, "message": str(error), "line": line}


def show(value: Any) -> str:
    """Return a value as JSON, or as Python shows it, shortened for an error message."""
    text = f"a {type(value).__name__}"  # of a value that neither can show, nested too deeply
    for write in (json.dumps, repr):
        with suppress(Exception):
            text = " ".join(write(value).split())
            break
    return text if len(text) <= 60 else f"{text[:57]}..."
