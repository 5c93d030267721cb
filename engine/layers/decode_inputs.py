"""Decode inputs: the step inputs of a decode step at addresses that never change.

A CUDA graph reads its inputs where they were when it was captured. So each number of rows that
graphs are captured for, a bucket, has buffers of its own; a step fills those of the smallest bucket
with room for its sequences, and the rows that are left idle: token 0 at position 0 of a context of
no tokens, which attention leaves at once, its key in a scratch block that no sequence has.

All that changes from step to step lies in one range of bytes, which one copy out of pinned memory
fills. The block table comes last in it, as wide as the longest context needs; a copy on the device
spreads it to the table of fixed width. On the CPU the range is host memory, and nothing is copied.

Legend: B rows of the bucket, C columns of the block table, n rows in use, w columns in use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from engine.layers.step_inputs import Queries, StepTensors
from engine.ops.to_device import copy_into

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_ALIGNED = 16  # bytes, at a multiple of which each array begins


def bucket_of(num_rows: int) -> int | None:
    """Return the smallest bucket with room for so many rows, None where there is none.

    A rank without rows takes part in a step with the smallest one.
    """
    return next((bucket for bucket in BUCKETS if bucket >= num_rows), None)


class DecodeInputs:
    """The buffers of one bucket.

    Args:
        num_rows: B.
        max_blocks: C, the blocks of the longest context.
        block_size: of the KV cache.
        device: of the model.
        scratch_slot: a slot of the KV cache in a block that no sequence has.
        scratch_state: a row of the recurrent states that no sequence has; None: the model has none.
    """

    def __init__(
        self,
        num_rows: int,
        max_blocks: int,
        block_size: int,
        device: torch.device,
        scratch_slot: int,
        scratch_state: int | None = None,
    ) -> None:
        self.num_rows = num_rows
        self.max_blocks = max_blocks
        self.block_size = block_size
        self._scratch = scratch_slot, scratch_state or 0
        self._places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
        end = 0
        wide, narrow = torch.int64, torch.int32
        for name, dtype, shape in (
            ("token_ids", wide, (num_rows,)),
            ("positions", wide, (num_rows,)),
            ("slots", wide, (num_rows,)),
            ("states", wide, (num_rows,)),
            ("sampling", torch.float64, (5, num_rows)),
            ("contexts", narrow, (num_rows,)),
            ("num_used", narrow, (1,)),
            ("table", narrow, (num_rows, max_blocks)),
        ):
            self._places[name] = end, dtype, shape
            end += -(-math.prod(shape) * dtype.itemsize // _ALIGNED) * _ALIGNED
        self._packed = torch.zeros(end, dtype=torch.uint8, device=device)
        self._table_BC = torch.zeros(num_rows, max_blocks, dtype=narrow, device=device)
        # int32 [1], the rows in use, the first ones.
        self.num_used_1 = self._view("num_used")
        # Per row what `choose_tokens` takes, float64 [5, B].
        self.sampling_5B = self._view("sampling")
        # The lists are what a graph is captured with, so `context_lens` are the largest there are.
        self.step = StepTensors(
            token_ids_T=self._view("token_ids"),
            positions_T=self._view("positions"),
            slots_T=self._view("slots"),
            queries=Queries(
                query_start_S1=torch.arange(num_rows + 1, dtype=narrow, device=device),
                query_lens=[1] * num_rows,
                context_lens=[max_blocks * block_size] * num_rows,
                context_lens_S=self._view("contexts"),
                block_table_SB=self._table_BC,
                states_S=None if scratch_state is None else self._view("states"),
            ),
            num_live_1=self.num_used_1,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers on the device."""
        return self._packed.nbytes + self._table_BC.nbytes

    def fill(
        self,
        token_ids: Sequence[int],
        positions_n: np.ndarray,
        tables: Sequence[Sequence[int]],
        states: Sequence[int] = (),
        sampling_5n: np.ndarray | None = None,
    ) -> None:
        """Write a step's rows, by at most one copy from the host and one on the device.

        Args:
            token_ids: one per row in use.
            positions_n: int64, of these tokens.
            tables: the blocks of each row's sequence, at least those of its context.
            states: the row of each sequence in the recurrent states; () without any.
            sampling_5n: float64, see `sampling_5B`; None: all rows are greedy.
        """
        used, room, block_size = len(token_ids), self.num_rows, self.block_size
        assert used <= room, f"{used} rows for a bucket of {room}"
        blocks_n = positions_n // block_size + 1
        width = int(blocks_n.max(initial=0))
        assert width <= self.max_blocks, f"{width} blocks, room for {self.max_blocks}"
        start = self._places["table"][0]
        num_bytes = start + room * width * 4
        # Pinned memory is a new piece per step; torch uses one again only when its copy has passed.
        is_cpu = self._packed.device.type == "cpu"
        host = (
            self._packed[:num_bytes]
            if is_cpu
            else torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
        )

        def of(name: str) -> np.ndarray:
            return self._view(name, host).numpy()

        table_nw = host[start:].view(torch.int32).view(room, width).numpy()[:used]
        lists = [blocks[:num] for blocks, num in zip(tables, blocks_n.tolist(), strict=True)]
        table_nw[np.arange(width) < blocks_n[:, None]] = [each for row in lists for each in row]
        last_n = table_nw[np.arange(used), blocks_n - 1].astype(np.int64)
        rows = {
            "token_ids": (token_ids, 0),
            "positions": (positions_n, 0),
            "slots": (last_n * block_size + positions_n % block_size, self._scratch[0]),
            "states": (states or 0, self._scratch[1]),
            "contexts": (positions_n + 1, 0),
        }
        for name, (values, idle) in rows.items():
            array = of(name)
            array[:used], array[used:] = values, idle
        sampling_5B = of("sampling")
        sampling_5B[:, :used] = 0 if sampling_5n is None else sampling_5n
        sampling_5B[:, used:] = 0  # idle rows are greedy
        of("num_used")[:] = used
        if not is_cpu:
            copy_into(self._packed[:num_bytes], host)
        if width:
            packed_Bw = self._packed[start:num_bytes].view(torch.int32).view(room, width)
            self._table_BC[:, :width].copy_(packed_Bw)

    def _view(self, name: str, packed: torch.Tensor | None = None) -> torch.Tensor:
        start, dtype, shape = self._places[name]
        end = start + math.prod(shape) * dtype.itemsize
        packed = self._packed if packed is None else packed
        return packed[start:end].view(dtype).view(shape)
