"""How much runs at once, where and how long: the sections `scheduler` and `runtime`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.config.rules import COUNT, GIB, SEED, at_least
from engine.config.validation import rule

# Longer waits overflow the milliseconds that torch's store and gloo count in 32 bits.
_WEEK_S = 7 * 24 * 3600


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """How much runs at once on one data rank."""

    max_batch_tokens: int = field(default=2048, metadata=COUNT)  # most tokens of one step
    max_sequences: int = field(default=64, metadata=COUNT)  # most sequences of one step
    block_size: int = field(  # tokens of one KV cache block
        default=16,
        metadata=rule(
            "a power of two, at most 2**20", lambda v: 0 < v <= 2**20 and v & (v - 1) == 0
        ),
    )
    kv_cache_gib: float | None = field(default=None, metadata=GIB)  # size of one rank's
    # KV cache; null: what max_sequences needs, within the memory that is free
    kv_cache_blocks: int | None = field(default=None, metadata=COUNT)  # size of one rank's
    # KV cache in blocks, instead of kv_cache_gib
    kv_dtype: Literal["auto", "fp8"] = "auto"  # of keys and values in the cache; fp8: float8 E4M3,
    # numbers stored as they are (scale 1), those beyond 448 as 448; auto: as the model computes
    async_scheduling: Literal["auto", "on", "off"] = "auto"  # schedule a step while the one before
    # it runs, whose tokens are then read one step late. on: unless parallel.tensor, a capacity
    # policy, low-bit copies or moe.copies.replan need them at once; auto: on CUDA, not on the CPU
    prefix_cache: bool | Literal["auto"] = "auto"  # run the common prefix of several requests once;
    # a request with prompt_logprobs runs whole; auto: on, off for models with recurrent states


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig:
    """Where the engine runs and how long it waits."""

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    timeout_s: float = field(  # time in which a collective must end, and all ranks after one has
        # failed
        default=120.0,
        metadata=rule(
            f"finite and above 0: from 0.1 to {_WEEK_S}, a week", lambda v: 0.1 <= v <= _WEEK_S
        ),
    )
    drain_s: float = field(  # time after SIGTERM for running requests to finish; torchrun kills
        # after 30 s
        default=20.0,
        metadata=rule(
            f"finite and at least 0, at most {_WEEK_S}, a week", lambda v: 0 <= v <= _WEEK_S
        ),
    )
    seed: int = field(default=0, metadata=SEED)  # of dummy weights
    threads: int | None = field(default=None, metadata=at_least(1, 1024))  # CPU threads per rank;
    # null: the host's cores / its ranks
    shared_memory: bool = True  # ranks of one host exchange data of the host in shared memory and
    # not over gloo: on the CPU all data, on CUDA the control messages
    graphs: Literal["auto", "off"] = "auto"  # auto: on CUDA decode steps are replayed as CUDA
    # graphs, where moe.dispatch.exchange may be static and nothing else keeps them from it
    numa: Literal["auto", "off"] = "auto"  # auto: on CUDA a rank runs on the CPU cores next to its
    # GPU, unless the launcher has bound the ranks of its host to different cores
