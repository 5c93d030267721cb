"""Lockstep's expert parallelism in a transformers model: dispatch, capacity and expert kernels.

transformers splits a model over torchrun's ranks with a `DistributedConfig`, whose
`ep_implementation` names what brings tokens to their experts:

    experts = register(MoEConfig(capacity=CapacityConfig(policy="token_drop", factor="1.25")))
    model = AutoModelForCausalLM.from_pretrained(
        path,
        distributed_config=DistributedConfig(
            tp_size=ranks, ep_size=ranks, ep_implementation="lockstep"
        ),
    )

Everything but the experts is transformers' own: router, shared experts, attention, generation.

    transformers_layer.py     one layer
    transformers_experts.py   which experts can be served, and their weights
    transformers_shared.py    settings, phase and groups, which all layers share

What a call of transformers' experts does not have, and the substitute:

    scores      only the chosen experts' combine weights: `token_drop` ranks by them; there is no
                `expanded_drop`
    requests    a token's global id is its index among the tokens of the call
    phases      all tokens of a call have the phase of the attribute `phase`, "prefill" unless set;
                `follow` sets it by the length of each forward pass
    padding     counts as tokens

Importing this module imports nothing of transformers, which takes seconds; `register` does.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from engine.config import MoEConfig
from engine.interop.transformers_shared import LockstepExperts, check_settings

WORKS_WITH = "transformers>=5.23,<5.24"  # the versions that this was tested with
_MADE = ["self", "experts", "ep_mesh", "tp_mesh"]
_CALL = ["self", "hidden_states", "top_k_index", "top_k_weights"]


def register(config: MoEConfig | None = None, name: str = "lockstep") -> LockstepExperts:
    """Register the engine's experts as the `ep_implementation` of this name, again if it exists.

    The same on every rank, before `from_pretrained`. No collective.

    Args:
        config: section moe of the engine's config; by default nothing is dropped.
        name: as `DistributedConfig` has it.

    Raises:
        ValueError: settings that contradict each other, or that only the engine supports.
        ImportError: transformers is not installed, or of a version without this interface.
    """
    config = config or MoEConfig()
    check_settings(config)
    interface = _interface()
    from engine.interop.transformers_layer import LockstepEP

    experts = LockstepExperts(config)
    interface.register(name, partial(LockstepEP, experts))
    return experts


def _interface() -> Any:
    """Return transformers' registry of expert parallelism.

    Raises:
        ImportError: it is not where this was written for; the sentence names the versions.
    """
    import transformers

    try:
        from transformers.distributed.configuration_utils import DistributedConfig
        from transformers.distributed.expert_parallel import (
            EPImplementation,
            EPImplementationInterface,
        )

        made = list(inspect.signature(EPImplementation.__init__).parameters)
        called = list(inspect.signature(EPImplementation.__call__).parameters)
        named = "ep_implementation" in DistributedConfig.__dataclass_fields__
        inspect.signature(EPImplementationInterface.register).bind("name", EPImplementation)
        is_known = made == _MADE and called == _CALL and named
    except (ImportError, AttributeError, TypeError, ValueError):
        is_known = False
    if not is_known:
        raise ImportError(
            f"transformers {transformers.__version__} has not the interface for expert parallelism "
            f"that Lockstep's is written for; install {WORKS_WITH}"
        )
    return EPImplementationInterface
