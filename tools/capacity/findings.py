"""Findings: which usual claims the figures confirm; computed, never written in.

Each claim compares pairs of settings that differ in one factor, over all panels of a report. A pair
counts for or against a claim only where its difference exceeds three paired standard errors, in
loss or in task accuracy; a pair whose two measures contradict each other counts as open.

Some are compared at equal speed bound, because at equal gamma they do not gain the same: the rank
scope drops less, Expanded Drop refills slots of the ranks that set the layer's time. The partner is
then read off the other's curve over gamma, dropless at 1.0 included, by linear interpolation
between two settings, example by example, so the comparison stays paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Any

from capacity.panel import Panel, Result
from capacity.scores import Difference, Scores, blend, difference
from engine.config import CapacityConfig

# Standard errors. At two, noise alone would decide one pair in twenty; a report has a hundred.
CERTAIN = 3.0


@dataclass(frozen=True, slots=True)
class Pair:
    """Two settings of one panel, A minus B."""

    where: str  # model, ranks and what else is equal
    a: str
    b: str
    difference: Difference

    @property
    def verdict(self) -> str:
        """`better`, `worse` or `open`: A compared with B."""
        d = self.difference
        signs = {
            _sign(-d.loss, d.loss_error),  # a lower loss is better
            _sign(d.accuracy, d.accuracy_error),
        }
        if signs == {1} or signs == {0, 1}:
            return "better"
        return "worse" if signs == {-1} or signs == {-1, 0} else "open"


@dataclass(frozen=True, slots=True)
class Finding:
    """A claim and its pairs."""

    claim: str
    at_least: bool  # whether equality is enough
    pairs: list[Pair]

    @property
    def counts(self) -> dict[str, int]:
        """Pairs by verdict."""
        verdicts = [pair.verdict for pair in self.pairs]
        return {word: verdicts.count(word) for word in ("better", "worse", "open")}

    @property
    def verdict(self) -> str:
        """`confirmed`, `contradicted`, `mixed`, `undecided`, or `not tested` without a pair."""
        if not self.pairs:
            return "not tested"
        counts = self.counts
        if counts["better"] and counts["worse"]:
            return "mixed"
        if counts["worse"]:
            return "contradicted"
        if counts["better"]:
            return "confirmed"
        return "confirmed (equal)" if self.at_least else "undecided"

    def sentence(self) -> str:
        """Return the finding in one line."""
        if not self.pairs:
            return f"{self.claim}: {self.verdict}"
        counts = self.counts
        loss = sum(pair.difference.loss for pair in self.pairs) / len(self.pairs)
        tasks = sum(pair.difference.accuracy for pair in self.pairs) / len(self.pairs)
        return (
            f"{self.claim}: {self.verdict}; of {len(self.pairs)} pairs {counts['better']} better, "
            f"{counts['worse']} worse, {counts['open']} within {CERTAIN:g} standard errors; on "
            f"average loss {loss:+.4f} nats, tasks {100 * tasks:+.2f} points"
        )

    def record(self) -> dict[str, Any]:
        """Return the finding for the JSON line."""
        pairs = []
        for pair in self.pairs:
            numbers = {
                name: float(f"{value:.6g}") if isfinite(value) else None
                for name, value in asdict(pair.difference).items()
            }
            where = {"where": pair.where, "a": pair.a, "b": pair.b}
            pairs.append({**where, "verdict": pair.verdict, **numbers})
        counts = self.counts
        return {"claim": self.claim, "verdict": self.verdict, "counts": counts, "pairs": pairs}


def findings(panels: Sequence[Panel]) -> list[Finding]:
    """Return all claims, tested on all panels."""

    def claim(text: str, partner: Callable[[CapacityConfig], CapacityConfig | None], at_least=True):
        pairs = [pair for panel in panels for pair in _pairs(panel, partner)]
        return Finding(text, at_least, pairs)

    def factor(name: str, value: str, other: str) -> Callable[..., CapacityConfig | None]:
        def partner(setting: CapacityConfig) -> CapacityConfig | None:
            if setting.policy == "none" or getattr(setting, name) != value:
                return None
            return replace(setting, **{name: other})

        return partner

    def to_token_drop(setting: CapacityConfig) -> CapacityConfig | None:
        plain = setting.tiers == "two" and setting.extras == "all"
        if setting.policy != "expanded_drop" or not plain or setting.expand is not None:
            return None
        return replace(setting, policy="token_drop")

    def at_equal_speed(text: str, mine: dict[str, str], theirs: dict[str, str]) -> Finding:
        pairs = [pair for panel in panels for pair in _pairs_at_speed(panel, mine, theirs)]
        return Finding(f"{text} at equal speed bound", False, pairs)

    token_drop, expanded = {"policy": "token_drop"}, {"policy": "expanded_drop"}
    return [
        claim("score keeps better tokens than random", factor("order", "score", "random"), False),
        claim("random keeps better tokens than first", factor("order", "random", "first"), False),
        claim("random keeps better tokens than last", factor("order", "random", "last"), False),
        claim("expanded_drop is at least as good as token_drop", to_token_drop),
        claim("two tiers are at least as good as one", factor("tiers", "two", "one")),
        claim("extras for all beat extras for dropped tokens", factor("extras", "all", "dropped")),
        claim("global is at least as good as quota", factor("consensus", "global", "quota")),
        claim("global is better than local", factor("consensus", "global", "local"), False),
        claim("quota is better than local", factor("consensus", "quota", "local"), False),
        at_equal_speed(
            "scope rank is better than expert", {**token_drop, "scope": "rank"}, token_drop
        ),
        at_equal_speed("expanded_drop is better than token_drop", expanded, token_drop),
    ]


def _pairs(
    panel: Panel, partner: Callable[[CapacityConfig], CapacityConfig | None]
) -> Iterator[Pair]:
    for result in panel.results:
        wanted = partner(result.setting)
        other = None if wanted is None else panel.find(wanted)
        # Without drops and extras, loads and scores are equal.
        if other is not None and (result.dropped or result.added or other.dropped or other.added):
            where = f"{panel.model}, {panel.ranks} ranks"
            gap = difference(result.scores, other.scores)
            yield Pair(where, result.name, other.name, gap)


def _pairs_at_speed(panel: Panel, mine: dict[str, str], theirs: dict[str, str]) -> Iterator[Pair]:
    """Yield pairs at equal speed bound.

    Each setting that differs from the defaults in `mine` and gamma alone, with the curve of those
    that differ in `theirs` and gamma alone.
    """
    points = [(1.0, panel.reference.scores)]
    points += [(result.speed.bound, result.scores) for result in _curve(panel, theirs)]
    for result in _curve(panel, mine):
        scores = at_speed(points, result.speed.bound)
        if scores is not None:
            where = f"{panel.model}, {panel.ranks} ranks, bound {result.speed.bound:.2f}"
            other = f"{' '.join(theirs.values())} at the same bound"
            yield Pair(where, result.name, other, difference(result.scores, scores))


def _curve(panel: Panel, factors: dict[str, str]) -> Iterator[Result]:
    wanted = replace(CapacityConfig(phases=panel.reference.setting.phases), **factors)
    for result in panel.results:
        if result.dropped and result.setting == replace(wanted, factor=result.setting.factor):
            yield result


def at_speed(points: Sequence[tuple[float, Scores]], bound: float) -> Scores | None:
    """Return scores of a curve (speed bound, scores) at `bound`, interpolated; None outside it."""
    ordered = sorted(points, key=lambda point: point[0])
    for (low, before), (high, after) in zip(ordered, ordered[1:], strict=False):
        if low <= bound <= high and high > low:
            return blend(before, after, (bound - low) / (high - low))
    return None


def _sign(value: float, error: float) -> int:
    if abs(value) <= CERTAIN * error:
        return 0
    return 1 if value > 0 else -1
