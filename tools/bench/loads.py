"""Skewed loads: how many tokens choose each expert, and a routing that does exactly that.

One place for tests, benches and reports (tests/loads.py passes it on). A load is int64 [E], its sum
T * K, no entry above T, because a token chooses an expert once. Experts are placed contiguously on
ranks, so the first ranks are the loaded ones.

    zipf       N_i proportional to i ** -s, capped at T
    hot        the first rank's experts have `ratio` times the mean rank's rows, as much of it as
               possible on its first expert
    recorded   the loads of a real run, layer by layer, from a report.json of the batch job

Legend: T tokens of all ranks, K top-k, E experts, W ranks.
"""

from __future__ import annotations

import json
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch


def zipf_loads(num_tokens: int, num_experts: int, top_k: int, exponent: float) -> np.ndarray:
    """Loads proportional to i ** -exponent, i = 1 .. E; 0 is uniform."""
    return fit(np.arange(1, num_experts + 1) ** -float(exponent), num_tokens, top_k)


def hot_loads(
    num_tokens: int, num_experts: int, top_k: int, ratio: float, num_ranks: int
) -> np.ndarray:
    """Loads that give the first of `num_ranks` ranks `ratio` times the mean rows.

    Raises:
        ValueError: a ratio that the first rank's experts cannot hold.
    """
    local = -(-num_experts // num_ranks)
    rows = round(num_tokens * top_k * ratio / num_ranks)
    if not num_tokens * top_k / num_ranks <= rows <= min(local * num_tokens, num_tokens * top_k):
        raise ValueError(
            f"ratio {ratio}: the first of {num_ranks} ranks holds {local} experts, each of at most "
            f"{num_tokens} tokens, of {num_tokens * top_k} assignments"
        )
    loads_E = np.zeros(num_experts, dtype=np.int64)
    rest = rows
    for expert in range(local):
        others = local - expert - 1
        even = -(-rest // (others + 1))
        loads_E[expert] = max(even, min(num_tokens, rest // 2 if others else rest))
        rest -= int(loads_E[expert])
    idle = num_tokens * top_k - rows
    loads_E[local:] = _integers(np.ones(num_experts - local), idle)
    assert loads_E.sum() == num_tokens * top_k and loads_E.max() <= num_tokens
    return loads_E


def recorded_loads(path: Path) -> dict[int, np.ndarray]:
    """Loads before capacity of every layer of a run, from the batch job's report.json.

    Raises:
        ValueError: a file that holds no layers.
    """
    report = json.loads(path.read_text(encoding="utf-8"))
    layers = (report.get("run") or {}).get("layers") or report.get("layers")
    if not layers:
        raise ValueError(f"{path}: holds no layers; name the report.json of a finished batch job")
    return {entry["layer"]: np.array(entry["expert_loads"], dtype=np.int64) for entry in layers}


def fit(weights_E: np.ndarray, num_tokens: int, top_k: int) -> np.ndarray:
    """Whole loads in proportion to weights, none above T, T * K in all.

    What exceeds T goes to the others in proportion, as often as needed.
    """
    weights = np.asarray(weights_E, dtype=np.float64)
    full = np.zeros(len(weights), dtype=bool)
    shares = np.zeros(len(weights))
    while True:
        left = num_tokens * (top_k - int(full.sum()))
        shares[full] = num_tokens
        shares[~full] = weights[~full] / max(weights[~full].sum(), 1e-300) * left
        if not (shares > num_tokens + 1e-9).any():
            break
        full |= shares > num_tokens
    loads_E = np.minimum(_integers(shares, num_tokens * top_k), num_tokens)
    for expert in np.argsort(-shares, kind="stable"):  # what rounding above T has cut off
        missing = num_tokens * top_k - int(loads_E.sum())
        loads_E[expert] += min(missing, num_tokens - int(loads_E[expert]))
    return loads_E


def routing_of(loads_E: np.ndarray, num_tokens: int, seed: int = 0) -> torch.Tensor:
    """Experts of every token, int64 [T, K], distinct in a row, with exactly these loads.

    Tokens and the order inside a row are shuffled, so that equal shares of tokens on ranks see
    alike, not equal, loads.
    """
    total = int(loads_E.sum())
    assert total % num_tokens == 0 and loads_E.max() <= num_tokens, "T * K rows, none above T"
    top_k = total // num_tokens
    # Experts one after the other, laid over the tokens again and again: a run of at most T places
    # meets no token twice.
    experts_N = np.repeat(np.arange(len(loads_E)), loads_E)
    ids_TK = experts_N.reshape(top_k, num_tokens).T
    random = np.random.default_rng(seed)
    ids_TK = random.permuted(ids_TK[random.permutation(num_tokens)], axis=1)
    return torch.from_numpy(ids_TK.astype(np.int64))


def cap_loads(loads_E: np.ndarray, factor: str, num_tokens: int, top_k: int) -> np.ndarray:
    """What Token Drop with expert scope leaves: min(N_e, C)."""
    share = Fraction(Decimal(factor)) * num_tokens * top_k / len(loads_E)
    return np.minimum(loads_E, max(1, -(-share.numerator // share.denominator)))


def rank_loads(loads_E: np.ndarray, num_ranks: int) -> np.ndarray:
    """Rows of each rank, experts placed contiguously, the remainder on the first ranks."""
    sizes = [len(part) for part in np.array_split(np.arange(len(loads_E)), num_ranks)]
    return np.add.reduceat(loads_E, np.concatenate(([0], np.cumsum(sizes)[:-1])))


def _integers(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in proportion to shares, by largest remainder, `total` in all."""
    scaled = shares / max(shares.sum(), 1e-300) * total
    whole = np.floor(scaled + 1e-9).astype(np.int64)
    order = np.argsort(whole - scaled, kind="stable")
    whole[order[: total - int(whole.sum())]] += 1
    return whole
