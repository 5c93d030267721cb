"""Loads: what the simulated steps route, recorded or made, scaled to a number of tokens.

Sources: a folder that `profiler.routing` filled, an .npz with `loads` [S, L, E], or a skew
(`uniform`, `zipf:EXPONENT`), whose experts are shuffled anew in every layer.

Legend: S steps, L MoE layers, E experts, K top-k, W ranks, T tokens of all ranks.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engine.profiling.routing.trace import RoutingTrace, read_trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """The steps to simulate."""

    name: str
    loads_SLE: np.ndarray  # int64, top-k assignments over all ranks, before capacity
    tokens_S2: np.ndarray  # int64, prefill and decode tokens over all ranks
    layers: tuple[int, ...]  # numbers of the MoE layers in the model
    top_k: int
    keys_S3: np.ndarray | None = None  # int64, segment, step and first rank of recorded steps
    trace: RoutingTrace | None = None  # the recording, where there is one
    is_scaled: bool = False  # tokens are not those recorded

    @property
    def num_experts(self) -> int:
        """E."""
        return self.loads_SLE.shape[2]

    def first(self, steps: int | None) -> Traffic:
        """Return at most so many steps, at equal distances."""
        count = len(self.loads_SLE)
        if steps is None or steps >= count:
            return self
        kept = np.linspace(0, count - 1, steps).round().astype(np.int64)
        keys = None if self.keys_S3 is None else self.keys_S3[kept]
        return replace(
            self, loads_SLE=self.loads_SLE[kept], tokens_S2=self.tokens_S2[kept], keys_S3=keys
        )

    def scaled(self, num_tokens: int | None) -> Traffic:
        """Return steps of so many tokens with the recorded proportions; None: as recorded.

        A small step scaled up keeps its noise, so it is more skewed than a recorded large one.
        """
        if num_tokens is None or (self.tokens_S2.sum(1) == num_tokens).all():
            return self
        loads_SLE = np.empty_like(self.loads_SLE)
        for loads_LE, found_LE in zip(self.loads_SLE, loads_SLE, strict=True):
            for layer, load_E in enumerate(loads_LE):
                found_LE[layer] = fit(load_E, num_tokens, self.top_k)
        total_S = self.tokens_S2.sum(1)
        prefill_S = num_tokens * self.tokens_S2[:, 0] // np.maximum(total_S, 1)
        tokens_S2 = np.stack((prefill_S, num_tokens - prefill_S), axis=1)
        return replace(self, loads_SLE=loads_SLE, tokens_S2=tokens_S2, keys_S3=None, is_scaled=True)


def read_traffic(path: Path, top_k: int | None) -> Traffic:
    """Read a recording.

    Args:
        path: a folder of profiler.routing, a file of loads in it, or an .npz.
        top_k: K, which an .npz does not hold.

    Raises:
        ValueError: naming the path and what to do.
    """
    if path.suffix == ".npz":
        return _read_arrays(path, top_k)
    trace = read_trace(path)
    used_S = trace.loads_SLE.sum((1, 2)) > 0
    if not used_S.any():
        raise ValueError(f"{path}: no recorded rows; record a job with tokens")
    keys_S3 = np.stack((trace.segments_S, trace.steps_S, trace.first_ranks_S), axis=1)
    return Traffic(
        name=path.name,
        loads_SLE=trace.loads_SLE[used_S],
        tokens_S2=trace.tokens_S2[used_S],
        layers=trace.layers,
        top_k=trace.top_k,
        keys_S3=keys_S3[used_S],
        trace=trace,
    )


def _read_arrays(path: Path, top_k: int | None) -> Traffic:
    if top_k is None:
        raise ValueError(f"{path}: an .npz does not say how many experts a token has; give --top-k")
    try:
        with np.load(path) as arrays:
            loads_SLE = arrays["loads"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read as arrays of loads: {error}") from error
    whole = np.issubdtype(loads_SLE.dtype, np.integer) and loads_SLE.ndim == 3
    if not whole or not loads_SLE.size or (loads_SLE < 0).any() or not loads_SLE.any():
        raise ValueError(
            f"{path}: loads must be integers [steps, layers, experts] of at least 0, not all 0"
        )
    loads_SLE = loads_SLE.astype(np.int64)
    if top_k > loads_SLE.shape[2]:
        raise ValueError(f"--top-k {top_k}: the loads are of {loads_SLE.shape[2]} experts")
    tokens_S = -(-loads_SLE.sum(2).max(1) // top_k)
    return Traffic(
        name=path.stem,
        loads_SLE=loads_SLE,
        tokens_S2=np.stack((tokens_S, np.zeros_like(tokens_S)), axis=1),
        layers=tuple(range(loads_SLE.shape[1])),
        top_k=top_k,
    )


def make_traffic(
    skew: str,
    *,
    num_tokens: int,
    num_layers: int,
    num_experts: int,
    top_k: int,
    steps: int,
    seed: int,
) -> Traffic:
    """Return synthetic prefill steps.

    Args:
        skew: uniform, or zipf:EXPONENT; every step draws its assignments from it.
        num_tokens, num_layers, num_experts, top_k: T, L, E, K.
        steps: S.
        seed: of the draws.

    Raises:
        ValueError: the skew is neither.
    """
    kind, _, written = skew.partition(":")
    exponent = 0.0
    if kind == "zipf" and written:
        try:
            exponent = float(written)
        except ValueError:
            exponent = -1.0
    if (
        kind not in ("uniform", "zipf")
        or not 0 <= exponent <= 8
        or (kind == "zipf") != bool(written)
    ):
        raise ValueError(
            f"--synthetic {skew}: give uniform, or zipf:EXPONENT with an exponent of 0 to 8"
        )
    random = np.random.default_rng(seed)
    weight_E = np.arange(1, num_experts + 1) ** -exponent
    loads_SLE = np.empty((steps, num_layers, num_experts), dtype=np.int64)
    for layer in range(num_layers):
        own_E = random.permutation(weight_E)
        for step in range(steps):
            drawn_E = random.multinomial(num_tokens * top_k, own_E / own_E.sum())
            loads_SLE[step, layer] = fit(drawn_E, num_tokens, top_k)
    tokens_S2 = np.tile(np.array([num_tokens, 0], dtype=np.int64), (steps, 1))
    return Traffic(
        name=skew,
        loads_SLE=loads_SLE,
        tokens_S2=tokens_S2,
        layers=tuple(range(num_layers)),
        top_k=top_k,
    )


def fit(weights_E: np.ndarray, num_tokens: int, top_k: int) -> np.ndarray:
    """Return whole loads in proportion to weights, none above T, T * K in all.

    What exceeds T is distributed over the others in proportion, repeatedly. Shares are rounded
    down, and the remaining assignments go to the most loaded experts, one each.
    """
    weights = np.asarray(weights_E, dtype=np.float64)
    full = np.zeros(len(weights), dtype=bool)
    shares = np.zeros(len(weights))
    while True:
        left = num_tokens * (top_k - int(full.sum()))
        others = weights[~full] if weights[~full].any() else np.ones((~full).sum())
        shares[full] = num_tokens
        shares[~full] = others / max(others.sum(), 1e-300) * left
        if not (shares > num_tokens + 1e-9).any():
            break
        full |= shares > num_tokens
    loads_E = np.minimum(np.floor(shares + 1e-9).astype(np.int64), num_tokens)
    order = np.argsort(-shares, kind="stable")
    order = order[loads_E[order] < num_tokens]
    loads_E[order[: num_tokens * top_k - int(loads_E.sum())]] += 1
    assert loads_E.sum() == num_tokens * top_k
    return loads_E


def over_replicas(
    loads_E: np.ndarray, num_replicas: int, random: np.random.Generator
) -> np.ndarray:
    """Return the loads of replicas that share a step's tokens evenly, int64 [replicas, E].

    Which assignments a replica gets is drawn without replacement.
    """
    if num_replicas == 1:
        return loads_E[None]
    found = np.empty((num_replicas, len(loads_E)), dtype=np.int64)
    rest_E, total = loads_E.copy(), int(loads_E.sum())
    for replica in range(num_replicas - 1):
        count = total * (replica + 1) // num_replicas - total * replica // num_replicas
        found[replica] = random.multivariate_hypergeometric(rest_E, count, method="marginals")
        rest_E -= found[replica]
    found[-1] = rest_E
    return found


def over_ranks(load_E: np.ndarray, num_ranks: int) -> np.ndarray:
    """Return each expert's rows dealt evenly to source ranks, int64 [W, E]; the remainders go
    around, so that ranks have about equally many.
    """
    each_E, more_E = np.divmod(load_E, num_ranks)
    start_E = (np.cumsum(more_E) - more_E) % num_ranks
    place_WE = (np.arange(num_ranks)[:, None] - start_E) % num_ranks
    return each_E + (place_WE < more_E)


def even(total: int, parts: int) -> tuple[int, ...]:
    """Return a number in equal parts, the remainder in the first."""
    each, more = divmod(total, parts)
    return tuple(each + (part < more) for part in range(parts))
