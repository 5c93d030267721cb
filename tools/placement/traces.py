"""Traces as domains: recorded loads of one model, each of one kind of traffic.

A trace is a folder that `profiler.routing` filled, or an .npz file with the arrays

    loads   integers [S, L, E], rows of every expert in every layer, step by step
    layers  integers [L], numbers of the MoE layers; may be left out: 0 .. L - 1

Legend: S steps, L MoE layers, E experts.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.moe.placement.search import MIXED
from engine.profiling.routing.trace import (
    read_trace,
)


@dataclass(frozen=True, slots=True)
class Domain:
    """One trace."""

    name: str
    path: Path
    loads_SLE: np.ndarray  # int64
    layers: tuple[int, ...]
    fingerprint: str | None  # of the model

    @property
    def by_layer(self) -> dict[int, np.ndarray]:
        """Return the loads of each layer, int64 [S, E]."""
        return {index: self.loads_SLE[:, n] for n, index in enumerate(self.layers)}


def read_domains(arguments: Sequence[str]) -> list[Domain]:
    """Read the traces, each given as PATH or NAME=PATH, and check that they are of one model.

    Raises:
        ValueError: naming the trace and what to do.
    """
    found: list[Domain] = []
    for argument in arguments:
        name, equals, path = argument.partition("=")
        domain = _read(name, Path(path)) if equals else _read(Path(name).stem, Path(name))
        if domain.name in [other.name for other in found]:
            raise ValueError(
                f"{argument}: a second trace named {domain.name!r}; name it with NAME={domain.path}"
            )
        if domain.name == MIXED:
            raise ValueError(
                f"{argument}: {MIXED!r} is the name of all traces together; name it otherwise with "
                f"NAME={domain.path}"
            )
        found.append(domain)
    first = found[0]
    for domain in found[1:]:
        for what, own, other in (
            ("layers", domain.layers, first.layers),
            ("experts", domain.loads_SLE.shape[2], first.loads_SLE.shape[2]),
            ("model", domain.fingerprint, first.fingerprint),
        ):
            if own != other and None not in (own, other):
                raise ValueError(
                    f"{domain.path}: {what} {own}, but {first.path} has {other}; all traces must "
                    "be of one model"
                )
    return found


def _read(name: str, path: Path) -> Domain:
    if not path.exists():
        raise ValueError(f"{path}: there is no such trace; give a folder of profiler.routing")
    if path.suffix == ".npz":
        domain = _read_arrays(name, path)
    else:
        trace = read_trace(path)
        domain = Domain(name, path, trace.loads_SLE, trace.layers, trace.fingerprint)
    if not domain.loads_SLE.sum():
        raise ValueError(f"{path}: no recorded rows; record a job with tokens")
    return domain


def _read_arrays(name: str, path: Path) -> Domain:
    try:
        with np.load(path) as arrays:
            loads_SLE = arrays["loads"]
            count = loads_SLE.shape[1] if loads_SLE.ndim == 3 else 0
            layers = arrays["layers"].tolist() if "layers" in arrays else list(range(count))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read as arrays of loads: {error}") from error
    whole = np.issubdtype(loads_SLE.dtype, np.integer) and loads_SLE.ndim == 3
    if not whole or len(layers) != count or (loads_SLE < 0).any():
        raise ValueError(
            f"{path}: loads must be integers [steps, layers, experts] of at least 0, and layers "
            "the number of each layer"
        )
    return Domain(name, path, loads_SLE.astype(np.int64), tuple(map(int, layers)), None)
