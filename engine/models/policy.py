"""The policy of a run: read from its file, checked against the model, and put in the place of
moe.capacity and moe.placement.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from engine.config import CONTIGUOUS, Config
from engine.config.validation import ConfigError
from engine.distributed.collectives import gather_objects
from engine.distributed.errors import name_ranks
from engine.distributed.groups import Topology
from engine.models.language_model import LanguageModel
from engine.models.registry import read_spec
from engine.models.spec import ModelSpec, SparseSpec
from engine.moe.placement import placement_file
from engine.moe.policy.policy import Policy
from engine.moe.policy.policy_file import digest, placement_path, policy_error, read_policy
from engine.weights.fingerprint import model_fingerprint

logger = logging.getLogger(__name__)


def resolve_policy(config: Config, hf_config: Any, topology: Topology) -> Policy | None:
    """Return the policy that moe.policy names, for this model; None without a file.

    Collective over all ranks where there is a file: every rank must call.

    Args:
        hf_config: the checkpoint's transformers configuration.

    Raises:
        ConfigError: on every rank, naming moe.policy, what is wrong and what to do.
    """
    file = config.moe.policy
    if file is None:
        return None
    spec, error, policy = read_spec(hf_config, config.model.implementation), None, None
    try:
        policy = read_policy(file)
        check_policy(policy, spec, config)
    except ConfigError as caught:
        error = str(caught)
    found = gather_objects((error, None if policy is None else digest(policy)), topology.host_world)
    if errors := {rank: text for rank, (text, _) in enumerate(found) if text is not None}:
        ranks = "" if len(errors) == len(found) else f" ({name_ranks(list(errors))})"
        raise ConfigError(f"{next(iter(errors.values()))}{ranks}")
    if len({text for _, text in found}) > 1:
        raise ConfigError(
            f"moe.policy = {file!r}: the hosts of this run hold different files there; copy the "
            "same to all"
        )
    assert policy is not None
    size = topology.expert.size
    if topology.world.rank == 0 and policy.ranks not in (None, size):
        logger.warning(
            "moe.policy: the file %s was made for %d ranks per copy of the experts and this run has"
            " %d: what it expects of share and loss does not hold here",
            file,
            policy.ranks,
            size,
        )
    return policy


def check_policy(policy: Policy, spec: ModelSpec, config: Config) -> None:
    """Check a policy against a model and the other settings.

    Raises:
        ConfigError: naming the file and what does not fit.
    """
    file = config.moe.policy
    assert file is not None
    sparse = [i for i, layer in enumerate(spec.layers) if isinstance(layer.mlp, SparseSpec)]
    if not sparse:
        raise policy_error(file, "the model has no MoE layer; set moe.policy=null")
    if unknown := sorted(set(policy.layers) - set(sparse)):
        raise policy_error(
            file,
            f"layers.{unknown[0]}: is no MoE layer of this model, which has layers {min(sparse)} "
            f"to {max(sparse)}",
        )
    if policy.fingerprint is not None and policy.fingerprint != (
        own := model_fingerprint(config.model)
    ):
        raise policy_error(
            file,
            f"was made for another model (fingerprint {policy.fingerprint}, this model's is "
            f"{own}); make one for this model, or leave out its key `model` to use it all the same",
        )
    if policy.placement is None and config.moe.copies.replan != "off":
        raise ConfigError(
            f"moe.copies.replan = {config.moe.copies.replan}: changes the copies of a placement, "
            f"and the policy {file} names none; name one there, or set replan to off"
        )
    path = placement_path(policy, file)
    if policy.placement is not None and path is not None:
        found = placement_file.digest(placement_file.read_placement(path))
        if found != policy.placement.digest:
            raise policy_error(
                file,
                f"placement.digest = {policy.placement.digest}: the placement file {path} has "
                f"{found}, so it is not the one that the policy was made with; restore that file, "
                "or make the policy again",
            )
    for index in policy.layers:
        try:
            in_place_of(policy, config, index)
        except ConfigError as error:
            raise policy_error(file, _of_layer("; ".join(error.problems), index)) from None


def in_place_of(policy: Policy, config: Config, index: int | None = None) -> Config:
    """Return a config in which a policy has taken the place of moe.capacity and moe.placement.

    moe.capacity is that of one layer.

    Args:
        index: of the layer; None: the first that may drop something.

    Raises:
        ConfigError: settings that contradict each other.
    """
    file = config.moe.policy
    assert file is not None
    capacity = policy.summary if index is None else policy.layer(index)
    placement = placement_path(policy, file) or CONTIGUOUS
    return replace(config, moe=replace(config.moe, capacity=capacity, placement=placement))


def set_policy(model: LanguageModel, policy: Policy, file: str) -> None:
    """Give every MoE layer its capacity settings, alike on every rank.

    file: of the policy.

    Raises:
        ConfigError: settings that this model or number of ranks cannot honour.
    """
    for layer in model.moe_layers:
        try:
            layer.set_capacity(policy.layer(layer.layer))
        except ValueError as error:
            text = _of_layer(str(error), layer.layer)
            raise policy_error(file, text) from error


def _of_layer(text: str, index: int) -> str:
    """Return an error about moe.capacity as one about a layer of the policy."""
    return text.replace("moe.capacity.", f"layers.{index}.")
