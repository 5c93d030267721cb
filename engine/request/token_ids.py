"""Token ids as users give them: of lists, numpy, torch and others, to whole numbers of Python."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from engine.request.errors import RequestError, show


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
