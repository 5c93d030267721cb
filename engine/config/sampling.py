"""The settings of sampling, which are the defaults of every request: the section `sampling`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from engine.config.rules import SEED, at_least
from engine.config.validation import rule

_PENALTY = rule("from -2 to 2 (0: off)", lambda v: -2 <= v <= 2)
_TOP = rule("from 0 to 100", lambda v: 0 <= v <= 100)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How tokens are chosen and when they end; the defaults of every request.

    The one statement of these fields: `request.SamplingParams` inherits them. Applied in the order
    min_tokens, repetition_penalty, frequency_penalty, presence_penalty, temperature, min_p, top_k,
    top_p.
    """

    max_new_tokens: int = field(default=128, metadata=at_least(1))  # most tokens to generate
    temperature: float = field(  # divides the logits; 0: greedy
        default=0.0,
        metadata=rule("finite and at least 0 (0: greedy)", lambda v: 0 <= v <= sys.float_info.max),
    )
    top_p: float = field(  # sample from the smallest set of tokens with this much probability
        default=1.0, metadata=rule("above 0 and at most 1 (1: off)", lambda v: 0 < v <= 1)
    )
    top_k: int = field(  # sample from this many likeliest tokens; 0 or -1: off
        default=0, metadata=rule("at least 0 (0 or -1: off)", lambda v: v >= -1)
    )
    min_p: float = field(  # sample from the tokens with this share of the likeliest's probability
        default=0.0, metadata=rule("from 0 to 1 (0: off)", lambda v: 0 <= v <= 1)
    )
    presence_penalty: float = field(  # subtracted from the logit of every token of the output
        default=0.0, metadata=_PENALTY
    )
    frequency_penalty: float = field(  # the same, times how often the token is in the output
        default=0.0, metadata=_PENALTY
    )
    repetition_penalty: float = field(  # divides the logit, below 0 multiplies it, of every token
        # of prompt and output
        default=1.0,
        metadata=rule("from 0.01 to 100 (1: off)", lambda v: 0.01 <= v <= 100),
    )
    seed: int = field(default=0, metadata=SEED)  # of sampling, per request
    stop: tuple[str, ...] = field(  # texts that end a completion; special tokens too, by their id
        default=(), metadata=rule("free of empty text", lambda v: "" not in v)
    )
    stop_token_ids: tuple[int, ...] = field(  # token ids that end a completion
        default=(),
        metadata=rule("free of negative numbers", lambda v: all(item >= 0 for item in v)),
    )
    min_tokens: int = field(  # least tokens to generate: until then nothing ends a completion
        default=0, metadata=rule("at least 0 (0: off)", lambda v: v >= 0)
    )
    ignore_eos: bool = False  # generate max_new_tokens, whatever the end-of-sequence token
    logprobs: bool = False  # report the log probability of every new token
    prompt_logprobs: bool = False  # report the log probability of every prompt token
    top_logprobs: int = field(default=0, metadata=_TOP)  # also report so many likeliest tokens per
    # new token, with their log probabilities; needs logprobs
    prompt_top_logprobs: int = field(default=0, metadata=_TOP)  # the same per prompt token; needs
    # prompt_logprobs
