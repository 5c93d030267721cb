"""Consensus: who decides which claims an overloaded pool keeps. The protocol.

`agreement.py` hands a rank's claims to a `Consensus` and gets a verdict on its own. One file an
algorithm; a further one is a class with `begin` and one line in `consensus_registry.py`.

| consensus      | collectives a layer               | a rank sends            | who stays       |
|----------------|-----------------------------------|-------------------------|-----------------|
| global, gather | 1 all-gather of claims            | 6 bytes a claim         | the best of all |
| global, radix  | all-reduced loads, 4 histograms,  | 1 KiB a pool and digit  | the same set,   |
|                | 1 all-gather of counts            |                         | bit for bit     |
| quota          | 1 all-gather of counts (rank      | 12 bytes an expert      | a rank's best,  |
|                | scope: another for the rows)      |                         | as its share is |
| local          | 1 all-gather of the rows          | nothing for the choice  | a rank's best   |

Equal words at the cut cost one more round, which gathers the global token ids (`exact`).

Everything here runs on the device without reading it: that a round needs its exact form is one of
the numbers that `agreement.py` copies to the host with the split sizes.

Legend: N claims of this rank (the same number on every rank after padding), P pools, E experts, W
expert-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Claims:
    """One rank's assignments in a layer, as consensus sees them.

    words: int32 [N] each, larger is kept first; the first `leading` tell most claims apart.
    code_N: int64, what the claim is: e for a top-k assignment that competes, E + e for one that
    passes (its token's phase is not under capacity), 2E + e for an extra that competes, 3E for
    nothing. pool_of_code: int64 [3E + 1], the pool of each code, -1 where none. limit_P: int64,
    slots of each pool. bad: int64 [1], 1 where a router score is not finite. padded: claims of the
    rank that has most.
    """

    words: list[torch.Tensor]
    leading: int
    code_N: torch.Tensor
    pool_of_code: torch.Tensor
    limit_P: torch.Tensor
    bad: torch.Tensor
    padded: int

    @property
    def num_experts(self) -> int:
        """E."""
        return (self.pool_of_code.numel() - 1) // 3

    @property
    def pool_N(self) -> torch.Tensor:
        """The pool of every claim, -1 where it does not compete."""
        return self.pool_of_code[self.code_N]

    def count_codes(self) -> torch.Tensor:
        """int64 [3E]: claims of each code."""
        counts = torch.zeros_like(self.pool_of_code)
        return counts.scatter_add_(0, self.code_N, torch.ones_like(self.code_N))[:-1]

    def by_pool(self, counts_E: torch.Tensor) -> torch.Tensor:
        """Sum counts [..., E] of experts to counts [..., P] of pools."""
        pool_E = self.pool_of_code[: self.num_experts]
        shape = (*counts_E.shape[:-1], self.limit_P.numel())
        return counts_E.new_zeros(shape).index_add_(-1, pool_E, counts_E)


@dataclass(frozen=True, slots=True)
class Selection:
    """What consensus says about this rank's claims.

    keep_N: bool, of those that compete. pool_kept_P: int64, top-k claims that each pool keeps, of
    the ranks that share it: what is left of the limit is free. tied: bool scalar, equal words at a
    cut were not told apart and `exact` must be asked for. rows_WE2: int64 [W, 2E + 1] where the
    algorithm knows every rank's numbers: rows to send to each expert, its top-k assignments before
    capacity, and `bad`; None where ranks must still exchange them. all_ids: where the algorithm
    knows every rank's claims, gives the experts that will be computed, int64 [W, claims of the rank
    that has most], -1 for none, in the order of the claims; without the extras that are chosen
    later.
    """

    keep_N: torch.Tensor
    pool_kept_P: torch.Tensor
    tied: torch.Tensor
    rows_WE2: torch.Tensor | None
    all_ids: Callable[[], torch.Tensor] | None = None


class PendingSelection(Protocol):
    """One agreement under way. complete: its verdict has `rows_WE2`."""

    complete: bool

    def wait(self) -> None:
        """Let the first collective end; after it `verdict(exact=False)` may not need another."""
        ...

    def verdict(self, *, exact: bool) -> Selection:
        """Decide. exact: tell equal claims apart by token and expert. Collective."""
        ...


class Consensus(Protocol):
    """An algorithm. communicates: `begin` starts a collective. counts_only: complete rounds know
    how many rows other ranks keep, and not of which tokens.
    """

    communicates: bool
    counts_only: bool

    def begin(self, claims: Claims) -> PendingSelection:
        """Start the first collective, if there is one. Collective over the group."""
        ...
