"""Copies report: what the copies of a run's experts computed and what they take. Pure.

A rank's experts are those whose home it is, then those that it has a copy of; which of them are
copies is known to the rank alone, so it sends that with its measurements (`OwnPlacement`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.models.language_model import LanguageModel
from engine.moe.placement.placement_file import digest
from engine.profiling.loads import LayerLoad, LoadCounter
from engine.profiling.report import LayerPlacementReport, RankPlacement, RunPlacement

RankLoads = Mapping[int, tuple[list[int], list[int]]]  # layer -> a rank's experts, their rows


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnPlacement:
    """The placement of a run, as one rank sees it."""

    file: str  # moe.placement
    digest: str
    precision: str  # of copies
    copies: int  # of all layers, on all ranks
    num_homes: Mapping[int, int]  # layer -> experts whose home this rank is
    copy_bytes: int  # memory of this rank's copies


def own_placement(model: LanguageModel, file: str) -> OwnPlacement | None:
    """Return the placement of this rank's model; None without one.

    file: moe.placement.
    """
    placement = model.placement
    if placement is None:
        return None
    return OwnPlacement(
        file=file,
        digest=digest(placement),
        precision=placement.precision,
        copies=placement.num_copies,
        num_homes={layer.layer: layer.experts.num_homes for layer in model.moe_layers},
        copy_bytes=sum(layer.experts.copy_bytes for layer in model.moe_layers),
    )


def copied(own: OwnPlacement | None, loads: RankLoads, layer: int) -> list[tuple[int, int]]:
    """Return one rank's copies in a layer: expert, rows."""
    if own is None:
        return []
    experts, rows = loads[layer]
    first = own.num_homes[layer]
    return list(zip(experts[first:], rows[first:], strict=True))


def rank_placement(own: OwnPlacement | None, loads: RankLoads) -> RankPlacement | None:
    """Return what one rank's copies did."""
    if own is None:
        return None
    rows = sum(count for layer in loads for _, count in copied(own, loads, layer))
    return RankPlacement(copied_rows=rows, copy_bytes=own.copy_bytes)


def layer_placement(
    ranks: Sequence[tuple[OwnPlacement | None, RankLoads]], layer: int, load: LayerLoad
) -> LayerPlacementReport | None:
    """Return what the copies of a layer did; None where it has none.

    Args:
        ranks: of one expert-parallel group.
        load: of the layer, before capacity equal on these ranks.
    """
    copies = [each for own, loads in ranks for each in copied(own, loads, layer)]
    if not copies:
        return None
    rows = [0] * len(load.experts)
    for expert, count in copies:
        rows[expert] += count
    return LayerPlacementReport(
        copied_rows=sum(rows),
        expert_copied_rows=rows,
        share=load.share,
        share_after=load.share_after,
    )


def run_placement(
    own: OwnPlacement | None, layers: Sequence[LayerPlacementReport | None], loads: LoadCounter
) -> RunPlacement | None:
    """Return the placement of a run; None without one. layers: of one expert-parallel group."""
    if own is None:
        return None
    return RunPlacement(
        file=own.file,
        digest=own.digest,
        precision=own.precision,
        copies=own.copies,
        copied_rows=sum(layer.copied_rows for layer in layers if layer is not None),
        share=loads.share(),
        share_after=loads.share_after(),
    )
