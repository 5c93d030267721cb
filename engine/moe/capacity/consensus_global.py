"""Global consensus: a pool keeps the best claims of any rank.

Two ways to the same set. *Gather*: one all-gather of every rank's claims, and every rank makes the
same selection over all of them; counts of all ranks follow from it, so nothing else is exchanged.
*Radix*: claims are not sent; the selection's histograms are all-reduced, four passes of eight bits,
and each rank marks its own. Gather moves 6 bytes per claim and rank, radix 1 KiB per pool and pass
for any number of claims: `SelectionByTraffic` has the rule.

Legend: N claims of this rank, B claims of a rank after padding, P pools, E experts, W ranks.
"""

from __future__ import annotations

import torch

from engine.distributed.collectives import Collectives, Done, Pending
from engine.moe.capacity.consensus import Claims, PendingSelection, Selection
from engine.ops.claims import count_claims
from engine.ops.select_top import DIGITS, PASSES_A_WORD, select_reduced, select_top


def gather_bytes(claims: Claims, num_ranks: int) -> int:
    """Return the bytes that a rank receives in the gather."""
    return (num_ranks - 1) * 4 * _buffer_length(claims)


def radix_bytes(claims: Claims, num_ranks: int) -> int:
    """Return the bytes that a rank sends in the all-reduced histograms (ring algorithm)."""
    histograms = claims.num_primary * PASSES_A_WORD * claims.limit_P.numel() * DIGITS * 4
    return 2 * histograms * (num_ranks - 1) // num_ranks


class GatherConsensus:
    """One all-gather of claims."""

    communicates = True
    counts_only = False

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives

    def begin(self, claims: Claims) -> PendingSelection:
        """Start gathering the primary keys and the codes. Collective over the group."""
        return _PendingGather(claims, self._collectives)


class RadixConsensus:
    """All-reduced histograms."""

    communicates = True
    counts_only = False

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives

    def begin(self, claims: Claims) -> PendingSelection:
        """Start summing the loads. Collective over the group."""
        return _PendingRadix(claims, self._collectives)


class SelectionByTraffic:
    """Gather or radix, by bytes and collectives.

    The rule: gather where what a rank receives is at most the histograms' bytes plus
    `collective_bytes` for each collective that radix needs beyond gather's one. All terms are equal
    on all ranks, so all choose alike.
    """

    communicates = True
    counts_only = False

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives

    def begin(self, claims: Claims) -> PendingSelection:
        """Choose and start. Collective over the group."""
        size = self._collectives.size
        more = claims.num_primary * PASSES_A_WORD + 1  # loads, histograms and counts, against one
        extra = more * self._collectives.collective_bytes
        gather = gather_bytes(claims, size) <= radix_bytes(claims, size) + extra
        kind = GatherConsensus if gather else RadixConsensus
        return kind(self._collectives).begin(claims)


class GatheredClaims:
    """All ranks' claims, on their way to every rank: the primary keys and the codes.

    Collective over the group: every rank must make one.
    """

    keys: list[torch.Tensor]  # int32 [W, B] each, views, from `wait` on
    code_WB: torch.Tensor  # int64
    non_finite_W1: torch.Tensor  # int64

    def __init__(self, claims: Claims, collectives: Collectives) -> None:
        self.claims, self.collectives = claims, collectives
        self._pending: Pending = collectives.all_gather(_pack(claims))

    def wait(self) -> None:
        """Wait for the gather and split its buffer."""
        claims, size = self.claims, claims_length(self.claims)
        gathered = self._pending.wait()
        num_keys = claims.num_primary
        parts = gathered[:, : num_keys * size].unflatten(1, (num_keys, size))
        self.keys = list(parts.unbind(1))
        self.non_finite_W1 = gathered[:, -1:].long()
        codes = gathered[:, num_keys * size : -1].contiguous().view(torch.int16)
        self.code_WB = codes[:, :size].long()


class _PendingGather(GatheredClaims):
    complete = True

    def select(self, *, exact: bool) -> Selection:
        """Select over all ranks' claims. Collective only when exact."""
        claims, size = self.claims, claims_length(self.claims)
        num_experts, num_ranks = claims.num_experts, self.code_WB.shape[0]
        if exact:
            rest = torch.zeros(
                (len(claims.keys) - claims.num_primary, size),
                dtype=torch.int32,
                device=claims.code_N.device,
            )
            for row, key_N in zip(rest, claims.keys[claims.num_primary :], strict=True):
                row[: key_N.numel()] = key_N
            others = self.collectives.all_gather(rest).wait()
            self.keys += others.unbind(1)
        code_M = self.code_WB.flatten()
        pool_M = claims.pool_of_code[code_M]
        keys = [key_WB.flatten() for key_WB in self.keys]
        keep_M, tied = select_top(keys, pool_M, claims.limit_P)
        rows, claims_P = count_claims(
            self.code_WB,
            keep_M.view(num_ranks, size),
            self.non_finite_W1,
            claims.pool_of_code,
            claims.limit_P.numel(),
        )
        own_N = keep_M.view(num_ranks, size)[self.collectives.rank, : claims.code_N.numel()]
        kept_P = claims_P.minimum(claims.limit_P)

        def all_ids() -> torch.Tensor:
            exempt_WB = (self.code_WB >= num_experts) & (self.code_WB < 2 * num_experts)
            computed_WB = keep_M.view(num_ranks, size) | exempt_WB
            return (self.code_WB % num_experts).where(computed_WB, -1)[:, : claims.padded]

        return Selection(own_N, kept_P, tied, rows, all_ids)


class _PendingRadix:
    complete = False

    def __init__(self, claims: Claims, collectives: Collectives) -> None:
        self._claims, self._collectives = claims, collectives
        load_E = claims.count_codes()[: claims.num_experts].contiguous()
        self._pending = collectives.all_reduce(load_E)

    def wait(self) -> None:
        """Wait for the loads."""
        self._pending = Done(self._pending.wait())

    def select(self, *, exact: bool) -> Selection:
        """Select by all-reduced histograms. Collective."""
        claims = self._claims
        keys = claims.keys if exact else claims.keys[: claims.num_primary]

        def reduce(histogram: torch.Tensor) -> torch.Tensor:
            return self._collectives.all_reduce(histogram).wait()

        keep_N, tied = select_reduced(keys, claims.pool_N, claims.limit_P, reduce)
        kept_P = claims.by_pool(self._pending.wait()).minimum(claims.limit_P)
        return Selection(keep_N, kept_P, tied, None)


def claims_length(claims: Claims) -> int:
    """Return B: claims per rank in the gathered buffer, even, as two codes fill one int32."""
    return claims.padded + claims.padded % 2


def _buffer_length(claims: Claims) -> int:
    size = claims_length(claims)
    return claims.num_primary * size + size // 2 + 1


def _pack(claims: Claims) -> torch.Tensor:
    """Return int32: the primary keys [num_primary, B], codes [B] as int16, non_finite."""
    size, count = claims_length(claims), claims.code_N.numel()
    buffer = torch.zeros(_buffer_length(claims), dtype=torch.int32, device=claims.code_N.device)
    for index in range(claims.num_primary):
        buffer[index * size : index * size + count] = claims.keys[index]
    codes = buffer[claims.num_primary * size : -1].view(torch.int16)
    codes[:count] = claims.code_N
    codes[count:] = 3 * claims.num_experts
    buffer[-1:] = claims.non_finite
    return buffer
