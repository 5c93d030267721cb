"""The placement of a run: read from its file, checked against the model and the ranks.

A file for another number of ranks, as after an elastic restart on fewer, is planned again from the
loads that it holds, with as many copies per layer and rank; without loads it is refused.
"""

from __future__ import annotations

import logging
from typing import Any

from engine.config import CONTIGUOUS, Config
from engine.config.validation import ConfigError
from engine.distributed.collectives import gather_objects
from engine.distributed.errors import name_ranks
from engine.distributed.groups import Topology
from engine.models.registry import read_spec
from engine.models.spec import ModelSpec, SparseSpec
from engine.moe.placement.placement import Placement
from engine.moe.placement.placement_file import digest, read_placement
from engine.weights.fingerprint import model_fingerprint

logger = logging.getLogger(__name__)


def resolve_placement(config: Config, hf_config: Any, topology: Topology) -> Placement | None:
    """Return the placement that moe.placement names, for this model and these ranks; None without
    a file.

    Collective over all ranks where there is a file: every rank must call.

    Args:
        hf_config: the checkpoint's transformers configuration.

    Raises:
        ConfigError: on every rank, naming moe.placement, what is wrong and what to do.
    """
    if config.moe.placement == CONTIGUOUS:
        return None
    spec, error, placement = read_spec(hf_config), None, None
    try:
        placement = read_placement(config.moe.placement)
        check_placement(placement, spec, config)
    except ConfigError as caught:
        error = str(caught)
    found = gather_objects(
        (error, None if placement is None else digest(placement)), topology.host_world
    )
    if errors := {rank: text for rank, (text, _) in enumerate(found) if text is not None}:
        ranks = "" if len(errors) == len(found) else f" ({name_ranks(list(errors))})"
        raise ConfigError(f"{next(iter(errors.values()))}{ranks}")
    if len({text for _, text in found}) > 1:
        raise ConfigError(
            f"moe.placement = {config.moe.placement!r}: the hosts of this run hold different files "
            "there; copy the same to all"
        )
    assert placement is not None
    size = topology.expert.size
    if placement.num_ranks == size:
        return placement
    raise ConfigError(
        f"moe.placement: the file {config.moe.placement} is for {placement.num_ranks} ranks and "
        f"parallel.expert is {size}; plan again with tools/plan_placement.py --ranks {size}, or "
        "set moe.placement=contiguous"
    )


def check_placement(placement: Placement, spec: ModelSpec, config: Config) -> None:
    """Check a placement against a model.

    Raises:
        ConfigError: naming the file and what does not fit.
    """
    where = f"moe.placement: the file {config.moe.placement}"
    sparse = {
        index: layer.mlp.moe
        for index, layer in enumerate(spec.layers)
        if isinstance(layer.mlp, SparseSpec)
    }
    if not sparse:
        raise ConfigError(f"{where}: the model has no MoE layer; set moe.placement=contiguous")
    experts = next(iter(sparse.values())).router.num_experts
    if placement.num_experts != experts:
        raise ConfigError(
            f"{where}: is for {placement.num_experts} experts and the model has {experts}; plan "
            "again from loads of this model"
        )
    if unknown := sorted(set(placement.layers) - set(sparse)):
        raise ConfigError(
            f"{where}: layer {unknown[0]} is no MoE layer of this model, which has layers "
            f"{min(sparse)} to {max(sparse)}"
        )
    if placement.fingerprint is not None and placement.fingerprint != (
        own := model_fingerprint(config.model)
    ):
        raise ConfigError(
            f"{where}: was made for another model (fingerprint {placement.fingerprint}, this "
            f"model's is {own}); plan again, or leave out its key `model` to use it all the same"
        )
    low_bit = placement.precision != "model" and placement.num_copies
    if low_bit and config.moe.overlap.two_batch:
        raise ConfigError(
            "moe.overlap.two_batch = True: cannot be combined with the "
            f"{placement.precision} copies of moe.placement, whose rows are chosen over a whole "
            "step; use copies in the model's precision, or two_batch = false"
        )
