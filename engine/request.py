"""What travels between the batch job, the scheduler and the user.

A `Request` (prompt tokens and `SamplingParams`) goes in; a `Completion` comes out. Plain data:
nothing here touches a tensor, a tokenizer or the configuration, so every module may import it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

FinishReason = Literal["stop", "length", "error"]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return _is_int(value) and value >= 0  # type: ignore[operator]


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _tuple_of(ok: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, tuple) and all(ok(item) for item in value)


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (_is_count, "a whole number from 0 (0: run the prompt only)"),
    "temperature": (lambda v: _is_number(v) and v >= 0, "finite and at least 0 (0: greedy)"),
    "top_p": (lambda v: _is_number(v) and 0 < v <= 1, "above 0 and at most 1 (1: off)"),
    "top_k": (_is_count, "a whole number from 0 (0: off)"),
    "seed": (lambda v: _is_count(v) and v < 2**63, "a whole number from 0 to 2**63 - 1"),
    "stop": (_tuple_of(lambda s: isinstance(s, str) and s != ""), "a list of non-empty texts"),
    "stop_token_ids": (_tuple_of(_is_count), "a list of whole numbers from 0"),
    "ignore_eos": (_is_bool, "true or false"),
    "logprobs": (_is_bool, "true or false"),
    "prompt_logprobs": (_is_bool, "true or false"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How one request's tokens are chosen and when they end; the fields of the config's `sampling`.

    Applied in the order temperature, top_k, top_p. Raises ValueError naming the field, its value
    and the rule it breaks.
    """

    max_new_tokens: int = 128  # 0: only the prompt is run, for its logprobs
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        for name, (ok, rule) in _RULES.items():
            if not ok(value := getattr(self, name)):
                raise ValueError(f"{name} = {value!r}: must be {rule}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken, so that no random number is drawn."""
        return self.temperature == 0 or self.top_k == 1

    @classmethod
    def from_config(cls, config: object, **overrides: Any) -> SamplingParams:
        """The defaults in `config` (any object with these fields), then a request's own values.

        An override of None keeps the default; a list becomes a tuple, a single stop string a tuple
        of one. Raises ValueError for a bad value or an unknown name (naming the nearest known one).
        """
        names = [f.name for f in fields(cls)]
        values = {name: getattr(config, name) for name in names}
        for name, value in overrides.items():
            if name not in values:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(names)}"
                raise ValueError(f"{name!r} is not a sampling parameter: {hint}")
            if value is not None:
                values[name] = value
        if isinstance(values["stop"], str):
            values["stop"] = (values["stop"],)
        for name in ("stop", "stop_token_ids"):
            if isinstance(values[name], list):
                values[name] = tuple(values[name])
        return cls(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt to complete.

    `id` is the user's name for it. `index` is its number in the whole job, the same on every rank:
    it seeds sampling and breaks routing ties. Raises ValueError when the prompt is empty or holds
    what is no token id.
    """

    index: int
    id: str | int
    prompt_token_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        if not _is_count(self.index):
            raise ValueError(f"index = {self.index!r}: must be a whole number from 0")
        ids = self.prompt_token_ids
        if not ids:
            raise ValueError(f"request {self.id!r}: the prompt has no tokens; give at least one")
        for place, token in enumerate(ids):
            if not _is_count(token):
                raise ValueError(
                    f"request {self.id!r}: prompt_token_ids[{place}] = {token!r}: "
                    "must be a whole number from 0"
                )


@dataclass(slots=True)
class CapacityUse:
    """What expert capacity did to one request, in (token, expert) assignments over all MoE layers.

    assignments: as routed; tokens that compete with nobody are routed in the last layer only where
    their output is read. mass, mass_kept: combine weights of the assignments that competed for
    capacity, and of those that survived; extras do not count.
    """

    assignments: int = 0
    dropped: int = 0
    added: int = 0
    mass: float = 0.0
    mass_kept: float = 0.0

    @property
    def gate_mass_kept(self) -> float:
        """Share of the gate mass that was computed, in [0, 1]; 1 where nothing competed."""
        return self.mass_kept / self.mass if self.mass else 1.0

    def add(self, other: CapacityUse) -> None:
        """Count `other` in."""
        self.assignments += other.assignments
        self.dropped += other.dropped
        self.added += other.added
        self.mass += other.mass
        self.mass_kept += other.mass_kept


@dataclass(slots=True)
class Timing:
    """Moments of a request's life, in seconds of the monotonic clock; None where not reached."""

    arrived: float
    first_token: float | None = None
    finished: float | None = None


@dataclass(slots=True)
class Completion:
    """The outcome of one request. Logprobs are natural logarithms; `prompt_logprobs[0]` is None."""

    index: int
    id: str | int | None
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    logprobs: list[float] | None = None
    prompt_logprobs: list[float | None] | None = None
    capacity: CapacityUse = field(default_factory=CapacityUse)
    error: dict[str, Any] | None = None  # {"message": str, "line": int | None}
    timing: Timing | None = None

    @classmethod
    def failure(
        cls,
        index: int,
        id: str | int | None,
        message: str,
        *,
        line: int | None = None,
        prompt_tokens: int = 0,
    ) -> Completion:
        """The completion of a request that could not be run: no tokens, and why."""
        return cls(
            index=index,
            id=id,
            text="",
            token_ids=[],
            finish_reason="error",
            prompt_tokens=prompt_tokens,
            completion_tokens=0,
            error={"message": message, "line": line},
        )

    def record(self) -> dict[str, Any]:
        """The batch job's output line, ready for JSON; optional keys only where present."""
        out: dict[str, Any] = {
            "id": self.id,
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
            },
        }
        if self.logprobs is not None:
            out["logprobs"] = self.logprobs
        if self.prompt_logprobs is not None:
            out["prompt_logprobs"] = self.prompt_logprobs
        out["capacity"] = {
            "assignments": self.capacity.assignments,
            "dropped": self.capacity.dropped,
            "added": self.capacity.added,
            "gate_mass_kept": self.capacity.gate_mass_kept,
        }
        if self.error is not None:
            out["error"] = self.error
        return out
