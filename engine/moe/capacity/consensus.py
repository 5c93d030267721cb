"""Consensus: which claims an overloaded pool keeps, and which ranks decide. The protocol.

A `Consensus` takes a rank's claims and returns a selection of them. One file per algorithm; another
one is a class with `begin` and one line in `consensus_registry.py`.

| consensus      | collectives per layer             | a rank sends            | kept            |
|----------------|-----------------------------------|-------------------------|-----------------|
| global, gather | 1 all-gather of claims            | 6 bytes per claim       | the best of all |
| global, radix  | all-reduced loads, 4 histograms,  | 1 KiB per pool and      | the same set,   |
|                | 1 all-gather of counts            | digit                   | bit for bit     |
| quota          | 1 all-gather of counts (rank      | 12 bytes per expert     | a rank's best,  |
|                | scope: another for the rows)      |                         | up to its quota |
| local          | 1 all-gather of the rows          | nothing for the choice  | a rank's best   |

Equal keys at the cut cost one more selection, which gathers the global token ids (`exact`).

Everything here runs on the device without a host sync: that an exact selection is needed is one of
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
    """One rank's assignments in a layer, as consensus sees them."""

    keys: list[torch.Tensor]  # int32 [N] each, most significant first; larger is kept first
    num_primary: int  # the first keys, which distinguish most claims
    # int64, what each claim is: e for a top-k assignment subject to capacity, E + e for one that is
    # not (its token's phase is exempt), 2E + e for an extra subject to capacity, 3E for none
    code_N: torch.Tensor
    pool_of_code: torch.Tensor  # int64 [3E + 1], the pool of each code, -1 where none
    limit_P: torch.Tensor  # int64, slots of each pool
    non_finite: torch.Tensor  # int64 [1], 1 where a router score is not finite
    padded: int  # claims of the rank that has most

    @property
    def num_experts(self) -> int:
        """E."""
        return (self.pool_of_code.numel() - 1) // 3

    @property
    def pool_N(self) -> torch.Tensor:
        """The pool of every claim, -1 where it is not subject to capacity."""
        return self.pool_of_code[self.code_N]

    def count_codes(self) -> torch.Tensor:
        """Return the claims of each code, int64 [3E]."""
        counts = torch.zeros_like(self.pool_of_code)
        return counts.scatter_add_(0, self.code_N, torch.ones_like(self.code_N))[:-1]

    def by_pool(self, counts_E: torch.Tensor) -> torch.Tensor:
        """Return counts [..., E] of experts summed to counts [..., P] of pools."""
        pool_E = self.pool_of_code[: self.num_experts]
        shape = (*counts_E.shape[:-1], self.limit_P.numel())
        return counts_E.new_zeros(shape).index_add_(-1, pool_E, counts_E)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which of this rank's claims are kept."""

    keep_N: torch.Tensor  # bool, of the claims subject to capacity
    # int64, top-k claims that each pool keeps over the ranks that share it; the rest of its limit
    # is free for extras
    pool_kept_P: torch.Tensor
    tied: torch.Tensor  # bool scalar: equal keys at a cut, an exact selection is needed
    # int64 [W, 2E + 1], rows to send to each expert, its top-k assignments before capacity, and
    # `non_finite`, of every rank; None where ranks must still exchange them
    rows_WE2: torch.Tensor | None
    # The experts that will be computed, of every rank: int64 [W, claims of the rank that has most],
    # -1 for none, in the order of the claims, without the extras chosen later; None: not known
    all_ids: Callable[[], torch.Tensor] | None = None


class PendingSelection(Protocol):
    """A consensus whose first collective is in flight."""

    complete: bool  # its selections have `rows_WE2`

    def wait(self) -> None:
        """Wait for the first collective; after it `select(exact=False)` may need no other."""
        ...

    def select(self, *, exact: bool) -> Selection:
        """Select. exact: order equal claims by token and expert. Collective."""
        ...


class Consensus(Protocol):
    """An algorithm."""

    communicates: bool  # `begin` starts a collective
    counts_only: bool  # complete selections have other ranks' row counts, not their tokens

    def begin(self, claims: Claims) -> PendingSelection:
        """Start the first collective, if there is one. Collective over the group."""
        ...
