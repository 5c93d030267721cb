"""Claim log: what the router chose for each of this rank's tokens, while a step is recorded.

Off by default, since it copies every layer's choices to the host.

Legend: T tokens on this rank, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerClaims:
    """Top-k assignments of some tokens in one layer of one step.

    With the score, (request, position) orders them as capacity does. Without a capacity policy, and
    in steps in which no token is subject to one, requests and positions are -1.
    """

    request_T: np.ndarray  # int32
    position_T: np.ndarray  # int32
    eligible_T: np.ndarray  # bool, subject to capacity; all where there is no policy
    # int32, the model's expert numbers, best first; -1 with the score 0 for a zero expert
    topk_ids_TK: np.ndarray
    scores_TK: np.ndarray  # float32, the router's scores of these experts


def join_claims(parts: list[LayerClaims], top_k: int) -> LayerClaims:
    """Return the claims of all parts, one after the other, with so many columns: those that a part
    has not are expert -1 with the score 0.
    """
    names = [each.name for each in fields(LayerClaims)]
    parts = [_widened(part, top_k) for part in parts]
    values = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return LayerClaims(**values)


def without_padding(claims: LayerClaims) -> LayerClaims:
    """Return claims without the columns that no token has."""
    used_K = (claims.topk_ids_TK >= 0).any(0)
    if not used_K.any() or used_K.all():
        return claims
    return replace(
        claims, topk_ids_TK=claims.topk_ids_TK[:, used_K], scores_TK=claims.scores_TK[:, used_K]
    )


def _widened(claims: LayerClaims, top_k: int) -> LayerClaims:
    missing = top_k - claims.topk_ids_TK.shape[1]
    if missing == 0:
        return claims
    columns = ((0, 0), (0, missing))
    return replace(
        claims,
        topk_ids_TK=np.pad(claims.topk_ids_TK, columns, constant_values=-1),
        scores_TK=np.pad(claims.scores_TK, columns),
    )


class ClaimLog:
    """Collects the claims of one step while it is recorded."""

    def __init__(self) -> None:
        # layer -> its claims, one entry per micro-batch; None: this step is not recorded.
        self.step: dict[int, list[LayerClaims]] | None = None

    def add(self, layer: int, claims: LayerClaims) -> None:
        """Add one call of a layer. Only while a step is recorded."""
        assert self.step is not None, "no step is recorded"
        self.step.setdefault(layer, []).append(claims)
