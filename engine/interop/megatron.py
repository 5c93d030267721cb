"""Lockstep's capacity in a Megatron-Core model: its MoE layers drop and add as the engine's do.

Megatron builds a layer's router from `MoESubmodules(router=...)`; pass it the result of
`capacity_router`:

    moe = layer_spec.submodules.mlp                  # ModuleSpec(MoELayer, MoESubmodules(...))
    moe.submodules.router = capacity_router(CapacityConfig(policy="token_drop", factor="1"))

The router (`megatron_router.py`) runs Megatron's own router, then lets the engine's
`CapacityAgreement` decide with the other expert-parallel ranks (`capacity_gate.py`), and returns
the same two tensors as Megatron's: the rest of the layer is unchanged. `megatron_settings.py`
checks Megatron's settings: above all, the alltoall dispatcher needs moe_expert_capacity_factor =
num_moe_experts, which drops nothing and makes it count its rows instead of expecting K per token.

What a Megatron layer does not know, and the substitute:

    requests    a token's global id is its index among the tokens of all expert-parallel ranks,
                lower ranks first: ties go to the lower (rank, position). So one list of tokens
                loses the same assignments, in contiguous parts on any number of ranks
    phases      all tokens of a call have the phase of the router's attribute `phase`, "prefill"
                unless set; set it alike on all ranks: a phase outside moe.capacity.phases calls no
                collective
    loads       one more small collective per call exchanges the ranks' numbers of tokens
    padding     with a padding mask, padded tokens get no expert at all

The router cannot be captured in a CUDA graph: it reads the ranks' decision on the host. Experts
that Megatron pads for quantisation process up to that many rows more than the capacity.

Importing this module imports nothing of Megatron-Core, which takes seconds; `capacity_router` does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from engine.config import CapacityConfig, Config, ModelConfig, MoEConfig
from engine.config.validation import ConfigError

if TYPE_CHECKING:
    from engine.interop.megatron_router import CapacityRouter


def capacity_router(config: CapacityConfig) -> Callable[..., CapacityRouter]:
    """Return a builder of Megatron routers with this capacity, as `router` of `MoESubmodules`.

    The config must be the same on every rank. Imports Megatron-Core; no collective.

    Raises:
        ValueError: settings that contradict each other, or that only the engine supports.
        ImportError: Megatron-Core is not installed.
    """
    if config.speed_aware:
        raise ConfigError(
            "moe.capacity.speed_aware = True: follows speeds that only the engine measures; in a "
            "Megatron layer it must be False"
        )
    # The path is not read: a Config checks all its sections and the rules between their fields.
    Config(model=ModelConfig(path="unused"), moe=MoEConfig(capacity=config))
    from engine.interop.megatron_router import CapacityRouter

    return partial(CapacityRouter, capacity=config)
