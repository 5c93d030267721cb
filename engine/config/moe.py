"""The settings of the mixture-of-experts layers: the section `moe` and those inside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Literal

from engine.config.rules import COUNT_OR_0, PATH, SEED
from engine.config.validation import rule

CONTIGUOUS = "contiguous"  # of moe.placement: no file
_MOST_DIGITS = 100  # of a capacity factor, before and behind the point
RequestPhase = Literal["prefill", "decode"]
SUMMING = ("deepep", "te_ep")  # of moe.dispatch.transport: add results up on the way, as
# partial_sums does, and so change them by rounding


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


_CHUNKS = rule(
    "at least 1, or auto; at most 256", lambda value: value == "auto" or 1 <= value <= 256
)
_PHASES = rule(
    "a list of phases, not empty and without repeats",
    lambda value: 0 < len(value) == len(set(value)),
)


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
    expand: int | None = field(default=None, metadata=COUNT_OR_0)  # of expanded_drop: extra
    # experts of its own rank that a token may add; null: all of them
    tiers: Literal["two", "one"] = "two"  # of expanded_drop: two: extras only fill slots that top-k
    # leaves free; one: top-k and extras are ranked together by score
    extras: Literal["all", "dropped"] = "all"  # of expanded_drop: which tokens may take free slots:
    # all, or those that lost an assignment
    phases: tuple[RequestPhase, ...] = field(default=("prefill",), metadata=_PHASES)  # phases whose
    # tokens are subject to capacity: prefill, decode; `both` is short for the two
    renormalize: bool = False  # rescale the kept weights of a token to their sum before dropping
    seed: int = field(default=0, metadata=SEED)  # of order: random
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

    backend: Literal["auto", "torch", "grouped_mm", "te", "scaled_mm", "deep_gemm"] = "auto"
    # torch: the native kernel on the CPU, else a loop; grouped_mm: torch's grouped GEMM; te:
    # Transformer Engine; scaled_mm: torch's FP8 grouped GEMM on a GPU like H100, for experts in
    # FP8, rounds activations to FP8 as well, never taken by auto; deep_gemm: DeepGEMM's on a GPU
    # like H100, for experts in FP8 in blocks of 128x128, rounds activations to FP8 per 128 columns;
    # auto: on CUDA in bfloat16 grouped_mm, te where a measurement at start finds it faster, for
    # experts in FP8 blocks deep_gemm where it is installed; else torch


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchConfig:
    """How rows are sent between ranks."""

    deduplicate: bool = True  # send a token's row once to a rank, however many of its experts are
    # there
    partial_sums: bool = False  # return one row per rank, summed there: results differ by
    # rounding; needs deduplicate
    dtype: Literal["auto", "bf16", "fp8"] = "auto"  # of the rows of dispatch; auto: model.dtype's
    transport: Literal["auto", "nccl", "symmetric", "deepep", "te_ep"] = "auto"  # what moves rows;
    # nccl: all-to-alls of NCCL, on the CPU of gloo, by counts on the host; symmetric: torch's
    # symmetric memory (NVSHMEM), deepep: DeepEP, te_ep: Transformer Engine's, all by counts on the
    # device and never executed on a GPU; auto: nccl
    exchange: Literal["auto", "counted", "static"] | None = None  # counted: ranks exchange how many
    # rows go where, then the rows; static: small steps without competition are padded to a size
    # all ranks agree on and need no counts; auto: static in decode, on the CPU where it is measured
    # faster; null: static in decode where runtime.graphs captures them, else counted


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
    min_rows: int = field(default=0, metadata=COUNT_OR_0)  # fewest rows that a copy takes of its
    # expert in a step; with fewer to take they stay at the home
    replan: int | Literal["off"] = field(  # steps from one change of the copies by the loads seen
        # to the next; off: the placement stays
        default="off",
        metadata=rule("at least 1, or off", lambda value: value == "off" or value >= 1),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """The mixture-of-experts layers."""

    placement: str = field(default=CONTIGUOUS, metadata=PATH)  # which ranks hold which experts:
    # contiguous, or a file that tools/plan_placement.py has written
    policy: str | None = field(default=None, metadata=PATH)  # a file with capacity per layer and a
    # placement, which takes the place of moe.capacity and moe.placement; null: these two
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    copies: CopiesConfig = field(default_factory=CopiesConfig)
    shared_expert: Literal["replicated", "balanced"] = "replicated"  # replicated: each rank
    # computes its own tokens; balanced: a token may have it computed where another of its experts
    # is, if that rank has less to do; needs moe.dispatch.partial_sums
