"""Every setting of the engine: one frozen dataclass per section, checked as a whole.

`Config` checks itself when it is made, with the rules stated here and the walk of `validation.py`,
and reports all problems at once. YAML, `--set` and the search for config files are in `loader.py`.
What depends on the number of ranks and on the model is checked by `world_rules.py`, what this
machine lacks by `preflight.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Literal

from engine.config.validation import ConfigError, Rule, field_problems, rule


def _at_least(low: int) -> dict[str, Rule]:
    return rule(f"at least {low}", lambda value: value >= low)


def _positive_factor(value: str | float) -> bool:
    try:
        return Decimal(str(value)) > 0
    except InvalidOperation:  # not a number, or NaN, which Decimal refuses to compare
        return False


_POSITIVE = rule("finite and above 0", lambda value: 0 < value < float("inf"))
_SEED = rule("from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63)
_TEXT = rule("non-empty text", lambda value: value != "")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which checkpoint to run, and in which precision."""

    path: str = field(metadata=_TEXT)  # a local Hugging Face directory
    tokenizer: str | None = field(default=None, metadata=_TEXT)  # a directory; default: path
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: cpu float32,
    # cuda the checkpoint's own
    load_format: Literal["safetensors", "dummy"] = "safetensors"  # dummy: seeded random weights
    max_model_len: int | None = field(default=None, metadata=_at_least(1))  # prompt + new tokens;
    # default: the checkpoint's context length


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How ranks share the model: world = expert * replicas, and tensor divides expert."""

    expert: int | Literal["auto"] | None = field(  # ranks that share the experts; default: all
        # ranks; auto: as many as can, whatever number of ranks an elastic run has left
        default=None,
        metadata=rule("at least 1, or auto", lambda v: v == "auto" or v >= 1),
    )
    tensor: int = field(default=1, metadata=_at_least(1))  # ranks that share one attention layer


RequestPhase = Literal["prefill", "decode"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CapacityConfig:
    """How much work an expert may get, who decides, and what is dropped or added."""

    policy: Literal["none", "token_drop", "expanded_drop"] = "none"
    factor: str | float = field(  # capacity over mean load, kept as written; inf: no limit
        default="1.5", metadata=rule("a number above 0, or inf", _positive_factor)
    )
    scope: Literal["expert", "rank"] = "expert"  # one limit per expert, or one pool per rank
    consensus: Literal["global", "quota", "local"] = "global"  # who decides what is kept
    order: Literal["score", "first", "last", "random"] = "score"  # who is kept first
    expand: int | None = field(default=None, metadata=_at_least(0))  # extra local experts that a
    # token may add; default: all local experts
    tiers: Literal["two", "one"] = "two"  # two: extras only fill slots that top-k leaves free
    extras: Literal["all", "dropped"] = "all"  # which tokens may take free slots
    phases: tuple[RequestPhase, ...] = field(  # whose tokens are subject to capacity; both: all
        default=("prefill",),
        metadata=rule(
            "a list of phases, not empty and without repeats", lambda v: 0 < len(v) == len(set(v))
        ),
    )
    renormalize: bool = False  # rescale the kept weights of a token to their sum before dropping
    seed: int = field(default=0, metadata=_SEED)  # of order: random
    selection: Literal["auto", "gather", "radix"] = "auto"  # how consensus: global finds its cut;
    # the result is the same, auto takes what moves less
    speed_aware: bool = False  # a rank's share of the capacity follows its measured speed

    @property
    def exact_factor(self) -> Decimal:
        """Return the capacity factor as the decimal that was written, without binary rounding."""
        return Decimal(str(self.factor))


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsConfig:
    """What computes the experts."""

    backend: Literal["auto", "torch", "grouped_mm", "te"] = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchConfig:
    """How token rows are exchanged between the ranks."""

    deduplicate: bool = True  # a token whose experts share a rank sends its row there once
    partial_sums: bool = False  # and receives one row, summed there: results differ by rounding
    dtype: Literal["auto", "bf16", "fp8"] = "auto"  # of dispatched rows; auto: the compute's


@dataclass(frozen=True, kw_only=True, slots=True)
class OverlapConfig:
    """How communication overlaps with the experts' computation."""

    chunks: int | Literal["auto"] = field(  # rows are split into this many chunks: one is in flight
        # while another is computed; 1: no overlap; auto: 1, 2 or 4, measured as the job runs
        default=1,
        metadata=rule("at least 1, or auto", lambda v: v == "auto" or v >= 1),
    )
    by: Literal["auto", "experts", "tokens"] = "auto"  # what is split, a rank's experts or its
    # tokens; auto: experts where every rank has one for each chunk
    two_batch: bool = False  # large steps run as two micro-batches: attention of one while rows of
    # the other are in flight


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """The mixture-of-experts layers."""

    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """How much runs at once on one data rank."""

    max_batch_tokens: int = field(default=2048, metadata=_at_least(1))  # tokens of one step
    max_sequences: int = field(default=64, metadata=_at_least(1))  # sequences of one step
    block_size: int = field(  # tokens of one KV cache block
        default=16, metadata=rule("a power of two", lambda v: v > 0 and v & (v - 1) == 0)
    )
    kv_cache_gib: float | None = field(default=None, metadata=_POSITIVE)  # KV cache of one rank;
    # default: what max_sequences needs, within the memory that is free
    kv_cache_blocks: int | None = field(default=None, metadata=_at_least(1))  # the same, in blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How tokens are chosen and when they end; the defaults of every request.

    The one statement of these fields: `request.SamplingParams` inherits them. Applied in the order
    temperature, top_k, top_p.
    """

    max_new_tokens: int = field(default=128, metadata=_at_least(1))
    temperature: float = field(
        default=0.0,
        metadata=rule("finite and at least 0 (0: greedy)", lambda v: math.isfinite(v) and v >= 0),
    )
    top_p: float = field(  # sample from the smallest set of tokens with this much probability
        default=1.0, metadata=rule("above 0 and at most 1 (1: off)", lambda v: 0 < v <= 1)
    )
    top_k: int = field(  # sample from this many of the likeliest tokens
        default=0, metadata=rule("at least 0 (0: off)", lambda v: v >= 0)
    )
    seed: int = field(default=0, metadata=_SEED)
    stop: tuple[str, ...] = field(  # texts that end the completion
        default=(), metadata=rule("free of empty text", lambda v: "" not in v)
    )
    stop_token_ids: tuple[int, ...] = field(
        default=(),
        metadata=rule("free of negative numbers", lambda v: all(item >= 0 for item in v)),
    )
    ignore_eos: bool = False  # continue to max_new_tokens
    logprobs: bool = False  # report the log probability of every new token
    prompt_logprobs: bool = False  # report that of every prompt token


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfilerConfig:
    """What the profiler measures, and where it reports."""

    enabled: bool = True
    spans: str | None = None  # a folder, for the spans of every step of every rank
    spans_mib: float = field(default=64.0, metadata=_POSITIVE)  # limit of span files per rank; the
    # newest steps are kept
    metrics_port: int | None = field(  # rank 0 serves Prometheus' /metrics there; null: off
        default=None, metadata=rule("a port, 0 to 65535; 0: any free one", lambda v: 0 <= v < 65536)
    )
    metrics_host: str = field(  # the address it listens at
        default="127.0.0.1", metadata=rule("an address", bool)
    )
    deepspeed_comms: bool = False  # the report has the table of DeepSpeed's comms logger


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig:
    """Where the engine runs and how long it waits."""

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    timeout_s: float = field(default=120.0, metadata=_POSITIVE)  # of one collective
    drain_s: float = field(  # after SIGTERM, for running requests; torchrun kills after 30 s
        default=20.0, metadata=rule("finite and at least 0", lambda v: 0 <= v < float("inf"))
    )
    seed: int = field(default=0, metadata=_SEED)  # of dummy weights
    threads: int | None = field(default=None, metadata=_at_least(1))  # CPU threads per rank;
    # default: the host's cores / its ranks
    shared_memory: bool = True  # on the CPU, ranks of one host exchange in memory, not over gloo


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All settings; building one checks every rule and raises `ConfigError` with all problems."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    profiler: ProfilerConfig = field(default_factory=ProfilerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        # A rule between fields reads their values, so it is only checked once each field is valid.
        problems = list(field_problems(self)) or list(_combination_problems(self))
        if problems:
            raise ConfigError(*problems)


def _combination_problems(config: Config) -> Iterator[str]:
    parallel, capacity, scheduler = config.parallel, config.moe.capacity, config.scheduler
    if isinstance(parallel.expert, int) and parallel.expert % parallel.tensor:
        yield (
            f"parallel.tensor = {parallel.tensor}: must divide parallel.expert = {parallel.expert}"
        )
    if capacity.policy != "expanded_drop":
        default = CapacityConfig()
        for name in ("expand", "tiers", "extras"):
            if (value := getattr(capacity, name)) != getattr(default, name):
                yield (
                    f"moe.capacity.{name} = {value!r}: only moe.capacity.policy = expanded_drop "
                    f"uses it, and the policy is {capacity.policy}"
                )
    if capacity.tiers == "one" and capacity.extras == "dropped":
        yield (
            "moe.capacity.extras = 'dropped': must be all with moe.capacity.tiers = one, where "
            "extras compete before any assignment is dropped; use tiers = two"
        )
    if capacity.tiers == "one" and capacity.order != "score":
        yield (
            f"moe.capacity.order = {capacity.order!r}: must be score with moe.capacity.tiers = "
            "one, where top-k and extras compete by score"
        )
    if capacity.speed_aware and capacity.policy == "none":
        yield (
            "moe.capacity.speed_aware = True: distributes capacity over ranks, and "
            "moe.capacity.policy = none has none; use token_drop or expanded_drop"
        )
    if capacity.speed_aware and not config.profiler.enabled:
        yield (
            "moe.capacity.speed_aware = True: needs what the profiler measures; set "
            "profiler.enabled = true"
        )
    if config.profiler.deepspeed_comms and not config.profiler.enabled:
        yield (
            "profiler.deepspeed_comms = True: needs what the profiler measures; set "
            "profiler.enabled = true"
        )
    if config.moe.dispatch.partial_sums and not config.moe.dispatch.deduplicate:
        yield (
            "moe.dispatch.partial_sums = True: sums the rows that a token has on one rank, which "
            "needs moe.dispatch.deduplicate = true"
        )
    if config.moe.overlap.two_batch and capacity.policy != "none":
        yield (
            "moe.overlap.two_batch = True: the two micro-batches of a step cannot share one expert "
            f"capacity, and moe.capacity.policy is {capacity.policy}; use none, or "
            "moe.overlap.chunks instead"
        )
    if scheduler.kv_cache_gib is not None and scheduler.kv_cache_blocks is not None:
        yield (
            f"scheduler.kv_cache_blocks = {scheduler.kv_cache_blocks}: must be null when "
            f"scheduler.kv_cache_gib = {scheduler.kv_cache_gib} already sizes the cache"
        )
    if config.moe.experts.backend == "te" and config.runtime.device == "cpu":
        yield (
            "moe.experts.backend = 'te': needs runtime.device = cuda (Transformer Engine has no "
            "CPU kernels); use torch, grouped_mm or auto on a CPU"
        )
