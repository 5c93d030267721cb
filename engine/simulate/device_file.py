"""Device files: a device's figures (assumed), or the costs of a model on it (fitted), as YAML.

format: lockstep-device-1
name: h100
assumed: true                 # nothing of it was measured
sources: {...}                # of the figures
figures: {...}                # `figures.py`; or
costs: {attention: {...}}     # `cost_model.py`, seconds; holds for one model
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from engine.config.loader import PROJECT_ROOT
from engine.simulate.cost_model import CostModel, ExpertLine, Hop, Line
from engine.simulate.figures import Figures

FORMAT = "lockstep-device-1"
FOLDER = PROJECT_ROOT / "configs" / "devices"
_KEYS = ("format", "name", "assumed", "sources", "figures", "costs")
_PARTS: dict[str, type] = {
    "attention": Line, "gate": Line, "plan": Line, "experts": ExpertLine,
    "consensus": Hop, "dispatch": Hop, "combine": Hop, "network": Hop, "step": Line,
}  # fmt: skip
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class DeviceFile:
    """What a file says; exactly one of the last two."""

    path: Path
    name: str
    assumed: bool
    figures: Figures | None
    costs: CostModel | None


def read_device(name: str) -> DeviceFile:
    """Read a device file.

    Args:
        name: of a file in configs/devices, or a path.

    Raises:
        ValueError: naming the file, the key and what to do.
    """
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        path = Path(name).expanduser()
    known = ", ".join(sorted(each.stem for each in FOLDER.glob("*.yaml"))) or "none"
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"--device {name}: cannot be read ({error.strerror}); give one of {known}, or a file "
            "that --write-device wrote"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--device {path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise ValueError(
            f"--device {path}: format must be {FORMAT}; give one of {known}, or a file that "
            "--write-device wrote"
        )
    if unknown := sorted(str(key) for key in data if key not in _KEYS):
        raise ValueError(
            f"--device {path}: unknown key {unknown[0]!r}; the keys are {', '.join(_KEYS)}"
        )
    if ("figures" in data) == ("costs" in data):
        raise ValueError(f"--device {path}: give either figures or costs")
    label, assumed = str(data.get("name", path.stem)), data.get("assumed") is True
    if "figures" in data:
        figures = _built(Figures, data["figures"], f"--device {path}: figures")
        return DeviceFile(path, label, assumed, figures, None)
    return DeviceFile(path, label, assumed, None, _costs(label, data, f"--device {path}: costs"))


def write_device(costs: CostModel, path: Path) -> None:
    """Write fitted costs as a device file.

    Raises:
        ValueError: the file cannot be written.
    """
    parts = {key: value for key, value in asdict(costs).items() if value is not None}
    name, measured = parts.pop("name"), parts.pop("measured")
    data = {
        "format": FORMAT,
        "name": name,
        "assumed": not measured,
        "sources": {"costs": measured},
        "costs": parts,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--write-device {path}: cannot be written: {error.strerror}") from error


def _costs(name: str, data: Mapping[str, Any], where: str) -> CostModel:
    costs = data["costs"]
    if not isinstance(costs, Mapping):
        raise ValueError(f"{where}: must be a mapping of {', '.join(_PARTS)}")
    built: dict[str, Any] = {
        key: _built(_PARTS[key], value, f"{where}.{key}") if key in _PARTS else value
        for key, value in costs.items()
    }
    cores = built.get("cores")
    if cores is not None and (type(cores) is not int or cores < 1):
        raise ValueError(f"{where}.cores = {cores!r}: must be a whole number from 1")
    sources = data.get("sources")
    measured = sources.get("costs", "") if isinstance(sources, Mapping) else ""
    try:
        return CostModel(name=name, measured=str(measured), **built)
    except TypeError as error:
        known = ", ".join((*_PARTS, "host", "cores"))
        raise ValueError(f"{where}: {error}; the keys are {known}") from error


def _built(kind: type[_T], values: Any, where: str) -> _T:
    """Return a dataclass of numbers of at least 0."""
    known = fields(kind)  # type: ignore[arg-type]
    names = [each.name for each in known]
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: must be a mapping of {', '.join(names)}")
    for key, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key not in names or not is_number or not 0 <= value < float("inf"):
            raise ValueError(
                f"{where}.{key} = {value!r}: must be one of {', '.join(names)}, with a number of "
                "at least 0"
            )
    if missing := [e.name for e in known if e.default is MISSING and e.name not in values]:
        raise ValueError(f"{where}: {missing[0]} is missing")
    return kind(**{key: float(value) for key, value in values.items()})
