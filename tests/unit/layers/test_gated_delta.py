"""Gated DeltaNet against transformers. Run: python -m pytest tests/unit/layers/test_gated_delta.py.

Both run in float32 on the CPU with the same random weights.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from engine.layers.gated_delta import GatedDelta, GatedDeltaSpec
from engine.layers.step_inputs import Queries

CPU, D = torch.device("cpu"), 32
SPEC = GatedDeltaSpec(
    hidden=D,
    num_key_heads=2,
    num_value_heads=4,
    key_dim=8,
    value_dim=12,
    conv_width=4,
    norm_eps=1e-6,
)


@pytest.fixture(scope="module")
def both() -> tuple[Qwen3NextGatedDeltaNet, GatedDelta]:
    torch.manual_seed(3)
    config = Qwen3NextConfig(
        hidden_size=D,
        num_hidden_layers=1,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
    )
    theirs, ours = Qwen3NextGatedDeltaNet(config, 0), GatedDelta(SPEC, CPU, torch.float32)
    for parameter in theirs.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    tensors = theirs.state_dict(prefix="x.")
    slots = list(ours.weight_slots("x"))
    assert {slot.name for slot in slots} == set(tensors)
    for slot in slots:
        assert slot.full_shape == tuple(tensors[slot.name].shape)
        slot.target.data.copy_(tensors[slot.name])
    ours.finalize_weights()
    return theirs, ours


def queries(lens: list[int], before: list[int]) -> Queries:
    contexts = [new + old for new, old in zip(lens, before, strict=True)]
    return Queries(
        query_start_S1=F.pad(torch.tensor(lens).cumsum(0), (1, 0)).int(),
        query_lens=lens,
        context_lens=contexts,
        context_lens_S=torch.tensor(contexts, dtype=torch.int32),
        block_table_SB=torch.zeros(len(lens), 1, dtype=torch.int32),
    )


def expected(theirs: Qwen3NextGatedDeltaNet, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return theirs(x[None])[0]


def test_prompts_of_a_step_give_the_same_outputs(both: tuple[Qwen3NextGatedDeltaNet, GatedDelta]):
    theirs, ours = both
    parts = [torch.randn(length, D) for length in (1, 3, 70)]
    states = ours.new_states(4)
    for state in states:
        state.fill_(9.0)  # of sequences that have finished
    rows = torch.tensor([2, 0, 3])
    want = torch.cat([expected(theirs, part) for part in parts])
    step = queries([1, 3, 70], [0, 0, 0])
    got = ours(torch.cat(parts), step, rows, *states)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    read = torch.tensor([0, 3, 73])
    got = ours(torch.cat(parts), step, rows, *states, rows_R=read)
    torch.testing.assert_close(got, want[read], rtol=1e-4, atol=1e-5)


def test_chunks_and_decodes_continue_the_state(both: tuple[Qwen3NextGatedDeltaNet, GatedDelta]):
    theirs, ours = both
    first, second, states = torch.randn(40, D), torch.randn(12, D), ours.new_states(2)
    got: list[list[torch.Tensor]] = [[], []]
    done = [0, 0]
    for lens in ([20, 1], [1, 4], [1, 1], [17, 5], [1, 1]):  # decodes and chunks in one step
        order = sorted((0, 1), key=lambda sequence: lens[sequence])  # decodes first
        x = [(first, second)[s][done[s] : done[s] + lens[s]] for s in order]
        step = queries([lens[s] for s in order], [done[s] for s in order])
        out = ours(torch.cat(x), step, torch.tensor(order), *states)
        for s, part in zip(order, out.split([lens[s] for s in order]), strict=True):
            got[s].append(part)
            done[s] += lens[s]
    assert done == [40, 12]
    for parts, x in zip(got, (first, second), strict=True):
        torch.testing.assert_close(torch.cat(parts), expected(theirs, x), rtol=1e-4, atol=1e-5)
