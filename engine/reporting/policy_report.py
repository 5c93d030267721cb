"""Policy report: what a run's policy limited and promised, as data and in a sentence. Pure."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from engine.moe.policy.policy import Expected, Policy
from engine.moe.policy.policy_file import digest
from engine.profiling.report import PolicyReport

_SHOWN = ("policy", "factor", "scope", "order", "consensus", "phases")  # of a layer's settings


def policy_report(policy: Policy, file: str, share: float) -> PolicyReport:
    """Return the report of a run's policy.

    Args:
        file: moe.policy.
        share: of perfect balance over all layers, as run.
    """
    return PolicyReport(
        file=file,
        digest=digest(policy),
        ranks=policy.ranks,
        model=policy.fingerprint,
        data=dict(policy.data),
        placement=None if policy.placement is None else policy.placement.digest,
        layers={
            index: {key: _plain(getattr(capacity, key)) for key in _SHOWN}
            for index, capacity in policy.limited.items()
        },
        expected=None if policy.expected is None else asdict(policy.expected),
        share=share,
    )


def describe_promise(report: PolicyReport) -> str:
    """Return in one line what a policy promised, and the share that the run got."""
    name = f"The policy {report.file} (hash {report.digest})"
    expected = Expected(**(report.expected or {}))
    promises = []
    if expected.share is not None:
        promises.append(f"a share of perfect balance of {expected.share:.3f}")
    if expected.loss is not None:
        promises.append(f"{_quality(expected.loss, expected)} added")
    if expected.bound is not None:
        sure = f"with {expected.confidence:.0%} confidence"
        promises.append(f"at most {_quality(expected.bound, expected)} added {sure}")
    got = f"this run had a share of {report.share:.3f}"
    if not promises:
        return f"{name} promised nothing; {got}."
    return f"{name} promised {', '.join(promises)}; {got}."


def _quality(value: float, expected: Expected) -> str:
    if expected.measure == "kl":
        return f"{value:.2g} nats of KL divergence per token"
    return f"{value:.3%} of loss"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
