"""From a scheduler's step to the model's tensors, and from its hidden states to logits.

Run: pytest tests/unit/generation/test_runner.py
"""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from engine.generation.runner import Hidden, Runner
from engine.generation.step import Slice

BLOCK_SIZE = 4


def piece(blocks: list[int], start: int, length: int, read: int) -> Slice:
    """Tokens 100 * first block + position; the row of states is the last block."""
    tokens = [100 * blocks[0] + p for p in range(BLOCK_SIZE * len(blocks))]
    seq = SimpleNamespace(token_ids=tokens, block_ids=blocks, state_row=blocks[-1])
    return cast(Slice, SimpleNamespace(seq=seq, start=start, length=length, num_read=read))


def runner(model: Any = None, has_states: bool = False) -> Runner:
    spec = SimpleNamespace(has_states=has_states)
    cache: Any = SimpleNamespace(block_size=BLOCK_SIZE, spec=spec)
    return Runner(model, cache, torch.device("cpu"))


# Two that decode, the second after a full block; a chunk that is not read, one read in part.
STEP = [
    piece([5, 9], 6, 1, 1),
    piece([2, 7, 1], 8, 1, 1),
    piece([4, 3, 0], 3, 6, 0),
    piece([8, 6], 0, 5, 2),
]


def test_a_step_is_flattened_with_the_slots_of_its_keys():
    step = runner().build(STEP)
    places = [
        (piece, position)
        for piece in STEP
        for position in range(piece.start, piece.start + piece.length)
    ]
    assert step.token_ids_T.tolist() == [p.seq.token_ids[position] for p, position in places]
    assert step.positions_T.tolist() == [position for _, position in places]
    assert step.slots_T.tolist() == [
        p.seq.block_ids[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        for p, position in places
    ]
    all_of = step.queries
    assert all_of.query_lens == [1, 1, 6, 5] and all_of.query_start_S1.tolist() == [0, 1, 2, 8, 13]
    assert all_of.context_lens == all_of.context_lens_S.tolist() == [7, 9, 9, 5]
    assert all_of.block_table_SB.tolist() == [[5, 9, 0], [2, 7, 1], [4, 3, 0], [8, 6, 0]]
    on_device = (all_of.query_start_S1, all_of.context_lens_S, all_of.block_table_SB)
    assert {tensor.dtype for tensor in on_device} == {torch.int32}
    assert {step.token_ids_T.dtype, step.positions_T.dtype, step.slots_T.dtype} == {torch.int64}


def test_every_sequence_of_a_step_has_its_row_of_the_states_in_the_one_copy(monkeypatch):
    copies = []

    def all_to_device(hosts, device):
        copies.append(len(hosts))
        return list(hosts)

    monkeypatch.setattr("engine.generation.runner.all_to_device", all_to_device)
    for slices in (STEP, STEP[:2], STEP[2:3], []):  # read in part, whole, not at all, empty
        plain = runner().build(slices)
        assert plain.queries.states_S is None
        step = runner(has_states=True).build(slices)
        states_S = step.queries.states_S
        assert states_S is not None and states_S.dtype == torch.int64
        assert states_S.tolist() == [piece.seq.block_ids[-1] for piece in slices]
        assert copies[-1] == copies[-2] + 1
        assert step.slots_T.tolist() == plain.slots_T.tolist()
        assert (step.read is None) == (plain.read is None)
        if step.read is not None and plain.read is not None:
            assert step.read.queries.states_S is None
            assert step.read.rows_R.tolist() == plain.read.rows_R.tolist()
            contexts = step.read.queries.context_lens_S.tolist()
            assert contexts == plain.read.queries.context_lens_S.tolist()


def test_sequences_that_are_not_read_have_no_queries_in_the_last_layer():
    read = runner().build(STEP).read
    assert read is not None
    assert read.rows_R.tolist() == [0, 1, 11, 12]
    assert read.queries.query_lens == [1, 1, 2] and read.queries.query_start_S1.tolist() == [
        0,
        1,
        2,
        4,
    ]
    assert read.queries.context_lens == read.queries.context_lens_S.tolist() == [7, 9, 5]
    assert read.queries.block_table_SB.tolist() == [[5, 9, 0], [2, 7, 1], [8, 6, 0]]


def test_a_step_of_which_nothing_is_read_has_no_queries_there():
    read = runner().build(STEP[2:3]).read
    assert read is not None
    assert read.rows_R.tolist() == read.queries.query_lens == read.queries.context_lens == []
    assert read.queries.query_start_S1.tolist() == [0] and read.queries.block_table_SB.shape[0] == 0


@pytest.mark.parametrize("slices", [STEP[:2], []], ids=["decode", "empty"])
def test_a_step_that_is_read_whole_needs_no_read_rows(slices):
    step = runner().build(slices)
    assert step.read is None and step.token_ids_T.shape == (len(slices),)


def test_logits_are_selected_by_row_numbers_of_the_step():
    states_RD = torch.tensor([[0.0], [1.0], [11.0], [12.0]])
    here = runner(SimpleNamespace(logits=lambda states: states))
    rows_R = runner().build(STEP).read
    assert rows_R is not None
    hidden = Hidden(states_RD, rows_R.rows_R.numpy())
    assert here.logits(hidden, [12, 0, 11]).flatten().tolist() == [12, 0, 11]
    assert here.logits(hidden, [0, 1, 11, 12]) is states_RD, "all rows in order are not copied"
    whole = Hidden(states_RD, None)
    assert here.logits(whole, [3, 0]).flatten().tolist() == [12, 0]
