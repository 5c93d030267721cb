"""Reads the span files of a run and checks them. `engine/profiling/span_file.py` writes them.

A rank has one file, and a second one with its older steps when the first has grown too large. Both
begin with a header line; every other line is a step. Nothing of the engine is imported, so that a
report can be made where neither torch nor the model is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from straggler.run import (
    DURATION,
    LAYER,
    NUM_COLUMNS,
    OFFSET,
    PHASE,
    Held,
    RankHeader,
    RankSpans,
    Run,
)

FORMAT, VERSIONS = "lockstep-spans", (1, 2)
_NAME = re.compile(r"spans\.rank(\d+)(\.old)?\.jsonl")
_TYPES: dict[str, type] = {
    "rank": int,
    "host": str,
    "world_size": int,
    "group": list,
    "clock_error_ns": int,
    "phases": list,
    "num_layers": int,
    "num_experts": int,
    "policy": str,
}
# By version: which experts the rank has.
_HELD_TYPES: dict[int, dict[str, type]] = {
    1: {"first_expert": int, "num_local_experts": int},
    2: {"own_experts": dict, "num_homes": dict, "num_copies": dict},
}
# Fields that are equal on all ranks of one run.
_SHARED = ("world_size", "phases", "num_layers", "num_experts", "policy")
_AGAIN = "clear the folder and run the job again"


@dataclass(slots=True)
class _Step:
    """One line of a span file."""

    step: int
    start_ns: int
    prefill: int
    decode: int
    table_N7: np.ndarray  # its spans
    before: dict[int, list[int]]  # layer -> rows of each expert
    after: dict[int, list[int]]


def read_run(folder: Path) -> Run:
    """Read every rank's span files in a folder.

    Raises:
        ValueError: no span files, or one that is no span file or is damaged elsewhere than in its
            last line; the message names the file, the line and what to do.
    """
    files: dict[int, list[Path]] = {}
    for path in folder.glob("spans.rank*.jsonl"):
        if match := _NAME.fullmatch(path.name):
            files.setdefault(int(match[1]), []).append(path)
    if not files:
        what = "holds no span files (spans.rank*.jsonl)" if folder.is_dir() else "is no folder"
        raise ValueError(
            f"{folder}: {what}; run the job with profiler.spans = FOLDER and name that folder here"
        )
    notes: list[str] = []
    ranks: list[RankSpans] = []
    first: tuple[Path, RankHeader] | None = None
    for number, paths in sorted(files.items()):
        paths.sort(key=lambda path: not path.name.endswith(".old.jsonl"))  # the older half first
        read = _read_rank(paths, notes, {rank.header.group for rank in ranks})
        if read is None:
            continue
        if read.header.rank != number:
            raise ValueError(
                f"{paths[-1]}:1: the header has rank {read.header.rank}, the file's name rank "
                f"{number}; give the file its own name back"
            )
        first = first or (paths[-1], read.header)
        _check_shared(first, paths[-1], read.header)
        ranks.append(read)
    if not ranks:
        raise ValueError(f"{folder}: no rank wrote a step before the job ended; run it for longer")
    return Run(name=folder.resolve().name, ranks=ranks, notes=notes)


def _check_shared(first: tuple[Path, RankHeader], path: Path, header: RankHeader) -> None:
    for name in _SHARED:
        one, other = getattr(first[1], name), getattr(header, name)
        if one != other:
            raise ValueError(
                f"{path}:1: {name} is {other!r}, but {one!r} in {first[0].name}: files of more "
                f"than one run; {_AGAIN}"
            )


def _read_rank(paths: list[Path], notes: list[str], seen: set[tuple[int, ...]]) -> RankSpans | None:
    """Read one rank's files, the older first; None where they hold no step.

    Args:
        seen: groups of which a rank has been read: all ranks of a group have the same loads before
            capacity.
    """
    header: RankHeader | None = None
    steps: list[_Step] = []
    for path in paths:
        lines = _lines(path, notes)
        head = next(lines, None)
        if head is None:
            continue
        own = _header(head[1], path)
        if header is not None and own != header:
            raise ValueError(f"{path}:1: not the header of {paths[0].name}; {_AGAIN}")
        header = own
        for number, value in lines:
            where = f"{path}:{number}"
            step = _step(value, where, header)
            if steps and step.step <= steps[-1].step:
                raise ValueError(
                    f"{where}: step {step.step} after step {steps[-1].step}: files of more than "
                    f"one run; {_AGAIN}"
                )
            steps.append(step)
    if header is None or not steps:
        notes.append(f"{paths[-1].name} holds no whole step.")
        return None
    return _assemble(header, steps, keep_before=header.group not in seen)


def _lines(path: Path, notes: list[str]) -> Iterator[tuple[int, Any]]:
    """Yield line numbers and parsed lines; a torn last line becomes a note."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                value = json.loads(line)
            except ValueError:
                # A job that is killed leaves half a line, and only at the end.
                if next(file, None) is None and number > 1:
                    notes.append(
                        f"{path.name}: line {number}, the last, is torn (the job was killed while "
                        "it wrote); it is left out."
                    )
                    return
                kind = "the header" if number == 1 else "a step"
                raise ValueError(
                    f"{path}:{number}: not JSON, so not {kind} of a span file; copy the file "
                    "again, or remove it to go without this rank"
                ) from None
            yield number, value


def _header(value: Any, path: Path) -> RankHeader:
    where = f"{path}:1"
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(
            f'{where}: not the header of a span file ("format": "{FORMAT}"); name the folder that '
            "profiler.spans named"
        )
    version = value.get("version")
    if version not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise ValueError(
            f"{where}: version {version!r} of the format, this tool reads {known}; use the tool of "
            "the release that wrote it"
        )
    for name, kind in (*_TYPES.items(), *_HELD_TYPES[version].items()):
        if not isinstance(value.get(name), kind):
            raise ValueError(
                f"{where}: the header's {name} is {value.get(name)!r}, must be of type "
                f"{kind.__name__}; {_AGAIN}"
            )
    fields = {name: value[name] for name in _TYPES}
    lists = {"group": tuple(value["group"]), "phases": tuple(map(str, value["phases"]))}
    header = RankHeader(**{**fields, **lists}, held=_held(value, where))
    if header.rank not in header.group:
        raise ValueError(f"{where}: group {value['group']} lacks rank {header.rank}; {_AGAIN}")
    return header


def _held(value: dict[str, Any], where: str) -> dict[int, Held]:
    """Return the rank's experts of every layer."""
    num_experts = value["num_experts"]
    if value["version"] == 1:
        first = value["first_expert"]
        own = tuple(range(first, first + value["num_local_experts"]))
        return dict.fromkeys(range(value["num_layers"]), Held(own, len(own), 0))
    found: dict[int, Held] = {}
    try:
        for layer, experts in value["own_experts"].items():
            homes, copies = int(value["num_homes"][layer]), int(value["num_copies"][layer])
            held = found[int(layer)] = Held(tuple(map(int, experts)), homes, copies)
            unique = set(held.experts)
            if (
                len(unique) != len(held.experts)
                or not unique <= set(range(num_experts))
                or not 0 <= homes <= len(unique) <= homes + copies
            ):
                raise ValueError(f"layer {layer} has experts {experts}, homes {homes}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: the header's own_experts, num_homes and num_copies do not hold, layer by "
            f"layer, this rank's of {num_experts} experts ({type(error).__name__}: {error}); "
            f"{_AGAIN}"
        ) from error
    return found


def _step(value: Any, where: str, header: RankHeader) -> _Step:
    """Check one step's line against the header."""
    try:
        numbers = [int(value[name]) for name in ("step", "start_ns", "prefill", "decode")]
        table_N7 = np.array(value["spans"], dtype=np.int64).reshape(-1, NUM_COLUMNS)
        loads = [
            {int(layer): list(map(int, rows)) for layer, rows in value[name].items()}
            for name in ("before", "after")
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{where}: not a step ({type(error).__name__}: {error}); remove the line, or the file "
            "to go without this rank"
        ) from error
    phases, layers = table_N7[:, PHASE], table_N7[:, LAYER]
    rules = (
        (len(table_N7) > 0, "a step has at least one span"),
        (
            ((phases >= 0) & (phases < len(header.phases))).all(),
            f"a phase is 0 to {len(header.phases) - 1}",
        ),
        (
            ((layers >= -1) & (layers < header.num_layers)).all(),
            f"a layer is -1 to {header.num_layers - 1}",
        ),
        ((table_N7[:, [OFFSET, DURATION]] >= 0).all(), "offsets and durations are at least 0"),
        (
            all(len(rows) == header.num_experts for rows in loads[0].values()),
            f"before holds {header.num_experts} experts per layer",
        ),
        (
            all(
                layer in header.held and len(rows) == len(header.held[layer].experts)
                for layer, rows in loads[1].items()
            ),
            "after holds the rank's experts of each layer in the header",
        ),
    )
    for holds, rule in rules:
        if not holds:
            raise ValueError(f"{where}: {rule}, not so here; {_AGAIN}")
    return _Step(*numbers, table_N7, *loads)


def _assemble(header: RankHeader, steps: list[_Step], keep_before: bool) -> RankSpans:
    layers = sorted({layer for step in steps for layer in step.after})
    widest = max((len(header.held[layer].experts) for layer in layers), default=0)

    def stacked(name: str, width: int) -> np.ndarray:
        rows_SLE = np.zeros((len(steps), len(layers), width), dtype=np.int32)
        for index, step in enumerate(steps):
            loads: dict[int, list[int]] = getattr(step, name)
            for place, layer in enumerate(layers):
                if layer in loads:
                    rows_SLE[index, place, : len(loads[layer])] = loads[layer]
        return rows_SLE

    return RankSpans(
        header=header,
        steps_S=np.array([step.step for step in steps]),
        starts_S=np.array([step.start_ns for step in steps]),
        tokens_S2=np.array([(step.prefill, step.decode) for step in steps]),
        begins_S=np.cumsum([0, *(len(step.table_N7) for step in steps)]),
        table_N7=np.concatenate([step.table_N7 for step in steps]),
        layers=layers,
        before_SLE=stacked("before", header.num_experts) if keep_before else None,
        after_SLe=stacked("after", widest),
    )
