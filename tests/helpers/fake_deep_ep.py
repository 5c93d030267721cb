"""DeepEP's `Buffer` on CPU tensors, over the group it is given: slow, and refuses what it refuses.

Names, arguments and rules are those of `deep_ep.Buffer` of version 1.2.1 (16 September 2025), which
2.1.0 (2026) keeps beside its `ElasticBuffer`. Rows that no token fills are NaN here and unspecified
there, and what arrives at an expert in no order there is in another order than it was sent in. One
rule is stricter: a handle is combined once, in the order of the dispatches.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar

import torch

from tests.helpers.fake_transport import ContractError, demand, gather

__all__ = ["Buffer", "ContractError", "fake_module"]

RANKS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)  # that it has configurations for
HIDDEN = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)  # of the low-latency kernels
_PEERS = 8  # ranks that NVLink connects
_MOST_TOP_K = 11  # of the low-latency kernels
_MOST_LOCAL = 1024  # experts per rank
_QUEUE_DEPTH = 1024  # requests to another rank in flight; NVSHMEM_QP_DEPTH
_BUFFER_ALIGNMENT = 128
topk_idx_t = torch.int64


class Config:
    """How many SMs and rows a kernel of the throughput kind uses."""

    def __init__(self, num_sms: int, nvl_send: int, nvl_recv: int, rdma_send: int, rdma_recv: int):
        self.num_sms, self.nvl_recv, self.rdma_recv = num_sms, nvl_recv, rdma_recv
        self._sends = nvl_send, rdma_send

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Return the bytes for the ranks of one host."""
        nodes, peers = max(num_ranks // _PEERS, 1), min(num_ranks, _PEERS)
        cells = self.num_sms // 2 * peers
        row = hidden_bytes + 8 + 128 * (8 + 4 + 4)
        return _aligned(cells * ((2 * nodes + 3) * 4 + self.nvl_recv * row))

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Return the bytes for ranks of other hosts."""
        if num_ranks <= _PEERS:
            return 0
        demand(num_ranks % _PEERS == 0, "all hosts have 8 ranks")
        cells = self.num_sms // 2 * (num_ranks // _PEERS)
        row = hidden_bytes + 8 + 128 * (8 + 4 + 4) + 16
        return _aligned(2 * cells * ((2 * _PEERS + 2) * 4 + self.rdma_recv * row) + (1 << 20))


def _aligned(count: int) -> int:
    return -(-count // _BUFFER_ALIGNMENT) * _BUFFER_ALIGNMENT


class Handle:
    """What combine takes from dispatch; a tuple of tensors there."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts


class EventOverlap:
    """What a call returns that waits for nothing."""

    def current_stream_wait(self) -> None:
        """Do nothing: the call has ended."""


class Buffer:
    """Buffers of one rank, and the collectives that use them."""

    num_sms: int = 20
    made: ClassVar[list[Buffer]] = []

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
    ) -> None:
        self.group, self.rank, self.group_size = group, group.rank(), group.size()
        small = num_nvl_bytes % _BUFFER_ALIGNMENT == 0 == num_rdma_bytes % _BUFFER_ALIGNMENT
        demand(small, "sizes of buffers are multiples of 128 bytes")
        demand(self.group_size < _PEERS or self.group_size % _PEERS == 0, "hosts have 8 ranks")
        needs = self.group_size > _PEERS or low_latency_mode or not num_rdma_bytes
        demand(needs, "RDMA buffers are for several hosts or low latency")
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.num_qps_per_rank = low_latency_mode, num_qps_per_rank
        self.explicitly_destroy, self.alive = explicitly_destroy, True
        self._open: list[Handle] = []  # handles to combine
        self._is_clean = True
        Buffer.made.append(self)

    def destroy(self) -> None:
        """Free the buffers."""
        demand(self.explicitly_destroy, "explicitly_destroy was not set")
        self.alive = False

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """Return the configuration of dispatch."""
        demand(num_ranks in RANKS, f"no configuration for {num_ranks} ranks")
        return Config(Buffer.num_sms, 6, 256, 6, 128)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """Return the configuration of combine."""
        demand(num_ranks in RANKS, f"no configuration for {num_ranks} ranks")
        return Config(Buffer.num_sms, 4, 256, 6, 128)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Return the bytes of two buffers of rows sent and received."""
        most, scales = num_max_dispatch_tokens_per_rank, hidden // 128
        sent_row = 16 + max(2 * hidden, hidden + 4 * scales)
        combined_row = 4 * scales + 2 * hidden
        send = max(most * sent_row, num_experts * most * combined_row)
        recv = num_experts * most * max(sent_row, combined_row)
        signals = _aligned(8 * num_experts + 4 * (num_experts // num_ranks))
        return _aligned(2 * (send + recv + signals) + 1)

    def get_dispatch_layout(
        self, topk_idx: torch.Tensor, num_experts: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, EventOverlap]:
        """Return the tokens for each rank, host and expert, and which rank gets which."""
        self._check_ids(topk_idx, num_experts)
        expert_KE = torch.arange(num_experts)
        chosen = (topk_idx[:, :, None] == expert_KE).sum(1)
        in_rank = chosen.view(-1, self.group_size, num_experts // self.group_size).any(-1)
        hosts = None
        if self.group_size > _PEERS:
            hosts = in_rank.view(-1, self.group_size // _PEERS, _PEERS).any(-1).sum(0).int()
        return in_rank.sum(0).int(), hosts, chosen.sum(0).int(), in_rank, EventOverlap()

    def dispatch(
        self,
        x: torch.Tensor,
        *,
        num_tokens_per_rank: torch.Tensor,
        num_tokens_per_rdma_rank: torch.Tensor | None,
        is_token_in_rank: torch.Tensor,
        num_tokens_per_expert: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int], Handle, EventOverlap]:
        """Send each token to each rank that has one of its experts, once."""
        num_experts = num_tokens_per_expert.shape[0]
        self._check_rows(x, topk_idx, num_experts)
        demand(x.shape[1] * x.element_size() % 16 == 0, "a row is a multiple of 16 bytes")
        demand(topk_weights.dtype == torch.float32, "weights are float32")
        demand(topk_weights.shape == topk_idx.shape, "a weight per expert")
        demand(topk_weights.is_contiguous(), "weights are contiguous")
        layout = Buffer.get_dispatch_layout(self, topk_idx, num_experts)
        given = (
            num_tokens_per_rank,
            num_tokens_per_rdma_rank,
            num_tokens_per_expert,
            is_token_in_rank,
        )
        for name, made in zip(given, layout, strict=False):
            same = (name is None) == (made is None) and (made is None or torch.equal(name, made))  # pyright: ignore[reportArgumentType]
            demand(same, "the layout is that of these experts")
        demand(self.group_size <= _PEERS or not num_worst_tokens, "no worst number between hosts")
        row = x.shape[1] * x.element_size()
        config = self.get_dispatch_config(self.group_size)
        enough = config.get_nvl_buffer_size_hint(row, self.group_size) <= self.num_nvl_bytes
        demand(enough, "the NVLink buffer holds the rows in flight")
        demand(self.alive, "the buffers are there")
        self._is_clean = False
        local = num_experts // self.group_size
        first = self.rank * local
        xs, ids, weights = (gather(self.group, part) for part in (x, topk_idx, topk_weights))
        rows, places, scales, sources, origins = [], [], [], [], []
        for source, source_ids in enumerate(ids):
            mine = (source_ids >= first) & (source_ids < first + local)
            token = mine.any(1).nonzero()[:, 0]
            rows.append(xs[source][token])
            places.append((source_ids - first).where(mine, -1)[token])
            scales.append(weights[source].where(mine, 0.0)[token])
            sources.append(token.int())
            origins.append(torch.full_like(token, source))
        place = torch.cat(places)
        counts = [int((place == each).sum()) for each in range(local)]
        num = place.shape[0]
        size = num_worst_tokens or num
        demand(num <= size, f"{num} tokens arrive where num_worst_tokens is {size}")
        recv_x = _padded(torch.cat(rows), size, torch.nan)
        recv_ids, recv_weights = (
            _padded(place, size, -1),
            _padded(torch.cat(scales), size, torch.nan),
        )
        source = _padded(torch.cat(sources), size, -1)
        handle = Handle(num, torch.cat(origins), source, is_token_in_rank)
        self._open.append(handle)
        counts = [-(-count // expert_alignment) * expert_alignment for count in counts]
        listed = [] if num_worst_tokens else counts
        return recv_x, recv_ids, recv_weights, listed, handle, EventOverlap()

    def combine(self, x: torch.Tensor, handle: Handle) -> tuple[torch.Tensor, None, EventOverlap]:
        """Return the sum over ranks of what they made of each token, without weights."""
        self._close(handle)
        num, origin, source, in_rank = handle.parts
        demand(x.dtype == torch.bfloat16 and x.is_contiguous(), "rows are bfloat16, contiguous")
        demand(x.shape[0] == source.shape[0], "as many rows as were received")
        total = torch.zeros(in_rank.shape[0], x.shape[1])
        parts = [gather(self.group, part) for part in (x[:num], origin, source[:num])]
        for made, origins, sources in zip(*parts, strict=True):
            mine = origins == self.rank
            total.index_add_(0, sources[mine].long(), made[mine].float())
        return total.to(x.dtype), None, EventOverlap()

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Zero what low latency counts with."""
        self._is_clean = True

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        use_fp8: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, Handle, EventOverlap, None]:
        """Send each token to each of its experts: [local experts, most tokens * ranks, hidden]."""
        demand(not use_fp8, "not emulated")
        self._check_rows(x, topk_idx, num_experts)
        most, hidden = num_max_dispatch_tokens_per_rank, x.shape[1]
        demand(self.low_latency_mode, "low_latency_mode is set")
        demand(self._is_clean, "the buffer is cleaned after kernels of the other kind")
        demand(hidden in HIDDEN, f"no kernel for a hidden size of {hidden}")
        demand(topk_idx.shape[1] <= _MOST_TOP_K, "at most 11 experts per token")
        demand(x.shape[0] <= most, f"{x.shape[0]} tokens where at most {most} are dispatched")
        demand(2 * (most + 1) <= _QUEUE_DEPTH, "queues hold the requests of all tokens")
        need = self.get_low_latency_rdma_size_hint(most, hidden, self.group_size, num_experts)
        demand(need <= self.num_rdma_bytes, "the RDMA buffer holds the rows")
        local = num_experts // self.group_size
        recv = x.new_full((local, most * self.group_size, hidden), torch.nan)
        count = torch.zeros(local, dtype=torch.int32)
        origin = torch.full((*recv.shape[:2], 3), -1)
        xs, ids = gather(self.group, x), gather(self.group, topk_idx)
        for source in reversed(range(self.group_size)):
            for token, k in reversed((ids[source] // local == self.rank).nonzero().tolist()):
                if ids[source][token, k] < 0:
                    continue
                expert = int(ids[source][token, k]) % local
                recv[expert, count[expert]] = xs[source][token]
                origin[expert, count[expert]] = torch.tensor([source, token, k])
                count[expert] += 1
        handle = Handle(count.clone(), origin, most, hidden, num_experts)
        self._open.append(handle)
        demand(len(self._open) <= 2, "two buffers: at most two results are held")
        return recv, count, handle, EventOverlap(), None

    def low_latency_combine(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, handle: Handle
    ) -> tuple[torch.Tensor, EventOverlap, None]:
        """Return the weighted sum of each token's results, k = 0 .. K - 1, on its own rank."""
        self._close(handle)
        count, origin, most, hidden, num_experts = handle.parts
        local = num_experts // self.group_size
        demand(x.shape == (local, most * self.group_size, hidden), "a place per row of dispatch")
        demand(x.dtype == torch.bfloat16 and x.is_contiguous(), "rows are bfloat16, contiguous")
        demand(topk_weights.dtype == torch.float32, "weights are float32")
        self._check_ids(topk_idx, num_experts)
        is_row = torch.arange(x.shape[1]) < count[:, None]
        term = x.new_zeros(*topk_idx.shape, hidden)
        for made, where in zip(
            gather(self.group, x[is_row]), gather(self.group, origin[is_row]), strict=True
        ):
            mine = where[:, 0] == self.rank
            term[where[mine, 1], where[mine, 2]] = made[mine]
        total = torch.zeros(topk_idx.shape[0], hidden)
        for k in range(topk_idx.shape[1]):
            total += term[:, k].float() * topk_weights[:, k, None].where(
                topk_idx[:, k, None] >= 0, 0
            )
        return total.to(x.dtype), EventOverlap(), None

    def _close(self, handle: Handle) -> None:
        demand(self.alive, "the buffers are there")
        first = bool(self._open) and self._open.pop(0) is handle
        demand(first, "handles are combined once, in the order of their dispatches")

    def _check_ids(self, topk_idx: torch.Tensor, num_experts: int) -> None:
        demand(topk_idx.dtype == topk_idx_t, "ids are int64")
        demand(topk_idx.dim() == 2 and topk_idx.is_contiguous(), "ids are [tokens, top-k]")
        demand(num_experts % self.group_size == 0, "as many experts on every rank")
        demand(num_experts // self.group_size <= _MOST_LOCAL, "at most 1024 experts per rank")
        inside = bool(((topk_idx >= -1) & (topk_idx < num_experts)).all())
        demand(inside, "ids are experts, or -1")

    def _check_rows(self, x: torch.Tensor, topk_idx: torch.Tensor, num_experts: int) -> None:
        self._check_ids(topk_idx, num_experts)
        demand(x.dtype == torch.bfloat16, "rows are bfloat16")
        demand(x.dim() == 2 and x.is_contiguous(), "rows are contiguous")
        demand(x.shape[0] == topk_idx.shape[0], "ids of every token")


def _padded(rows: torch.Tensor, size: int, value: float) -> torch.Tensor:
    full = rows.new_full((size, *rows.shape[1:]), value)
    full[: rows.shape[0]] = rows
    return full


def fake_module() -> ModuleType:
    """Return what `import deep_ep` is to find in sys.modules."""
    module = ModuleType("deep_ep")
    for name, value in {
        "__version__": "1.2.1",
        "Buffer": Buffer,
        "Config": Config,
        "EventOverlap": EventOverlap,
        "topk_idx_t": topk_idx_t,
    }.items():
        setattr(module, name, value)
    return module
