"""Shape: the sizes of a model that bytes, memory and assumed costs need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.layers.precision import compute_dtype
from engine.model_check.config_reading import read_checkpoint_config
from engine.model_check.rank_share import Setup, part_bytes
from engine.models.weight_dtype import model_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a model's MoE layers."""

    hidden: int  # D
    ffn: int  # F, of an expert
    num_experts: int  # E
    top_k: int  # K
    matrices: int = 3  # of an expert
    num_zero_experts: int = 0
    weight_bytes: int = 2  # of a weight
    activation_bytes: int = 2  # of a number of a row that travels
    attention_weights: int = 0  # of a layer
    num_layers: int | None = None  # MoE layers; None: those of the loads
    other_bytes: int | None = None  # weights of a rank that are no experts; None: unknown

    @property
    def expert_weights(self) -> int:
        """Weights of an expert."""
        return self.matrices * self.hidden * self.ffn


def read_shape(folder: Path, device: str) -> Shape:
    """Return the shape of a checkpoint, from its config.json alone.

    Args:
        folder: of the checkpoint.
        device: cuda or cpu, for model.dtype = auto.

    Raises:
        ValueError: the folder holds no config.json of a model with experts that can be read.
    """
    reading = read_checkpoint_config(folder)
    if reading.hf_config is None or reading.problems:
        raise ValueError(f"--model {folder}: {'; '.join(reading.problems)}")
    place = torch.device(device)
    dtype = model_dtype("auto", reading.hf_config, place)
    model = Setup(reading.hf_config, dtype).build()
    if not model.moe_layers:
        raise ValueError(
            f"--model {folder}: the model has no experts; there is nothing to simulate"
        )
    layer = model.moe_layers[0].spec
    parts = part_bytes(model, ())
    layers = len(model.spec.layers)
    return Shape(
        hidden=layer.width,
        ffn=layer.ffn,
        num_experts=layer.router.num_experts,
        top_k=layer.router.top_k,
        matrices=3 if layer.experts.gated else 2,
        num_zero_experts=layer.router.num_zero_experts,
        weight_bytes=dtype.itemsize,
        activation_bytes=compute_dtype(dtype, place).itemsize,
        attention_weights=parts.get("attention", 0) // dtype.itemsize // max(layers, 1),
        num_layers=len(model.moe_layers),
        other_bytes=sum(size for part, size in parts.items() if part != "experts"),
    )
