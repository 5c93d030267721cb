"""Mask window: what a mask of transformers means for the paged cache."""

from __future__ import annotations

from collections.abc import Callable

import torch


def window_of(allows: Callable[..., torch.Tensor], longest: int) -> int | None:
    """Return the sliding window of a mask, None where a query attends to all keys up to its own.

    Args:
        allows: of batch, head, query and key, whether the query attends to the key.
        longest: positions to look at.

    Raises:
        ValueError: it is another mask.
    """
    widths = set()
    for query in (longest - 1, longest - 2, longest // 2, 1):
        key_C = torch.arange(query + 2)
        at = torch.tensor(query)
        allowed_C = torch.as_tensor(allows(torch.tensor(0), torch.tensor(0), at, key_C))
        allowed_C = allowed_C.expand(key_C.shape)
        first = int(allowed_C.int().argmax())
        if not torch.equal(allowed_C, (key_C >= first) & (key_C <= query)):
            raise ValueError("neither causal nor a window")
        widths.add((query + 1 - first, first == 0))
    windows = {width for width, is_all in widths if not is_all}
    if len(windows) > 1 or any(width > min(windows, default=width) for width, _ in widths):
        raise ValueError("a window that depends on the position")
    return windows.pop() if windows else None
