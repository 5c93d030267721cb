"""Static exchange: steps 3 to 7 of `layer.py` for few tokens, without counts.

One more way beside `agreement` and `pipeline.py`, for steps without capacity. Tokens are
padded to a bucket that the step's control messages agree on, and two collectives of equal parts
move them:

    1. pack      a token's row, and behind it its instances and, with sums, its combine weights
    2. gather    one all-gather: every rank has the rows of all
    3. group     on the device: assignments sorted by instance, this rank's first; those of other
                 ranks and of padding come past the end and are never read
    4. experts   on a bounded number of places, whose ends the device knows
    5. home      one all-to-all of equal parts: `StaticLayout` says which result is where
    6. combine   each token sums its experts' results by weight, k = 0 .. K - 1

Results are those of the plain way, bit for bit: the same rows in the same order per expert, the
same sum. With moe.dispatch.partial_sums they are those of deduplicated rows under that setting: a
rank sums a token's rows in the order of its experts, and the token's rank the sums in the order of
their first k.

Nothing reads a value of the device on the host, and every shape follows from the bucket, so a CUDA
graph can capture it, once a call of the bucket has run. On the CPU, where a count costs nothing
to read, only the rows that exist are computed.

Legend: T tokens of this rank, B bucket, D model dim, K top-k, N rows gathered (W * B), R places of
rows by expert, L bytes of a packed row, I instances, m results per token and rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.distributed.collectives import run_overlapped
from engine.moe.dispatch.exchange import AllToAll, Exchange
from engine.moe.dispatch.static_layout import StaticLayout
from engine.moe.local_experts import LocalExperts
from engine.ops.permute import combine_rows, gather_rows
from engine.ops.sort_by_expert import sort_by_expert
from engine.profiling.phase_clock import Phase, PhaseClock

_ID_BYTES, _WEIGHT_BYTES = 8, 4  # int64, which the lookup and the sort take, and float32


class StaticExchange:
    """Runs one layer's experts on tokens padded to a bucket.

    Args:
        layout: where rows are.
        exchange: of the expert-parallel group.
        experts: of this rank.
        layer: for the clock.
    """

    def __init__(
        self, layout: StaticLayout, exchange: Exchange, experts: LocalExperts, layer: int
    ) -> None:
        self.layout = layout
        self._exchange, self._experts, self._layer = exchange, experts, layer

    def __call__(
        self,
        x_TD: torch.Tensor,
        instance_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        bucket: int,
        clock: PhaseClock,
        overlap: Callable[[], None] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sums of this rank's tokens [T, D], and the assignments of every instance over
        all ranks, int64 [I], this rank's instances first.

        Args:
            x_TD: rows in the model's dtype, T <= B.
            instance_TK: int64, of `StaticLayout.instances_of`; -1: no assignment.
            weights_TK: float32 combine weights.
            bucket: B, the same on every rank.
            clock: enters DISPATCH and COMBINE once each.
            overlap: work to do while the rows are gathered.

        Collective over EP: every rank must call, T may be 0.
        """
        layout, layer, exchange = self.layout, self._layer, self._exchange
        top_k, num_sums = instance_TK.shape[1], layout.num_results
        clock.enter(Phase.PLAN, layer)
        packed_BL = self._pack(x_TD, instance_TK, weights_TK, bucket)
        sent = exchange.collectives.bytes_sent
        pending = run_overlapped(
            lambda: exchange.gather(packed_BL), overlap, clock, layer, phase=Phase.DISPATCH
        )
        clock.sent(exchange.collectives.bytes_sent - sent)
        rows_NL = pending.wait()
        clock.enter(Phase.PLAN, layer)
        ids_at = x_TD.shape[1] * x_TD.element_size()
        instance_NK = _part(rows_NL, ids_at, top_k, torch.int64)
        key_NK = layout.key_I1[instance_NK]
        row_M, slot_NK, load_I = sort_by_expert(key_NK, layout.num_instances)
        load_e = load_I[: layout.num_local]
        places = num_rows = layout.rows_bound(bucket)
        if rows_NL.is_cpu:
            num_rows = int(load_e.sum())
        grouped_RD = x_TD.new_empty(places, x_TD.shape[1])
        plain_ND = rows_NL.view(x_TD.dtype)[:, : x_TD.shape[1]]
        gather_rows(plain_ND, row_M[:num_rows], grouped_RD[:num_rows])
        clock.enter(Phase.EXPERTS, layer, num_rows if rows_NL.is_cpu else 0)
        out_RD = self._experts.run_bounded(grouped_RD, load_e)
        if exchange.is_single_rank:
            clock.enter(Phase.PLAN, layer)
            return combine_rows(out_RD, slot_NK[: len(x_TD)], weights_TK), load_I
        if layout.sums:
            weights_at = ids_at + _ID_BYTES * top_k
            weights_NK = _part(rows_NL, weights_at, top_k, torch.float32)
            home_SD = self._sum(out_RD, slot_NK, key_NK, weights_NK)
        else:
            index_S = layout.local_slots(slot_NK, key_NK, places)
            home_SD = gather_rows(out_RD, index_S)
        parts = [bucket * num_sums] * layout.num_ranks
        rows = AllToAll(home_SD, torch.empty_like(home_SD), parts, parts)
        clock.enter_collective(Phase.COMBINE, layer, home_SD.shape[0])
        clock.sent(exchange.remote_bytes(rows))
        result_SD = exchange.start(rows).wait()
        clock.enter(Phase.PLAN, layer)
        if layout.sums:
            weights_TK = torch.ones_like(weights_TK)
        slot_TK = layout.home_slots(instance_TK, bucket)
        return combine_rows(result_SD, slot_TK, weights_TK), load_I

    def _pack(
        self, x_TD: torch.Tensor, instance_TK: torch.Tensor, weights_TK: torch.Tensor, bucket: int
    ) -> torch.Tensor:
        """Return this rank's packed rows, uint8 [B, L]; padding has no assignments and no row."""
        (num_tokens, width), top_k = x_TD.shape, instance_TK.shape[1]
        ids_at = width * x_TD.element_size()
        assert ids_at % _ID_BYTES == 0, "`serves` refuses it"
        assert num_tokens <= bucket, f"{num_tokens} tokens in a bucket of {bucket}"
        used = ids_at + (_ID_BYTES + _WEIGHT_BYTES * self.layout.sums) * top_k
        packed_BL = torch.empty(
            (bucket, -(-used // 16) * 16), dtype=torch.uint8, device=x_TD.device
        )
        packed_BL.view(x_TD.dtype)[:num_tokens, :width].copy_(x_TD)
        ids_BK = _part(packed_BL, ids_at, top_k, torch.int64)
        ids_BK[:num_tokens].copy_(instance_TK)
        if num_tokens < bucket:
            ids_BK[num_tokens:].fill_(-1)
        if self.layout.sums:
            weights_BK = _part(packed_BL, ids_at + _ID_BYTES * top_k, top_k, torch.float32)
            weights_BK[:num_tokens].copy_(weights_TK)
        return packed_BL

    def _sum(
        self,
        out_RD: torch.Tensor,
        slot_NK: torch.Tensor,
        key_NK: torch.Tensor,
        weights_NK: torch.Tensor,
    ) -> torch.Tensor:
        """Return the sum of each gathered token's results on this rank by weight, [N, D], in the
        order of its experts, which is that of its rows.
        """
        own_NK = slot_NK.masked_fill(key_NK >= self.layout.num_local, -1)
        own_NK, order_NK = own_NK.sort(dim=1)
        return combine_rows(out_RD, own_NK, weights_NK.gather(1, order_NK))


def serves(width: int, dtype: torch.dtype, payload: torch.dtype) -> bool:
    """Return whether rows of `width` numbers of `dtype` can be sent this way: in the model's dtype
    alone, and ids behind them at a multiple of 8 bytes.

    payload: of moe.dispatch.dtype.
    """
    return payload == dtype and width * dtype.itemsize % _ID_BYTES == 0


def _part(rows_L: torch.Tensor, offset: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return `count` numbers of every packed row from a byte on, as a view."""
    return rows_L[:, offset : offset + count * dtype.itemsize].view(dtype)
