"""Plug-in points of transformers: its registries of attention and masks, and its key mapping.

Everything that this folder needs of transformers beyond its models is named here, so that a version
that has moved some of it fails with one sentence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

# Names in the registries: of the attention that a run uses, for which transformers makes no masks,
# and of the one that `probe.py` uses to see which masks a model asks for.
ATTENTION, PROBE = "lockstep", "lockstep_probe"
VERSIONS = "5.23"  # of transformers, with which this is tested
# What is called or read of each model, and of transformers' decorator of experts modules.
_OF_MODELS = (
    "_from_config",
    "_get_dtype_plan",
    "_init_weights",
    "base_model_prefix",
    "get_input_embeddings",
    "get_output_embeddings",
)
_OF_EXPERTS = {"has_gate", "has_bias", "is_concatenated", "is_transposed"}


class MovedPlugIn(ValueError):
    """This version of transformers has moved what this engine plugs into."""


@dataclass(frozen=True, slots=True)
class PlugIn:
    """What this engine uses of transformers to read weights."""

    mapping_of: Callable[[Any], list[Any]]  # a model's key mapping
    mapping_of_type: Callable[[str], list[Any] | None]  # of a model type
    rename: Callable[..., tuple[str, str | None]]
    converter: type  # transforms that change tensors; the others change names alone
    merge: type  # operation that stacks the experts of a layer
    concatenate: type  # operation that joins gate and up
    transpose: type  # operation that turns matrices where the files hold them turned


class MaskRule:
    """In place of a mask: the function that says which keys a query attends to."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self.function = function


@cache
def plug_in() -> PlugIn:
    """Register this engine's attention with transformers, once, and return its key mapping.

    Raises:
        MovedPlugIn: this version of transformers has moved what is needed.
    """
    import transformers

    try:
        from transformers.conversion_mapping import (
            get_checkpoint_conversion_mapping,
            get_model_conversion_mapping,
        )
        from transformers.core_model_loading import (
            Concatenate,
            MergeModulelist,
            Transpose,
            WeightConverter,
            rename_source_key,
        )
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        _check_members()
        for name in (ATTENTION, PROBE):
            ALL_ATTENTION_FUNCTIONS.register(name, _attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(PROBE, _mask_rule)
    except (ImportError, AttributeError, TypeError) as error:
        raise MovedPlugIn(
            f"model.implementation: transformers {transformers.__version__} has not what this "
            f"engine plugs into ({' '.join(str(error).split())}); install transformers {VERSIONS}, "
            "or use a model that model.implementation = lockstep runs"
        ) from error
    return PlugIn(
        mapping_of=get_model_conversion_mapping,
        mapping_of_type=get_checkpoint_conversion_mapping,
        rename=rename_source_key,
        converter=WeightConverter,
        merge=MergeModulelist,
        concatenate=Concatenate,
        transpose=Transpose,
    )


def _check_members() -> None:
    """Check what is used later, while a model is built, loaded or run.

    Raises:
        ImportError, AttributeError, TypeError: naming what is not there.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
    from transformers.core_model_loading import WeightConverter, rename_source_key
    from transformers.integrations.moe import _default_apply_gate, use_experts_implementation
    from transformers.modeling_outputs import MoeModelOutputWithPast

    del MODEL_FOR_CAUSAL_LM_MAPPING, _default_apply_gate, MoeModelOutputWithPast
    held: list[tuple[Any, tuple[str, ...]]] = [
        (PreTrainedModel, _OF_MODELS),
        (PretrainedConfig, ("get_text_config",)),
    ]
    for holder, names in held:
        for name in names:
            getattr(holder, name)
    inspect.signature(rename_source_key).bind("name", [], [], "prefix", {})
    takes = inspect.signature(WeightConverter).parameters.keys()
    marks = inspect.signature(use_experts_implementation).parameters.keys()
    missing = {"source_patterns", "operations"} - takes | (_OF_EXPERTS - marks)
    if missing:
        raise AttributeError(f"it does not know {', '.join(sorted(missing))}")


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as the module's `lockstep_attention` does, in the form of transformers' registry."""
    attend: Any = module.lockstep_attention
    return attend(query, key, value, attention_mask, scaling, arguments), None


def _mask_rule(*_: Any, mask_function: Callable[..., torch.Tensor], **__: Any) -> MaskRule:
    return MaskRule(mask_function)
