"""Quality of one run, example by example, and whether two runs differ by more than noise.

Settings differ by less than the noise of a few hundred examples, so comparisons are paired: the
same excerpts and prompts under both. The loss has a standard error by excerpt (tokens of one
excerpt are not independent), the accuracy one by prompt. Both leave out that prompts of one batch
compete with each other for capacity.

Worked example: two excerpts of 10 and 30 tokens, with 20 and 90 nats under A, 22 and 96 under B.
The losses are 110 / 40 = 2.75 and 118 / 40 = 2.95, the difference A - B is -8 / 40 = -0.2; both
excerpts differ by -0.2 per token, so its standard error is 0.

Legend: X excerpts, N task prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, sqrt

import numpy as np

from capacity.jobs import Item


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one run, by example."""

    nll_X: np.ndarray  # float64, nats of each excerpt after its first token
    tokens_X: np.ndarray  # int64, number of those tokens
    hit_N: np.ndarray  # float64, 1 where the whole answer is right
    task_N: np.ndarray  # text, task of each prompt

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nll_X.sum() / self.tokens_X.sum()) if self.tokens_X.size else 0.0

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return exp(self.loss)

    @property
    def by_task(self) -> dict[str, float]:
        """Share of right answers of each task."""
        return {str(name): float(self.hit_N[self.task_N == name].mean()) for name in self._names}

    @property
    def accuracy(self) -> float:
        """Mean of the tasks' shares; each task has equal weight."""
        return float(np.mean([*self.by_task.values()])) if self.hit_N.size else 0.0

    @property
    def accuracy_error(self) -> float:
        """Binomial standard error of `accuracy`."""
        parts = [self.hit_N[self.task_N == name] for name in self._names]
        shares = [float(part.mean()) for part in parts]
        variance = sum(
            share * (1 - share) / part.size for share, part in zip(shares, parts, strict=True)
        )
        return sqrt(variance) / max(1, len(parts))

    @property
    def _names(self) -> list[str]:
        return sorted(set(self.task_N.tolist()))


@dataclass(frozen=True, slots=True)
class Difference:
    """Two runs of the same examples, A minus B, each with its paired standard error."""

    loss: float
    loss_error: float
    accuracy: float
    accuracy_error: float


def collect(
    items: Sequence[Item], nll: Mapping[int, float], generated: Mapping[int, Sequence[int]]
) -> Scores:
    """Score what the ranks returned: `nll` and `generated` by item index.

    Raises:
        KeyError: an item that no rank returned.
    """
    texts = [item for item in items if item.answer is None]
    prompts = [item for item in items if item.answer is not None]
    return Scores(
        np.array([nll[item.index] for item in texts], dtype=np.float64),
        np.array([len(item.prompt) - 1 for item in texts], dtype=np.int64),
        np.array([tuple(generated[i.index]) == i.answer for i in prompts], dtype=np.float64),
        np.array([item.domain for item in prompts]),
    )


def difference(a: Scores, b: Scores) -> Difference:
    """Return A minus B, paired by example; both have the same examples in the same order."""
    assert np.array_equal(a.tokens_X, b.tokens_X) and np.array_equal(a.task_N, b.task_N)
    return Difference(
        *_ratio(a.nll_X - b.nll_X, a.tokens_X), *_mean_of_tasks(a.hit_N - b.hit_N, a.task_N)
    )


def blend(a: Scores, b: Scores, share: float) -> Scores:
    """Return scores interpolated linearly: a `share` of B, the rest of A."""
    return Scores(
        (1 - share) * a.nll_X + share * b.nll_X,
        a.tokens_X,
        (1 - share) * a.hit_N + share * b.hit_N,
        a.task_N,
    )


def _ratio(delta_X: np.ndarray, tokens_X: np.ndarray) -> tuple[float, float]:
    """Return sum of deltas over sum of tokens, and its standard error (linearised ratio)."""
    if not tokens_X.size:
        return 0.0, 0.0
    ratio = float(delta_X.sum() / tokens_X.sum())
    count = tokens_X.size
    if count < 2:
        return ratio, float("inf")
    rest_X = delta_X - ratio * tokens_X
    error = sqrt(count / (count - 1) * float((rest_X**2).sum())) / float(tokens_X.sum())
    return ratio, error


def _mean_of_tasks(delta_N: np.ndarray, task_N: np.ndarray) -> tuple[float, float]:
    """Return the mean over tasks of the mean delta, and its standard error by prompt."""
    parts = [delta_N[task_N == name] for name in sorted(set(task_N.tolist()))]
    if not parts:
        return 0.0, 0.0
    if any(part.size < 2 for part in parts):
        error = float("inf")
    else:
        error = sqrt(sum(float(part.var(ddof=1)) / part.size for part in parts)) / len(parts)
    return float(np.mean([part.mean() for part in parts])), error
