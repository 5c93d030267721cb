"""The steps of the warm-up.

Run: pytest tests/unit/models/test_warm_up.py
"""

import torch

from engine.models.warm_up import _step, _widened


def test_a_wide_block_table_has_the_same_blocks_first():
    step = _step(5, 6, 4, 2, 90, torch.device("cpu"), has_states=False)
    wide = _widened(step, 9).queries
    assert wide.block_table_SB.shape == (2, 9) and wide.block_table_SB.dtype == torch.int32
    assert torch.equal(wide.block_table_SB[:, :2], step.queries.block_table_SB)
    assert wide.context_lens == step.queries.context_lens
