"""Simulated ranks from counts: a layer on more ranks than this machine has cores for.

Every rank's own work (pack its tokens' rows, run its experts on the rows they would receive,
regroup and combine the results) is run alone, one rank after the other, on the whole machine; the
layer takes as long as the slowest, plus its two all-to-alls, which `transfers.py` has measured
between two real processes and which are looked up by the bytes of the busiest rank. Gate and
agreement are left out, since counts are all that is known; `simulated_ranks.py` has them. Figures
made this way are labelled simulated.

Legend: W ranks, E experts, D model dim, F expert hidden dim, K top-k, A rows sent, R rows received.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bench.moe_case import MoEShape
from bench.transfers import NO_TRANSFERS, Transfers
from engine.ops.grouped_ffn import grouped_ffn
from engine.ops.permute import combine_rows, gather_rows

ROW_BYTES = 4  # float32


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Seconds of one layer call."""

    rank_seconds: tuple[float, ...]  # work of each rank, run alone
    collective_seconds: float  # both all-to-alls

    @property
    def seconds(self) -> float:
        """The slowest rank's work and the all-to-alls."""
        return max(self.rank_seconds) + self.collective_seconds


class SimulatedLayer:
    """Weights and rows of one rank, used for every rank in turn. counts are int64 [W, E]."""

    def __init__(self, shape: MoEShape, num_ranks: int, seed: int = 0) -> None:
        self.shape, self.num_ranks = shape, num_ranks
        random = torch.Generator().manual_seed(seed)
        local = -(-shape.experts // num_ranks)
        scale = shape.hidden**-0.5
        self._w13 = torch.randn(local, 2 * shape.ffn, shape.hidden, generator=random).mul_(scale)
        self._w2 = torch.randn(local, shape.hidden, shape.ffn, generator=random).mul_(scale)
        self._buffers = [torch.empty(0, shape.hidden) for _ in range(3)]
        self._random = random
        parts = np.array_split(np.arange(shape.experts), num_ranks)
        self._owned = [slice(int(part[0]), int(part[-1]) + 1) for part in parts]

    def time(
        self, counts_WE: np.ndarray, transfers: Transfers = NO_TRANSFERS, rounds: int = 3
    ) -> LayerTime:
        """Time one layer call in which rank w sends counts_WE[w, e] rows to expert e."""
        return self.compare([counts_WE], transfers, rounds)[0]

    @torch.inference_mode()
    def compare(
        self, cases: Sequence[np.ndarray], transfers: Transfers = NO_TRANSFERS, rounds: int = 3
    ) -> list[LayerTime]:
        """Time several calls in turns, so that they see the same state of the machine.

        The first one determines the number of tokens per rank: it sends K rows for each. The
        others may have dropped rows or added some.
        """
        tokens = [-(-int(sent) // self.shape.top_k) for sent in cases[0].sum(1)]
        ranks = range(self.num_ranks)
        times: list[list[list[float]]] = [[[] for _ in ranks] for _ in cases]
        for turn in range(rounds + 1):
            for case, counts_WE in enumerate(cases):
                for rank in ranks:
                    seconds = self._work(counts_WE, rank, tokens[rank])
                    if turn:
                        times[case][rank].append(seconds)
        return [
            LayerTime(
                tuple(statistics.median(each) for each in times[case]),
                2 * transfers.of(self._busiest(counts_WE)),
            )
            for case, counts_WE in enumerate(cases)
        ]

    def _work(self, counts_WE: np.ndarray, rank: int, num_tokens: int) -> float:
        expert_counts = counts_WE.sum(0)[self._owned[rank]].tolist()
        sent, received = int(counts_WE[rank].sum()), sum(expert_counts)
        columns = max(self.shape.top_k, -(-sent // max(num_tokens, 1)))
        slot_TM = torch.full((num_tokens, columns), -1)
        # What is missing of T * M is spread over the tokens, as the drops of a step.
        position_A = torch.arange(sent) * slot_TM.numel() // max(sent, 1)
        slot_TM.view(-1)[position_A] = torch.arange(sent)
        weights_TM = torch.full((num_tokens, columns), 1 / columns)
        regroup_R = torch.arange(received).flip(0)
        local = len(expert_counts)
        rows = self._buffer(0, max(sent, received, num_tokens))
        packed, grouped = self._buffer(1, max(sent, received)), self._buffer(2, received)
        begin = time.perf_counter()
        gather_rows(rows[:num_tokens], position_A // columns, packed[:sent])
        gather_rows(rows[:received], regroup_R, grouped)
        results = grouped_ffn(
            grouped, self._w13[:local], self._w2[:local], expert_counts, packed[:received]
        )
        grouped.index_copy_(0, regroup_R, results)
        combine_rows(rows[:sent], slot_TM, weights_TM)
        return time.perf_counter() - begin

    def _buffer(self, number: int, num_rows: int) -> torch.Tensor:
        """Return rows kept between calls, as the engine's: new memory would be paged in."""
        if len(self._buffers[number]) < num_rows:
            made = torch.randn(num_rows, self.shape.hidden, generator=self._random)
            self._buffers[number] = made
        return self._buffers[number][:num_rows]

    def _busiest(self, counts_WE: np.ndarray) -> int:
        """Return the bytes of the rank that sends or receives most, in one all-to-all."""
        to_rank_WW = np.stack([counts_WE[:, owned].sum(1) for owned in self._owned], axis=1)
        remote = to_rank_WW - np.diag(np.diag(to_rank_WW))
        rows = max(int(remote.sum(0).max()), int(remote.sum(1).max()))
        return rows * self.shape.hidden * ROW_BYTES


def layer_seconds(
    shape: MoEShape,
    counts_WE: np.ndarray,
    transfers: Transfers = NO_TRANSFERS,
    rounds: int = 3,
) -> LayerTime:
    """Time one layer call with these counts on as many simulated ranks as it has rows."""
    return SimulatedLayer(shape, len(counts_WE)).time(counts_WE, transfers, rounds)
