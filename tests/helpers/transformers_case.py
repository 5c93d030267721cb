"""A transformers model on torchrun's ranks, for tests of Lockstep's experts inside it.

Transformers' models take seconds to import, so nothing here does before a function is called.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.model_cases import CASES, make_reference

needs_interface = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None
    or importlib.util.find_spec("transformers.distributed.expert_parallel") is None,
    reason="needs accelerate and transformers 5.23",
)

LENGTHS = (7, 4, 9)
NEW_TOKENS = 6


def write(name: str, path: Path) -> None:
    """Write the checkpoint of a case."""
    make_reference(CASES[name], path)


def load(path: Path, implementation: str | None, ranks: int) -> Any:
    """Load a checkpoint, its experts spread over `ranks` where an implementation is named."""
    import transformers
    from transformers.distributed.configuration_utils import DistributedConfig

    more: dict[str, Any] = {}
    if implementation is not None:
        more["distributed_config"] = DistributedConfig(
            tp_size=ranks, ep_size=ranks, ep_implementation=implementation
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", **more
    )
    return model.eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts padded to the left, and their attention mask."""
    generator = torch.Generator().manual_seed(3)
    width = max(LENGTHS)
    ids = torch.randint(1, 97, (len(LENGTHS), width), generator=generator)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in LENGTHS])
    return ids * mask, mask


@torch.inference_mode()
def run(model: Any) -> dict[str, torch.Tensor]:
    """Return the logits of one forward pass and the tokens of a greedy continuation."""
    ids, mask = batch()
    logits = model(input_ids=ids, attention_mask=mask).logits
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    tokens = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return {"logits": logits[mask.bool()].clone(), "tokens": tokens[:, ids.shape[1] :].clone()}
