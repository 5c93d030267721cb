"""Settings of a line: the names that users write -> the fields of `SamplingParams`.

A plain line has its settings next to the prompt, among keys of the user's own (an expected answer,
a task name), which are left alone and counted. So a key that looks like a misspelt setting, or is
another engine's name of one (`other_engines.py`), is refused: the line would run without it. In an
OpenAI body every key is known or refused.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from engine.batch.other_engines import (
    KNOWN,
    UNSUPPORTED,
    advice,
    asks_nothing,
    is_setting,
    letters,
)
from engine.batch.requests.chat import CHAT_FIELDS
from engine.batch.requests.fields import NO_EFFECT, SETTINGS
from engine.batch.strict_json import show
from engine.request import RequestError

_ALIASES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
_PARAMETERS = SETTINGS | UNSUPPORTED.keys()
# Values of chat fields that ask for nothing where there are no messages, besides empty ones.
_OFF_IN_CHAT = {"tool_choice": ("none", "auto"), "add_generation_prompt": (True,)}
_BY_LETTERS = {letters(name): name for name in sorted(_PARAMETERS)}
_OURS_BY_LETTERS = {letters(name): name for name in sorted(SETTINGS - {"best_of"})}
_NEAR, _NEAR_OTHERS = 0.8, 0.88  # likeness from which a key is a misspelling
_LONGEST_NAME = 40  # a longer key is no misspelling
_MAX_COMPARED = 256  # keys of one line that are compared with every name
_MAX_COUNTED, _OTHERS = 1000, "(other keys)"  # names of users' keys that are counted one by one


@dataclass(frozen=True, slots=True)
class UserKeys:
    """Counts, per name, the lines with a key of the user's own."""

    lines: Counter[str] = field(default_factory=Counter)

    def add(self, keys: list[str]) -> None:
        """Count one line."""
        for key in keys:
            name = key if len(key) <= _LONGEST_NAME else f"{key[:_LONGEST_NAME]}..."
            is_counted = name in self.lines or len(self.lines) < _MAX_COUNTED
            self.lines[name if is_counted else _OTHERS] += 1


def split_plain(
    record: Mapping[str, Any], not_settings: frozenset[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of a plain line, and the keys that are the user's own.

    Args:
        record: the line.
        not_settings: its other keys that have a meaning.

    Raises:
        RequestError: a key is a misspelt setting, or another engine's.
    """
    settings: dict[str, Any] = {}
    own: list[str] = []
    for key, value in record.items():
        if key in _PARAMETERS:
            settings[key] = value
        elif key not in not_settings:
            if value is not None and (problem := _problem(key, value, len(own))):
                raise problem
            own.append(key)
    return settings, own


def split_body(
    body: Mapping[str, Any], prompts: tuple[str, ...], url: str | None
) -> dict[str, Any]:
    """Return the settings of an OpenAI body.

    Args:
        prompts: the keys of a prompt that it may have.
        url: of the line; None without one.

    Raises:
        RequestError: a key is not known here.
    """
    settings: dict[str, Any] = {}
    for key, value in body.items():
        if key in _PARAMETERS:
            settings[key] = value
        elif key not in prompts and key not in NO_EFFECT and value is not None:
            near = _meant(key)
            if near in _BY_LETTERS.values():
                hint = f": did you mean {near!r}?"
            elif what := advice(letters(key), value, _settings_in(value)):
                hint = f": {what}"
            elif len(key) <= _LONGEST_NAME and (
                names := difflib.get_close_matches(letters(key), prompts, n=1, cutoff=_NEAR)
            ):
                hint = f": did you mean {names[0]!r}?"
            else:
                hint = f" at {url}" if url else ""
            raise RequestError("unknown_setting", f"body.{key} is not supported{hint}")
    return settings


def check_outside_body(record: Mapping[str, Any], not_settings: frozenset[str]) -> list[str]:
    """Return the user's own keys of an OpenAI line, outside of its body.

    Raises:
        RequestError: a key is a setting, which belongs in the body.
    """
    own = [key for key in record if key not in not_settings]
    for key in own[:_MAX_COMPARED]:
        if record[key] is not None and (key in _PARAMETERS or _meant(key)):
            message = f"{key} = {show(record[key])}: is outside of body; write it in the body"
            raise RequestError("unknown_setting", message)
    return own


def to_sampling_names(settings: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
    """Return settings under the names of `SamplingParams`, without those that have no effect.

    Raises:
        RequestError: one is not supported, or two mean the same.
    """
    ours: dict[str, Any] = {}
    for key, value in settings.items():
        if value is None or (key == "seed" and type(value) is int and value == -1):
            continue  # -1 is how others leave the seed out
        if key in UNSUPPORTED:
            if not asks_nothing(key, value):
                message = f"{key} = {show(value)}: {key} is not supported; leave it out"
                raise RequestError("unsupported_setting", message)
            continue
        if key in CHAT_FIELDS:
            if not chat and value not in _OFF_IN_CHAT.get(key, ([], {}, False)):
                message = f"{key} = {show(value)}: {key} is not supported with prompt; it is for "
                raise RequestError("unsupported_setting", f"{message}messages")
            continue
        if key == "best_of":
            _check_best_of(value, settings.get("n"))
            continue
        name = _ALIASES.get(key, key)
        if name in ours:
            others = [other for other in settings if _ALIASES.get(other, other) == name]
            message = f"{' and '.join(others)} mean the same: give one of them"
            raise RequestError("conflicting_settings", message)
        ours[name] = value
    # In completions a number asks for so many likeliest tokens, in chat `top_logprobs` does.
    if chat and type(ours.get("logprobs")) is int:
        message = (
            f"logprobs = {ours['logprobs']}: must be true or false with messages; give the number "
            "in top_logprobs"
        )
        raise RequestError("invalid_value", message)
    if chat and ours.get("echo") is True:
        message = "echo = true: echo is not supported with messages; it is for prompt"
        raise RequestError("unsupported_setting", message)
    return ours


def _check_best_of(best_of: Any, n: Any) -> None:
    """Raise RequestError where more completions are to be made than returned."""
    limit = n if type(n) is int else 1
    if type(best_of) is not int or best_of > limit:
        message = (
            f"best_of = {show(best_of)}: best_of above n = {limit} is not supported; leave it out"
        )
        raise RequestError("unsupported_setting", message)


def _problem(key: str, value: Any, num_compared: int) -> RequestError | None:
    """Return why a key of a plain line that is no setting may not stay, None where it may."""
    name = letters(key)
    if what := advice(name, value, _settings_in(value)):
        return RequestError("unknown_setting", f"{key!r} is another engine's name: {what}")
    if is_setting(name) and name not in _BY_LETTERS:
        return None  # it asks for nothing
    if num_compared >= _MAX_COMPARED or not (near := _meant(key)):
        return None
    known = letters(near)
    if known in _OURS_BY_LETTERS:
        hint = f"did you mean {near!r}?"
    elif what := advice(known, value, _settings_in(value)):
        hint = f"if you mean {near!r}, {what}"
    else:
        return None
    return RequestError("unknown_setting", f"{key!r} is not a sampling parameter: {hint}")


def _settings_in(value: Any) -> list[str]:
    """Return the names of settings in an object, as they should be written."""
    if not isinstance(value, dict):
        return []
    return [key for key in list(value)[:_MAX_COMPARED] if key in _PARAMETERS or _meant(key)]


@lru_cache(maxsize=1 << 14)
def _meant(key: str) -> str | None:
    """Return the setting that a key means: the same letters, or similar and long enough."""
    if len(key) > _LONGEST_NAME:
        return None
    name = letters(key)
    if name in _BY_LETTERS:
        return _BY_LETTERS[name]
    if is_setting(name):
        return name
    if len(name) <= 5:
        return None
    near = difflib.get_close_matches(name, _OURS_BY_LETTERS, n=1, cutoff=_NEAR)
    if near:
        return _OURS_BY_LETTERS[near[0]]
    near = difflib.get_close_matches(name, KNOWN, n=1, cutoff=_NEAR_OTHERS)
    return KNOWN[near[0]] if near else None
