"""Attention whose heads have output gates, and zero-centred norms, against transformers.

Run: python -m pytest tests/unit/layers/test_output_gate.py. Float32 on the CPU, the same weights.
"""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextAttention,
    Qwen3NextRotaryEmbedding,
)

from engine.distributed.groups import Group
from engine.layers.attention import Attention, AttentionSpec
from engine.layers.kv_cache import KVCache
from engine.layers.rotary import RotaryTable
from engine.layers.step_inputs import Queries, ReadRows, StepTensors

CPU, D, HEADS, KV_HEADS, DIM, TOKENS = torch.device("cpu"), 32, 4, 2, 16, 7
CONFIG = Qwen3NextConfig(
    hidden_size=D,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    head_dim=DIM,
    attention_bias=True,
)
CONFIG._attn_implementation = "eager"


def load(ours: Attention, tensors: dict[str, torch.Tensor]) -> None:
    slots = list(ours.weight_slots("x"))
    assert {slot.name for slot in slots} == set(tensors)
    for slot in slots:
        assert slot.full_shape == tuple(tensors[slot.name].shape)
        whole = tensors[slot.name] if slot.shard is None else tensors[slot.name][slot.shard]
        slot.target.copy_(whole + slot.offset)
    ours.finalize_weights()


def new(rank: int = 0, size: int = 1) -> Attention:
    spec = AttentionSpec(
        hidden=D,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        qkv_bias=True,
        out_bias=True,
        qk_norm="head",
        norm_eps=CONFIG.rms_norm_eps,
        norm_offset=1.0,
        output_gate=True,
    )
    group = Group(rank, size, tuple(range(size)), cast(Any, None))
    return Attention(spec, group, CPU, torch.float32)


@pytest.fixture(scope="module")
def theirs() -> Qwen3NextAttention:
    torch.manual_seed(5)
    module = Qwen3NextAttention(CONFIG, 0)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn_like(parameter) * 0.3)
    return module


def step_of(read: torch.Tensor | None) -> StepTensors:
    def queries(count: int) -> Queries:
        return Queries(
            query_start_S1=torch.tensor([0, count], dtype=torch.int32),
            query_lens=[count],
            context_lens=[TOKENS],
            context_lens_S=torch.tensor([TOKENS], dtype=torch.int32),
            block_table_SB=torch.tensor([[1, 0]], dtype=torch.int32),
        )

    rows = None if read is None else ReadRows(rows_R=read, queries=queries(len(read)))
    positions = torch.arange(TOKENS)
    return StepTensors(
        token_ids_T=positions,
        positions_T=positions,
        slots_T=torch.where(positions < 4, positions + 4, positions - 4),
        queries=queries(TOKENS),
        read=rows,
    )


@torch.inference_mode()
def test_gated_heads_give_transformers_output(theirs: Qwen3NextAttention):
    ours, x_TD = new(), torch.randn(TOKENS, D)
    load(ours, theirs.state_dict(prefix="x."))
    angles = Qwen3NextRotaryEmbedding(CONFIG)(x_TD, torch.arange(TOKENS)[None])
    mask = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)
    want = theirs(x_TD[None], angles, mask[None, None])[0][0]
    rotated = RotaryTable(CONFIG, DIM // 4, TOKENS, CPU, torch.float32).rows(torch.arange(TOKENS))
    cache = KVCache(ours.kv_spec(1), 2, 4, CPU, torch.float32)
    for read in (None, torch.tensor([5, 6])):
        step = step_of(read)
        got = ours(x_TD, *rotated, step, cache.keys[0], cache.values[0], step.read)
        expected = want if read is None else want[read]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_tensor_rank_has_the_gates_of_its_own_queries(theirs: Qwen3NextAttention):
    tensors, width = theirs.state_dict(prefix="x."), HEADS // 2 * DIM
    by_head = tensors["x.q_proj.bias"].view(HEADS, 2, DIM)
    for rank in (0, 1):
        ours = new(rank, 2)
        load(ours, tensors)
        mine = by_head[rank * 2 : rank * 2 + 2]
        assert ours.qkv_bias_O is not None
        assert torch.equal(ours.qkv_bias_O[:width], mine[:, 0].flatten())
        assert torch.equal(ours.qkv_bias_O[width : 2 * width], mine[:, 1].flatten())
