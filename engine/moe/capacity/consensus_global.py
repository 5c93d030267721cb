"""Global consensus: a pool keeps the best claims of all ranks, whoever holds them.

Two ways to the same set. *Gather*: one all-gather carries every rank's claims, and every rank makes
the same selection over all of them; counts of all ranks fall out of it, so nothing else has to be
exchanged. *Radix*: claims stay where they are; the selection's histograms are all-reduced, four
rounds of eight bits, and each rank marks its own. Gather moves 6 bytes a claim and rank, radix
1 KiB a pool and round however many claims there are: `SelectionByTraffic` states when which.

Legend: N claims of this rank, B claims of a rank after padding, P pools, E experts, W ranks.
"""

from __future__ import annotations

import torch

from engine.distributed.collectives import COLLECTIVE_BYTES, Collectives, Done, Pending
from engine.moe.capacity.consensus import Claims, PendingSelection, Selection
from engine.ops.select_top import DIGITS, PASSES_A_WORD, select_top, select_top_reference


def gather_bytes(claims: Claims, num_ranks: int) -> int:
    """Bytes a rank receives in the gather."""
    return (num_ranks - 1) * 4 * _buffer_length(claims)


def radix_bytes(claims: Claims, num_ranks: int) -> int:
    """Bytes a rank sends in the all-reduced histograms (ring algorithm)."""
    histograms = claims.leading * PASSES_A_WORD * claims.limit_P.numel() * DIGITS * 4
    return 2 * histograms * (num_ranks - 1) // num_ranks


class GatherConsensus:
    """One all-gather of claims."""

    communicates = True
    counts_only = False

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives

    def begin(self, claims: Claims) -> PendingSelection:
        """Start gathering the leading words and the codes. Collective over the group."""
        return _PendingGather(claims, self._collectives)


class RadixConsensus:
    """All-reduced histograms."""

    communicates = True
    counts_only = False

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives

    def begin(self, claims: Claims) -> PendingSelection:
        """Start adding up the loads. Collective over the group."""
        return _PendingRadix(claims, self._collectives)


class SelectionByTraffic:
    """Gather or radix, by bytes and collectives.

    The rule: gather where what a rank receives is at most the histograms' bytes plus
    `COLLECTIVE_BYTES` for each collective that radix needs beyond gather's one. All of it follows
    from agreed numbers, so all ranks choose alike.
    """

    communicates = True
    counts_only = False

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives

    def begin(self, claims: Claims) -> PendingSelection:
        """Choose and start. Collective over the group."""
        size = self._collectives.size
        more = claims.leading * PASSES_A_WORD + 1  # loads, histograms and counts, against one
        gather = gather_bytes(claims, size) <= radix_bytes(claims, size) + more * COLLECTIVE_BYTES
        kind = GatherConsensus if gather else RadixConsensus
        return kind(self._collectives).begin(claims)


class _PendingGather:
    complete = True

    def __init__(self, claims: Claims, collectives: Collectives) -> None:
        self._claims, self._collectives = claims, collectives
        self._pending: Pending = collectives.all_gather(_pack(claims))
        self._words: list[torch.Tensor] = []  # of all ranks, [W * B]

    def wait(self) -> None:
        """Let the gather end and take its buffer apart."""
        claims, size = self._claims, claims_length(self._claims)
        gathered = self._pending.wait()
        leading = claims.leading
        parts = gathered[:, : leading * size].unflatten(1, (leading, size))
        self._words = [parts[:, index].flatten() for index in range(leading)]
        self._bad_W1 = gathered[:, -1:].long()
        codes = gathered[:, leading * size : -1].contiguous().view(torch.int16)
        self._code_WB = codes[:, :size].long()

    def verdict(self, *, exact: bool) -> Selection:
        """Select over all ranks' claims. Collective only when exact."""
        claims, size = self._claims, claims_length(self._claims)
        num_experts, num_ranks = claims.num_experts, self._code_WB.shape[0]
        if exact:
            rest = torch.zeros(
                (len(claims.words) - claims.leading, size),
                dtype=torch.int32,
                device=claims.code_N.device,
            )
            for row, word_N in zip(rest, claims.words[claims.leading :], strict=True):
                row[: word_N.numel()] = word_N
            others = self._collectives.all_gather(rest).wait()
            self._words += [others[:, index].flatten() for index in range(others.shape[1])]
        code_M = self._code_WB.flatten()
        pool_M = claims.pool_of_code[code_M]
        keep_M, tied = select_top(self._words, pool_M, claims.limit_P)
        num_codes = 3 * num_experts + 1
        first_W1 = torch.arange(num_ranks, device=code_M.device)[:, None] * num_codes
        place_M = (first_W1 + self._code_WB).flatten()
        counts = torch.zeros((2, num_ranks * num_codes), dtype=torch.int64, device=code_M.device)
        counts[0].scatter_add_(0, place_M, torch.ones_like(place_M))
        counts[1].scatter_add_(0, place_M, keep_M.long())
        claimed_W, kept_W = counts.view(2, num_ranks, num_codes)
        before_WE, passes_WE = claimed_W[:, : 2 * num_experts].chunk(2, dim=1)
        keep_WE = kept_W[:, :num_experts] + kept_W[:, 2 * num_experts : -1]
        rows = torch.cat((keep_WE + passes_WE, before_WE + passes_WE, self._bad_W1), dim=1)
        own_N = keep_M.view(num_ranks, size)[self._collectives.rank, : claims.code_N.numel()]
        kept_P = claims.by_pool(before_WE.sum(0)).minimum(claims.limit_P)

        def all_ids() -> torch.Tensor:
            passes_WB = (self._code_WB >= num_experts) & (self._code_WB < 2 * num_experts)
            computed_WB = keep_M.view(num_ranks, size) | passes_WB
            return (self._code_WB % num_experts).where(computed_WB, -1)[:, : claims.padded]

        return Selection(own_N, kept_P, tied, rows, all_ids)


class _PendingRadix:
    complete = False

    def __init__(self, claims: Claims, collectives: Collectives) -> None:
        self._claims, self._collectives = claims, collectives
        load_E = claims.count_codes()[: claims.num_experts].contiguous()
        self._pending = collectives.all_reduce(load_E)

    def wait(self) -> None:
        """Let the loads arrive."""
        self._pending = Done(self._pending.wait())

    def verdict(self, *, exact: bool) -> Selection:
        """Select by all-reduced histograms. Collective."""
        claims = self._claims
        words = claims.words if exact else claims.words[: claims.leading]

        def reduce(histogram: torch.Tensor) -> torch.Tensor:
            return self._collectives.all_reduce(histogram).wait()

        keep_N, tied = select_top_reference(words, claims.pool_N, claims.limit_P, reduce)
        kept_P = claims.by_pool(self._pending.wait()).minimum(claims.limit_P)
        return Selection(keep_N, kept_P, tied, None)


def claims_length(claims: Claims) -> int:
    """B: claims of a rank in the gathered buffer, even, so that two codes fill one word."""
    return claims.padded + claims.padded % 2


def _buffer_length(claims: Claims) -> int:
    size = claims_length(claims)
    return claims.leading * size + size // 2 + 1


def _pack(claims: Claims) -> torch.Tensor:
    """int32 buffer: leading words [leading, B], codes [B] as int16, bad."""
    size, count = claims_length(claims), claims.code_N.numel()
    buffer = torch.zeros(_buffer_length(claims), dtype=torch.int32, device=claims.code_N.device)
    for index in range(claims.leading):
        buffer[index * size : index * size + count] = claims.words[index]
    codes = buffer[claims.leading * size : -1].view(torch.int16)
    codes[:count] = claims.code_N
    codes[count:] = 3 * claims.num_experts
    buffer[-1:] = claims.bad
    return buffer
