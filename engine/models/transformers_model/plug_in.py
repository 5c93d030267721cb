"""Plug-in points of transformers: its registries of attention and masks, and its key mapping.

Everything that this folder needs of transformers beyond its models is named here, so that a version
that has moved some of it fails with one sentence.
"""

from __future__ import annotations

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
        ValueError: this version of transformers has moved what is needed.
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

        for name in (ATTENTION, PROBE):
            ALL_ATTENTION_FUNCTIONS.register(name, _attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(PROBE, _mask_rule)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"model.implementation: transformers {transformers.__version__} has no longer what "
            f"this engine plugs into ({error}); install transformers {VERSIONS}, or use a model "
            "that model.implementation = lockstep runs"
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
