"""Loading a checkpoint of 3 GiB of weights: no rank holds much more than its own share.

The files are sparse: real headers, zeros as data. Needs about 4 GiB of memory.

    python -m pytest -m long tests/distributed/test_load_memory.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import Config, ModelConfig, RuntimeConfig
from engine.distributed import bootstrap
from engine.distributed.health.progress import ProgressReporter
from engine.generation.builder import build, checkpoint_names, load_weights
from engine.models.registry import read_config
from tests.helpers.packers import CONFIGS
from tests.helpers.ranks import run_ranks
from tests.helpers.sparse_checkpoint import BYTES, Tensors, write_sparse

HIDDEN, FFN, EXPERTS, LAYERS, VOCABULARY = 4096, 2048, 32, 2, 1024
GROUP = 128
MIB = 1 << 20
SPARE = 256 * MIB

Shape = tuple[int, int]


def blocks_of(rows: int, columns: int, size: int = 128) -> Shape:
    return -(-rows // size), -(-columns // size)


def bfloat16(n: int, k: int) -> Tensors:
    return {"weight": ("BF16", (n, k))}


def fp8_block(n: int, k: int) -> Tensors:
    return {"weight": ("F8_E4M3", (n, k)), "weight_scale_inv": ("F32", blocks_of(n, k))}


def fp8_channel(n: int, k: int) -> Tensors:
    return {"weight": ("F8_E4M3", (n, k)), "weight_scale": ("BF16", (n, 1))}


def int4(n: int, k: int) -> Tensors:
    scale = ("BF16", (n, k // GROUP))
    return {
        "weight_packed": ("I32", (n, k // 8)),
        "weight_scale": scale,
        "weight_shape": ("I32", (2,)),
    }


def awq(n: int, k: int) -> Tensors:
    return {
        "qweight": ("I32", (k, n // 8)),
        "qzeros": ("I32", (k // GROUP, n // 8)),
        "scales": ("F16", (k // GROUP, n)),
    }


def gptq(n: int, k: int) -> Tensors:
    return {
        "qweight": ("I32", (k // 8, n)),
        "qzeros": ("I32", (k // GROUP, n // 8)),
        "scales": ("F16", (k // GROUP, n)),
        "g_idx": ("I32", (k,)),
    }


FORMATS: dict[str, tuple[str | None, Callable[[int, int], Tensors]]] = {
    "bfloat16": (None, bfloat16),
    "fp8-block": ("fp8-block", fp8_block),
    "fp8-channel": ("fp8-channel", fp8_channel),
    "int4": ("int4", int4),
    "awq": ("awq", awq),
    "gptq": ("gptq", gptq),
    "mxfp4": ("mxfp4", bfloat16),  # its experts are written below
}


def write(folder: Path, kind: str) -> None:
    """Write a Qwen3-MoE of two layers whose experts are in the format."""
    scheme, parts = FORMATS[kind]
    config: dict[str, Any] = {
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "max_position_embeddings": 64,
        "moe_intermediate_size": FFN,
        "norm_topk_prob": True,
        "num_attention_heads": 2,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 2,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY,
    }
    if scheme is not None:
        config["quantization_config"] = with_group(CONFIGS[scheme])
    tensors: Tensors = {
        "model.embed_tokens.weight": ("BF16", (VOCABULARY, HIDDEN)),
        "lm_head.weight": ("BF16", (VOCABULARY, HIDDEN)),
        "model.norm.weight": ("BF16", (HIDDEN,)),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = ("BF16", (HIDDEN,))
        for letter in "qkv":
            tensors[f"{prefix}.self_attn.{letter}_proj.weight"] = ("BF16", (256, HIDDEN))
        tensors[f"{prefix}.self_attn.o_proj.weight"] = ("BF16", (HIDDEN, 256))
        for letter in "qk":
            tensors[f"{prefix}.self_attn.{letter}_norm.weight"] = ("BF16", (128,))
        tensors[f"{prefix}.mlp.gate.weight"] = ("BF16", (EXPERTS, HIDDEN))
        if kind == "mxfp4":
            tensors |= stacked_mxfp4(f"{prefix}.mlp.experts")
            continue
        for expert in range(EXPERTS):
            for name, rows, columns in (
                ("gate_proj", FFN, HIDDEN),
                ("up_proj", FFN, HIDDEN),
                ("down_proj", HIDDEN, FFN),
            ):
                module = f"{prefix}.mlp.experts.{expert}.{name}"
                tensors |= {f"{module}.{part}": held for part, held in parts(rows, columns).items()}
    write_sparse(folder, config, tensors, shards=2)


def with_group(scheme: dict[str, Any]) -> dict[str, Any]:
    """Return a scheme with this file's sizes of blocks and groups in place of the tiny ones."""
    sizes = {"weight_block_size": [128, 128], "group_size": GROUP}
    return {
        name: sizes.get(name, with_group(value) if isinstance(value, dict) else value)
        for name, value in scheme.items()
    }


def stacked_mxfp4(prefix: str) -> Tensors:
    tensors: Tensors = {}
    for name, rows, columns in (("gate_up_proj", 2 * FFN, HIDDEN), ("down_proj", HIDDEN, FFN)):
        shape = (EXPERTS, rows, columns // 32)
        tensors[f"{prefix}.{name}_blocks"] = ("U8", (*shape, 16))
        tensors[f"{prefix}.{name}_scales"] = ("U8", shape)
    return tensors


def status(field: str) -> int:
    """Return a size of this process in bytes, by its name in /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise KeyError(field)


def load(rank: int, folder: Path, setting: Any) -> tuple[int, int, int]:
    """Return the bytes of this rank's weights, those that loading added at most, and those read."""
    config = Config(
        model=ModelConfig(
            path=str(folder), dtype="bfloat16", max_model_len=64, quantization=setting
        ),
        runtime=RuntimeConfig(device="cpu", timeout_s=60.0, threads=1),
    )
    topology = bootstrap.start(config)
    hf_config = read_config(folder)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    model = build(config, hf_config, topology, torch.bfloat16)
    names = checkpoint_names(config)
    report = load_weights(model, config, topology, names, ProgressReporter())
    assert report is not None
    weights = sum(slot.num_bytes for slot in model.weight_slots(names))
    added = status("VmHWM") - before
    bootstrap.stop(topology)
    return weights, added, report.bytes_read


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "setting"),
    [*((kind, "dequantize") for kind in FORMATS), ("int4", "keep"), ("bfloat16", "int8")],
)
def test_a_rank_holds_its_weights_its_largest_tensor_and_little_more(kind, setting, tmp_path):
    write(tmp_path, kind)
    largest, own = largest_and_half(tmp_path)
    for weights, added, read in run_ranks(load, 2, tmp_path, setting):
        sizes = [size >> 20 for size in (weights, added, read)]
        print(f"{kind}, {setting}: MiB of weights, peak, read: {sizes}")
        least = {"dequantize": 1536, "int8": 768, "keep": 384}  # MiB: 16, 8 and 4 bits
        assert weights > least[setting] * MIB
        assert added <= weights + SPARE + largest
        assert own <= read <= 1.02 * own


def largest_and_half(folder: Path) -> tuple[int, int]:
    """Return the bytes of the largest tensor, and of half of the experts and all else."""
    largest = experts = rest = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        for name, each in header.items():
            size = math.prod(each["shape"]) * BYTES[each["dtype"]]
            largest = max(largest, size)
            if name.endswith("_shape"):  # never read
                continue
            if ".experts." in name:
                experts += size
            else:
                rest += size
    return largest, experts // 2 + rest
