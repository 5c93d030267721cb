"""Type and rule checks of a settings dataclass, field by field; no setting is named here.

`schema.py` and the sections it names declare the fields: an annotation gives the type,
`field(metadata=rule(...))` what else must hold. `field_problems` walks an instance and describes
each violation in one sentence.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """One or more settings are wrong."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems  # one sentence for each

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return "\n  - ".join([f"{len(self.problems)} problems in the config:", *self.problems])


@dataclass(frozen=True)
class Rule:
    """What a value of the right type must also satisfy."""

    text: str  # completes the sentence "must be ..."
    holds: Callable[[Any], bool]


def rule(text: str, holds: Callable[[Any], bool]) -> dict[str, Rule]:
    """Return the metadata of a field whose value must be `text`, which `holds` tests."""
    return {"rule": Rule(text, holds)}


@functools.cache
def type_hints(section: type) -> dict[str, Any]:
    """Return the resolved annotations of a section by field, in order."""
    hints = get_type_hints(section)
    return {item.name: hints[item.name] for item in fields(section)}


def field_problems(section: Any, prefix: str = "", *, full: bool = False) -> Iterator[str]:
    """Yield one sentence for each field of a dataclass (recursively) that breaks type or rule.

    Args:
        section: instance of a settings dataclass.
        prefix: text before each field's name, such as `moe.capacity.`.
        full: a value of the wrong type gets the field's rule as well.
    """
    for item in fields(section):
        name, value = f"{prefix}{item.name}", getattr(section, item.name)
        hint, rule = type_hints(type(section))[item.name], item.metadata.get("rule")
        if is_dataclass(hint):
            if isinstance(value, hint):  # type: ignore[arg-type]
                yield from field_problems(value, f"{name}.", full=full)
            else:
                keys = ", ".join(type_hints(hint))
                yield f"{name} = {value!r}: must be a section of keys ({keys})"
        elif not _matches(value, hint):
            more = f", {rule.text}" if full and rule else _nearest_choice(value, hint)
            yield f"{name} = {value!r}: must be {describe(hint)}{more}"
        elif value is not None and rule and not rule.holds(value):
            yield f"{name} = {value!r}: must be {rule.text}"


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union; of any other annotation, itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _matches(value: Any, hint: Any) -> bool:
    """Return whether `value` has the type `hint`; a bool is no number, an int is a valid float."""
    if len(options := alternatives(hint)) > 1:
        return any(_matches(value, option) for option in options)
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_matches(item, get_args(hint)[0]) for item in value)
    if get_origin(hint) is dict:
        of_key, of_value = get_args(hint)
        return isinstance(value, dict) and all(
            _matches(key, of_key) and _matches(item, of_value) for key, item in value.items()
        )
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


_TYPE_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def describe(hint: Any) -> str:
    """Return in words which values an annotation allows."""
    if len(options := alternatives(hint)) > 1:
        return " or ".join(describe(option) for option in options)
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if get_origin(hint) is tuple:
        return f"a list, each item {describe(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        key, value = map(describe, get_args(hint))
        return f"an object, each key {key} and each value {value}"
    return "null" if hint is NoneType else _TYPE_WORDS[hint]


def _nearest_choice(value: Any, hint: Any) -> str:
    """Return a hint with the valid choice nearest to a value, or to an item of a list; or ""."""
    if get_origin(hint) is tuple and isinstance(value, tuple):
        item_hint = get_args(hint)[0]
        wrong = (item for item in value if not _matches(item, item_hint))
        return next(filter(None, (_nearest_choice(item, item_hint) for item in wrong)), "")
    choices = [choice for option in alternatives(hint) for choice in get_args(option)]
    names = [choice for choice in choices if isinstance(choice, str)]
    near = difflib.get_close_matches(str(value), names, n=1)
    return f"; did you mean {near[0]}?" if near else ""
