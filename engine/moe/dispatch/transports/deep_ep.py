"""DeepEP: rows by `deep_ep.Buffer`, whose kernels send each token to a rank once.

Two kinds of kernels, by how many tokens the rank that has most brings (`Outgoing.most_tokens`):

    throughput    a token's row once per rank, with its experts and weights. Here it is sorted by
                  expert; the rank sums its results by weight, in the order of its experts, and the
                  library adds up the ranks' sums on the way home: moe.dispatch.partial_sums, but
                  for the order in which ranks are added
    low latency   where all ranks have agreed on few tokens: a row per expert, in blocks of one
                  length (`expert_blocks.py`). The token's own rank sums its results by weight,
                  k = 0 .. K - 1, in float32

Throughput kernels receive into a buffer of as many tokens as can arrive: without a capacity policy
all tokens of all ranks, with one at most as many as the ranks' experts have places.

API of version 1.2.1 (September 2025), which 2.1.0 has too, beside another of its own: docs/
decisions.md. Never executed on a GPU.

Legend: T tokens, K top-k, D model dim, N tokens received, R places of rows by expert, e experts of
this rank, B rows of a block.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from engine.moe.dispatch.transports.deep_ep_library import load, obstacle
from engine.moe.dispatch.transports.expert_blocks import (
    equal_ids,
    places_of_rows,
    rows_of_places,
)
from engine.moe.dispatch.transports.transport import (
    Arrived,
    Arriving,
    Limits,
    Outgoing,
    Ready,
    Returned,
    Setup,
)
from engine.ops.permute import combine_rows, gather_rows
from engine.ops.sort_by_expert import sort_by_expert

__all__ = ["DeepEP", "make", "obstacle"]

logger = logging.getLogger(__name__)

# Hidden sizes that the low-latency kernels are built for, and the experts per token that all
# versions take.
LOW_LATENCY_WIDTHS = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)
LOW_LATENCY_TOP_K = 9
LOW_LATENCY_TOKENS = 256  # per rank; the library recommends no more


def make(setup: Setup) -> DeepEP:
    """Return the transport of layers with one setup."""
    return DeepEP(setup, load())


@dataclass(frozen=True, slots=True)
class _Throughput:
    """What combine needs of a dispatch by the throughput kernels."""

    handle: Any  # the library's
    slot_NK: torch.Tensor  # place of each received token's k-th result; -1: not of this rank
    weights_NK: torch.Tensor


@dataclass(frozen=True, slots=True)
class _LowLatency:
    """What combine needs of a dispatch by the low-latency kernels."""

    handle: Any
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    load_e: torch.Tensor


class DeepEP:
    """Rows by DeepEP; see `DeviceTransport`.

    Args:
        setup: of the layers.
        library: what `load` returns.
    """

    name = "deepep"
    sums = True

    def __init__(self, setup: Setup, library: Any) -> None:
        self._setup, self._library = setup, library
        self._num_experts = setup.group.size * setup.most_local
        self._ids_E1 = equal_ids(setup.first_experts, setup.device)
        self._limits: Limits | None = None
        self._buffer: Any = None
        self._low_tokens = 0  # most tokens of a rank in a call of low latency; 0: no such calls
        self._is_clean = True  # whether low latency may follow

    def reserve(self, limits: Limits) -> int:
        """Allocate the library's buffers, and return their bytes with those of what is received."""
        setup, held = self._setup, self._limits
        limits = limits.join(held)
        if limits != held:
            self.close()
            self._limits = limits
            low = setup.width in LOW_LATENCY_WIDTHS and setup.top_k <= LOW_LATENCY_TOP_K
            self._low_tokens = min(LOW_LATENCY_TOKENS, limits.tokens) if low else 0
            self._open()
            most_places = max(self._num_places, self._low_places, self._block, limits.tokens)
            self._place_R = torch.arange(most_places, device=setup.device)
            self._one_T1 = torch.ones(limits.tokens, 1, device=setup.device)
            self._log()
        return self._buffer_bytes + self._received_bytes(self._num_tokens, self._num_places)

    def close(self) -> None:
        """Free the library's buffers. Collective over the group: every rank must call."""
        if self._buffer is not None:
            self._buffer.destroy()
        self._buffer = self._limits = None

    def dispatch(self, outgoing: Outgoing) -> Arriving:
        """See `DeviceTransport`."""
        assert self._limits is not None, "`reserve` comes first"
        ids_TK, most = outgoing.ids_TK, outgoing.most_tokens
        if self._ids_E1 is not None:
            ids_TK = self._ids_E1[ids_TK]
        if most is not None and most <= self._low_tokens:
            return Ready(self._dispatch_low(outgoing, ids_TK))
        return Ready(self._dispatch(outgoing, ids_TK))

    def combine(self, arrived: Arrived, out_RD: torch.Tensor) -> Returned:
        """See `DeviceTransport`."""
        sent = arrived.handle
        if isinstance(sent, _LowLatency):
            block_eBD = self._blocks(out_RD, sent.load_e)
            sums_TD, _, _ = self._buffer.low_latency_combine(
                block_eBD, sent.ids_TK, sent.weights_TK, sent.handle
            )
        else:
            assert isinstance(sent, _Throughput)
            # In the order of its experts, which is that of its places.
            slot_NK, order_NK = sent.slot_NK.sort(dim=1)
            part_ND = combine_rows(out_RD, slot_NK, sent.weights_NK.gather(1, order_NK))
            sums_TD, _, _ = self._buffer.combine(part_ND, sent.handle)
        num_tokens = sums_TD.shape[0]
        return Returned(sums_TD, self._place_R[:num_tokens, None], self._one_T1[:num_tokens])

    def _dispatch(self, outgoing: Outgoing, ids_TK: torch.Tensor) -> Arrived:
        """Send by the throughput kernels, and sort what comes by expert."""
        ids_TK, buffer = ids_TK.contiguous(), self._buffer
        num_tokens, num_places = self._num_tokens, self._num_places
        if (most := outgoing.most_received) is not None:
            num_tokens, num_places = min(num_tokens, most), min(num_places, most)
        per_rank, per_host, per_expert, in_rank, _ = buffer.get_dispatch_layout(
            ids_TK, self._num_experts
        )
        recv_ND, local_NK, weights_NK, _, handle, _ = buffer.dispatch(
            outgoing.x_TD,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_host,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=ids_TK,
            topk_weights=outgoing.weights_TK.contiguous(),
            num_worst_tokens=max(num_tokens, 1),  # 0: the host would wait
        )
        self._is_clean = False
        row_M, slot_NK, load_e = sort_by_expert(local_NK, self._setup.most_local)
        rows_RD = gather_rows(recv_ND, row_M[: max(num_places, 1)])
        load_e = load_e[: self._setup.num_local]
        sent = _Throughput(handle, slot_NK, weights_NK)
        return Arrived(rows_RD=rows_RD, load_e=load_e, places_e=load_e, handle=sent)

    def _dispatch_low(self, outgoing: Outgoing, ids_TK: torch.Tensor) -> Arrived:
        """Send by the low-latency kernels, and close the gaps between the experts' rows."""
        ids_TK, setup = ids_TK.contiguous(), self._setup
        if not self._is_clean:
            self._buffer.clean_low_latency_buffer(self._low_tokens, setup.width, self._num_experts)
            self._is_clean = True
        block_eBD, count_e, handle, _, _ = self._buffer.low_latency_dispatch(
            outgoing.x_TD, ids_TK, self._low_tokens, self._num_experts, use_fp8=False
        )
        load_e, num_places = count_e.long(), self._low_places
        if outgoing.most_received is not None:
            num_places = max(min(num_places, outgoing.most_received), 1)
        rows_RD = block_eBD[0, :num_places]
        if block_eBD.shape[0] > 1:
            place_R = self._place_R[:num_places]
            rows_RD = gather_rows(
                block_eBD.flatten(0, 1), rows_of_places(load_e, self._block, place_R)
            )
        sent = _LowLatency(handle, ids_TK, outgoing.weights_TK.contiguous(), load_e)
        load_e = load_e[: setup.num_local]
        return Arrived(rows_RD=rows_RD, load_e=load_e, places_e=load_e, handle=sent)

    def _blocks(self, out_RD: torch.Tensor, load_e: torch.Tensor) -> torch.Tensor:
        """Return results in the blocks that low latency takes, [e, B, D]."""
        if load_e.shape[0] == 1 and out_RD.shape[0] == self._block:
            return out_RD.contiguous()[None]
        slot_B = self._place_R[: self._block]
        index = places_of_rows(load_e, slot_B, out_RD.shape[0])
        return gather_rows(out_RD, index).unflatten(0, (load_e.shape[0], self._block))

    @property
    def _block(self) -> int:
        """B: rows of all ranks for one expert."""
        return self._low_tokens * self._setup.group.size

    @property
    def _num_tokens(self) -> int:
        """The most tokens that a rank receives: each has a row for one of its experts at least."""
        assert self._limits is not None
        return min(self._setup.group.size * self._limits.tokens, self._limits.received)

    @property
    def _num_places(self) -> int:
        """R of the throughput kernels."""
        assert self._limits is not None
        setup = self._setup
        return min(self._limits.received, self._num_tokens * min(setup.top_k, setup.most_local))

    @property
    def _low_places(self) -> int:
        """R of low latency, whose calls have no competition for capacity."""
        setup = self._setup
        return self._block * min(setup.top_k, setup.most_local)

    def _received_bytes(self, num_tokens: int, num_places: int) -> int:
        """Return the bytes of what the throughput kernels deliver, and of the rows by expert."""
        row = self._setup.width * self._setup.dtype.itemsize
        return num_tokens * (row + self._setup.top_k * (8 + 4)) + num_places * row

    def _open(self) -> None:
        """Make the library's buffers."""
        setup, kind = self._setup, self._library.Buffer
        size, row = setup.group.size, setup.width * setup.dtype.itemsize
        nvlink = max(
            config.get_nvl_buffer_size_hint(row, size)
            for config in (kind.get_dispatch_config(size), kind.get_combine_config(size))
        )
        rdma = 0
        if self._low_tokens:
            rdma = kind.get_low_latency_rdma_size_hint(
                self._low_tokens, setup.width, size, self._num_experts
            )
        self._buffer_bytes = nvlink + rdma
        try:
            self._buffer = kind(
                setup.group.handle,
                nvlink,
                rdma,
                low_latency_mode=rdma > 0,
                num_qps_per_rank=setup.most_local,  # one per expert is its rule for low latency
                explicitly_destroy=True,
            )
        except (RuntimeError, AssertionError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"moe.dispatch.transport = 'deepep': DeepEP cannot start here: {reason}; its ranks "
                "need NVLink between all GPUs, and low latency NVSHMEM with IBGDA; set "
                "moe.dispatch.transport to auto"
            ) from error
        self._is_clean = True

    def _log(self) -> None:
        setup, limits = self._setup, self._limits
        assert limits is not None
        if setup.group.rank:
            return
        tokens = setup.group.size * limits.tokens
        all_places = tokens * min(setup.top_k, setup.most_local)
        logger.info(
            "moe.dispatch.transport = deepep: %.1f MiB of buffers and %.1f MiB for at most %d "
            "tokens in %d rows received; all tokens of all ranks would be %d in %d rows, %.1f MiB",
            self._buffer_bytes / 2**20,
            self._received_bytes(self._num_tokens, self._num_places) / 2**20,
            self._num_tokens,
            self._num_places,
            tokens,
            all_places,
            self._received_bytes(tokens, all_places) / 2**20,
        )
