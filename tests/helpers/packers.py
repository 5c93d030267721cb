"""Packers: a matrix as the published formats store it, and a slow reading of what they stored.

`PACKERS[format](weight, generator)` returns the tensors of one quantised weight by suffix of its
module's name, `CONFIGS[format]` the quantization_config. `slow_read` computes the weight value by
value from the definition of the format, in Python's integers, and shares no code with the engine.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
BLOCK = (48, 40)  # neither divides the tiny models' 64
GROUP = 16
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the outputs of a word, lowest bits first


def _to_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def _spread(scales: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    full = scales.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return full[..., : shape[-2], : shape[-1]]


def fp8_block(
    weight: torch.Tensor, generator: torch.Generator, block: tuple[int, int] = BLOCK
) -> Tensors:
    rows, columns = weight.shape
    grid = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    scales = torch.rand(grid, generator=generator) * 0.01 + 0.001
    values = _to_fp8(weight, _spread(scales, block, weight.shape))
    return {"weight": values, "weight_scale_inv": scales}


def fp8_ue8m0(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
    stored = fp8_block(weight, generator)
    powers = stored["weight_scale_inv"].log2().ceil().exp2()
    values = _to_fp8(weight, _spread(powers, BLOCK, weight.shape))
    return {"weight": values, "weight_scale_inv": powers.to(torch.float8_e8m0fnu)}


def fp8_tensor(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
    scale = weight.abs().max() / 448 + 1e-4
    stored = {"weight": _to_fp8(weight, scale), "weight_scale": scale.reshape(())}
    return {**stored, "input_scale": torch.tensor(0.5)}


def fp8_channel(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
    scale = (weight.abs().amax(1, keepdim=True) / 448 + 1e-4).bfloat16()
    return {"weight": _to_fp8(weight, scale.float()), "weight_scale": scale}


def _integers(
    weight: torch.Tensor, generator: torch.Generator, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return values 0..15 [N, K], zero points [N, G] and scales [N, G]."""
    rows, columns = weight.shape
    groups = columns // GROUP
    scales = (torch.rand(rows, groups, generator=generator) * 0.02 + 0.01).half()
    zeros = torch.full((rows, groups), 8)
    if not symmetric:
        zeros = torch.randint(0, 16, (rows, groups), generator=generator)
    per_input = scales.float().repeat_interleave(GROUP, 1)
    values = (weight / per_input).round() + zeros.repeat_interleave(GROUP, 1)
    return values.clamp(0, 15).long(), zeros, scales


def _pack(values: torch.Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Pack eight values along `dim` into an int32, `order` naming them from the lowest bits."""
    lines = values.movedim(dim, -1)
    missing = -lines.shape[-1] % 8
    lines = torch.nn.functional.pad(lines, (0, missing)).unflatten(-1, (-1, 8))
    words = sum(lines[..., place] << 4 * i for i, place in enumerate(order))
    assert isinstance(words, torch.Tensor)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return words.int().movedim(-1, dim).contiguous()


def int4_packed(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
    values, _, scales = _integers(weight, generator, symmetric=True)
    shape = torch.tensor(weight.shape, dtype=torch.int32)
    return {"weight_packed": _pack(values, 1), "weight_scale": scales, "weight_shape": shape}


def int4_zero_point(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
    values, zeros, scales = _integers(weight, generator, symmetric=False)
    stored = {"weight_packed": _pack(values, 1), "weight_scale": scales.bfloat16()}
    shape = torch.tensor(weight.shape)
    return {**stored, "weight_zero_point": _pack(zeros, 0), "weight_shape": shape}


def int4_g_idx(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
    order = torch.randperm(weight.shape[1], generator=generator)
    return {**int4_zero_point(weight, generator), "weight_g_idx": (order // GROUP).int()}


def awq(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
    values, zeros, scales = _integers(weight, generator, symmetric=False)
    return {
        "qweight": _pack(values.T, 1, AWQ_ORDER),
        "qzeros": _pack(zeros.T, 1, AWQ_ORDER),
        "scales": scales.T.contiguous(),
    }


def gptq_v2(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
    values, zeros, scales = _integers(weight, generator, symmetric=False)
    return {
        "qweight": _pack(values.T, 0),
        "qzeros": _pack(zeros.T, 1),
        "scales": scales.T.contiguous(),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
    }


def gptq(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
    stored = gptq_in_order(weight, generator)
    order = torch.randperm(weight.shape[1], generator=generator)
    stored["g_idx"] = (order // GROUP).int()
    return stored


def mxfp4(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
    """Return blocks and scales of a stack of matrices [..., N, K]."""
    groups = weight.unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1) / 6).clamp(min=1e-6).log2().ceil()
    table = torch.tensor([*FP4, *(-value for value in FP4)])
    scaled = groups * (-exponents).exp2()[..., None]
    codes = (scaled[..., None] - table).abs().argmin(-1)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return {"_blocks": blocks, "_scales": (exponents + 127).to(torch.uint8)}


def gptq_in_order(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
    """GPTQ v1 as GPTQModel writes it: 1 taken from every zero point of whole words of v2."""
    stored = gptq_v2(weight, generator)
    words = [[int(word) - 0x11111111 for word in row] for row in stored["qzeros"].tolist()]
    signed = [[(word + (1 << 31)) % (1 << 32) - (1 << 31) for word in row] for row in words]
    stored["qzeros"] = torch.tensor(signed, dtype=torch.int32)
    return stored


PACKERS: dict[str, Callable[[torch.Tensor, torch.Generator], Tensors]] = {
    "fp8-block": fp8_block,
    "fp8-ue8m0": fp8_ue8m0,
    "fp8-tensor": fp8_tensor,
    "fp8-channel": fp8_channel,
    "int4": int4_packed,
    "int4-zero-point": int4_zero_point,
    "int4-g-idx": int4_g_idx,
    "awq": awq,
    "gptq": gptq,
    "gptq-v2": gptq_v2,
    "gptq-in-order": gptq_in_order,
}
# For models that are wider than the tiny ones of most tests.
WIDE_PACKERS: dict[str, Callable[[torch.Tensor, torch.Generator], Tensors]] = {
    "fp8-128": functools.partial(fp8_block, block=(128, 128)),
}


def _groups(weights: dict[str, Any], kind: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "format": kind}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


_INT4 = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": GROUP}
_PACKED = _groups({**_INT4, "symmetric": False}, "pack-quantized")
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}
_FP8_BLOCK = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
CONFIGS: dict[str, dict[str, Any]] = {
    "fp8-block": _FP8_BLOCK,
    "fp8-128": {**_FP8_BLOCK, "weight_block_size": [128, 128]},
    "fp8-ue8m0": {**_FP8_BLOCK, "scale_fmt": "ue8m0"},
    "fp8-tensor": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
    "fp8-channel": _groups(
        {"type": "float", "num_bits": 8, "strategy": "channel"}, "float-quantized"
    ),
    "int4": _groups({**_INT4, "symmetric": True}, "pack-quantized"),
    "int4-zero-point": _PACKED,
    "int4-g-idx": _PACKED,
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
    "gptq": _GPTQ,
    "gptq-v2": {**_GPTQ, "checkpoint_format": "gptq_v2"},
    "gptq-in-order": {**_GPTQ, "desc_act": False},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn"]},
}


def _nibble(words: list[list[int]], row: int, column: int, place: int) -> int:
    return (words[row][column] % (1 << 32)) >> 4 * place & 15


def slow_read(kind: str, stored: Tensors) -> torch.Tensor:
    """Return the float32 weight [N, K] that the tensors of one weight stand for."""
    if kind.startswith("fp8"):
        values = stored["weight"].float().tolist()
        scales = stored.get("weight_scale_inv", stored.get("weight_scale"))
        assert scales is not None
        table = scales.float().reshape(scales.shape or (1, 1)).tolist()
        block = (128, 128) if kind == "fp8-128" else BLOCK
        high, wide = block if "weight_scale_inv" in stored else (1, len(values[0]))
        if kind == "fp8-tensor":
            high = len(values)
        return torch.tensor(
            [
                [value * table[n // high][k // wide] for k, value in enumerate(row)]
                for n, row in enumerate(values)
            ],
            dtype=torch.float64,
        ).float()
    packed = "weight_packed" in stored
    words = stored["weight_packed" if packed else "qweight"].tolist()
    scales = stored["weight_scale" if packed else "scales"].float().tolist()
    zeros = stored.get("weight_zero_point" if packed else "qzeros")
    zero_words = None if zeros is None else zeros.tolist()
    if zero_words is not None and kind in ("gptq", "gptq-in-order"):
        zero_words = [[word + 0x11111111 for word in row] for row in zero_words]
    index = stored.get("weight_g_idx", stored.get("g_idx"))
    of_input = None if index is None else index.tolist()
    num_rows = len(words[0]) * (8 if kind == "awq" else 1)
    num_rows, num_columns = {
        True: (len(words), len(words[0]) * 8),
        False: (num_rows, len(words) * (1 if kind == "awq" else 8)),
    }[packed]
    result = torch.empty(num_rows, num_columns, dtype=torch.float64)
    for n in range(num_rows):
        for k in range(num_columns):
            group = k // GROUP if of_input is None else of_input[k]
            if packed:
                value = _nibble(words, n, k // 8, k % 8)
                zero = 8 if zero_words is None else _nibble(zero_words, n // 8, group, n % 8)
                scale = scales[n][group]
            elif kind == "awq":
                place = AWQ_ORDER.index(n % 8)
                assert zero_words is not None
                value = _nibble(words, k, n // 8, place)
                zero, scale = _nibble(zero_words, group, n // 8, place), scales[group][n]
            else:
                assert zero_words is not None
                value = _nibble(words, k // 8, n, k % 8)
                zero = _nibble(zero_words, group, n // 8, n % 8)
                scale = scales[group][n]
            result[n, k] = (value - zero) * scale
    return result.float()


def slow_mxfp4(stored: Tensors) -> torch.Tensor:
    """Return the float32 weight [..., N, K] of blocks and scales."""
    blocks, scales = stored["_blocks"], stored["_scales"]
    values = []
    for block, scale in zip(blocks.flatten(0, -2).tolist(), scales.flatten().tolist(), strict=True):
        for byte in block:
            for code in (byte & 15, byte >> 4):
                sign = -1.0 if code & 8 else 1.0
                values.append(sign * FP4[code & 7] * 2.0 ** (scale - 127))
    return torch.tensor(values).view(*scales.shape[:-1], -1)


def quantise_checkpoint(
    source: Path, kind: str, out: Path, plain: Path, unquantised: str = "model.layers.0."
) -> None:
    """Write a checkpoint quantised to a format, and one of its dequantised weights in float32.

    Projections are quantised, of the layer whose names begin with `unquantised` only the experts'.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(source / "model.safetensors")
    quantised, dequantised = {}, {}
    if kind == "mxfp4":
        tensors = stack_experts(tensors)
    for name, tensor in tensors.items():
        is_expert = ".experts." in name
        chosen = is_expert or ("_proj" in name and not name.startswith(unquantised))
        if kind == "mxfp4" and is_expert:
            stored = mxfp4(tensor, generator)
            quantised |= {f"{name}{suffix}": value for suffix, value in stored.items()}
            dequantised[name] = slow_mxfp4(stored)
        elif kind != "mxfp4" and chosen and tensor.dim() == 2:
            stored = (PACKERS | WIDE_PACKERS)[kind](tensor, generator)
            module = name.removesuffix(".weight")
            quantised |= {f"{module}.{suffix}": value for suffix, value in stored.items()}
            dequantised[name] = slow_read(kind, stored)
        else:
            quantised[name] = dequantised[name] = tensor
    for folder, content in ((out, quantised), (plain, dequantised)):
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        content = {name: value.contiguous() for name, value in content.items()}
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = CONFIGS[kind]
    (out / "config.json").write_text(json.dumps(config))


def stack_experts(tensors: Tensors) -> Tensors:
    """Return the tensors with the experts of each layer in two, gate rows before up rows."""
    found: Tensors = {}
    experts: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, is_expert, rest = name.partition(".experts.")
        if is_expert:
            index, projection, _ = rest.split(".")
            experts.setdefault(prefix, {})[int(index), projection] = tensor
        else:
            found[name] = tensor
    for prefix, parts in experts.items():
        count = 1 + max(index for index, _ in parts)
        gate_up = [torch.cat((parts[i, "gate_proj"], parts[i, "up_proj"])) for i in range(count)]
        found[f"{prefix}.experts.gate_up_proj"] = torch.stack(gate_up)
        down = [parts[i, "down_proj"] for i in range(count)]
        found[f"{prefix}.experts.down_proj"] = torch.stack(down)
    return found
