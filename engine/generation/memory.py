"""Memory plan: the most rows an MoE layer may have to hold, and how many KV cache blocks fit.

Computed after the weights are loaded, from the memory that is free then. In the worst case all
tokens of the group choose experts of one rank, which then receives

    W * T * min(K, e)

rows. That hardly ever happens, and room for it would be taken from the KV cache for ever: so a rank
has room for twice what the mean rank receives, and more come in rounds (`moe/dispatch/rounds.py`):

    received = min(W * T * min(K, e), max(2 * T * K, 4 * W))

With a capacity factor gamma and all tokens subject to it, a rank receives at most what its experts
may keep, whatever the router does:

    received = e * C,  C = max(1, ceil(gamma * W * T * K / E))

8 ranks of 8,192 tokens, Mixtral (E = 8, K = 2, e = 1): 65,536 rows in the worst case, 32,768 at
once, and 24,576 at gamma = 1.5. A transport that leaves counts on the device has no rounds: without
a capacity policy its buffers are of the worst case.
`local` consensus rounds up once per rank: e * (W - 1) rows more. With moe.capacity.speed_aware a
fast rank gets up to twice that. Tokens of a phase without capacity add min(K, e) rows each. A rank
sends K rows per token and, with Expanded Drop, the extras of its own experts. From the rows:

    bytes = (sent + 2 * received) * D      the buffers of engine/moe/dispatch/buffers.py
          + received * 3 * F               gate, up and their product, where the backend stores them
          + received * D                   on CUDA, where the experts return a tensor of their own
          + sent * D                       where there may be rounds, whose results are collected

Recurrent states, a row per sequence that may run at once, come before the KV cache too: both are
allocated together, and a sequence needs its row whatever its length.

Copies of experts (moe.placement) take memory before the cache does: their weights are allocated
with the others, and what is free is read after them, so they need no term here. Low-bit experts,
homes or copies, are quantised row by row while they are read. e counts homes and copies. The report
has the bytes of every rank's copies (`ranks[].placement`).

Legend: T tokens per step and rank, W expert-parallel ranks, K top-k, E experts, e experts on this
rank, D model dim, F expert dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch

from engine.config import CapacityConfig, SchedulerConfig
from engine.distributed.collectives import gather_objects
from engine.distributed.groups import Group
from engine.generation.host_memory import free_memory
from engine.generation.scheduler import most_running
from engine.moe.capacity.speed_weights import MAX_WEIGHT, ONE

_GIB = 1 << 30
CUDA_SHARE = 0.92  # of the free device memory; the rest is for fragmentation and libraries
_CPU_SHARE = 0.25  # of what the host and its cgroups leave, divided by the host's ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEShape:
    """Shape of an MoE layer on this rank, for its worst case."""

    num_ranks: int  # W
    top_k: int  # K
    num_experts: int  # E
    num_local_experts: int  # e, with copies
    hidden: int  # D
    ffn: int  # F
    num_homes: int | None = None  # experts at home on the rank that has most; None: e
    has_copies: bool = False


@dataclass(frozen=True, slots=True)
class RowBound:
    """Upper bound on the rows that a rank sends and receives in one call of an MoE layer."""

    sent: int
    received: int
    has_rounds: bool = False  # whether more rows come, in rounds of `received`

    def join(self, other: RowBound) -> RowBound:
        """Return the bound of calls that keep either."""
        return RowBound(
            max(self.sent, other.sent),
            max(self.received, other.received),
            self.has_rounds or other.has_rounds,
        )

    def activation_bytes(self, shape: MoEShape, dtype: torch.dtype, *, is_cuda: bool) -> int:
        """Return the bytes of the row buffers and of the experts' inner activations."""
        rows = self.sent * (2 if self.has_rounds else 1) + self.received * (3 if is_cuda else 2)
        return (rows * shape.hidden + self.received * 3 * shape.ffn) * dtype.itemsize


def row_bound(
    shape: MoEShape,
    capacity: CapacityConfig,
    max_tokens: int,
    max_sequences: int,
    *,
    in_rounds: bool = True,
) -> RowBound:
    """Return the bound that the module's formulas give, the same on every rank of equal experts.

    Args:
        max_tokens: T.
        max_sequences: upper bound on the decode tokens per step and rank, which are not subject to
            capacity unless it covers their phase.
        in_rounds: whether more rows than twice the mean rank's come one part after the other, for
            which the host has to know the counts.
    """
    num_ranks, most = shape.num_ranks, min(shape.top_k, shape.num_local_experts)
    tokens = num_ranks * max_tokens
    dropless = RowBound(max_tokens * shape.top_k, tokens * most)
    if in_rounds:
        dropless = _in_rounds(dropless, shape, max_tokens)
    factor = capacity.exact_factor
    if capacity.policy == "none" or not factor.is_finite():
        return dropless
    share = Fraction(factor) * shape.top_k
    if share >= shape.num_experts:
        return dropless
    each = max(1, math.ceil(share * tokens / shape.num_experts))
    slots = (shape.num_homes or shape.num_local_experts) * each
    if shape.has_copies and capacity.scope == "rank":
        # Layers with copies share the slots of all experts equally, the others by their homes.
        slots = max(slots, -(-shape.num_experts * each // num_ranks))
    elif shape.has_copies:
        slots = max(slots, shape.num_local_experts * each)
    if capacity.consensus == "local":
        slots += shape.num_local_experts * (num_ranks - 1)
    if capacity.speed_aware:
        slots = slots * MAX_WEIGHT // ONE  # the rounded capacity of each rank is scaled by itself
    passing = 0
    if "prefill" not in capacity.phases:
        passing = tokens
    elif "decode" not in capacity.phases:
        passing = num_ranks * min(max_sequences, max_tokens)
    sent, limit = max_tokens * shape.top_k, tokens * most
    if capacity.policy == "expanded_drop":
        limit = tokens * shape.num_local_experts  # extras are of any token
        sent += min(slots, max_tokens * shape.num_local_experts)
    bound = RowBound(sent, min(limit, slots + passing * most))
    # Of the extras that a rank adds for its own experts the others do not know.
    if capacity.policy == "expanded_drop" or not in_rounds:
        return bound
    return _in_rounds(bound, shape, max_tokens)


def _in_rounds(bound: RowBound, shape: MoEShape, max_tokens: int) -> RowBound:
    """Return the bound with no more rows at once than twice those of the mean rank."""
    limit = max(2 * max_tokens * shape.top_k, 4 * shape.num_ranks)
    return bound if bound.received <= limit else RowBound(bound.sent, limit, has_rounds=True)


def num_kv_blocks(
    config: SchedulerConfig,
    *,
    bytes_per_block: int,
    max_model_len: int,
    reserve_bytes: int,
    device: torch.device,
    local_world_size: int,
    copy_bytes: int = 0,
    state_bytes: int = 0,
) -> int:
    """Return the number of KV cache blocks of this rank.

    By scheduler.kv_cache_blocks or scheduler.kv_cache_gib if set; otherwise what max_sequences
    sequences of `max_model_len` tokens need, within the free memory of the device less
    `reserve_bytes`. Recurrent states of all sequences that may run at once come first.

    Args:
        copy_bytes: memory that copies of experts have taken, named where none is left.
        state_bytes: of the recurrent states of one sequence.

    Raises:
        ValueError: when not even one block fits, or fewer than the settings ask for, or not the
            states.
    """
    if config.kv_cache_blocks is not None or config.kv_cache_gib is not None:
        total, sharers, limit = _all_bytes(device, local_world_size)
        place = _place(device, limit, sharers)
        share = total // sharers
        states = _check_states(config, state_bytes, bytes_per_block, share, place)
        if config.kv_cache_blocks is not None:
            blocks, setting = config.kv_cache_blocks, f"kv_cache_blocks: {config.kv_cache_blocks}"
        else:
            blocks = int(Fraction(config.kv_cache_gib or 0) * _GIB) // bytes_per_block
            setting = f"kv_cache_gib: {config.kv_cache_gib}"
        _check_fits(setting, blocks, bytes_per_block, share, states, place)
        if blocks < 1:
            raise ValueError(
                f"scheduler.kv_cache_gib: {config.kv_cache_gib} is less than one block of "
                f"{bytes_per_block} bytes; give at least {bytes_per_block / _GIB:.6f}"
            )
        return blocks
    wanted = config.max_sequences * -(-max_model_len // config.block_size)
    free, limit = _free_bytes(device, local_world_size)
    place, left = _place(device, limit), free - reserve_bytes
    left -= _check_states(config, state_bytes, bytes_per_block, left, place)
    fits = left // bytes_per_block
    if fits < 1:
        copies, fewer = "", ""
        if copy_bytes:
            copies = f", copies of experts have taken {copy_bytes / _GIB:.2f} GiB"
            fewer = "plan fewer copies or int4 ones for moe.placement, "
        raise ValueError(
            f"scheduler.kv_cache_gib: no memory is left for a KV cache on {place}: "
            f"{free / _GIB:.2f} GiB are free{copies} and {reserve_bytes / _GIB:.2f} GiB are kept "
            f"for the MoE layer's worst case; {fewer}lower scheduler.max_batch_tokens, use more "
            "ranks, or set scheduler.kv_cache_gib"
        )
    return min(wanted, fits)


def agree_kv_blocks(num_blocks: int, group: Group) -> int:
    """Return the KV cache blocks of every rank: as many as fit on the rank with the fewest.

    The ranks of a tensor group schedule each for itself and must decide alike, and a request that
    fits on one data rank must fit on all. Free memory differs from GPU to GPU.

    Args:
        num_blocks: that fit on this rank.
        group: all ranks of the run.

    Collective over `group`: every rank must call.
    """
    return min(gather_objects(num_blocks, group))


def _check_states(
    config: SchedulerConfig, state_bytes: int, bytes_per_block: int, free: int, place: str
) -> int:
    """Return the bytes of the recurrent states of all sequences that may run at once.

    Raises:
        ValueError: they leave no room for a block of the KV cache, which without them has some.
    """
    rows = most_running(config)
    states, most = rows * state_bytes, free - bytes_per_block
    if states and 0 <= most < states:
        most //= state_bytes
        advice = f"give at most {most}, or use more ranks" if most else "use more ranks"
        raise ValueError(
            f"scheduler.max_sequences: {config.max_sequences} does not fit: the recurrent states "
            f"of {rows} sequences would take {_gib(states)} GiB, and {free / _GIB:.2f} GiB are "
            f"free for them and the KV cache on {place}; {advice}"
        )
    return states


def _check_fits(
    setting: str, blocks: int, bytes_per_block: int, share: int, states: int, place: str
) -> None:
    """Raise ValueError where a number of blocks that a setting asks for exceeds this rank's share
    of what is free.
    """
    needed = blocks * bytes_per_block
    if needed <= share - states:
        return
    beside = f" beside {_gib(states)} GiB of recurrent states" if states else ""
    fits = max(0, share - states) // bytes_per_block
    most = fits if "blocks" in setting else f"{fits * bytes_per_block / _GIB:.2f}"
    raise ValueError(
        f"scheduler.{setting} does not fit: the KV cache would take {_gib(needed)} GiB{beside} and "
        f"{share / _GIB:.2f} GiB are free on {place}; give at most {most}, or null to use what is "
        "free"
    )


def _place(device: torch.device, limit: str, sharers: int = 1) -> str:
    each = f" for each of the {sharers} ranks here" if sharers > 1 else ""
    return f"{device}{each}" + (f" (limited by {limit})" if limit else "")


def _gib(num_bytes: int) -> str:
    gib = min(num_bytes, 10**300) / _GIB  # a setting may have 300 digits
    return f"{gib:.2f}" if gib < 1e6 else f"{gib:.2e}"


def _free_bytes(device: torch.device, local_world_size: int) -> tuple[int, str]:
    """Return the bytes that this rank may use for its KV cache and reserve, and the file of the
    cgroup that limits them, "" for none.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * CUDA_SHARE), ""
    free = free_memory()
    return int(free.num_bytes * _CPU_SHARE) // local_world_size, free.limit


def _all_bytes(device: torch.device, local_world_size: int) -> tuple[int, int, str]:
    """Return the bytes that are free, among how many ranks they are shared, and the limit's file as
    `_free_bytes` does. The memory of the host is shared: no rank has touched its cache yet.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], 1, ""
    free = free_memory()
    return free.num_bytes, local_world_size, free.limit
