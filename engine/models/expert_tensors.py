"""Expert tensors: which weights of a checkpoint are experts, in either implementation."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from engine.config.checkpoint_files import read_json_object
from engine.models.expert_weights import expert_names
from engine.models.model_types import Implementation, uses_transformers
from engine.models.registry import read_config
from engine.models.spec import ModelSpec
from engine.models.transformers_model.expert_names import expert_names as transformers_names


def expert_tensors(
    folder: Path, spec: ModelSpec, checkpoint: Collection[str], implementation: Implementation
) -> Mapping[int, tuple[list[str], list[str]]]:
    """Return layer -> names of its experts' gate and up weights, and of their down weights.

    Args:
        folder: of the checkpoint.
        spec: of the model.
        checkpoint: names of the checkpoint's weights; some that are returned may be missing there.
        implementation: model.implementation.

    Raises:
        ValueError: naming model.path and what is wrong in config.json.
    """
    model_type = read_json_object(folder / "config.json").get("model_type")
    if uses_transformers(model_type, implementation):
        return transformers_names(read_config(folder, implementation), checkpoint)
    return expert_names(spec)
