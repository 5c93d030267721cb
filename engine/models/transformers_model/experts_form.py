"""Experts form: which of transformers' experts modules this engine's experts compute alike."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from engine.moe.expert_form import ExpertForm
from engine.ops.expert_activation import Activation

# Classes of activations -> what they compute.
_ACTIVATIONS: dict[str, Activation] = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLUSquaredActivation": "relu2",
}
_MARKS = ("has_gate", "has_bias", "is_concatenated", "is_transposed")  # of transformers' decorator


class NotServed(ValueError):
    """A model of transformers asks for what this engine does not serve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsShape:
    """The experts of one layer."""

    num_experts: int
    width: int
    ffn: int
    form: ExpertForm


def is_experts(module: nn.Module) -> bool:
    """Return whether a module goes through transformers' experts interface."""
    return all(hasattr(module, mark) for mark in _MARKS)


def shape_of(path: str, module: nn.Module) -> ExpertsShape:
    """Return the shape of an experts module.

    Args:
        path: the module's name, for messages.
        module: on any device.

    Raises:
        NotServed: naming what of it this engine's experts do not compute.
    """
    first = "gate_up_proj" if module.has_gate else "up_proj"
    held = {name for name, _ in module.named_parameters()}
    activation = _ACTIVATIONS.get(type(getattr(module, "act_fn", None)).__name__)
    for is_so, what in (
        (bool(module.is_transposed), "matrices that are transposed"),
        (not module.is_concatenated, "rows of gate and up that alternate"),
        (bool(module.has_bias), "biases"),
        (getattr(module, "has_post_expert_norm", False), "a norm behind each expert"),
        (not _has_plain_gate(module), "a gate of its own kind"),
        (activation is None, f"the activation {type(getattr(module, 'act_fn', None)).__name__}"),
        (held != {first, "down_proj"}, f"the parameters {', '.join(sorted(held))}"),
    ):
        if is_so:
            raise NotServed(
                f"{path} ({type(module).__name__} of transformers) has {what}, which "
                "model.implementation = transformers does not serve"
            )
    assert activation is not None
    num_experts, width, ffn = module.get_parameter("down_proj").shape
    form = ExpertForm(activation=activation, gated=bool(module.has_gate))
    return ExpertsShape(num_experts=num_experts, width=width, ffn=ffn, form=form)


def _has_plain_gate(module: nn.Module) -> bool:
    """Return whether the gate is the activation of the first half times the second."""
    apply = getattr(type(module), "_apply_gate", None)
    return not module.has_gate or getattr(apply, "__name__", "") == "_default_apply_gate"
