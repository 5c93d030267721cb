"""Transformer Engine's expert parallelism on CPU tensors, over the group it is given: slow, strict.

Names, arguments and rules are those of `transformer_engine.pytorch.ep` of version 2.20.2 (wheel of
5 October 2026) with a fixed receive capacity and without zero copy; those of the library below it
are NCCL EP's (high throughput, rows by expert). Rows past the last are NaN here and unspecified
there. The order of rows within an expert is not documented, and here not that of the tokens.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch

from tests.helpers.fake_transport import ContractError, demand, gather

__all__ = ["ContractError", "EpBuffer", "ep_bootstrap", "ep_combine", "ep_dispatch"]

_MOST_TOP_K = 32
_ROW_ALIGNMENT = 16  # bytes
_made: dict[str, Any] = {}  # what ep_bootstrap was given; empty: not bootstrapped


def ep_bootstrap(
    ep_group: Any,
    num_experts: int,
    max_tokens_per_rank: int,
    hidden_dim: int,
    num_topk: int,
    recv_capacity_per_rank: int | None = None,
    max_num_sms: int = 0,
    zero_copy: bool = False,
    drop_on_overflow: bool = False,
    max_token_dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Start: once per process."""
    demand(not _made, "ep_bootstrap is called once in a process")
    demand(ep_group.size() >= 2, "a group of at least two ranks")
    demand(num_experts % ep_group.size() == 0, "as many experts on every rank")
    demand(1 <= num_topk <= _MOST_TOP_K, "1 to 32 experts per token")
    demand(hidden_dim * 2 % _ROW_ALIGNMENT == 0, "a row is a multiple of 16 bytes")
    assert recv_capacity_per_rank is not None and not zero_copy, "not emulated"
    enough = recv_capacity_per_rank >= max_tokens_per_rank > 0
    demand(enough, "the receive capacity is at least the tokens that a rank sends")
    _made.update(
        group=ep_group,
        num_experts=num_experts,
        max_tokens=max_tokens_per_rank,
        hidden=hidden_dim,
        top_k=num_topk,
        capacity=recv_capacity_per_rank,
        drops=drop_on_overflow,
    )


def is_ep_bootstrapped() -> bool:
    """Return whether `ep_bootstrap` was called."""
    return bool(_made)


def ep_finalize() -> None:
    """End; calls after the first do nothing."""
    _made.clear()


class EpBuffer:
    """What dispatch and combine of one layer share."""

    def __init__(
        self,
        top_k: int,
        max_tokens_per_rank: int,
        hidden_dim: int,
        num_local_experts: int,
        recv_capacity_per_rank: int | None = None,
        alignment: int = 0,
        payload_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | None = None,
    ) -> None:
        demand(bool(_made), "ep_bootstrap comes first")
        assert alignment <= 1 and payload_dtype == torch.bfloat16, "not emulated"
        local = _made["num_experts"] // _made["group"].size()
        given = (top_k, max_tokens_per_rank, hidden_dim, recv_capacity_per_rank, num_local_experts)
        agreed = (*(_made[key] for key in ("top_k", "max_tokens", "hidden", "capacity")), local)
        demand(given == agreed, "the sizes are those of ep_bootstrap")
        self.top_k, self.hidden_dim, self.max_tokens_per_rank = top_k, hidden_dim, agreed[1]
        self.recv_capacity_per_rank, self.num_local_experts = agreed[3], num_local_experts
        self.tokens_per_expert = torch.zeros(num_local_experts, dtype=torch.int64)
        self.total_recv_tokens = torch.zeros(1, dtype=torch.int64)
        self.origin: torch.Tensor | None = None  # rank and token of each row, until combined


def ep_dispatch(
    buffer: EpBuffer,
    tokens: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    recv_tokens: torch.Tensor | None = None,
    recv_topk_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the rows of this rank's experts, one after the other, their weights and counts."""
    demand(bool(_made), "ep_bootstrap comes first")
    demand(tokens.dtype == torch.bfloat16, "tokens are bfloat16")
    demand(topk_weights.dtype == torch.float32, "weights are float32")
    demand(topk_idx.dtype in (torch.int32, torch.int64), "ids are int32 or int64")
    shape = (tokens.shape[0], buffer.top_k)
    demand(topk_idx.shape == topk_weights.shape == shape, "ids and weights of every token")
    demand(tokens.shape[1] == buffer.hidden_dim, "rows have the hidden size")
    demand(0 < tokens.shape[0] <= buffer.max_tokens_per_rank, "1 to max_tokens_per_rank tokens")
    for each in (tokens, topk_idx, topk_weights):
        demand(each.is_contiguous(), "tensors are contiguous")
    demand(bool((topk_idx < _made["num_experts"]).all()), "ids are experts, or negative")
    chosen = topk_idx.sort(1).values
    distinct = (chosen[:, 1:] != chosen[:, :-1]) | (chosen[:, 1:] < 0)
    demand(bool(distinct.all()), "experts of a token differ")
    group, local = _made["group"], buffer.num_local_experts
    rank = group.rank()
    xs, ids, weights = (gather(group, part) for part in (tokens, topk_idx.long(), topk_weights))
    rows, scales, origins = [], [], []
    for expert in range(rank * local, (rank + 1) * local):
        before = len(rows)
        for source in reversed(range(group.size())):
            for token, k in (ids[source] == expert).nonzero().tolist():
                rows.append(xs[source][token])
                scales.append(weights[source][token, k])
                origins.append([source, token])
        buffer.tokens_per_expert[expert - rank * local] = len(rows) - before
    capacity = buffer.recv_capacity_per_rank
    buffer.total_recv_tokens[0] = len(rows)
    demand(len(rows) <= capacity, f"{len(rows)} rows where the receive capacity is {capacity}")
    if recv_tokens is None:
        recv_tokens = tokens.new_empty(capacity, buffer.hidden_dim)
    if recv_topk_weights is None:
        recv_topk_weights = topk_weights.new_empty(capacity)
    demand(recv_tokens.shape == (capacity, buffer.hidden_dim), "a place per row of the capacity")
    recv_tokens.fill_(torch.nan)
    recv_topk_weights.fill_(torch.nan)
    if rows:
        recv_tokens[: len(rows)] = torch.stack(rows)
        recv_topk_weights[: len(rows)] = torch.stack(scales)
    demand(buffer.origin is None, "a buffer is combined before it dispatches again")
    buffer.origin = torch.tensor(origins, dtype=torch.int64).view(-1, 2)
    return recv_tokens, recv_topk_weights, buffer.tokens_per_expert


def ep_combine(
    buffer: EpBuffer, expert_out: torch.Tensor, *, num_local_tokens: int | None = None
) -> torch.Tensor:
    """Return the sums of each token's rows, without weights, [num_local_tokens, hidden]."""
    demand(expert_out.dtype == torch.bfloat16, "results are bfloat16")
    shape = (buffer.recv_capacity_per_rank, buffer.hidden_dim)
    demand(expert_out.shape == shape and expert_out.is_contiguous(), "as many rows as received")
    demand(buffer.origin is not None, "dispatch comes first")
    assert buffer.origin is not None
    origin, buffer.origin = buffer.origin, None
    demand(not bool(expert_out[len(origin) :].any()), "rows past the last are zero")
    total = torch.zeros(num_local_tokens or buffer.max_tokens_per_rank, buffer.hidden_dim)
    group = _made["group"]
    parts = zip(gather(group, expert_out[: len(origin)]), gather(group, origin), strict=True)
    for made, where in parts:
        mine = where[:, 0] == group.rank()
        total.index_add_(0, where[mine, 1], made[mine].float())
    return total.to(expert_out.dtype)


def fake_modules() -> dict[str, ModuleType]:
    """Return what `import transformer_engine.pytorch.ep` is to find in sys.modules."""
    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.ep")
    package, torch_package, ep = modules = [ModuleType(name) for name in names]
    package.pytorch, torch_package.ep = torch_package, ep  # pyright: ignore[reportAttributeAccessIssue]
    package.__version__ = "2.20.2"  # pyright: ignore[reportAttributeAccessIssue]
    here = sys.modules[__name__]
    for name in ("EpBuffer", "ep_bootstrap", "is_ep_bootstrapped", "ep_finalize"):
        setattr(ep, name, getattr(here, name))
    ep.ep_dispatch, ep.ep_combine = ep_dispatch, ep_combine  # pyright: ignore[reportAttributeAccessIssue]
    return dict(zip(names, modules, strict=True))
