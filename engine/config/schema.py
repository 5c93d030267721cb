"""Every setting of the engine: one frozen dataclass per section, checked as a whole.

`Config` checks itself when it is made, so no wrong one exists; all problems are reported at once.
`loader.py` has YAML, `--set` and the search for config files. What depends on the number of ranks
is checked by `validate_world`, what depends on the model by `validate_capacity`, what this machine
lacks by `preflight.py`.

The comment behind a field is its line in docs/configuration.md (`tools/config_docs.py`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Literal

from engine.config.validation import ConfigError, Rule, field_problems, rule

CONTIGUOUS = "contiguous"  # of moe.placement: no file

_MOST = 2**31 - 1  # of what is counted or indexed in 32 bits
_MOST_DIGITS = 100  # of a capacity factor, before and behind the point
# Longer waits overflow the milliseconds that torch's store and gloo count in 32 bits.
_WEEK_S = 7 * 24 * 3600


def _at_least(low: int, high: int | None = None) -> dict[str, Rule]:
    text = f"at least {low}" + ("" if high is None else f" and at most {high}")
    return rule(text, lambda value: value >= low and (high is None or value <= high))


def _is_factor(value: str | float) -> bool:
    try:
        number = Decimal(str(value))
    except InvalidOperation:  # not a number
        return False
    if not number.is_finite():
        return number.is_infinite() and not number.is_signed()
    # Exact arithmetic with 1e999999 would take for ever.
    exponent = int(number.as_tuple().exponent)
    return number > 0 and exponent >= -_MOST_DIGITS and number.adjusted() < _MOST_DIGITS


def _is_path(value: str) -> bool:
    try:
        return value != "" and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _is_address(value: str) -> bool:
    return value != "" and value.isprintable() and not set(value) & set(" /")


def _positive(high: int) -> dict[str, Rule]:
    return rule(f"finite and above 0, at most {high}", lambda value: 0 < value <= high)


_COUNT = _at_least(1, _MOST)
_COUNT_OR_0 = _at_least(0, _MOST)
_GIB, _MIB = _positive(2**20), _positive(2**30)
_PENALTY = rule("from -2 to 2 (0: off)", lambda v: -2 <= v <= 2)
_TOP = rule("from 0 to 100", lambda v: 0 <= v <= 100)
_SEED = rule("from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63)
_NUMBER_OR_AUTO = rule("at least 1, or auto", lambda value: value == "auto" or value >= 1)
_EVERY = rule(
    "at least 1, or auto; at most 65536", lambda value: value == "auto" or 1 <= value <= 65536
)
_CHUNKS = rule(
    "at least 1, or auto; at most 256", lambda value: value == "auto" or 1 <= value <= 256
)
_PHASES = rule(
    "a list of phases, not empty and without repeats",
    lambda value: 0 < len(value) == len(set(value)),
)
_TEXT = rule("non-empty text", lambda value: value != "")
_PATH = rule("non-empty text that can be a path", _is_path)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which checkpoint to run, and in which precision."""

    path: str = field(metadata=_TEXT)  # a local Hugging Face checkpoint directory
    tokenizer: str | None = field(default=None, metadata=_TEXT)  # a directory with a tokenizer;
    # null: the one in path
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of weights and activations;
    # auto: float32 on the CPU, the checkpoint's own on CUDA
    quantization: Literal["auto", "keep", "dequantize", "int8", "int4", "fp8"] = "auto"  # of a
    # quantised checkpoint's weights; dequantize: read them into dtype; keep: compute on them as
    # stored; auto: keep where the experts' backend can (today none can), else dequantize; int8,
    # int4 and fp8 are refused until a backend computes on requantised experts
    load_format: Literal["safetensors", "dummy"] = "safetensors"  # where weights come from;
    # dummy: seeded random numbers
    max_model_len: int | None = field(default=None, metadata=_COUNT)  # prompt and new tokens
    # of one sequence; null: the checkpoint's context length


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How ranks share the model: world = expert * replicas, and tensor divides expert."""

    expert: int | Literal["auto"] | None = field(default=None, metadata=_NUMBER_OR_AUTO)  # ranks
    # per copy of the experts; null: all ranks; auto: as many as the number of ranks allows, also
    # after an elastic restart
    tensor: int = field(default=1, metadata=_COUNT)  # ranks per attention layer


RequestPhase = Literal["prefill", "decode"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CapacityConfig:
    """How much work an expert may get, which ranks decide, and what is dropped or added."""

    policy: Literal["none", "token_drop", "expanded_drop"] = "none"  # token_drop: an expert keeps
    # its best assignments up to its capacity; expanded_drop: and idle experts of a token's own rank
    # take extra tokens; none: nothing is dropped
    factor: str | float = field(  # capacity over mean load (gamma), exactly as written; inf: no
        # limit
        default="1.5",
        metadata=rule(
            f"a number above 0, or inf; at most {_MOST_DIGITS} digits on each side of the point",
            _is_factor,
        ),
    )
    scope: Literal["expert", "rank"] = "expert"  # expert: one limit per expert; rank: the experts
    # of a rank share one limit
    consensus: Literal["global", "quota", "local"] = "global"  # global: the best
    # assignments of all ranks are kept; quota: each rank may keep a share; local: each rank decides
    # for its own tokens
    order: Literal["score", "first", "last", "random"] = "score"  # which assignments are
    # kept first: highest score, first or last position, random
    expand: int | None = field(default=None, metadata=_COUNT_OR_0)  # of expanded_drop: extra
    # experts of its own rank that a token may add; null: all of them
    tiers: Literal["two", "one"] = "two"  # of expanded_drop: two: extras only fill slots that top-k
    # leaves free; one: top-k and extras are ranked together by score
    extras: Literal["all", "dropped"] = "all"  # of expanded_drop: which tokens may take free slots:
    # all, or those that lost an assignment
    phases: tuple[RequestPhase, ...] = field(default=("prefill",), metadata=_PHASES)  # phases whose
    # tokens are subject to capacity: prefill, decode; `both` is short for the two
    renormalize: bool = False  # rescale the kept weights of a token to their sum before dropping
    seed: int = field(default=0, metadata=_SEED)  # of order: random
    selection: Literal["auto", "gather", "radix"] = "auto"  # how consensus: global finds the last
    # kept assignment: gather all claims, or radix select by histograms; the result is the same,
    # auto takes what sends fewer bytes
    speed_aware: bool = False  # a rank's share of the capacity follows its measured speed

    @property
    def exact_factor(self) -> Decimal:
        """Return the capacity factor as the decimal that was written, without binary rounding."""
        return Decimal(str(self.factor))


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsConfig:
    """What computes the experts."""

    backend: Literal["auto", "torch", "grouped_mm", "te"] = "auto"  # torch: the native kernel on
    # the CPU, else a loop; grouped_mm: torch's grouped GEMM; te: Transformer Engine; auto: on CUDA
    # in bfloat16 grouped_mm, te where a measurement at start finds it faster; else torch


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchConfig:
    """How rows are sent between ranks."""

    deduplicate: bool = True  # send a token's row once to a rank, however many of its experts are
    # there
    partial_sums: bool = False  # return one row per rank, summed there: results differ by
    # rounding; needs deduplicate
    dtype: Literal["auto", "bf16", "fp8"] = "auto"  # of the rows of dispatch; auto: model.dtype's


@dataclass(frozen=True, kw_only=True, slots=True)
class OverlapConfig:
    """How communication overlaps with the experts' computation."""

    chunks: int | Literal["auto"] = field(default=1, metadata=_CHUNKS)  # parts of a step's
    # rows: one is sent while experts compute another; 1: no overlap; auto: 1, 2 or 4, measured as
    # the job runs
    by: Literal["auto", "experts", "tokens"] = "auto"  # what chunks divide: a rank's experts or
    # its tokens; auto: experts where every rank has one for each chunk
    two_batch: bool = False  # run large steps as two half batches: attention of one while rows of
    # the other are sent


@dataclass(frozen=True, kw_only=True, slots=True)
class CopiesConfig:
    """Copies of experts, where moe.placement has some: when and how far they take rows."""

    phases: tuple[RequestPhase, ...] = field(default=("prefill", "decode"), metadata=_PHASES)
    # phases whose tokens may be computed by copies: prefill, decode; `both` is short for the two.
    # Under a capacity policy moe.capacity.phases counts, in steps where it has tokens
    target: float = field(  # of low-bit copies without a capacity policy: they take rows only until
        # the mean rank has this share of the most loaded rank's rows
        default=0.95,
        metadata=rule("above 0 and at most 1", lambda value: 0 < value <= 1),
    )
    min_rows: int = field(default=0, metadata=_COUNT_OR_0)  # fewest rows that a copy takes of its
    # expert in a step; with fewer to take they stay at the home
    replan: int | Literal["off"] = field(  # steps from one change of the copies by the loads seen
        # to the next; off: the placement stays
        default="off",
        metadata=rule("at least 1, or off", lambda value: value == "off" or value >= 1),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """The mixture-of-experts layers."""

    placement: str = field(default=CONTIGUOUS, metadata=_PATH)  # which ranks hold which experts:
    # contiguous, or a file that tools/plan_placement.py has written
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    copies: CopiesConfig = field(default_factory=CopiesConfig)
    shared_expert: Literal["replicated", "balanced"] = "replicated"  # replicated: each rank
    # computes its own tokens; balanced: a token may have it computed where another of its experts
    # is, if that rank has less to do; needs moe.dispatch.partial_sums


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """How much runs at once on one data rank."""

    max_batch_tokens: int = field(default=2048, metadata=_COUNT)  # most tokens of one step
    max_sequences: int = field(default=64, metadata=_COUNT)  # most sequences of one step
    block_size: int = field(  # tokens of one KV cache block
        default=16,
        metadata=rule(
            "a power of two, at most 2**20", lambda v: 0 < v <= 2**20 and v & (v - 1) == 0
        ),
    )
    kv_cache_gib: float | None = field(default=None, metadata=_GIB)  # size of one rank's
    # KV cache; null: what max_sequences needs, within the memory that is free
    kv_cache_blocks: int | None = field(default=None, metadata=_COUNT)  # size of one rank's
    # KV cache in blocks, instead of kv_cache_gib
    prefix_cache: bool = True  # run the common prefix of several requests once; a request with
    # prompt_logprobs runs whole


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How tokens are chosen and when they end; the defaults of every request.

    The one statement of these fields: `request.SamplingParams` inherits them. Applied in the order
    min_tokens, repetition_penalty, frequency_penalty, presence_penalty, temperature, min_p, top_k,
    top_p.
    """

    max_new_tokens: int = field(default=128, metadata=_at_least(1))  # most tokens to generate
    temperature: float = field(  # divides the logits; 0: greedy
        default=0.0,
        metadata=rule("finite and at least 0 (0: greedy)", lambda v: 0 <= v <= sys.float_info.max),
    )
    top_p: float = field(  # sample from the smallest set of tokens with this much probability
        default=1.0, metadata=rule("above 0 and at most 1 (1: off)", lambda v: 0 < v <= 1)
    )
    top_k: int = field(  # sample from this many likeliest tokens; 0 or -1: off
        default=0, metadata=rule("at least 0 (0 or -1: off)", lambda v: v >= -1)
    )
    min_p: float = field(  # sample from the tokens with this share of the likeliest's probability
        default=0.0, metadata=rule("from 0 to 1 (0: off)", lambda v: 0 <= v <= 1)
    )
    presence_penalty: float = field(  # subtracted from the logit of every token of the output
        default=0.0, metadata=_PENALTY
    )
    frequency_penalty: float = field(  # the same, times how often the token is in the output
        default=0.0, metadata=_PENALTY
    )
    repetition_penalty: float = field(  # divides the logit, below 0 multiplies it, of every token
        # of prompt and output
        default=1.0,
        metadata=rule("from 0.01 to 100 (1: off)", lambda v: 0.01 <= v <= 100),
    )
    seed: int = field(default=0, metadata=_SEED)  # of sampling, per request
    stop: tuple[str, ...] = field(  # texts that end a completion; special tokens too, by their id
        default=(), metadata=rule("free of empty text", lambda v: "" not in v)
    )
    stop_token_ids: tuple[int, ...] = field(  # token ids that end a completion
        default=(),
        metadata=rule("free of negative numbers", lambda v: all(item >= 0 for item in v)),
    )
    min_tokens: int = field(  # least tokens to generate: until then nothing ends a completion
        default=0, metadata=rule("at least 0 (0: off)", lambda v: v >= 0)
    )
    ignore_eos: bool = False  # generate max_new_tokens, whatever the end-of-sequence token
    logprobs: bool = False  # report the log probability of every new token
    prompt_logprobs: bool = False  # report the log probability of every prompt token
    top_logprobs: int = field(default=0, metadata=_TOP)  # also report so many likeliest tokens per
    # new token, with their log probabilities; needs logprobs
    prompt_top_logprobs: int = field(default=0, metadata=_TOP)  # the same per prompt token; needs
    # prompt_logprobs


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """How a batch job reads and writes its files."""

    format: Literal["auto", "openai", "lockstep"] = "auto"  # of the records; openai: OpenAI's, and
    # errors go to a file of their own; lockstep: our own, all in one file; auto: that of the
    # input's first line


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfilerConfig:
    """What the profiler measures, and where it writes it."""

    enabled: bool = True  # time every phase of every layer on every rank
    every: int | Literal["auto"] = field(default="auto", metadata=_EVERY)  # time every phase
    # in one of so many steps, and in all others only layers and what waits for ranks; auto: 16 on
    # CUDA, 1 on the CPU and with spans, deepspeed_comms or moe.capacity.speed_aware
    spans: str | None = field(default=None, metadata=_PATH)  # a folder: every rank writes the spans
    # of every step in which all phases are timed there
    spans_mib: float = field(default=64.0, metadata=_MIB)  # most of one rank's span files; the
    # newest steps are kept
    routing: str | None = field(default=None, metadata=_PATH)  # a folder: the rows of every expert
    # in every layer and step are recorded there, also where profiler.enabled is false
    routing_mib: float = field(default=64.0, metadata=_MIB)  # most of one rank's recording; when it
    # is full, every second step of it is removed, so that the whole job stays covered
    routing_claims: bool = False  # also record which experts each token chose, with their scores,
    # in every 8th step
    metrics_port: int | None = field(  # rank 0 serves Prometheus' /metrics at it; null: off
        default=None, metadata=rule("a port, 0 to 65535; 0: any free one", lambda v: 0 <= v < 65536)
    )
    metrics_host: str = field(  # the address that serves metrics_port
        default="127.0.0.1", metadata=rule("an address or a host name", _is_address)
    )
    deepspeed_comms: bool = False  # add the table of DeepSpeed's comms logger to the report


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
    seed: int = field(default=0, metadata=_SEED)  # of dummy weights
    threads: int | None = field(default=None, metadata=_at_least(1, 1024))  # CPU threads per rank;
    # null: the host's cores / its ranks
    shared_memory: bool = True  # ranks of one host exchange data of the host in shared memory and
    # not over gloo: on the CPU all data, on CUDA the control messages
    numa: Literal["auto", "off"] = "auto"  # auto: on CUDA a rank runs on the CPU cores next to its
    # GPU, unless the launcher has bound the ranks of its host to different cores


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All settings; building one checks every rule and raises `ConfigError` with all problems."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
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
    if config.moe.copies.replan != "off" and config.moe.placement == CONTIGUOUS:
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
