"""Lockstep's capacity in a Megatron-Core model: its MoE layers drop and add what the engine's do.

Megatron builds a layer's router from `MoESubmodules(router=...)`; what `capacity_router` returns
goes there:

    moe = layer_spec.submodules.mlp                  # ModuleSpec(MoELayer, MoESubmodules(...))
    moe.submodules.router = capacity_router(CapacityConfig(policy="token_drop", factor="1"))

The router (`megatron_router.py`) lets Megatron's own choose, has the engine's `CapacityAgreement`
decide with the other expert-parallel ranks (`capacity_gate.py`) and hands on the same two tensors,
so that all that follows in the layer is Megatron's as before. `megatron_settings.py` says which of
Megatron's settings go with it: above all, the alltoall dispatcher needs moe_expert_capacity_factor
= num_moe_experts, which drops nothing and makes it count its rows instead of expecting K a token.
What a Megatron layer does not know, and what stands for it:

    requests    a token's global id is its place among the tokens of all expert-parallel ranks,
                lower ranks first: ties go to the lower (rank, position). One list of tokens, in
                contiguous parts on any number of ranks, so loses the same assignments
    phases      all tokens of a call are of the router's attribute `phase`, "prefill" unless set;
                set it alike on all ranks: a phase outside moe.capacity.phases calls no collective
    loads       one more small collective a call tells every rank how many tokens the others have
    padding     where the caller gives a padding mask, padded tokens get no expert at all

CUDA graphs cannot hold the router: it reads what the ranks agreed on. Experts that Megatron pads
for quantisation work on up to that many rows more than the capacity.

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
    """Return what builds a Megatron router under this capacity: the `router` of `MoESubmodules`.

    Give it the same config on every rank. Imports Megatron-Core; no collective.

    Raises:
        ValueError: settings that contradict each other, or that only the engine can honour.
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
