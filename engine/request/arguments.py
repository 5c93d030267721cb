"""Prompts and sampling parameters as a call of `LLM.generate` gives them: one alone, or a list."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from engine.request.errors import show
from engine.request.params import SamplingParams
from engine.request.token_ids import whole_number


def list_prompts(prompts: Any) -> list[Any]:
    """Return the prompts one by one; a text, or token ids that are in no list, is one prompt.

    Raises:
        ValueError: they are neither, or in no order that is the same on every rank.
    """
    if isinstance(prompts, str):
        return [prompts]
    is_list = isinstance(prompts, Iterable) and not isinstance(
        prompts, bytes | bytearray | memoryview | Mapping | Set
    )
    if not is_list or getattr(prompts, "ndim", 1) == 0:
        raise ValueError(
            f"prompts = {show(prompts)}: must be a list of prompts, each text or a list of token "
            "ids, or one prompt"
        )
    each = list(prompts)
    one = bool(each) and all(whole_number(item) is not None for item in each)
    return [each] if one else each


def list_sampling(sampling: Any, num_prompts: int) -> Sequence[SamplingParams]:
    """Return the parameters of each prompt.

    Raises:
        ValueError: not as many as prompts, or something else.
    """
    is_list = isinstance(sampling, Sequence) and not isinstance(sampling, str)
    each = sampling if is_list else [sampling] * num_prompts
    if len(each) != num_prompts:
        raise ValueError(
            f"sampling: {len(each)} parameters for {num_prompts} prompts; give one for all, or one "
            "per prompt"
        )
    for index, params in enumerate(each):
        if not isinstance(params, SamplingParams):
            key = f"sampling[{index}]" if is_list else "sampling"
            raise ValueError(f"{key} = {show(params)}: must be SamplingParams")
    return each
