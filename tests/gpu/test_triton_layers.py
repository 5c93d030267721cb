"""Attention, linear attention and the dense MLP on the Triton kernels: the torch references'
results, few launches.

On a CUDA device, else in Triton's interpreter, where CPU tensors are taken for CUDA ones.

Launches are counted by a rule, not measured: a Triton kernel and an op of torch are one each, views
and memory none.
"""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any, cast

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from engine.distributed.groups import Group
from engine.layers.attention import Attention, AttentionSpec, share_query_scales
from engine.layers.gated_delta import GatedDelta, GatedDeltaSpec
from engine.layers.mla import LatentAttention, MLASpec
from engine.layers.mlp import DenseMLP
from engine.layers.query_scale import QueryScale
from engine.layers.step_inputs import Queries, ReadRows, StepTensors
from engine.ops import native, triton_support
from tests.helpers.triton_cases import DEVICE, kernel

ALONE = Group(0, 1, (0,), cast(Any, None))
BLOCK, NUM_BLOCKS = 4, 12

pytestmark = kernel


class Launches(TorchDispatchMode):
    """Counts what a GPU would run while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one op of torch and run it."""
        returns = func._schema.returns
        is_view = any(each.alias_info and not each.alias_info.is_write for each in returns)
        name = func._schema.name.split("::")[1]
        if not is_view and name not in ("_unsafe_view", "detach") and "empty" not in name:
            self.by_name[name] += 1
        return func(*args, **(kwargs or {}))


def step_of(query_lens: list[int], context_lens: list[int]) -> StepTensors:
    """Sequence s has the blocks 3 s, 3 s + 1 and 3 s + 2; rows are its last tokens."""
    positions = [
        torch.arange(context - new, context)
        for new, context in zip(query_lens, context_lens, strict=True)
    ]
    slots = [3 * s * BLOCK + position for s, position in enumerate(positions)]
    return StepTensors(
        token_ids_T=torch.zeros(sum(query_lens), dtype=torch.int64, device=DEVICE),
        positions_T=torch.cat(positions).to(DEVICE),
        slots_T=torch.cat(slots).to(DEVICE),
        queries=queries_of(query_lens, context_lens),
    )


def queries_of(query_lens: list[int], context_lens: list[int]) -> Queries:
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    return Queries(
        query_start_S1=starts.int().to(DEVICE),
        query_lens=query_lens,
        context_lens=context_lens,
        context_lens_S=torch.tensor(context_lens).int().to(DEVICE),
        block_table_SB=torch.arange(3 * len(query_lens)).view(-1, 3).int().to(DEVICE),
        states_S=torch.arange(len(query_lens)).flip(0).to(DEVICE),
    )


DECODE = ([1, 1, 1], [4, 9, 1])
MIXED = ([1, 5, 3], [7, 5, 11])
ATTENTION = {
    "mixtral": AttentionSpec(hidden=24, num_heads=4, num_kv_heads=2, head_dim=8, window=6),
    "qwen2": AttentionSpec(hidden=24, num_heads=2, num_kv_heads=2, head_dim=8, qkv_bias=True),
    "qwen3": AttentionSpec(hidden=24, num_heads=4, num_kv_heads=1, head_dim=8, qk_norm="head"),
    "olmoe": AttentionSpec(
        hidden=24, num_heads=3, num_kv_heads=3, head_dim=8, qk_norm="projection", clip_qkv=0.7
    ),
    "llama4 rotary": AttentionSpec(
        hidden=24, num_heads=4, num_kv_heads=2, head_dim=8, qk_norm="unit", chunk=4
    ),
    "llama4 nope": AttentionSpec(
        hidden=24, num_heads=4, num_kv_heads=2, head_dim=8, rotary=False,
        query_scale=QueryScale(interval=3, strength=0.5),
    ),
}  # fmt: skip
LATENT = {
    "deepseek direct": MLASpec(
        hidden=24, num_heads=3, q_rank=None, kv_rank=16, nope_dim=6, rope_dim=8, value_dim=5,
        scale=0.25,
    ),
    "deepseek latent queries": MLASpec(
        hidden=24, num_heads=4, q_rank=12, kv_rank=16, nope_dim=6, rope_dim=8, value_dim=5,
        scale=0.25, interleaved=False,
    ),
}  # fmt: skip


def attention_of(name: str) -> Attention | LatentAttention:
    torch.manual_seed(0)
    kind, spec = (Attention, ATTENTION) if name in ATTENTION else (LatentAttention, LATENT)
    layer = kind(cast(Any, spec[name]), ALONE, torch.device(DEVICE), torch.float32)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.4)
    share_query_scales([layer], 16, torch.device(DEVICE))
    return layer


def run(
    layer: Attention | LatentAttention, step: StepTensors, read: ReadRows | None = None
) -> tuple[torch.Tensor, torch.Tensor, Counter[str]]:
    """Return the output, the keys in the cache and the launches of one call."""
    torch.manual_seed(1)
    spec = layer.kv_spec(1)
    keys = torch.randn(NUM_BLOCKS, spec.num_kv_heads, BLOCK, spec.key_dim).to(DEVICE)
    values = keys[..., : spec.value_dim]
    if not spec.latent:
        values = torch.randn(keys.shape).to(DEVICE)
    num_tokens = step.token_ids_T.shape[0]
    x_TD = torch.randn(num_tokens, 24).to(DEVICE)
    angle = (torch.rand(num_tokens, 4).repeat(1, 2) * 6).to(DEVICE)
    with torch.no_grad(), Launches() as launches:
        out = layer(x_TD, angle.cos(), angle.sin(), step, keys, values, read)
    launches.by_name["cos"] -= 1
    launches.by_name["sin"] -= 1
    return out.cpu(), keys.cpu(), +launches.by_name


def serve(monkeypatch: pytest.MonkeyPatch, triton: bool) -> None:
    """Let Triton serve every tensor or none; each of its launchers counts as one launch."""
    monkeypatch.setattr(native, "serves", lambda *_: False)
    monkeypatch.setattr(triton_support, "serves", lambda _: triton)
    for op in ("rms_norm", "qk_rotary_store", "latent_rotary_store", "gate_output",
               "silu_and_mul", "paged_attention", "causal_conv_silu", "gated_delta_rule",
               "gated_rms_norm"):  # fmt: skip
        module = importlib.import_module(f"engine.ops.gpu.{op}")
        monkeypatch.setattr(module, f"{op}_triton", one_launch(op, module))


def one_launch(op: str, module: Any) -> Any:
    launcher = getattr(module, f"{op}_triton")
    launcher = getattr(launcher, "launcher", launcher)  # a test may ask for Triton twice

    def launch(*args: Any, **options: Any) -> Any:
        mode = torch.utils._python_dispatch._get_current_dispatch_mode()
        if isinstance(mode, Launches):
            mode.by_name[f"{op}_triton"] += 1
        with _disable_current_modes():
            return launcher(*args, **options)

    launch.launcher = launcher
    return launch


def read_last(query_lens: list[int], context_lens: list[int]) -> ReadRows:
    """The last token of every sequence."""
    rows = torch.tensor(query_lens).cumsum(0) - 1
    return ReadRows(rows_R=rows.to(DEVICE), queries=queries_of([1] * len(rows), context_lens))


@pytest.mark.parametrize("reads", [False, True], ids=["all rows", "the last rows"])
@pytest.mark.parametrize("lens", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("name", [*ATTENTION, *LATENT])
def test_attention_is_that_of_the_torch_references(name, lens, reads, monkeypatch):
    layer, step = attention_of(name), step_of(*lens)
    read = read_last(*lens) if reads else None
    results = []
    for triton in (True, False):
        serve(monkeypatch, triton)
        results.append(run(layer, step, read))
    (out, keys, launches), (expected, expected_keys, _) = results
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(keys, expected_keys, rtol=2e-5, atol=2e-5)
    assert any(name.endswith("_triton") for name in launches)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("mixtral", 4),  # projections, rotary and store, attention, output projection
        ("qwen2", 4),
        ("qwen3", 4),
        ("olmoe", 4),
        ("llama4 rotary", 4),
        ("llama4 nope", 6),  # the positions' factors, and a product of queries and them
        ("deepseek direct", 7),  # two products with the up-projection and a copy between heads
        ("deepseek latent queries", 9),  # norm and up-projection of the queries
    ],
)
def test_attention_of_a_decode_step_takes_few_launches(name, most, monkeypatch):
    serve(monkeypatch, triton=True)
    _, _, launches = run(attention_of(name), step_of(*DECODE))
    assert launches.total() <= most, launches


@pytest.mark.parametrize(("gate", "most"), [(False, 3), (True, 4)])
def test_the_dense_mlp_is_that_of_the_torch_references_in_few_launches(gate, most, monkeypatch):
    torch.manual_seed(0)
    layer = DenseMLP(24, 20, torch.device(DEVICE), torch.float32, output_gate=gate)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.4)
    x_TD = torch.randn(5, 24).to(DEVICE)
    serve(monkeypatch, triton=True)
    with torch.no_grad(), Launches() as launches:
        out = layer(x_TD)
    serve(monkeypatch, triton=False)
    torch.testing.assert_close(out, layer(x_TD), rtol=1e-5, atol=1e-5)
    assert launches.by_name.total() <= most, launches.by_name


def advance(layer: GatedDelta, lens: tuple[list[int], list[int]], reads: bool) -> tuple[Any, ...]:
    """Return the output, both states and the launches of one call."""
    torch.manual_seed(1)
    shapes, step = layer.state_spec(), step_of(*lens)
    conv, delta = (torch.randn(4, *s).to(DEVICE) for s in (shapes.conv_shape, shapes.delta_shape))
    x_TD = torch.randn(step.token_ids_T.shape[0], 24).to(DEVICE)
    read = read_last(*lens) if reads else None
    with torch.no_grad(), Launches() as launches:
        out = layer(x_TD, x_TD, x_TD, step, conv, delta, read)
    return out.cpu(), conv.cpu(), delta.cpu(), launches.by_name


@pytest.mark.parametrize("reads", [False, True], ids=["all rows", "the last rows"])
@pytest.mark.parametrize("lens", [DECODE, MIXED], ids=["decode", "mixed"])
def test_linear_attention_is_that_of_the_torch_references_in_five_launches(
    lens, reads, monkeypatch
):
    torch.manual_seed(0)
    spec = GatedDeltaSpec(
        hidden=24, num_key_heads=2, num_value_heads=4, key_dim=6, value_dim=5, conv_width=4,
        norm_eps=1e-6,
    )  # fmt: skip
    layer = GatedDelta(spec, ALONE, torch.device(DEVICE), torch.float32)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.4)
    results = []
    for triton in (True, False):
        serve(monkeypatch, triton)
        results.append(advance(layer, lens, reads))
    (*got, launches), (*expected, _) = results
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
    # Projections, convolution, delta rule, norm with its gate: decodes beside prefills too.
    assert launches.total() <= 5, launches
