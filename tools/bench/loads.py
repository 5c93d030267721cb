"""Skewed loads: how many tokens choose each expert, and a routing that does exactly that.

Shared by tests, benches and reports. A load is int64 [E], its sum
T * K, no entry above T, because a token chooses an expert once. Experts are placed contiguously on
ranks, so the first ranks are the loaded ones.

    zipf       N_i proportional to i ** -s, capped at T
    hot        the first rank's experts have `ratio` times the mean rank's rows, as much of it as
               possible on its first expert
    recorded   the loads of a real run, layer by layer, from a report.json of the batch job, or of
               any routing saved as topk_ids_TK arrays in an .npz

Legend: T tokens of all ranks, K top-k, E experts, W ranks.
"""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import torch

from engine.moe.capacity.limits import expert_capacity
from engine.simulate.loads import fit as fit


def zipf_loads(num_tokens: int, num_experts: int, top_k: int, exponent: float) -> np.ndarray:
    """Return loads proportional to i ** -exponent, i = 1 .. E; 0 is uniform."""
    return fit(np.arange(1, num_experts + 1) ** -float(exponent), num_tokens, top_k)


def overloaded_rank_loads(
    num_tokens: int, num_experts: int, top_k: int, ratio: float, num_ranks: int
) -> np.ndarray:
    """Return loads that give the first of `num_ranks` ranks `ratio` times the mean rows.

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
    if others := num_experts - local:
        loads_E[local:] = idle // others
        loads_E[local : local + idle % others] += 1
    assert loads_E.sum() == num_tokens * top_k and loads_E.max() <= num_tokens
    return loads_E


def recorded_loads(path: Path) -> dict[int, np.ndarray]:
    """Return loads before capacity of every layer of a run.

    Args:
        path: report.json of a batch job, or an .npz whose arrays `layer0`, `layer1`, ... hold the
            chosen experts [T, K] and whose `num_experts` is their number.

    Raises:
        ValueError: a file that holds no layers.
    """
    hint = "name the report.json of a finished batch job, or an .npz of layer0, layer1, ..."
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            names = sorted(name for name in arrays.files if name.removeprefix("layer").isdigit())
            if not names or "num_experts" not in arrays.files:
                raise ValueError(f"{path}: holds no layers or no num_experts; {hint}")
            num_experts = int(arrays["num_experts"])
            return {
                int(name.removeprefix("layer")): np.bincount(
                    arrays[name].ravel(), minlength=num_experts
                ).astype(np.int64)
                for name in names
            }
    report = json.loads(path.read_text(encoding="utf-8"))
    layers = (report.get("run") or {}).get("layers") or report.get("layers")
    if not layers:
        raise ValueError(f"{path}: holds no layers; {hint}")
    return {entry["layer"]: np.array(entry["expert_loads"], dtype=np.int64) for entry in layers}


def routing_of(loads_E: np.ndarray, num_tokens: int, seed: int = 0) -> torch.Tensor:
    """Return experts of every token, int64 [T, K], distinct in a row, with exactly these loads.

    Tokens and the order inside a row are shuffled, so that equal shares of tokens on ranks see
    alike, not equal, loads.
    """
    total = int(loads_E.sum())
    assert total % num_tokens == 0 and loads_E.max() <= num_tokens, "T * K rows, none above T"
    top_k = total // num_tokens
    # Experts one after the other, laid over the tokens repeatedly: a run of at most T positions
    # holds no token twice.
    experts_N = np.repeat(np.arange(len(loads_E)), loads_E)
    ids_TK = experts_N.reshape(top_k, num_tokens).T
    random = np.random.default_rng(seed)
    ids_TK = random.permuted(ids_TK[random.permutation(num_tokens)], axis=1)
    return torch.from_numpy(ids_TK.astype(np.int64))


def random_routing(
    num_tokens: int, num_experts: int, top_k: int, exponent: float, seed: int = 0
) -> torch.Tensor:
    """Return experts of every token, int64 [T, K], drawn without replacement.

    Expert e has a weight of (e + 1) ** -exponent. Tokens are independent, unlike `routing_of`'s.
    """
    random = np.random.default_rng(seed)
    log_weights_E = -exponent * np.log(np.arange(1, num_experts + 1))
    keys_TE = log_weights_E + random.gumbel(size=(num_tokens, num_experts))
    return torch.from_numpy(np.argsort(-keys_TE, axis=1)[:, :top_k].copy())


def scores_of(topk_ids_TK: torch.Tensor, num_experts: int, *, ties: bool = False) -> torch.Tensor:
    """Return router scores, float32 [T, E], whose top-k are these experts.

    Args:
        ties: all chosen scores are equal, so that only token ids can order them; otherwise a
            token's choices are a clear step apart, and no two tokens score an expert alike.
    """
    num_tokens, top_k = topk_ids_TK.shape
    scores_TE = torch.zeros(num_tokens, num_experts)
    if ties:
        return scores_TE.scatter_(1, topk_ids_TK, 1.0)
    # Whole numbers over a power of two: exact in float32 below 2 ** 20 tokens and up to top-16.
    steps_TK = (top_k - torch.arange(top_k)).expand(num_tokens, top_k)
    whole_TK = steps_TK * 2**20 - torch.arange(num_tokens)[:, None]
    return scores_TE.scatter_(1, topk_ids_TK, whole_TK.float() / 2**24)


def ragged_sizes(num_tokens: int, num_ranks: int) -> list[int]:
    """Return tokens per rank, each about half of the rank before it, the last without any."""
    if num_ranks == 1:
        return [num_tokens]
    weights = 0.5 ** np.arange(num_ranks)
    weights[-1] = 0.0
    sizes = np.floor(weights / weights.sum() * num_tokens).astype(np.int64)
    sizes[0] += num_tokens - sizes.sum()
    return sizes.tolist()


def cap_loads(loads_E: np.ndarray, factor: str, num_tokens: int, top_k: int) -> np.ndarray:
    """Return what Token Drop with expert scope keeps: min(N_e, C)."""
    return np.minimum(loads_E, expert_capacity(Decimal(factor), num_tokens, top_k, len(loads_E)))


def rank_loads(loads_E: np.ndarray, num_ranks: int) -> np.ndarray:
    """Return rows of each rank, experts placed contiguously, the remainder on the first ranks."""
    sizes = [len(part) for part in np.array_split(np.arange(len(loads_E)), num_ranks)]
    return np.add.reduceat(loads_E, np.concatenate(([0], np.cumsum(sizes)[:-1])))
