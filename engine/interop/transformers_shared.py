"""Transformers' shared part: what the layers of one registration have in common.

Settings, the phase of the tokens, process groups and row buffers. See `transformers_ep.py` for its
use. Imports nothing of transformers.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from engine.config import CapacityConfig, Config, ModelConfig, MoEConfig, RequestPhase
from engine.config.validation import ConfigError
from engine.distributed.collectives import gather_objects
from engine.distributed.groups import Topology
from engine.distributed.process_groups import create_groups_beside
from engine.moe.dispatch.buffers import RowBuffers
from engine.profiling.loads import LayerDrops

_TIMEOUT = timedelta(minutes=30)  # ranks may finish loading a model that far apart
_worlds: list[tuple[Any, Topology]] = []  # this process's group of all ranks, and the groups in it


class LockstepExperts:
    """What the layers of one registration share: settings, phase and groups."""

    phase: RequestPhase = "prefill"  # of the tokens of the next calls; the same on every rank

    def __init__(self, config: MoEConfig) -> None:
        self.config = config
        self._layers: weakref.WeakSet[Any] = weakref.WeakSet()  # LockstepEP
        self._model: Any = None  # the config of the model whose layers are being made
        self._made = 0
        self._row_buffers: RowBuffers | None = None

    @property
    def limits(self) -> bool:
        """Whether the tokens of the next calls are subject to capacity."""
        capacity = self.config.capacity
        return capacity.policy != "none" and self.phase in capacity.phases

    @property
    def drops(self) -> LayerDrops:
        """What capacity did to this rank's part of the tokens since this was last read, over all
        layers.
        """
        total = LayerDrops()
        for each in self._layers:
            if each.layer is not None:
                # SYNC: of the sums, only when they are read.
                total.add(each.layer.drops.read_and_reset())
        return total

    def set_capacity(self, config: CapacityConfig) -> None:
        """Change the capacity policy, between calls and alike on every rank.

        Raises:
            ValueError: settings that these layers cannot honour.
        """
        changed = replace(self.config, capacity=config)
        check_settings(changed)
        for each in self._layers:
            if each.layer is not None:
                each.layer.set_capacity(config)
        self.config = changed

    def follow(self, model: torch.nn.Module) -> None:
        """Set `phase` before every forward pass of a model: decode where each sequence has one new
        token, else prefill. For models that take input_ids or inputs_embeds by keyword.
        """

        def set_phase(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            given = kwargs.get("input_ids")
            given = kwargs.get("inputs_embeds") if given is None else given
            given = args[0] if given is None and args else given
            if given is not None:
                self.phase = "decode" if given.shape[1] == 1 else "prefill"

        model.register_forward_pre_hook(set_phase, with_kwargs=True)

    def add(self, layer: Any, model: Any) -> int:
        """Return the number of a new layer, among those of the model with this config."""
        self._layers.add(layer)
        if model is None or model is not self._model:
            self._model, self._made = model, 0
        self._made += 1
        return self._made - 1

    def shared(self, device_type: str) -> tuple[Topology, RowBuffers]:
        """Return the groups and the row buffers of all layers. Collective at the first call.

        Raises:
            ValueError: the ranks have different settings, raised on every rank.
        """
        topology = _groups(device_type)
        if self._row_buffers is None:
            settings = gather_objects(repr(self.config), topology.control)
            other = next((rank for rank, each in enumerate(settings) if each != settings[0]), None)
            if other is not None:
                raise ValueError(
                    f"register: rank {other} has other settings than rank 0 ({settings[other]} "
                    f"instead of {settings[0]}); give all ranks the same"
                )
            self._row_buffers = RowBuffers()
        return topology, self._row_buffers


def check_settings(config: MoEConfig) -> None:
    """Refuse settings that need what only the engine has.

    Raises:
        ValueError: one sentence per problem.
    """
    # The path is not read: a Config checks all its sections and the rules between their fields.
    Config(model=ModelConfig(path="unused"), moe=config)
    capacity, none = config.capacity, MoEConfig()
    problems = []
    if capacity.policy == "expanded_drop":
        problems.append(
            "moe.capacity.policy = expanded_drop: needs the router's scores of all experts, and "
            "transformers passes the chosen ones' weights alone; use token_drop or none"
        )
    if capacity.speed_aware:
        problems.append(
            "moe.capacity.speed_aware = True: follows speeds that only the engine measures; set "
            "it to False"
        )
    if config.shared_expert != none.shared_expert:
        problems.append(
            f"moe.shared_expert = {config.shared_expert}: transformers runs the shared expert; set "
            f"it to {none.shared_expert}"
        )
    if config.placement != none.placement:
        problems.append(
            f"moe.placement = {config.placement}: transformers gives each rank the experts of one "
            f"contiguous block; set it to {none.placement}"
        )
    if config.policy is not None:
        problems.append(
            f"moe.policy = {config.policy}: is for models that the engine runs; set it to None and "
            "give moe.capacity"
        )
    if config.overlap.chunks == "auto" or config.overlap.two_batch:
        problems.append(
            "moe.overlap: chunks = auto and two_batch need the engine's steps; set chunks to a "
            "number and two_batch to False"
        )
    if problems:
        raise ConfigError(*problems)


def _groups(device_type: str) -> Topology:
    """Return the groups of this process's world. Collective over it at the first call."""
    world = dist.group.WORLD
    for known, topology in _worlds:
        if known is world:
            return topology
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    topology = create_groups_beside(
        device,
        name=f"transformers/{len(_worlds)}",
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())),
        timeout=_TIMEOUT,
    )
    _worlds.append((world, topology))
    return topology
