"""The placement of a run: read from its file, checked against the model and the ranks.

A file for another number of ranks, as after an elastic restart on fewer, is planned again from the
loads that it holds, with as many copies per layer and rank; without loads it is refused.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from engine.config import CONTIGUOUS, Config
from engine.config.validation import ConfigError
from engine.distributed.collectives import broadcast_object, gather_objects
from engine.distributed.errors import name_ranks
from engine.distributed.groups import Topology
from engine.models.registry import read_spec
from engine.models.spec import ModelSpec, SparseSpec
from engine.moe.placement.placement import Placement
from engine.moe.placement.placement_file import digest, read_placement
from engine.moe.placement.search import MIXED, Loads, plan
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
    spec, error, placement = read_spec(hf_config, config.model.implementation), None, None
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
    if placement.num_ranks == topology.expert.size:
        return placement
    return _plan_again(placement, config, topology)


def _plan_again(placement: Placement, config: Config, topology: Topology) -> Placement:
    """Return the placement for this number of ranks, planned from the loads in the file.

    The first rank plans, so that all have the same. Collective over all ranks.

    Raises:
        ConfigError: on every rank: the file has no loads.
    """
    size, file = topology.expert.size, config.moe.placement
    loads = {
        name: {index: np.array([rows]) for index, rows in domain.loads_E.items()}
        for name, domain in placement.domains.items()
        if name != MIXED and domain.loads_E
    }
    if not loads:
        raise ConfigError(
            f"moe.placement: the file {file} is for {placement.num_ranks} ranks, parallel.expert "
            f"is {size}, and it holds no loads to plan again from; plan again with "
            f"tools/plan_placement.py --ranks {size}, or set moe.placement=contiguous"
        )
    made = None
    if topology.world.rank == 0:
        made = plan_for_ranks(placement, loads, size)
    made = broadcast_object(made, topology.host_world)
    if topology.world.rank == 0:
        shares = ", ".join(f"{name} {each.share:.3f}" for name, each in made.domains.items())
        logger.warning(
            "moe.placement: the file %s is for %d ranks and this run has %d per copy of the "
            "experts: planned again from the loads in the file, with %d copies instead of %d; "
            "shares of perfect balance to expect: %s",
            file,
            placement.num_ranks,
            size,
            made.num_copies,
            placement.num_copies,
            shares,
        )
    return made


def plan_for_ranks(placement: Placement, loads: Loads, num_ranks: int) -> Placement:
    """Return a placement with as many copies per rank for another number of ranks; pure.

    Args:
        placement: so far.
        loads: of its domains.
        num_ranks: W.
    """
    copies: dict[int, int] = {}
    for index in next(iter(loads.values())):
        copies[index] = 0
        if num_ranks > 1:
            held = placement.layer(index).num_copies
            copies[index] = -(-held * num_ranks // placement.num_ranks)
    return plan(
        loads,
        placement.num_experts,
        num_ranks,
        num_copies=copies,
        precision=placement.precision,
        fingerprint=placement.fingerprint,
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
    if config.moe.copies.replan != "off" and not placement.num_copies:
        raise ConfigError(
            f"moe.copies.replan = {config.moe.copies.replan}: the file {config.moe.placement} has "
            "no copies to change; plan with --copies, or set replan to off"
        )
    low_bit = placement.precision != "model" and placement.num_copies
    if low_bit and config.moe.overlap.two_batch:
        raise ConfigError(
            "moe.overlap.two_batch = True: cannot be combined with the "
            f"{placement.precision} copies of moe.placement, whose rows are chosen over a whole "
            "step; use copies in the model's precision, or two_batch = false"
        )
