"""The inputs of decode steps at fixed addresses.

Run: pytest tests/unit/layers/test_decode_inputs.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.layers.decode_inputs import BUCKETS, DecodeInputs, bucket_of

CPU = torch.device("cpu")
SCRATCH = 40


def test_a_bucket_is_the_smallest_with_room() -> None:
    assert [bucket_of(rows) for rows in (0, 1, 2, 3, 8, 9, 256)] == [1, 1, 2, 4, 8, 16, 256]
    assert bucket_of(257) is None
    assert list(BUCKETS) == sorted(BUCKETS)


def filled() -> DecodeInputs:
    """Sequences at positions 6 and 8 in a bucket of four rows; blocks of four tokens."""
    inputs = DecodeInputs(4, 5, 4, CPU, SCRATCH, scratch_state=9)
    sampling_52 = np.arange(10, dtype=np.float64).reshape(5, 2)
    inputs.fill([11, 12], np.array([6, 8]), [[5, 9, 3], [2, 7, 1]], [3, 4], sampling_52)
    return inputs


def test_rows_in_use_come_first_and_idle_ones_have_no_context_and_a_scratch_slot() -> None:
    inputs = filled()
    step = inputs.step
    assert step.token_ids_T.tolist() == [11, 12, 0, 0]
    assert step.positions_T.tolist() == [6, 8, 0, 0]
    assert step.slots_T.tolist() == [9 * 4 + 2, 1 * 4, SCRATCH, SCRATCH]
    assert step.read is None
    queries = step.queries
    assert queries.query_start_S1.tolist() == [0, 1, 2, 3, 4] and queries.query_lens == [1] * 4
    assert queries.context_lens_S.tolist() == [7, 9, 0, 0]
    assert queries.block_table_SB.shape == (4, 5)
    assert queries.block_table_SB[0, :2].tolist() == [5, 9]
    assert queries.block_table_SB[1, :3].tolist() == [2, 7, 1]
    assert queries.states_S is not None and queries.states_S.tolist() == [3, 4, 9, 9]
    assert inputs.sampling_5B.tolist() == [[2 * row, 2 * row + 1, 0, 0] for row in range(5)]
    assert inputs.num_used_1.tolist() == [2]
    wide, narrow = torch.int64, torch.int32
    assert [step.token_ids_T.dtype, step.positions_T.dtype, step.slots_T.dtype] == [wide] * 3
    assert queries.context_lens_S.dtype == queries.block_table_SB.dtype == narrow


def test_addresses_stay_and_rows_of_the_step_before_are_idle_again() -> None:
    inputs = filled()
    step, queries = inputs.step, inputs.step.queries
    tensors = [step.token_ids_T, step.positions_T, step.slots_T, queries.context_lens_S]
    tensors += [queries.block_table_SB, inputs.sampling_5B]
    addresses = [each.data_ptr() for each in tensors]
    inputs.fill([13], np.array([16]), [[6, 5, 4, 3, 2]], [1])
    assert [each.data_ptr() for each in tensors] == addresses and inputs.step is step
    assert step.token_ids_T.tolist() == [13, 0, 0, 0]
    assert step.slots_T.tolist() == [8] + [SCRATCH] * 3
    assert queries.context_lens_S.tolist() == [17, 0, 0, 0]
    assert queries.block_table_SB[0].tolist() == [6, 5, 4, 3, 2]
    assert not inputs.sampling_5B.any()
    inputs.fill([], np.zeros(0, np.int64), [])
    assert queries.context_lens_S.tolist() == step.token_ids_T.tolist() == [0] * 4
    assert step.slots_T.tolist() == [SCRATCH] * 4 and inputs.num_used_1.tolist() == [0]


def test_more_rows_or_blocks_than_there_is_room_for_are_refused() -> None:
    inputs = DecodeInputs(1, 2, 4, CPU, SCRATCH)
    assert inputs.step.queries.states_S is None
    with pytest.raises(AssertionError, match="2 rows for a bucket of 1"):
        inputs.fill([1, 2], np.array([0, 0]), [[0], [1]])
    with pytest.raises(AssertionError, match="3 blocks, room for 2"):
        inputs.fill([1], np.array([8]), [[0, 1, 2]])
