"""Placement files: a `Placement` as YAML or JSON, and what is said where one is wrong.

    format: lockstep-placement-1
    ranks: 2
    experts: 4
    precision: int4            # of copies: model, int8 or int4
    model: 1f0c...             # fingerprint of the model; may be left out
    layers:
      0:
        homes: [0, 0, 1, 1]    # the rank of each expert
        copies: {3: [0]}       # expert: further ranks; may be left out
    domains:                   # what it was planned for; may be left out
      text:
        share: 0.97
        layers: {0: {share: 0.97, rows: [210, 190, 305, 295]}}
    row_times: [1.0, 1.0]      # of each rank over the fastest's; may be left out

A file that ends in .json is JSON, every other one YAML. `digest` is the placement's part of a job:
equal for equal placements, however their files are written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard, get_args

import yaml

from engine.config.validation import ConfigError
from engine.moe.placement.placement import LayerPlacement, Placement, PlannedLoads, Precision

FORMAT = "lockstep-placement-1"
_KEYS = ("format", "ranks", "experts", "precision", "model", "layers", "domains", "row_times")


def read_placement(path: str | Path) -> Placement:
    """Read and check a placement file.

    Raises:
        ConfigError: naming the file, the key and what to do.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _error(path, f"cannot be read ({error}); give a file that exists") from error
    try:
        data = json.loads(text) if str(path).endswith(".json") else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise _error(path, f"is not {_kind(path)}: {reason}") from error
    return parse_placement(data, path)


def parse_placement(data: Any, path: str | Path) -> Placement:
    """Check what a file holds and return it as a placement.

    Raises:
        ConfigError: naming the file, the key and what to do.
    """
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
        raise _error(
            path,
            f"format = {found!r}: must be {FORMAT}; write the file with tools/plan_placement.py",
        )
    if unknown := sorted(str(key) for key in data if key not in _KEYS):
        raise _error(path, f"unknown key {unknown[0]!r}; the keys are {', '.join(_KEYS)}")
    ranks, experts = (_count(data, name, path) for name in ("ranks", "experts"))
    precision = data.get("precision", "model")
    if precision not in get_args(Precision):
        choices = ", ".join(get_args(Precision))
        raise _error(path, f"precision = {precision!r}: must be one of {choices}")
    layers = {
        index: _layer(value, index, ranks, experts, path)
        for index, value in _by_number(data.get("layers", {}), "layers", path).items()
    }
    domains = data.get("domains") or {}
    if not isinstance(domains, Mapping):
        raise _error(path, "domains: must be a mapping of names")
    times = data.get("row_times") or []
    if times and not (
        isinstance(times, list)
        and len(times) == ranks
        and all(_is_number(each) and each > 0 for each in times)
    ):
        raise _error(path, f"row_times = {times!r}: must be {ranks} numbers above 0, one per rank")
    model = data.get("model")
    return Placement(
        num_ranks=ranks,
        num_experts=experts,
        layers=layers,
        precision=precision,
        fingerprint=None if model is None else str(model),
        domains={str(name): _domain(each, name, experts, path) for name, each in domains.items()},
        row_times_W=tuple(map(float, times)),
    )


def to_data(placement: Placement) -> dict[str, Any]:
    """Return a placement as plain data, as a file holds it."""
    layers: dict[int, Any] = {}
    for index, layer in sorted(placement.layers.items()):
        copies = {e: list(ranks) for e, ranks in enumerate(layer.copies_E) if ranks}
        layers[index] = {"homes": list(layer.home_E)} | ({"copies": copies} if copies else {})
    data: dict[str, Any] = {
        "format": FORMAT,
        "ranks": placement.num_ranks,
        "experts": placement.num_experts,
        "precision": placement.precision,
    }
    if placement.fingerprint is not None:
        data["model"] = placement.fingerprint
    data["layers"] = layers
    if placement.domains:
        data["domains"] = {
            name: {
                "share": round(domain.share, 4),
                "layers": {
                    index: {
                        "share": round(domain.layer_shares[index], 4),
                        "rows": list(domain.loads_E[index]),
                    }
                    for index in sorted(domain.loads_E)
                },
            }
            for name, domain in placement.domains.items()
        }
    if placement.row_times_W:
        data["row_times"] = [round(each, 4) for each in placement.row_times_W]
    return data


def write_placement(placement: Placement, path: str | Path) -> None:
    """Write a placement file."""
    data = to_data(placement)
    if str(path).endswith(".json"):
        text = json.dumps(data, indent=1) + "\n"
    else:
        text = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100)
    Path(path).write_text(text, encoding="utf-8")


def digest(placement: Placement) -> str:
    """Return a short hash of what decides where rows are computed, not of what was planned for."""
    data = to_data(placement)
    keys = ("ranks", "experts", "precision", "layers", "row_times")
    part = {key: data[key] for key in keys if key in data}
    text = json.dumps(part, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _layer(value: Any, index: int, ranks: int, experts: int, path: str | Path) -> LayerPlacement:
    name = f"layers.{index}"
    if not isinstance(value, Mapping) or not set(value) <= {"homes", "copies"}:
        raise _error(path, f"{name} = {value!r}: must have the keys homes and, perhaps, copies")
    homes = value.get("homes")
    if not _is_ranks(homes) or len(homes) != experts:
        raise _error(
            path, f"{name}.homes = {homes!r}: must be {experts} ranks, one for each expert"
        )
    copies: list[tuple[int, ...]] = [()] * experts
    for expert, found in _by_number(value.get("copies") or {}, f"{name}.copies", path).items():
        if expert >= experts or not _is_ranks(found):
            raise _error(
                path,
                f"{name}.copies.{expert} = {found!r}: must be a list of ranks of an expert below "
                f"{experts}",
            )
        copies[expert] = tuple(sorted(found))
    layer = LayerPlacement(tuple(homes), tuple(copies))
    if problems := layer.problems(ranks):
        raise _error(path, f"{name}: {problems[0]}; ranks are 0 to {ranks - 1}")
    return layer


def _domain(value: Any, name: str, experts: int, path: str | Path) -> PlannedLoads:
    where = f"domains.{name}"
    if not isinstance(value, Mapping) or not _is_number(value.get("share")):
        raise _error(path, f"{where}: must have a share and layers")
    shares: dict[int, float] = {}
    loads: dict[int, tuple[int, ...]] = {}
    for index, layer in _by_number(value.get("layers") or {}, f"{where}.layers", path).items():
        rows = layer.get("rows") if isinstance(layer, Mapping) else None
        if not _is_ranks(rows) or len(rows) != experts or not _is_number(layer.get("share")):
            raise _error(
                path, f"{where}.layers.{index}: must have a share and rows of {experts} experts"
            )
        shares[index], loads[index] = float(layer["share"]), tuple(rows)
    return PlannedLoads(float(value["share"]), shares, loads)


def _count(data: Mapping[str, Any], name: str, path: str | Path) -> int:
    value = data.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _error(path, f"{name} = {value!r}: must be a whole number of at least 1")
    return value


def _by_number(value: Any, name: str, path: str | Path) -> dict[int, Any]:
    """Return a mapping with whole numbers as keys, which JSON writes as text."""
    if not isinstance(value, Mapping):
        raise _error(path, f"{name} = {value!r}: must be a mapping of numbers")
    found: dict[int, Any] = {}
    for key, each in value.items():
        if isinstance(key, bool) or not str(key).isdecimal():
            raise _error(path, f"{name}: the key {key!r} must be a whole number")
        found[int(key)] = each
    return found


def _is_ranks(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in value
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _kind(path: str | Path) -> str:
    return "JSON" if str(path).endswith(".json") else "YAML"


def _error(path: str | Path, text: str) -> ConfigError:
    return ConfigError(f"moe.placement: the file {path}: {text}")
