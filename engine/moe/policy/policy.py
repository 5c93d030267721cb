"""Policy: the capacity settings of every MoE layer, the placement that goes with them, and what was
promised of both.

A layer that it does not name drops nothing. `policy_file.py` reads and writes one,
`engine/models/policy.py` checks it against a model and its ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from engine.config import CapacityConfig, RequestPhase
from engine.config.validation import rule

_SHARE = rule("finite and above 0", lambda value: 0 < value < float("inf"))
_FINITE = rule("a finite number", lambda value: abs(value) < float("inf"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What a policy is expected to give, on the text that it was made with."""

    share: float | None = field(default=None, metadata=_SHARE)  # of perfect balance: the mean
    # rank's rows before capacity over the most loaded rank's after; with gamma below 1 above 1
    loss: float | None = field(default=None, metadata=_FINITE)  # added by the policy over that of
    # dropless, as a share of it: 0.001 is 0.1%
    bound: float | None = field(default=None, metadata=_FINITE)  # one-sided, of the same on
    # held-out text
    confidence: float = field(  # of the bound
        default=0.95, metadata=rule("above 0 and below 1", lambda value: 0 < value < 1)
    )
    measure: Literal["loss", "kl"] = "loss"  # what `loss` and `bound` are of: the loss of the
    # text's tokens, or KL divergence from the dropless output, in nats per token


@dataclass(frozen=True, slots=True)
class NamedPlacement:
    """A placement file, by what it holds."""

    file: str  # relative to the policy's file
    digest: str  # as `placement_file.digest` returns it


@dataclass(frozen=True, slots=True)
class Policy:
    """Capacity per layer and a placement; part of a job, and the same on all ranks."""

    layers: Mapping[int, CapacityConfig]  # by layer index; other layers drop nothing
    placement: NamedPlacement | None = None  # None: contiguous homes, no copies
    fingerprint: str | None = None  # of the model that it was made for; None: any
    data: Mapping[str, str] = field(default_factory=dict)  # calibration data: name -> fingerprint
    ranks: int | None = None  # expert-parallel ranks that it was made for; None: any number
    expected: Expected | None = None

    def layer(self, index: int) -> CapacityConfig:
        """Return the capacity settings of a layer."""
        return self.layers.get(index, CapacityConfig())

    @property
    def limited(self) -> dict[int, CapacityConfig]:
        """The layers that may drop something, in order."""
        layers = sorted(self.layers.items())
        return {index: each for index, each in layers if each.policy != "none"}

    @property
    def summary(self) -> CapacityConfig:
        """The settings of the first layer that may drop something: those of all where they are
        equal.
        """
        return next(iter(self.limited.values()), CapacityConfig())

    def phases(self, index: int) -> tuple[RequestPhase, ...]:
        """Return the phases whose tokens compete in a layer; none where it drops nothing."""
        capacity = self.layer(index)
        if capacity.policy == "none":
            return ()
        return tuple(phase for phase in get_args(RequestPhase) if phase in capacity.phases)
