"""Lists and tuples of any depth, such as the arguments of an op."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def leaves(values: Any) -> Iterator[Any]:
    """Yield what lists and tuples hold, at any depth."""
    for each in values:
        if isinstance(each, (list, tuple)):
            yield from leaves(each)
        else:
            yield each


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Return the value with every leaf changed, in lists and tuples of the same types."""
    if isinstance(value, (list, tuple)):
        changed = [mapped(change, each) for each in value]
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    return change(value)
