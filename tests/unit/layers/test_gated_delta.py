"""Gated DeltaNet against transformers. Run: python -m pytest tests/unit/layers/test_gated_delta.py.

Both run in float32 on the CPU with the same random weights, in the layouts of Qwen3-Next and of
Qwen3.5.
"""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen3_5MoeTextConfig, Qwen3NextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from engine.distributed.groups import Group
from engine.layers.gated_delta import GatedDelta, GatedDeltaSpec
from engine.layers.parallel import TensorSum
from engine.layers.step_inputs import Queries, ReadRows, StepTensors

CPU, D = torch.device("cpu"), 32
ALONE = Group(0, 1, (0,), cast(Any, None))
SIZES: dict[str, Any] = {
    "hidden_size": D,
    "num_hidden_layers": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
Both = tuple[nn.Module, GatedDelta]


def spec(by_key_head: bool) -> GatedDeltaSpec:
    return GatedDeltaSpec(
        hidden=D,
        num_key_heads=2,
        num_value_heads=4,
        key_dim=8,
        value_dim=12,
        conv_width=4,
        norm_eps=1e-6,
        by_key_head=by_key_head,
    )


def load(ours: GatedDelta, tensors: dict[str, torch.Tensor]) -> None:
    slots = list(ours.weight_slots("x"))
    assert {slot.name for slot in slots} == set(tensors)
    for slot in slots:
        assert slot.full_shape == tuple(tensors[slot.name].shape)
        whole = tensors[slot.name]
        slot.target.data.copy_(whole if slot.shard is None else whole[slot.shard])
    ours.finalize_weights()


@pytest.fixture(scope="module", params=["qwen3-next", "qwen3.5"])
def both(request: pytest.FixtureRequest) -> Both:
    torch.manual_seed(3)
    if request.param == "qwen3-next":
        theirs = Qwen3NextGatedDeltaNet(Qwen3NextConfig(**SIZES), 0)
    else:
        theirs = Qwen3_5MoeGatedDeltaNet(cast(Any, Qwen3_5MoeTextConfig(**SIZES)), 0)
    ours = GatedDelta(spec(request.param == "qwen3-next"), ALONE, CPU, torch.float32)
    for parameter in theirs.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    load(ours, theirs.state_dict(prefix="x."))
    return theirs, ours


def new_states(ours: GatedDelta, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    shapes = ours.state_spec()
    return (
        torch.zeros(rows, *shapes.conv_shape, dtype=shapes.conv_dtype),
        torch.zeros(rows, *shapes.delta_shape, dtype=shapes.delta_dtype),
    )


def run(
    ours: GatedDelta,
    x_TD: torch.Tensor,
    lens: list[int],
    before: list[int],
    rows: list[int],
    states: tuple[torch.Tensor, torch.Tensor],
    read: torch.Tensor | None = None,
) -> torch.Tensor:
    contexts = [new + old for new, old in zip(lens, before, strict=True)]
    queries = Queries(
        query_start_S1=F.pad(torch.tensor(lens).cumsum(0), (1, 0)).int(),
        query_lens=lens,
        context_lens=contexts,
        context_lens_S=torch.tensor(contexts, dtype=torch.int32),
        block_table_SB=torch.zeros(len(lens), 1, dtype=torch.int32),
        states_S=torch.tensor(rows),
    )
    unused = torch.empty(0, dtype=torch.int64)
    step = StepTensors(token_ids_T=unused, positions_T=unused, slots_T=unused, queries=queries)
    some = None if read is None else ReadRows(rows_R=read, queries=queries)
    return ours(x_TD, unused, unused, step, *states, some)


def expected(theirs: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return theirs(x[None])[0]


def test_prompts_of_a_step_give_the_same_outputs(both: Both):
    theirs, ours = both
    parts = [torch.randn(length, D) for length in (1, 3, 70)]
    states = new_states(ours, 4)
    for state in states:
        state.fill_(9.0)  # of sequences that have finished
    want = torch.cat([expected(theirs, part) for part in parts])
    step = ([1, 3, 70], [0, 0, 0], [2, 0, 3], states)
    got = run(ours, torch.cat(parts), *step)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for read in ([0, 3, 73], []):
        rows = torch.tensor(read, dtype=torch.int64)
        got = run(ours, torch.cat(parts), *step, rows)
        torch.testing.assert_close(got, want[rows], rtol=1e-4, atol=1e-5)


def test_chunks_and_decodes_continue_the_state(both: Both):
    theirs, ours = both
    first, second, states = torch.randn(40, D), torch.randn(12, D), new_states(ours, 2)
    got: list[list[torch.Tensor]] = [[], []]
    done = [0, 0]
    for lens in ([20, 1], [1, 4], [1, 1], [17, 5], [1, 1]):  # decodes and chunks in one step
        order: list[int] = sorted((0, 1), key=lambda sequence: lens[sequence])  # decodes first
        x = [(first, second)[s][done[s] : done[s] + lens[s]] for s in order]
        new, old = [lens[s] for s in order], [done[s] for s in order]
        out = run(ours, torch.cat(x), new, old, order, states)
        for s, part in zip(order, out.split(new), strict=True):
            got[s].append(part)
            done[s] += lens[s]
    assert done == [40, 12]
    for parts, x in zip(got, (first, second), strict=True):
        torch.testing.assert_close(torch.cat(parts), expected(theirs, x), rtol=1e-4, atol=1e-5)


def test_tensor_ranks_have_their_key_heads_and_sum_up_to_the_whole(
    both: Both, monkeypatch: pytest.MonkeyPatch
):
    theirs, ours = both
    x, total = torch.randn(9, D), torch.zeros(9, D)
    for rank in (0, 1):
        group = Group(rank, 2, (0, 1), cast(Any, None))
        part = GatedDelta(spec(ours.spec.by_key_head), group, CPU, torch.float32)
        load(part, theirs.state_dict(prefix="x."))
        monkeypatch.setattr(TensorSum, "__call__", lambda self, partial: partial)
        states = new_states(part, 1)
        assert states[1].shape == (1, 2, 8, 12)
        total += run(part, x, [9], [0], [0], states)
    torch.testing.assert_close(total, expected(theirs, x), rtol=1e-4, atol=1e-5)


def test_tensor_ranks_that_do_not_divide_the_key_heads_are_refused_by_name():
    with pytest.raises(ValueError, match=r"parallel.tensor = 3 .* 2 key heads .*linear_num_key"):
        GatedDelta(spec(True), Group(0, 3, (0, 1, 2), cast(Any, None)), CPU, torch.float32)
