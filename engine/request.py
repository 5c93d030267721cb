"""The data of one request: `Request` (prompt tokens, `SamplingParams`) in, `Completion` out.

Plain data: nothing here uses a tensor or a tokenizer. The fields of `SamplingParams`, their
defaults and rules are those of `config/schema.py:SamplingConfig`, except that a request may ask for
no new tokens.
"""

from __future__ import annotations

import difflib
import json
import math
import operator
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from engine.config import SamplingConfig
from engine.config.validation import field_problems, rule

FinishReason = Literal["stop", "length", "error"]
TopLogprobs = list[tuple[int, float]]  # (token id, log probability), likeliest first
Endpoint = Literal["/v1/completions", "/v1/chat/completions"]
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


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams(SamplingConfig):
    """How one request's tokens are chosen and when they end.

    A list of `stop` or `stop_token_ids`, or an array, becomes a tuple, a single stop string a tuple
    of one. A number of `logprobs` or `prompt_logprobs` asks for so many likeliest tokens too.
    `echo` with `logprobs` asks for the prompt's as well. Token ids of `logit_bias` may be text.

    Raises:
        ValueError: naming the field, its value and the rule it breaks.
    """

    max_new_tokens: int = field(  # 0: only the prompt is run, for its logprobs
        default=128, metadata=rule("at least 0 (0: run the prompt only)", lambda v: v >= 0)
    )
    logit_bias: dict[int, float] = field(  # token id -> what is added to its logit
        default_factory=dict,
        metadata=rule(
            "with token ids from 0, and numbers from -100 to 100",
            lambda v: all(token >= 0 and -100 <= bias <= 100 for token, bias in v.items()),
        ),
    )
    n: int = field(  # completions of each prompt, every one drawn anew
        default=1, metadata=rule("from 1 to 128", lambda v: 1 <= v <= 128)
    )
    echo: bool = False  # the text begins with the prompt's

    def __post_init__(self) -> None:
        stop, stop_ids = self.stop, self.stop_token_ids
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else _as_tuple(stop))
        if isinstance(stop_ids := _as_tuple(stop_ids), tuple):
            numbers = [(token, whole_number(token)) for token in stop_ids]
            stop_ids = tuple(token if number is None else number for token, number in numbers)
        object.__setattr__(self, "stop_token_ids", stop_ids)
        self._split_counts()
        if type(self.top_k) is int and self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        if isinstance(self.logit_bias, dict):
            biases = {_token_id(token): bias for token, bias in self.logit_bias.items()}
            object.__setattr__(self, "logit_bias", biases)
        for problem in field_problems(self, full=True):
            raise ValueError(problem)
        for asked, top in (
            ("logprobs", self.top_logprobs),
            ("prompt_logprobs", self.prompt_top_logprobs),
        ):
            if top and not getattr(self, asked):
                name = asked.replace("logprobs", "top_logprobs")
                raise ValueError(f"{name} = {top}: needs {asked}: true")
        if self.min_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_tokens = {self.min_tokens}: must be at most max_new_tokens = "
                f"{self.max_new_tokens}"
            )

    def _split_counts(self) -> None:
        """Turn numbers of likeliest tokens into what they ask for, and `echo` into logprobs."""
        for asked in ("logprobs", "prompt_logprobs"):
            value, top = getattr(self, asked), asked.replace("logprobs", "top_logprobs")
            if type(value) is int:
                if not 0 <= value <= 100:
                    raise ValueError(f"{asked} = {value}: must be true, false, or from 0 to 100")
                if getattr(self, top) in (0, value):
                    object.__setattr__(self, asked, True)
                    object.__setattr__(self, top, value)
                else:
                    raise ValueError(
                        f"{asked} = {value}: differs from {top} = {getattr(self, top)}"
                    )
        if self.echo is True and self.logprobs is True:
            object.__setattr__(self, "prompt_logprobs", True)
            if not self.prompt_top_logprobs:
                object.__setattr__(self, "prompt_top_logprobs", self.top_logprobs)

    @property
    def greedy(self) -> bool:
        """Return whether the likeliest token is always taken, so that nothing is drawn."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def penalizes(self) -> bool:
        """Return whether tokens that the sequence already has get another logit."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @classmethod
    def from_config(cls, config: SamplingConfig, **overrides: Any) -> SamplingParams:
        """Return the defaults in `config` with a request's own values in place of some.

        Args:
            config: the defaults.
            overrides: None keeps the default.

        Raises:
            ValueError: a bad value, or an unknown name (with the nearest known one).
        """
        names = [f.name for f in fields(cls)]
        # What the config does not have is asked for by request alone.
        values = {name: getattr(config, name) for name in names if hasattr(config, name)}
        for name, value in overrides.items():
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(names)}"
                raise ValueError(f"{name!r} is not a sampling parameter: {hint}")
            if value is not None:
                values[name] = value
        for asked in ("logprobs", "prompt_logprobs"):
            top, given = asked.replace("logprobs", "top_logprobs"), overrides.get(asked)
            if given is not None and given is not True and overrides.get(top) is None:
                values[top] = 0  # the default's belongs to the default's `asked`
        if overrides.get("min_tokens") is None:
            limit = values["max_new_tokens"]
            if type(limit) is int:
                values["min_tokens"] = min(values["min_tokens"], max(limit, 0))
        return cls(**values)


def _token_id(key: Any) -> Any:
    """Return a token id that an object of JSON has as text as a whole number."""
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key


def check_logit_bias(params: SamplingParams, vocab_size: int) -> None:
    """Raise RequestError where `logit_bias` has a token id that the model does not have."""
    if params.logit_bias and (token := max(params.logit_bias)) >= vocab_size:
        raise RequestError(
            "token_out_of_range",
            f"logit_bias: token id {token}: must be from 0 to {vocab_size - 1}, the model's "
            "vocabulary",
        )


def _as_tuple(value: Any) -> Any:
    """Return a list, an array or a tensor of one dimension as a tuple, anything else unchanged."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(value) if isinstance(value, list) else value


def show(value: Any) -> str:
    """Return a value as JSON, or as Python shows it, shortened for an error message."""
    text = f"a {type(value).__name__}"  # of a value that neither can show, nested too deeply
    for write in (json.dumps, repr):
        with suppress(Exception):
            text = " ".join(write(value).split())
            break
    return text if len(text) <= 60 else f"{text[:57]}..."


def whole_number(value: Any) -> int | None:
    """Return a whole number, of numpy or torch too, as Python's; None for anything else."""
    if type(value) is int:
        return value
    # Python takes True as 1, and a tensor of one row of one number as that number.
    is_bool = isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
    if is_bool or getattr(value, "ndim", 0):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def check_token_ids(
    key: str, value: Any, vocab_size: int | None = None, *, kind: str = "a list of token ids"
) -> Sequence[int]:
    """Return a prompt's token ids as whole numbers of Python.

    Args:
        key: what the errors call the prompt.
        value: a list or another sequence, an array or a tensor with one dimension.
        vocab_size: token ids are below it; None: not known here.
        kind: what a value that is no sequence must be instead.

    Raises:
        RequestError: it is none of these, is empty, or an item is no token id.
    """
    ids = value
    if hasattr(value, "tolist"):  # of numpy, torch, pandas, ...
        with suppress(Exception):  # a tensor without values: not a sequence either
            ids = value.tolist()
    if isinstance(ids, str | bytes | bytearray | memoryview) or not isinstance(ids, Sequence):
        raise RequestError("invalid_prompt", f"{key} = {show(value)}: must be {kind}")
    if not ids:
        message = f"{key}: is empty and has no tokens; give at least one token"
        raise RequestError("invalid_prompt", message)
    limit = math.inf if vocab_size is None else vocab_size
    if all(type(token) is int and 0 <= token < limit for token in ids):
        return ids
    numbers: list[int] = []
    for place, token in enumerate(ids):
        number = whole_number(token)
        if number is None:
            several = ", one prompt at a time" if isinstance(token, str | Sequence) else ""
            raise RequestError(
                "invalid_prompt",
                f"{key}[{place}] = {show(token)}: must be a whole number (a token id){several}",
            )
        if not 0 <= number < limit:
            bounds = f"from 0 to {limit - 1}, the model's vocabulary"
            rule = "a whole number from 0" if vocab_size is None else bounds
            message = f"{key}[{place}] = {number}: must be {rule}"
            raise RequestError("token_out_of_range", message)
        numbers.append(number)
    return numbers


MAX_CHOICES = 2048  # completions that one line may ask for
_INDEX_BITS = 40  # an index is below 2**40; `Request.key` has the choice above it


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt to complete. Token ids of numpy or torch become whole numbers of Python.

    A line that asks for several completions is its first one's request, with `others`.

    Raises:
        ValueError: a wrong index.
        RequestError: the prompt is empty or holds what is no token id.
    """

    index: int  # its number in the whole job, from 0, equal on every rank: it seeds sampling and
    # breaks routing ties
    id: str | int  # the user's name for it
    prompt_token_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    choice: int = 0  # its number among the completions that one line asks for
    prompt_text: str | None = None  # as given, with `echo`; None: decoded from the token ids
    others: tuple[Request, ...] = ()  # of the first choice: the line's further ones
    endpoint: Endpoint | None = None  # of an OpenAI batch line; None: a line of our own form

    def __post_init__(self) -> None:
        if type(self.index) is not int or self.index < 0:
            raise ValueError(f"index = {self.index!r}: must be a whole number from 0")
        try:
            ids = check_token_ids("prompt_token_ids", self.prompt_token_ids)
        except RequestError as error:
            raise RequestError(error.code, f"request {self.id!r}: {error}") from error
        object.__setattr__(self, "prompt_token_ids", ids)

    @property
    def choices(self) -> tuple[Request, ...]:
        """Return the requests of all completions of the line in their order, this one first."""
        return (self, *self.others)

    @property
    def key(self) -> int:
        """Return what seeds its draws: of a first choice the line's index."""
        return self.index + (self.choice << _INDEX_BITS)

    @classmethod
    def of_line(
        cls,
        index: int,
        id: str | int,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        prompt_texts: Sequence[str | None] = (),
        endpoint: Endpoint | None = None,
    ) -> Request:
        """Return the request of a line: `params.n` choices of each prompt, prompt after prompt.

        Args:
            prompts: token ids, at least one prompt.
            prompt_texts: of the prompts that were given as text; kept where `params.echo`.

        Raises:
            RequestError: more choices than a line may have, or a prompt that is none.
        """
        if len(prompts) * params.n > MAX_CHOICES:
            raise RequestError(
                "invalid_request",
                f"{len(prompts)} prompts and n = {params.n} are {len(prompts) * params.n} "
                f"completions; a line may ask for {MAX_CHOICES}",
            )
        texts = list(prompt_texts) if params.echo else []
        texts += [None] * (len(prompts) - len(texts))
        first, *others = [
            cls(
                index=index,
                id=id,
                prompt_token_ids=ids,
                params=params,
                choice=place * params.n + sample,
                prompt_text=text,
                endpoint=endpoint,
            )
            for place, (ids, text) in enumerate(zip(prompts, texts, strict=True))
            for sample in range(params.n)
        ]
        return replace(first, others=tuple(others)) if others else first


@dataclass(slots=True)
class CapacityUse:
    """Effect of expert capacity on one request, in (token, expert) assignments of all layers."""

    assignments: int = 0  # as routed; tokens that are not subject to capacity are routed in the
    # last layer only where their output is read
    dropped: int = 0
    added: int = 0
    mass: float = 0.0  # combine weights of the assignments that were subject to capacity, extras
    # not counted
    mass_kept: float = 0.0  # combine weights of those that were kept
    copied: int | None = None  # computed by low-bit copies of experts; None: there are none

    @property
    def gate_mass_kept(self) -> float:
        """Return the share of the gate mass that was computed, in [0, 1]; 1 without any."""
        return self.mass_kept / self.mass if self.mass else 1.0

    def record(self) -> dict[str, Any]:
        """Return what records have under `capacity`."""
        out = {
            "assignments": self.assignments,
            "dropped": self.dropped,
            "added": self.added,
            "gate_mass_kept": self.gate_mass_kept,
        }
        return out if self.copied is None else {**out, "copied": self.copied}

    def add(self, other: CapacityUse) -> None:
        """Add the counts of `other`."""
        self.assignments += other.assignments
        self.dropped += other.dropped
        self.added += other.added
        self.mass += other.mass
        self.mass_kept += other.mass_kept
        if other.copied is not None:
            self.copied = (self.copied or 0) + other.copied


@dataclass(slots=True)
class Timing:
    """Times of one request's events, in seconds of the monotonic clock; None where not reached."""

    arrived: float
    first_token: float | None = None
    finished: float | None = None


def error_record(error: RequestError, line: int | None = None) -> dict[str, Any]:
    """Return what the output has under `error`; `line` is the number of the line in the input."""
    return {"code": error.code, "message": str(error), "line": line}


@dataclass(slots=True)
class Completion:
    """The outcome of one request. Logprobs are natural logarithms."""

    index: int
    id: str | int | None
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    logprobs: list[float] | None = None
    prompt_logprobs: list[float | None] | None = None  # [0] is None: nothing precedes it
    top_logprobs: list[TopLogprobs] | None = None  # per generated token
    # Per prompt token, [0] is None. A token is the greedy choice where it is the first.
    prompt_top_logprobs: list[TopLogprobs | None] | None = None
    # The stop text or token id that ended it; None: the end-of-sequence token, or the length.
    stop_reason: str | int | None = None
    prompt_text: str = ""  # with `echo`; `text` begins with it
    capacity: CapacityUse = field(default_factory=CapacityUse)
    error: dict[str, Any] | None = None  # as `error_record` returns it
    timing: Timing | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None  # per new token, likeliest first
    prompt_top_logprobs: list[list[tuple[int, float]] | None] | None = None  # [0] is None
    stop_reason: str | int | None = None  # the stop text or token id that ended it
    cached_tokens: int = 0  # prompt tokens that did not run: their keys and values were cached
    request: Request | None = None  # None: the line could not become one
    others: list[Completion] = field(default_factory=list)  # further choices of the same line

    @property
    def choices(self) -> list[Completion]:
        """Return all completions of the line in their order, this one first."""
        return [self, *self.others]

    @classmethod
    def failure(
        cls,
        index: int,
        id: str | int | None,
        error: RequestError,
        *,
        line: int | None = None,
    ) -> Completion:
        """Return the completion of a request that could not be run: no tokens, and the reason."""
        return cls(
            index=index,
            id=id,
            text="",
            token_ids=[],
            finish_reason="error",
            prompt_tokens=error.prompt_tokens,
            completion_tokens=0,
            error=error_record(error, line),
        )

    def record(self) -> dict[str, Any]:
        """Return the output record, ready for JSON; optional keys only where present.

        Of several choices each is under `choices`; a prompt counts once in `usage`.
        """
        choices = self.choices
        usage = usage_of(choices)
        if not usage["cached_tokens"]:
            del usage["cached_tokens"]
        capacity = CapacityUse()
        for each in choices:
            capacity.add(each.capacity)
        out: dict[str, Any] = {"id": self.id}
        if len(choices) > 1:
            out["choices"] = [
                {"index": number, **each._outcome(), **each._logprobs()}
                for number, each in enumerate(choices)
            ]
            out["usage"] = usage
        else:
            out |= {**self._outcome(), "usage": usage, **self._logprobs()}
        out["capacity"] = capacity.record()
        if self.error is not None:
            out["error"] = self.error
        return out

    @property
    def begins_prompt(self) -> bool:
        """Whether it is its prompt's first choice."""
        return self.request is None or self.request.choice % self.request.params.n == 0

    def _outcome(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
        }

    def _logprobs(self) -> dict[str, Any]:
        optional = {
            "logprobs": self.logprobs,
            "top_logprobs": self.top_logprobs,
            "prompt_logprobs": self.prompt_logprobs,
            "prompt_top_logprobs": self.prompt_top_logprobs,
        }
        return {key: value for key, value in optional.items() if value is not None}


def usage_of(choices: Sequence[Completion]) -> dict[str, int]:
    """Return the tokens of a line; a prompt counts once, however many choices it has."""
    first = [choice for choice in choices if choice.begins_prompt]
    return {
        "prompt_tokens": sum(choice.prompt_tokens for choice in first),
        "completion_tokens": sum(choice.completion_tokens for choice in choices),
        "cached_tokens": sum(choice.cached_tokens for choice in first),
    }
