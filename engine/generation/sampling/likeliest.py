"""Log probabilities of given tokens, and the likeliest tokens of a row of logits.

Legend: S rows of a step, R rows of a subset, V vocabulary, C candidates of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.ops.to_device import to_device
from engine.request import TopLogprobs


def token_logprobs(logits_RV: Tensor, token_ids: Tensor | Sequence[int]) -> Tensor:
    """Return the natural-log probability of one given token per row, float32 [R], on their device.

    Args:
        token_ids: int64 [R], or a list; for prompt logprobs the prompt's next tokens.

    Non-finite logits give non-finite results.
    """
    ids_R = torch.as_tensor(token_ids, dtype=torch.int64)
    if not isinstance(token_ids, Tensor):
        ids_R = to_device(ids_R, logits_RV.device)
    return logits_RV.gather(1, ids_R[:, None])[:, 0] - logits_RV.logsumexp(dim=1)


@dataclass(frozen=True, slots=True)
class Likeliest:
    """The likeliest tokens of the rows that ask for some, with logprobs, on their device."""

    counts: list[int]  # per row how many it asks for, 0 where it asks for none
    width: int  # tokens per asking row in `packed`
    packed: Tensor  # float64 [2 * R * width]: token ids, then logprobs; float64 holds both exactly

    @classmethod
    def of(cls, logits_SV: Tensor, counts: list[int]) -> Likeliest | None:
        """Find `counts` tokens per row, of equal logits the lower id first; None for all 0."""
        if not any(counts):
            return None
        width = min(max(counts), logits_SV.shape[1])
        logits_RV = logits_SV
        if not all(counts):
            rows_R = torch.tensor([row for row, count in enumerate(counts) if count])
            logits_RV = logits_SV.index_select(0, to_device(rows_R, logits_SV.device))
        ids_RC = likeliest_ids(logits_RV, width)
        logprobs_RC = logits_RV.gather(1, ids_RC) - logits_RV.logsumexp(dim=1, keepdim=True)
        return cls(counts, width, torch.cat([ids_RC.double(), logprobs_RC.double()]).flatten())

    def unpack(self, packed: list[float]) -> list[TopLogprobs]:
        """Return what each row asked for.

        Args:
            packed: `self.packed` as a list.
        """
        half, start, top = len(packed) // 2, 0, []
        for count in self.counts:
            kept = min(count, self.width)
            logprobs = packed[half + start : half + start + kept]
            top.append(list(zip(map(int, packed[start : start + kept]), logprobs, strict=True)))
            start += self.width if count else 0
        return top


def likeliest_ids(logits_RV: Tensor, width: int) -> Tensor:
    """Return token ids [R, width] by descending logit; of equal logits the lower id comes first.

    The float's bits, mapped to integers of the same order, and the id form one integer key without
    ties, so that the result does not depend on how top-k breaks ties.
    """
    vocab = logits_RV.shape[1]
    bits_RV = (logits_RV + 0.0).view(torch.int32)  # + 0.0: -0 equals 0
    bits_RV = torch.where(bits_RV < 0, bits_RV ^ 0x7FFFFFFF, bits_RV)
    low_ids_first_V = torch.arange(vocab - 1, -1, -1, device=logits_RV.device)
    keys_RV = (bits_RV.long() << 32) | low_ids_first_V
    return vocab - 1 - (keys_RV.topk(width, dim=1).values & 0xFFFFFFFF)
