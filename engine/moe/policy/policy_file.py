"""Policy files: a `Policy` as YAML, and what is said where one is wrong.

    format: lockstep-policy-1
    ranks: 4                     # expert-parallel ranks that it was made for; may be left out
    model: 1f0c...               # fingerprint of the model; may be left out
    data: {text.jsonl: 9a1b...}  # fingerprints of the calibration data; may be left out
    placement:                   # homes and copies of experts; may be left out
      file: placement.yaml       # from the folder of this file
      digest: 5be3...            # of what it holds
    layers:                      # a layer that is not here drops nothing
      0: {factor: 1.05, scope: rank}
      2: {factor: 1.25, order: first, phases: [prefill, decode]}
    expected:                    # what was measured; may be left out
      share: 0.951
      loss: 0.00071
      bound: 0.00098

The keys of a layer are those of `moe.capacity` but for `speed_aware`; `policy` is token_drop unless
given. `standin` is reserved. `digest` is the policy's part of a job: equal for equal policies,
however their files are written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from decimal import Decimal
from pathlib import Path
from typing import Any

from engine.config import CapacityConfig
from engine.config.loader import dump_yaml, parse_yaml, section_from_tree, written_number
from engine.config.validation import ConfigError
from engine.moe.policy.policy import Expected, NamedPlacement, Policy

FORMAT = "lockstep-policy-1"
_KEYS = ("format", "ranks", "model", "data", "placement", "layers", "expected")
_MAX_LAYER = 100_000


def read_policy(path: str | Path) -> Policy:
    """Read and check a policy file.

    Raises:
        ConfigError: naming the file, the field and what to do.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise policy_error(path, f"cannot be read ({error}); give a file that exists") from error
    return parse_policy(parse_yaml(text, f"moe.policy: the file {path}"), path)


def parse_policy(data: Any, path: str | Path) -> Policy:
    """Check what a file holds and return it as a policy.

    Raises:
        ConfigError: naming the file, the field and what to do.
    """
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
        raise policy_error(
            path, f"format = {found!r}: must be {FORMAT}; docs/policy.md has an example"
        )
    if unknown := sorted(str(key) for key in data if key not in _KEYS):
        raise policy_error(path, f"unknown key {unknown[0]!r}; the keys are {', '.join(_KEYS)}")
    ranks = data.get("ranks")
    if ranks is not None and (not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1):
        raise policy_error(path, f"ranks = {ranks!r}: must be a whole number of at least 1")
    expected = data.get("expected")
    return Policy(
        layers=_layers(data.get("layers"), path),
        placement=_placement(data.get("placement"), path),
        fingerprint=_text(data.get("model"), "model", path),
        data=_fingerprints(data.get("data"), path),
        ranks=ranks,
        expected=None if expected is None else _section(Expected, expected, "expected", path),
    )


def to_data(policy: Policy) -> dict[str, Any]:
    """Return a policy as plain data, as a file holds it: settings that are not the default."""
    data: dict[str, Any] = {"format": FORMAT}
    if policy.ranks is not None:
        data["ranks"] = policy.ranks
    if policy.fingerprint is not None:
        data["model"] = policy.fingerprint
    if policy.data:
        data["data"] = dict(policy.data)
    if policy.placement is not None:
        data["placement"] = asdict(policy.placement)
    data["layers"] = {index: _entry(each) for index, each in sorted(policy.layers.items())}
    if policy.expected is not None:
        default = Expected()
        data["expected"] = {
            key: value
            for key, value in asdict(policy.expected).items()
            if value != getattr(default, key)
        }
    return data


def write_policy(policy: Policy, path: str | Path) -> None:
    """Write a policy file."""
    Path(path).write_text(dump_yaml(to_data(policy)), encoding="utf-8")


def digest(policy: Policy) -> str:
    """Return a short hash of what decides results: the limits and the placement, not what was
    measured of them.
    """
    layers = {}
    for index, capacity in policy.limited.items():
        factor = capacity.exact_factor
        written = format(factor.normalize(), "f") if factor.is_finite() else "inf"
        settings = asdict(capacity) | {"factor": written, "phases": sorted(capacity.phases)}
        layers[index] = settings
    placement = None if policy.placement is None else policy.placement.digest
    text = json.dumps({"layers": layers, "placement": placement}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def placement_path(policy: Policy, path: str | Path) -> str | None:
    """Return the placement file that a policy names; None: it names none.

    path: of the policy.
    """
    if policy.placement is None:
        return None
    return os.path.join(os.path.dirname(path), os.path.expanduser(policy.placement.file))


def policy_error(path: str | Path, text: str) -> ConfigError:
    """Return the error that says what is wrong with a policy file."""
    return ConfigError(f"moe.policy: the file {path}: {text}")


def _layers(value: Any, path: str | Path) -> dict[int, CapacityConfig]:
    if not isinstance(value, Mapping):
        raise policy_error(
            path,
            f"layers = {value!r}: must be a mapping of layer numbers, such as "
            "{0: {factor: 1.05, scope: rank}}; {} where no layer drops anything",
        )
    found: dict[int, CapacityConfig] = {}
    for key, each in value.items():
        if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key <= _MAX_LAYER:
            raise policy_error(path, f"layers: the key {key!r} must be the number of a layer")
        found[key] = _layer(each, f"layers.{key}", path)
    return found


def _layer(value: Any, name: str, path: str | Path) -> CapacityConfig:
    settings = dict(value) if isinstance(value, Mapping) else value
    if isinstance(value, Mapping):
        if settings.pop("standin", None) is not None:
            raise policy_error(
                path,
                f"{name}.standin = {value['standin']!r}: stand-ins for dropped assignments do not "
                "exist yet; leave the key out",
            )
        if "speed_aware" in settings:
            raise policy_error(
                path,
                f"{name}.speed_aware = {settings['speed_aware']!r}: is not a setting of one layer; "
                "leave it out, or use moe.capacity without moe.policy",
            )
        if "factor" not in settings and settings.get("policy") != "none":
            raise policy_error(
                path,
                f"{name}.factor: is missing; give the capacity over the mean load, such as 1.05",
            )
        settings.setdefault("policy", "token_drop")
    return _section(CapacityConfig, settings, name, path)


def _placement(value: Any, path: str | Path) -> NamedPlacement | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or set(value) != {"file", "digest"}:
        raise policy_error(
            path, f"placement = {value!r}: must have the keys file and digest, of a placement file"
        )
    file, hashed = (_text(value[key], f"placement.{key}", path) for key in ("file", "digest"))
    if not file or "\0" in file or not hashed:
        raise policy_error(path, f"placement = {value!r}: file and digest must not be empty")
    return NamedPlacement(file, hashed)


def _fingerprints(value: Any, path: str | Path) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise policy_error(path, f"data = {value!r}: must be a mapping of names to fingerprints")
    return {str(name): _text(each, f"data.{name}", path) or "" for name, each in value.items()}


def _text(value: Any, name: str, path: str | Path) -> str | None:
    """Return a fingerprint or a name, whose digits YAML may have taken for a number."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise policy_error(path, f"{name} = {value!r}: must be text; put it into quotes")
    raise policy_error(path, f"{name} = {value!r}: must be text")


def _section(section: type, value: Any, name: str, path: str | Path) -> Any:
    if not isinstance(value, Mapping):
        keys = ", ".join(item.name for item in fields(section))
        raise policy_error(path, f"{name} = {value!r}: must be a mapping with keys of {keys}")
    try:
        return section_from_tree(section, value, f"{name}.")
    except ConfigError as error:
        raise policy_error(path, "; ".join(error.problems)) from None


def _entry(capacity: CapacityConfig) -> dict[str, Any]:
    default = CapacityConfig(policy="token_drop")
    entry: dict[str, Any] = {}
    if capacity.policy != "none":
        factor: Decimal | str = capacity.exact_factor
        entry["factor"] = written_number(str(capacity.factor)) if factor.is_finite() else "inf"
    for item in fields(capacity):
        value = getattr(capacity, item.name)
        if item.name != "factor" and value != getattr(default, item.name):
            entry[item.name] = list(value) if isinstance(value, tuple) else value
    return entry
