"""Experts form: which of transformers' experts modules this engine's experts compute alike."""

from __future__ import annotations

from torch import nn

from engine.moe.stacked_experts import StackedExperts, read_stacked


class NotServed(ValueError):
    """A model of transformers asks for what this engine does not serve."""


def shape_of(path: str, module: nn.Module) -> StackedExperts:
    """Return what an experts module holds and computes.

    Args:
        path: the module's name, for messages.
        module: of which `engine.moe.stacked_experts.is_stacked` is true, on any device.

    Raises:
        NotServed: naming what of it this engine's experts do not compute.
    """
    try:
        shape = read_stacked(module)
    except ValueError as error:
        raise NotServed(
            f"{path}: {error}; model.implementation = transformers does not serve it"
        ) from error
    if shape.alternating and not shape.transposed:
        raise NotServed(
            f"{path} ({type(module).__name__} of transformers) has rows of gate and up that "
            "alternate in matrices that are not transposed, which model.implementation = "
            "transformers does not serve"
        )
    return shape
