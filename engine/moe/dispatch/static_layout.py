"""Static layout: where rows of a static exchange are, by the bucket alone.

`static_exchange.py` uses it. Every shape follows from the bucket, which all ranks agree on before a
step, and from the layer: no count of a step's rows enters, on the host or on the device. Tables are
made once per layer and bucket.

    gathered   [W, B, L]    every rank's tokens: the row, its instances, with sums its weights
    grouped    [R, D]       rows of this rank's experts by expert, R = W * B * min(K, e) places;
                            those past the last row hold anything and are never read
    returned   [W, B, m, D] m results per token and rank: one where they are summed there, else
                            min(K, most e): result k, or where experts are fewer that of local
                            expert j

Worked example, 2 ranks of 2 experts, bucket 2, K = 2, not summed: m = 2. Token 1 with instances
[3, 0] reads its first term, result k = 0 from rank 1, in row (1 * 2 + 1) * 2 + 0 = 6 of what is
returned, and its second, k = 1 from rank 0, in row (0 * 2 + 1) * 2 + 1 = 3.

Legend: W ranks, B bucket, T tokens of this rank (at most B), D model dim, K top-k, I instances, E
experts, e instances on this rank, L bytes of a row, m results per token and rank, N rows gathered
(W * B), R places of rows by expert, P columns of the deal.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from engine.moe.dispatch.dedup import Deduplicator
from engine.moe.placement.instances import Instances
from engine.ops.to_device import to_device

# Tokens per rank that a step is padded to.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def bucket_for(most_tokens: int) -> int | None:
    """Return the bucket of a step whose largest rank has so many tokens; None: too many.

    Worked example: 5 tokens take bucket 8, none take bucket 1, 257 have none.
    """
    return next((bucket for bucket in BUCKETS if most_tokens <= bucket), None)


class StaticLayout:
    """Where one layer's rows are.

    Args:
        instances: of the layer.
        rank: this rank's position in the group.
        top_k: K.
        sums: whether the ranks of the experts sum a token's rows (moe.dispatch.partial_sums).
        device: of the tables, which are uploaded here.
        some_none: whether single assignments of a token may be none, as those to zero experts.
    """

    def __init__(
        self,
        instances: Instances,
        rank: int,
        top_k: int,
        sums: bool,
        device: torch.device,
        *,
        some_none: bool = True,
    ) -> None:
        self._instances, self._device, self._top_k = instances, device, top_k
        self.num_ranks, self.num_instances = instances.num_ranks, instances.num_instances
        self.num_local = instances.num_local(rank)  # e
        self.first = instances.first_instances[rank]
        width = min(top_k, instances.most_local)
        self.sums = sums and width > 1 and self.num_ranks > 1
        self.num_results = 1 if self.sums else width  # m
        self._by_expert = width < top_k  # results by local expert, not by k
        # Of a token's places this rank's comes first; that of no assignment is -1.
        self._takes_first = width == 1 and not some_none
        first = np.asarray(instances.first_instances)
        instance_I = np.arange(self.num_instances)
        self.key_I1, self._rank_I1, self._local_I1 = (
            to_device(torch.from_numpy(np.append(each, -1)), device)
            for each in (
                # This rank's come first, so that rows of others are sorted past the end.
                (instance_I - self.first) % self.num_instances,
                instances.rank_I,
                instance_I - first[instances.rank_I],
            )
        )
        self._deal_EP = None
        if instances.has_copies:
            self._deal_EP = to_device(torch.from_numpy(deal_table(instances, rank)), device)
        self._groups = Deduplicator(np.diff(first).tolist()) if self.sums else None
        self._tables: dict[int, tuple[torch.Tensor, ...]] = {}

    def rows_bound(self, bucket: int) -> int:
        """Return R, the most rows that this rank's experts may have."""
        return self.num_ranks * bucket * min(self._top_k, max(1, self.num_local))

    def prepare(self, bucket: int) -> None:
        """Make the tables of a bucket: before a CUDA graph of it is captured."""
        self._table(bucket)

    def instances_of(
        self, ids_TK: torch.Tensor, bucket: int, uses_copies: bool = True
    ) -> torch.Tensor:
        """Return the instance that computes each assignment, int64; -1 stays.

        Where experts have copies, hosts take rows by a fixed deal: see `deal_table`.

        Args:
            ids_TK: the model's experts.
            bucket: of the step.
            uses_copies: whether copies take rows, the same on every rank.
        """
        if self._deal_EP is None or not uses_copies:
            return self._instances.homes(ids_TK)
        column_B1 = self._table(bucket)[2]
        return self._deal_EP[ids_TK, column_B1[: ids_TK.shape[0]]]

    def local_slots(
        self, slot_NK: torch.Tensor, key_NK: torch.Tensor, num_rows: int
    ) -> torch.Tensor:
        """Return which row by expert each returned row is, int64 [N * m]; any row where there is
        none, since nobody reads it.

        Args:
            slot_NK: the row by expert of each gathered assignment.
            key_NK: its key; those of this rank are below e.
            num_rows: rows by expert, at least 1.
        """
        if self._by_expert and self._takes_first:
            slot_NK = slot_NK.amin(1)
        elif self._by_expert:
            most = self.num_results
            # What is not this rank's goes into one column more, which is left out.
            at_NK = key_NK.where(key_NK >= 0, most).clamp_(max=most)
            table_Nm = slot_NK.new_zeros(slot_NK.shape[0], most + 1).scatter_(1, at_NK, slot_NK)
            slot_NK = table_Nm[:, :most]
        return slot_NK.clamp(min=0, max=num_rows - 1).flatten()

    def home_slots(self, instance_TK: torch.Tensor, bucket: int) -> torch.Tensor:
        """Return the returned row of each term of this rank's tokens, int64 [T, K], -1 where there
        is none. With sums a rank's row is the term of the first of its experts.
        """
        base_I1, offset_BK, _ = self._table(bucket)
        if self._groups is not None:
            first_TK = self._groups.first_groups(instance_TK)
            at_TK = torch.add(offset_BK[: len(first_TK)], first_TK, alpha=bucket)
        else:
            at_TK = offset_BK[: len(instance_TK)] + base_I1[instance_TK]
        return at_TK.clamp_(min=-1)

    def _table(self, bucket: int) -> tuple[torch.Tensor, ...]:
        """Return what a term adds by its instance [I + 1] and by its token and k [B, K] to find its
        returned row, far below 0 for no instance; and each token's column of the deal [B, 1].
        """
        if bucket not in self._tables:
            per_rank = bucket * self.num_results
            base_I1 = self._rank_I1 * per_rank
            token_B1 = torch.arange(bucket, device=self._device)[:, None]
            offset_BK = (token_B1 * self.num_results).expand(-1, self._top_k)
            if self._by_expert and not self.sums:
                base_I1 = torch.where(base_I1 >= 0, base_I1 + self._local_I1, base_I1)
            elif not self.sums:
                offset_BK = offset_BK + torch.arange(self._top_k, device=self._device)
            columns = 1 if self._deal_EP is None else self._deal_EP.shape[1]
            self._tables[bucket] = base_I1, offset_BK.contiguous(), token_B1 % columns
        return self._tables[bucket]


def deal_table(instances: Instances, rank: int) -> np.ndarray:
    """Return the instance that takes an expert's row of a rank's token, int64 [E + 1, P], -1 in the
    last row: token t reads column t modulo P, the column of host (t + rank) modulo the hosts.

    Hosts are the home, then the copies by rank. The rank is added so that ranks of one token each
    do not all take the same host.

    Worked example, expert 2 with home rank 0 and a copy on rank 3: tokens 0 and 1 of rank 0 go to
    ranks 0 and 3, those of rank 1 to ranks 3 and 0.
    """
    hosts_EH = instances.hosts_EH[instances.home_order_E]
    num_E = (hosts_EH >= 0).sum(1)
    period = min(math.lcm(*num_E.tolist()), BUCKETS[-1])
    turn_EP = (np.arange(period)[None] + rank) % num_E[:, None]
    dealt_EP = np.take_along_axis(hosts_EH, turn_EP, axis=1)
    return np.concatenate((dealt_EP, np.full((1, period), -1, dtype=np.int64)))
