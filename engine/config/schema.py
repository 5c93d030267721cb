"""Every setting of the engine: one frozen dataclass per section, checked as a whole.

`Config` checks itself when it is made, so no wrong one exists; all problems are reported at once.
Larger sections are in `moe.py`, `attention.py`, `sampling.py`, `profiler.py` and `runtime.py`.
`loader.py` has YAML, `--set` and the search for config files. What depends on the number of ranks
is checked by `validate_world`, what depends on the model by `validate_capacity`, what this machine
lacks by `preflight.py`.

The comment behind a field is its line in docs/configuration.md (`tools/config_docs.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

from engine.config.attention import AttentionConfig
from engine.config.moe import CONTIGUOUS, CapacityConfig, MoEConfig
from engine.config.profiler import ProfilerConfig
from engine.config.rules import COUNT, TEXT
from engine.config.runtime import RuntimeConfig, SchedulerConfig
from engine.config.sampling import SamplingConfig
from engine.config.validation import ConfigError, field_problems, rule, type_hints

_NUMBER_OR_AUTO = rule("at least 1, or auto", lambda value: value == "auto" or value >= 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which checkpoint to run, and in which precision."""

    path: str = field(metadata=TEXT)  # a local Hugging Face checkpoint directory
    tokenizer: str | None = field(default=None, metadata=TEXT)  # a directory with a tokenizer;
    # null: the one in path
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of weights and activations;
    # bfloat16 on the CPU: of weight matrices, all else is float32; auto: on the CPU float32, or
    # bfloat16 where the checkpoint is and the processor multiplies it; the checkpoint's own on CUDA
    quantization: Literal["auto", "keep", "dequantize", "int8", "int4", "fp8"] = "auto"  # how
    # weights are held; dequantize: in dtype; int8, int4, fp8: experts rounded anew, the rest in
    # dtype; keep: experts as the checkpoint stores them (integers, FP8, MXFP4); auto: keep where
    # compiled kernels compute on them (CUDA; the CPU on integers), else dequantize
    implementation: Literal["auto", "lockstep", "transformers"] = "auto"  # who builds the decoder;
    # transformers: its modules, on this engine's cache, dispatch and experts; auto: lockstep where
    # it has the model's family, else transformers
    load_format: Literal["safetensors", "dummy"] = "safetensors"  # where weights come from;
    # dummy: seeded random numbers
    max_model_len: int | None = field(default=None, metadata=COUNT)  # prompt and new tokens
    # of one sequence; null: the checkpoint's context length


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How ranks share the model: world = expert * replicas, and tensor divides expert."""

    expert: int | Literal["auto"] | None = field(default=None, metadata=_NUMBER_OR_AUTO)  # ranks
    # per copy of the experts; null: all ranks; auto: as many as the number of ranks allows, also
    # after an elastic restart
    tensor: int = field(default=1, metadata=COUNT)  # ranks per attention layer


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """How a batch job reads and writes its files."""

    format: Literal["auto", "openai", "lockstep"] = "auto"  # of the records; openai: OpenAI's, and
    # errors go to a file of their own; lockstep: our own, all in one file; auto: that of the
    # input's first line


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All settings; building one checks every rule and raises `ConfigError` with all problems."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    profiler: ProfilerConfig = field(default_factory=ProfilerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        # A rule between fields reads their values, so it is only checked once each field is valid.
        problems = list(field_problems(self)) or list(_combination_problems(self))
        if problems:
            raise ConfigError(*problems)


def _combination_problems(config: Config) -> Iterator[str]:
    parallel, capacity, scheduler = config.parallel, config.moe.capacity, config.scheduler
    sampling = config.sampling
    for asked, top in (
        ("logprobs", sampling.top_logprobs),
        ("prompt_logprobs", sampling.prompt_top_logprobs),
    ):
        if top and not getattr(sampling, asked):
            name = asked.replace("logprobs", "top_logprobs")
            yield f"sampling.{name} = {top}: needs sampling.{asked} = true"
    if sampling.min_tokens > sampling.max_new_tokens:
        yield (
            f"sampling.min_tokens = {sampling.min_tokens}: must be at most "
            f"sampling.max_new_tokens = {sampling.max_new_tokens}"
        )
    if isinstance(parallel.expert, int) and parallel.expert % parallel.tensor:
        yield (
            f"parallel.tensor = {parallel.tensor}: must divide parallel.expert = {parallel.expert}"
        )
    if config.moe.policy in get_args(type_hints(CapacityConfig)["policy"]):
        yield (
            f"moe.policy = {config.moe.policy!r}: must be the path of a policy file; did you mean "
            "moe.capacity.policy?"
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
    if config.profiler.routing_claims and config.profiler.routing is None:
        yield (
            "profiler.routing_claims = True: needs the folder of a recording; set profiler.routing"
        )
    if config.moe.dispatch.partial_sums and not config.moe.dispatch.deduplicate:
        yield (
            "moe.dispatch.partial_sums = True: sums the rows that a token has on one rank, which "
            "needs moe.dispatch.deduplicate = true"
        )
    if config.moe.shared_expert == "balanced":
        if not config.moe.dispatch.partial_sums:
            yield (
                "moe.shared_expert = 'balanced': adds the shared expert to the sums that ranks "
                "return, which needs moe.dispatch.partial_sums = true"
            )
        if capacity.policy == "expanded_drop":
            yield (
                "moe.shared_expert = 'balanced': moe.capacity.policy = expanded_drop adds rows of "
                "which other ranks do not know; use replicated, or token_drop"
            )
    if config.moe.overlap.two_batch and capacity.policy != "none":
        yield (
            "moe.overlap.two_batch = True: the two micro-batches of a step cannot share one expert "
            f"capacity, and moe.capacity.policy is {capacity.policy}; use none, or "
            "moe.overlap.chunks instead"
        )
    placed = config.moe.placement != CONTIGUOUS or config.moe.policy is not None
    if config.moe.copies.replan != "off" and not placed:
        yield (
            f"moe.copies.replan = {config.moe.copies.replan}: changes the copies of a placement, "
            "and moe.placement is contiguous; name a file with copies, or set replan to off"
        )
    if config.moe.copies.replan != "off" and config.profiler.spans is not None:
        yield (
            f"moe.copies.replan = {config.moe.copies.replan}: span files name the experts of a "
            "rank once, so profiler.spans must be null; record profiler.routing instead"
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
    if config.attention.backend in ("flashinfer", "varlen") and config.runtime.device == "cpu":
        yield (
            f"attention.backend = {config.attention.backend!r}: needs runtime.device = cuda (it "
            "has no CPU kernels); use triton or auto on a CPU, which take the compiled CPU kernels"
        )
    if config.moe.experts.backend == "scaled_mm" and config.runtime.device == "cpu":
        yield (
            "moe.experts.backend = 'scaled_mm': needs runtime.device = cuda (torch's FP8 grouped "
            "product has no CPU kernel); use auto on a CPU"
        )
    if config.moe.experts.backend == "deep_gemm" and config.runtime.device == "cpu":
        yield (
            "moe.experts.backend = 'deep_gemm': needs runtime.device = cuda (DeepGEMM has no CPU "
            "kernels); use auto on a CPU"
        )
