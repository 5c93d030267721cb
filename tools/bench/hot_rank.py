"""Hot rank: a checkpoint whose router prefers the experts of the first of two ranks."""

from __future__ import annotations

from pathlib import Path


def heat_first_rank(checkpoint: Path, scale: float) -> None:
    """Multiply the router's rows of the first half of the experts, in place.

    Logits of these experts vary `scale` times as much, so that the largest of a token are mostly
    theirs.

    Args:
        checkpoint: of one file, of a family whose router's weight ends with gate.weight.
        scale: 1.0 leaves the loads as they are.
    """
    from safetensors.torch import load_file, save_file

    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    gates = [name for name in tensors if name.endswith(".gate.weight")]
    assert gates, f"{file} has no router"
    for name in gates:
        half = tensors[name].shape[0] // 2
        tensors[name][:half] *= scale
    save_file(tensors, file, metadata={"format": "pt"})
