"""Expert names: which tensors of a checkpoint are experts of a model that transformers builds."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from engine.models.transformers_model.plug_in import ATTENTION
from engine.models.transformers_model.probe import build_on_meta
from engine.models.transformers_model.spec import probed
from engine.models.transformers_model.weights import KeyMapping


def expert_names(
    hf_config: Any, checkpoint: Collection[str]
) -> dict[int, tuple[list[str], list[str]]]:
    """Return layer -> names of its experts' gate and up weights, and of their down weights.

    Args:
        hf_config: transformers' configuration.
        checkpoint: names of the checkpoint's weights, which transformers' key mapping turns into
            those of the model.

    Raises:
        ValueError: naming what of the model this engine cannot serve.
    """
    sources = KeyMapping(build_on_meta(hf_config, torch.float32, ATTENTION)).sources(checkpoint)
    found = {}
    for call in probed(hf_config).experts:
        first = "gate_up_proj" if call.shape.form.gated else "up_proj"
        inner, outer = (sources.get(f"{call.path}.{each}", []) for each in (first, "down_proj"))
        found[call.layer] = [each.name for each in inner], [each.name for each in outer]
    return found
