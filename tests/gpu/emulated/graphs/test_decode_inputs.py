"""Decode inputs on the emulated device: what a step costs, and that graphs read them.

Run: pytest tests/gpu/emulated/graphs/test_decode_inputs.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.layers.decode_inputs import DecodeInputs
from engine.ops.paged_attention import paged_attention
from engine.ops.store_kv import store_kv
from tests.gpu.emulated.cuda import emulated_cuda, strict
from tests.gpu.emulated.device import DEVICE
from tests.gpu.emulated.graphs.cuda_graph import check_replays
from tests.gpu.emulated.guard import obstacle

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=f"not emulated: {obstacle()}")

BLOCKS, SIZE = 8, 4


def fill(inputs: DecodeInputs, positions: list[int]) -> None:
    tables = [[2 * row, 2 * row + 1] for row in range(len(positions))]
    inputs.fill([7 + each for each in positions], np.array(positions, dtype=np.int64), tables)


def test_a_step_is_one_copy_from_the_host_and_one_on_the_device_without_a_wait(guard: Path) -> None:
    with emulated_cuda(guard):
        inputs = DecodeInputs(4, 2, SIZE, DEVICE.device, BLOCKS * SIZE)
        DEVICE.reset_counts()
        with strict():
            fill(inputs, [5, 2, 0])
        assert dict(DEVICE.kernels) == {"copy to the device": 1, "copy_": 1}
        assert not DEVICE.syncs
        assert inputs.step.slots_T.tolist() == [5, 2 * SIZE + 2, 4 * SIZE, BLOCKS * SIZE]
        assert inputs.step.queries.block_table_SB.tolist()[:2] == [[0, 1], [2, 0]]


def test_a_graph_over_them_gives_what_eager_gives_in_every_step(guard: Path) -> None:
    with emulated_cuda(guard), torch.inference_mode():
        inputs = DecodeInputs(4, 2, SIZE, DEVICE.device, BLOCKS * SIZE)
        # One block more: where the keys of idle rows go.
        keys, values = torch.rand(2, BLOCKS + 1, 1, SIZE, 8).pin_memory().to(DEVICE.device)
        table = torch.rand(20, 8).pin_memory().to(DEVICE.device)

        def run() -> torch.Tensor:
            step, queries = inputs.step, inputs.step.queries
            x_T1D = table.index_select(0, step.token_ids_T)[:, None]
            store_kv(x_T1D, x_T1D, keys, values, step.slots_T)
            return paged_attention(
                x_T1D,
                keys,
                values,
                queries.query_start_S1,
                queries.context_lens_S,
                queries.block_table_SB,
                query_lens=queries.query_lens,
                context_lens=queries.context_lens,
                scale=1.0,
                window=None,
            )

        steps = [[5, 2, 0], [6, 3, 1], [7], [], [1, 2, 3, 4]]
        check_replays(run, [lambda each=each: fill(inputs, each) for each in steps])
