"""Decode graphs of a toy model on the emulated device, against the sampler over eager logits.

Run: pytest tests/gpu/emulated/graphs/test_decode_graphs.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.generation.decode_graphs import DecodeGraphs
from engine.generation.decode_step import fill_inputs
from engine.generation.sampling.sampler import NonFiniteLogitsError, sample
from engine.generation.sequence import Sequence
from engine.generation.step import Slice
from engine.layers.decode_inputs import DecodeInputs
from engine.layers.step_inputs import StepTensors
from engine.ops.paged_attention import paged_attention
from engine.ops.store_kv import store_kv
from engine.request import Request, SamplingParams
from tests.gpu.emulated.cuda import emulated_cuda, strict
from tests.gpu.emulated.device import DEVICE, CaptureError
from tests.gpu.emulated.guard import obstacle

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=f"not emulated: {obstacle()}")

SIZE, BLOCKS, VOCAB, DIM = 4, 16, 1500, 8
PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.9, seed=1),
    SamplingParams(temperature=0.7, top_p=0.6, seed=2),
    SamplingParams(temperature=5.0, top_p=0.95, seed=3),  # of nearly equal logits: all are sorted
]


class Toy:
    """One layer of attention between an embedding and its transpose."""

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(VOCAB, DIM, generator=generator).to(device)
        self.keys, self.values = torch.zeros(2, BLOCKS + 1, 1, SIZE, DIM, device=device)

    def logits(self, step: StepTensors) -> torch.Tensor:
        x_T1D, queries = self.table.index_select(0, step.token_ids_T)[:, None], step.queries
        store_kv(x_T1D, x_T1D, self.keys, self.values, step.slots_T)
        out_T1D = paged_attention(
            x_T1D,
            self.keys,
            self.values,
            queries.query_start_S1,
            queries.context_lens_S,
            queries.block_table_SB,
            query_lens=queries.query_lens,
            context_lens=queries.context_lens,
            scale=0.3,
            window=None,
        )
        return (out_T1D[:, 0] + x_T1D[:, 0]) @ self.table.t() / 4


def sequences(count: int) -> list[Sequence]:
    made = []
    for index in range(count):
        request = Request(
            index=index, id=str(index), prompt_token_ids=[3 + index], params=PARAMS[index]
        )
        made.append(Sequence(request))
        made[-1].block_ids = [2 * index, 2 * index + 1]
    return made


def decode(run: Callable[[list[Slice]], list[int]], running: list[Sequence]) -> list[list[int]]:
    """Generate six tokens per sequence, of the last one only two."""
    for number in range(6):
        active = running if number < 2 else running[:-1]
        slices = [Slice(seq, len(seq.token_ids) - 1, 1, True) for seq in active]
        for seq, token in zip(active, run(slices), strict=True):
            seq.token_ids.append(token)
    return [seq.token_ids for seq in running]


def test_tokens_are_those_of_the_sampler_whatever_the_bucket(
    guard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sorted_all: list[list[int]] = []
    sort_all = DecodeGraphs._sort_all

    def noted(self: DecodeGraphs, logits: torch.Tensor, slices: list[Slice], tokens: list[int]):
        sorted_all.append(tokens)
        return sort_all(self, logits, slices, tokens)

    monkeypatch.setattr(DecodeGraphs, "_sort_all", noted)
    with emulated_cuda(guard), torch.inference_mode():
        found = []
        for bucket in (None, 4, 8):
            toy, inputs = Toy(DEVICE.device), []
            for rows in (4, 8):
                inputs.append(DecodeInputs(rows, 2, SIZE, DEVICE.device, BLOCKS * SIZE))
            graphs = DecodeGraphs(toy.logits, VOCAB)
            graphs.capture(inputs)
            assert graphs.buckets == [4, 8] and not toy.keys[:BLOCKS].any()
            plain = DecodeInputs(4, 2, SIZE, DEVICE.device, BLOCKS * SIZE)

            def eagerly(
                slices: list[Slice], toy: Toy = toy, plain: DecodeInputs = plain
            ) -> list[int]:
                fill_inputs(plain, slices, VOCAB)
                logits = toy.logits(plain.step)[: len(slices)]
                requests = [piece.seq.request for piece in slices]
                lengths = [len(piece.seq.token_ids) for piece in slices]
                return sample(
                    logits, [each.params for each in requests], lengths, [e.key for e in requests]
                )[0]

            def by_graph(
                slices: list[Slice], graphs: DecodeGraphs = graphs, bucket: int | None = bucket
            ) -> list[int]:
                assert bucket is not None
                return graphs.run(bucket, slices).tokens

            found.append(decode(eagerly if bucket is None else by_graph, sequences(4)))
        assert found[0] == found[1] == found[2]
        assert len({token for tokens in found[0] for token in tokens}) > 8, found[0]
        assert len(sorted_all) == 4, "twice per bucket"


def test_a_step_is_two_graphs_two_copies_and_one_wait(guard: Path) -> None:
    with emulated_cuda(guard), torch.inference_mode():
        toy = Toy(DEVICE.device)
        graphs = DecodeGraphs(toy.logits, VOCAB)
        graphs.capture([DecodeInputs(2, 2, SIZE, DEVICE.device, BLOCKS * SIZE)])
        slices = [Slice(seq, 0, 1, True) for seq in sequences(2)]
        DEVICE.reset_counts()
        with strict():
            graphs.run(2, slices)
        assert dict(DEVICE.kernels) == {"copy to the device": 1, "copy_": 1, "graph": 2}
        assert sum(DEVICE.syncs.values()) == 1
        DEVICE.reset_counts()
        with strict():
            assert graphs.run(2, []).tokens == []
        assert DEVICE.kernels["graph"] == 1 and not DEVICE.syncs


def test_requests_with_logits_that_are_not_finite_are_named(guard: Path) -> None:
    with emulated_cuda(guard), torch.inference_mode():
        toy = Toy(DEVICE.device)
        graphs = DecodeGraphs(toy.logits, VOCAB)
        graphs.capture([DecodeInputs(2, 2, SIZE, DEVICE.device, BLOCKS * SIZE)])
        toy.table[4] = torch.nan  # of the second prompt; of a column of every row's logits
        with pytest.raises(NonFiniteLogitsError, match="request '0', '1'") as raised:
            graphs.run(2, [Slice(seq, 0, 1, True) for seq in sequences(2)])
        assert raised.value.rows == [0, 1] and raised.value.tokens == [-1, -1]


def test_a_model_that_reads_a_number_cannot_be_captured(guard: Path) -> None:
    with emulated_cuda(guard), torch.inference_mode():
        toy = Toy(DEVICE.device)

        def logits(step: StepTensors) -> torch.Tensor:
            step.token_ids_T.max().item()
            return toy.logits(step)

        graphs = DecodeGraphs(logits, VOCAB)
        with pytest.raises(CaptureError, match=r"test_decode_graphs\.py:\d+: the host waits"):
            graphs.capture([DecodeInputs(2, 2, SIZE, DEVICE.device, BLOCKS * SIZE)])
