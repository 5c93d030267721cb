"""`SamplingParams`: how one request's tokens are chosen and when they end.

The fields, their defaults and rules are those of `config/sampling.py:SamplingConfig`, except that a
request may ask for no new tokens.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields
from typing import Any

from engine.config import SamplingConfig
from engine.config.validation import field_problems, rule
from engine.request.errors import RequestError
from engine.request.token_ids import whole_number


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


def check_logit_bias(params: SamplingParams, vocab_size: int) -> None:
    """Raise RequestError where `logit_bias` has a token id that the model does not have."""
    if params.logit_bias and (token := max(params.logit_bias)) >= vocab_size:
        raise RequestError(
            "token_out_of_range",
            f"logit_bias: token id {token}: must be from 0 to {vocab_size - 1}, the model's "
            "vocabulary",
        )


def _token_id(key: Any) -> Any:
    """Return a token id that an object of JSON has as text as a whole number."""
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key


def _as_tuple(value: Any) -> Any:
    """Return a list, an array or a tensor of one dimension as a tuple, anything else unchanged."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(value) if isinstance(value, list) else value
