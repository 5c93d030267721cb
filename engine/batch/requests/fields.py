"""Field tables: what a line of our own form and the bodies of OpenAI's two endpoints may have.

The tables say which names a line may use and what their values are;
`request/params.py:SamplingParams` has the rules of sampling settings, with their messages. Null
leaves a field out. Prompts are checked where they are encoded, fields of chat in `chat.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.batch.requests.chat import ChatFields
from engine.batch.strict_json import show
from engine.request import RequestError

_Penalty = Annotated[float | None, Field(ge=-2, le=2)]
_Count = Annotated[int | None, Field(ge=0)]
_Top = Annotated[int | None, Field(ge=0, le=100)]


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class CommonFields(_Fields):
    """Sampling settings that all three forms have."""

    max_tokens: _Count = None
    max_completion_tokens: _Count = None
    max_new_tokens: _Count = None
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: _Penalty = None
    frequency_penalty: _Penalty = None
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(None, ge=-1, lt=2**63)
    n: int | None = Field(None, ge=1, le=128)
    best_of: int | None = Field(None, le=128)  # at most n: it has no effect
    stop: str | list[str] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    ignore_eos: bool | None = None
    min_tokens: _Count = None
    prompt_logprobs: bool | _Top = None
    prompt_top_logprobs: _Top = None
    top_logprobs: _Top = None


class CompletionFields(CommonFields):
    """Fields of `prompt`, besides the common ones."""

    prompt: Any = None  # text, token ids, or a list of either
    logprobs: bool | _Top = None  # a number: so many likeliest tokens too
    echo: bool | None = None


class ChatRequestFields(ChatFields, CommonFields):
    """Fields of `messages`, besides the common ones."""

    messages: Any = None
    logprobs: bool | None = None


class _NoEffect(_Fields):
    """What OpenAI's clients send besides, and no result depends on; of any type."""

    model: Any = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    parallel_tool_calls: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    stream_options: Any = None


class CompletionBody(CompletionFields, _NoEffect):
    """The body of /v1/completions."""


class ChatBody(ChatRequestFields, _NoEffect):
    """The body of /v1/chat/completions."""


class OwnLine(CompletionFields, ChatFields):
    """A line of our own form; other keys are the user's."""

    id: Any = None
    prompt_token_ids: Any = None
    messages: Any = None


NO_EFFECT = frozenset(_NoEffect.model_fields)
# What has the prompt, or is the user's name for the line.
_ELSEWHERE = frozenset({"id", "prompt", "prompt_token_ids", "messages"})
SETTINGS = frozenset(OwnLine.model_fields) - _ELSEWHERE


def check_fields(table: type[BaseModel], record: Mapping[str, Any]) -> None:
    """Check the values of a line or body against its table.

    Raises:
        RequestError: a value is of a wrong type or out of bounds; names the first such field.
    """
    names = table.model_fields.keys() - _ELSEWHERE
    given = {name: record[name] for name in names if record.get(name) is not None}
    try:
        table.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0])
        what = table.model_fields[name].description or problem["msg"].lower()
        raise RequestError("invalid_value", f"{name} = {show(given[name])}: {what}") from error
