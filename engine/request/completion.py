"""`Completion`: the outcome of one request, and the record that the output has of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.request.errors import RequestError, error_record
from engine.request.request import Request

FinishReason = Literal["stop", "length", "error"]
TopLogprobs = list[tuple[int, float]]  # (token id, log probability), likeliest first


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
