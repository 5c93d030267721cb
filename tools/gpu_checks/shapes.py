"""Models at the widths of published ones, few layers deep: config.json, weights, bytes and FLOPs.

Weights are random numbers drawn on the device: those of `load_format: dummy` are drawn on the CPU,
which takes minutes for billions of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.config.loader import config_from_tree
from engine.llm import LLM
from engine.weights import loader

BYTES = 2  # per value: bfloat16


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Widths of a model; float operations and bytes are of the whole model on one rank."""

    name: str
    family: str
    hidden: int
    ffn: int  # of an expert
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: int = 4

    @property
    def expert_values(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.ffn

    @property
    def other_values(self) -> int:
        """Weights of a layer that every token uses: attention and gate."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim
        return self.hidden * (attention + self.experts)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        layer = self.other_values + self.experts * self.expert_values
        return BYTES * (self.layers * layer + 2 * self.vocab * self.hidden)

    def decode_bytes(self, sequences: int, context: float) -> float:
        """Return the bytes that a decode step must read: weights in use, and keys and values.

        Experts count as far as evenly routed tokens would choose them.
        """
        used = self.experts * (1 - (1 - self.top_k / self.experts) ** sequences)
        layer = self.other_values + used * self.expert_values
        cached = sequences * context * 2 * self.kv_heads * self.head_dim
        return BYTES * (self.layers * (layer + cached) + self.vocab * self.hidden)

    def prefill_flops(self, prompts: int, length: int) -> float:
        """Return the operations of one layer on so many prompts of so many tokens."""
        per_token = self.other_values + self.top_k * self.expert_values
        # Scores and values, each 2 operations per head dim and key; half of the keys are later.
        attention = 4 * self.heads * self.head_dim * length / 2
        return prompts * length * (2 * per_token + attention)


MIXTRAL = ModelShape(
    name="Mixtral-8x7B",
    family="mixtral",
    hidden=4096,
    ffn=14336,
    experts=8,
    top_k=2,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocab=32000,
)
QWEN3 = ModelShape(
    name="Qwen3-30B-A3B",
    family="qwen3_moe",
    hidden=2048,
    ffn=768,
    experts=128,
    top_k=8,
    heads=32,
    kv_heads=4,
    head_dim=128,
    vocab=151936,
)


def tiny(shape: ModelShape) -> ModelShape:
    """Return the shape at a hundredth of its widths, to try the suite on the CPU."""
    return replace(
        shape, hidden=64, ffn=64, experts=min(shape.experts, 16), heads=4, kv_heads=2, head_dim=16
    )


def config_fields(shape: ModelShape) -> dict[str, Any]:
    """Return the fields of config.json."""
    fields: dict[str, Any] = {
        "model_type": shape.family,
        "torch_dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "vocab_size": shape.vocab,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "num_experts_per_tok": shape.top_k,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "eos_token_id": None,
    }
    if shape.family == "mixtral":
        return fields | {"num_local_experts": shape.experts, "intermediate_size": shape.ffn}
    return fields | {
        "num_experts": shape.experts,
        "moe_intermediate_size": shape.ffn,
        "intermediate_size": 4 * shape.ffn,
        "norm_topk_prob": True,
    }


@contextmanager
def dummy_llm(
    shape: ModelShape, folder: Path, device: torch.device, **sections: dict[str, Any]
) -> Iterator[LLM]:
    """Give an engine on one rank with random weights, its steps eager.

    sections: of the config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_fields(shape)), encoding="utf-8")
    tree: dict[str, Any] = {
        "model": {"path": str(folder), "dtype": "bfloat16", "load_format": "dummy"},
        "runtime": {"device": device.type, "graphs": "off"},
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    fill = loader.fill_dummy
    loader.fill_dummy = _fill_on_device
    try:
        llm = LLM(config_from_tree(tree))
    finally:
        loader.fill_dummy = fill
    try:
        yield llm
    finally:
        llm.close()


def _fill_on_device(slots: Any, seed: int, report: Any = None) -> None:
    torch.manual_seed(seed)
    for slot in slots:
        if slot.kind == "matrix":
            slot.target.normal_(0, 0.02)
        else:
            slot.target.fill_(float(slot.kind == "norm"))


def free_bytes(device: torch.device) -> float:
    """Return the free memory of the device; on the CPU no limit."""
    return torch.cuda.mem_get_info()[0] if device.type == "cuda" else float("inf")
