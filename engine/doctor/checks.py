"""Checks of one machine: what is installed, and a tiny run of each backend against plain torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from engine.config import Config
from engine.doctor.findings import Absent, Finding, check_one
from engine.moe.backend_choice import choose_backend, find_grouped_mm
from engine.moe.experts import ExpertWeights, make_backend
from engine.ops import (
    deep_gemm_library,
    native,
    permute,
    select_experts,
    silu_and_mul,
    store_kv,
    triton_support,
)
from engine.ops.block_scaled_ffn import BLOCK, BlockWeights, block_scaled_ffn
from engine.ops.grouped_ffn import grouped_ffn, grouped_ffn_reference
from engine.ops.low_bit_floats import round_to_blocks

_PACKAGES = (
    "triton", "transformer-engine", "deep-gemm", "transformers", "deepspeed", "mpi4py",
    "megatron-core",
)  # fmt: skip
_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest output; TF32 is refused


def check_installed() -> Iterator[Finding]:
    """Yield what is installed, by version; nothing heavy is imported."""

    def cuda() -> str:
        if not torch.version.cuda:
            raise Absent("this torch is built without CUDA")
        if not torch.cuda.is_available():
            raise Absent(f"{torch.version.cuda}, but no GPU or no driver that fits it")
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.version.cuda}, {torch.cuda.get_device_name()} (sm_{major}{minor})"

    def nccl() -> str:
        if not dist.is_nccl_available():
            raise Absent("not in this torch")
        return ".".join(map(str, torch.cuda.nccl.version()))  # pyright: ignore[reportAttributeAccessIssue]

    def grouped_mm() -> str:
        found = find_grouped_mm()
        if found is None:
            raise Absent("not in this torch")
        is_public = hasattr(torch.nn.functional, "grouped_mm")
        return "torch.nn.functional" if is_public else "torch._grouped_mm: CUDA, bfloat16"

    def kernels() -> str:
        if not native.available():
            raise Absent(native.reason())
        return native.reason()

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise Absent("not installed") from None

    yield check_one("installed", "torch", lambda: torch.__version__, is_needed=True)
    yield check_one("installed", "CUDA", cuda)
    yield check_one("installed", "NCCL", nccl)
    yield check_one("installed", "grouped_mm", grouped_mm)
    yield check_one("installed", "native kernels", kernels)
    for name in _PACKAGES:
        yield check_one("installed", name, lambda name=name: version(name))


def check_works(device: torch.device, config: Config | None) -> Iterator[Finding]:
    """Yield what a tiny run of each backend says.

    config: what it asks for is needed; None: what `auto` takes.
    """
    asked = "auto" if config is None else config.moe.experts.backend
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        used = choose_backend(asked, device, dtype)
    except ValueError:
        used = asked

    def triton_kernels() -> str:
        if importlib.util.find_spec("triton") is None:
            raise Absent("triton is not installed; torch serves")
        if device.type != "cuda":
            raise Absent("they need a GPU")
        return _run_triton_kernels(device)

    for name in ("torch", "grouped_mm", "te"):
        yield check_one(
            "works",
            f"experts: {name}",
            lambda name=name: _run_experts(name, device, dtype),
            is_needed=name == used,
        )
    yield check_one(
        "works",
        "experts: deep_gemm",
        lambda: _run_deep_gemm(device, dtype),
        is_needed=used == "deep_gemm",
    )
    yield check_one("works", "native kernels", _run_native, is_needed=native.available())
    is_used = device.type == "cuda" and triton_support.serves(torch.empty(0, device=device))
    yield check_one("works", "Triton kernels", triton_kernels, is_needed=is_used)


@torch.inference_mode()
def _run_experts(name: str, device: torch.device, dtype: torch.dtype) -> str:
    hidden, ffn, counts = 64, 48, [3, 0, 5]
    if name == "te" and importlib.util.find_spec("transformer_engine") is None:
        raise Absent("Transformer Engine is not installed")
    if name == "te" and device.type != "cuda":
        raise Absent("it needs a GPU")
    if name == "grouped_mm" and find_grouped_mm() is None:
        raise Absent("not in this torch")
    choose_backend(name, device, dtype, (hidden, ffn))
    weights = ExpertWeights(len(counts), hidden, ffn, device, dtype)
    for weight in weights.parameters():
        weight.copy_(torch.randn(weight.shape) / 8)
    rows_RD = torch.randn(sum(counts), hidden).to(device, dtype)
    w13, w2 = weights.w13_e2FD.float().cpu(), weights.w2_eDF.float().cpu()
    expected = grouped_ffn_reference(rows_RD.float().cpu(), w13, w2, counts)
    _compare(make_backend(name, weights)(rows_RD, counts), expected)
    return f"{str(dtype).removeprefix('torch.')} on {device.type}"


@torch.inference_mode()
def _run_deep_gemm(device: torch.device, dtype: torch.dtype) -> str:
    if not deep_gemm_library.is_installed():
        raise Absent("DeepGEMM is not installed")
    if device.type != "cuda":
        raise Absent("it needs a GPU")
    hidden, ffn, counts = 256, 128, [3, 0, 5]
    choose_backend("deep_gemm", device, dtype, (hidden, ffn))
    made = []
    for outputs, inputs in ((2 * ffn, hidden), (hidden, ffn)):
        weights_eOI = torch.randn(len(counts), outputs, inputs, device=device) / inputs**0.5
        made.append(BlockWeights(*round_to_blocks(weights_eOI, (BLOCK, BLOCK))))
    rows_RD = torch.randn(sum(counts), hidden).to(device, dtype)
    w13, w2 = (
        torch.stack([each.dequantised(e, torch.float32) for e in range(len(counts))]).cpu()
        for each in made
    )
    expected = grouped_ffn_reference(rows_RD.float().cpu(), w13, w2, counts)
    # Rows are rounded to four significant bits, twice.
    _compare(block_scaled_ffn(rows_RD, made[0], made[1], counts), expected, 0.15)
    return f"float8 on {device.type}; this project has not run it on a GPU yet"


@torch.inference_mode()
def _run_native() -> str:
    if not native.available():
        raise Absent(native.reason())
    x, w13, w2 = torch.randn(8, 64), torch.randn(3, 96, 64) / 8, torch.randn(3, 64, 48) / 8
    _compare(grouped_ffn(x, w13, w2, [3, 0, 5]), grouped_ffn_reference(x, w13, w2, [3, 0, 5]))
    return "float32 on cpu"


@torch.inference_mode()
def _run_triton_kernels(device: torch.device) -> str:
    """Run Triton's kernels in bfloat16 against their torch references on the CPU."""
    rule = select_experts.SelectionRule(2, "softmax", normalize=True)
    logits_TE = torch.rand(9, 8).argsort(1).float()
    slot_TK, weights_TK = torch.randperm(18).view(9, 2), torch.rand(9, 2)
    rows = torch.randn(18, 128).bfloat16()

    def stored(store: Callable[..., None], to: torch.device) -> torch.Tensor:
        keys, values = (torch.zeros(3, 2, 16, 64, dtype=rows.dtype, device=to) for _ in range(2))
        k_TGD = rows.view(18, 2, 64).to(to)
        store(k_TGD, k_TGD, keys, values, torch.arange(18, device=to) * 2)
        return torch.cat((keys, values))

    pairs: dict[str, Callable[[torch.device, bool], Any]] = {
        "silu_and_mul": lambda to, plain: (
            silu_and_mul.silu_and_mul_reference if plain else silu_and_mul.silu_and_mul
        )(rows.to(to)),
        "combine_rows": lambda to, plain: (
            permute.combine_rows_reference if plain else permute.combine_rows
        )(rows.to(to), slot_TK.to(to), weights_TK.to(to)),
        "select_experts": lambda to, plain: (
            select_experts.select_experts_reference if plain else select_experts.select_experts
        )(logits_TE.to(to), None, rule)[2],
        "store_kv": lambda to, plain: stored(
            store_kv.store_kv_reference if plain else store_kv.store_kv, to
        ),
    }
    for name, call in pairs.items():
        try:
            _compare(call(device, False), call(torch.device("cpu"), True))
        except Exception as error:
            raise RuntimeError(f"{name}: {error}") from error
    return ", ".join(pairs)


def _compare(got: torch.Tensor, expected: torch.Tensor, share: float | None = None) -> None:
    """Raise unless `got` is `expected` up to rounding, or to a share of its largest number."""
    bound = (share or _BOUNDS[got.dtype]) * expected.float().abs().max().item()
    error = (got.float().cpu() - expected.float()).abs().max().item()
    if not error <= bound:  # NaN too
        raise RuntimeError(f"its numbers are wrong: off by {error:.3g}, {bound:.3g} is rounding")
