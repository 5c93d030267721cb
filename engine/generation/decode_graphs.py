"""Decode graphs: a CUDA graph per bucket of rows, and the sampler in graphs of its own.

A graph holds a decode step from its inputs (`layers/decode_inputs.py`) to the logits. Which filters
the sampler runs depends on this rank's requests alone, and it has no collective: so it has a graph
per bucket and kind (`Draws`), which reads the logits of the other.

Legend: B rows of a bucket, V vocabulary, D model dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from engine.generation.decode_step import fill_inputs
from engine.generation.runner import Fed
from engine.generation.sampling.sampler import NonFiniteLogitsError, Sampled, sample_rows
from engine.generation.sampling.static_sampler import (
    NEEDS_ALL,
    NOT_FINITE,
    Draws,
    choose_tokens,
)
from engine.generation.step import Slice
from engine.layers.decode_inputs import DecodeInputs
from engine.layers.step_inputs import StepTensors

# Runs before a capture: libraries load, autotuners choose, communicators connect.
_WARM_UPS = 2
# What a graph that draws tokens may keep for its rows: float64 and int64 numbers per logit.
_DRAW_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class _Graph:
    replay: Callable[[], None]
    made: torch.Tensor  # overwritten by every replay


@dataclass(frozen=True, slots=True)
class _Bucket:
    inputs: DecodeInputs
    forward: _Graph  # makes the logits, float32 [B, V]
    samplers: dict[Draws, _Graph]  # make the tokens, int64 [B]


class DecodeGraphs:
    """The graphs of one rank.

    Args:
        logits_of: runs a step of fixed shape; returns the logits of all rows, float32 [B, V]. It
            must do all that a capture allows alone, and leave no mark with a time.
        vocab: V.
        samples: whether this rank samples, as one of each tensor group does.
    """

    def __init__(
        self,
        logits_of: Callable[[StepTensors], torch.Tensor],
        vocab: int,
        *,
        samples: bool = True,
    ) -> None:
        self._logits_of = logits_of
        self._vocab, self._samples = vocab, samples
        self._pool = torch.cuda.graph_pool_handle()
        self._buckets: dict[int, _Bucket] = {}

    @property
    def buckets(self) -> list[int]:
        """The buckets that are captured."""
        return sorted(self._buckets)

    @torch.inference_mode()
    def capture(self, inputs: Sequence[DecodeInputs]) -> None:
        """Capture the graphs of buckets, with all rows idle.

        Graphs share their memory, of which the largest bucket needs the most: it comes first.
        Collective where `logits_of` is: every rank must call with the same buckets.
        """
        for each in sorted(inputs, key=lambda each: -each.num_rows):
            fill_inputs(each, (), self._vocab)
            forward = self._captured(partial(self._logits_of, each.step))
            fits = each.num_rows * self._vocab * 16 <= _DRAW_BYTES
            samplers = {
                draws: self._captured(partial(choose_tokens, forward.made, each.sampling_5B, draws))
                for draws in Draws
                if self._samples and (fits or draws is Draws.GREEDY)
            }
            self._buckets[each.num_rows] = _Bucket(each, forward, samplers)

    def _captured(self, run: Callable[[], torch.Tensor]) -> _Graph:
        for _ in range(_WARM_UPS):
            run()
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog thread queries events, which other modes forbid.
        # SYNC: torch waits for the device before a capture; none is within a step.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            made = run()
        return _Graph(graph.replay, made)

    @torch.inference_mode()
    def run(self, bucket: int, slices: Sequence[Slice]) -> Sampled:
        """Run a decode step and return the tokens of its rows.

        Args:
            bucket: a captured one, the same on every rank.
            slices: of one token each, at most `bucket`; may be empty.

        Raises:
            NonFiniteLogitsError: a ValueError that names the requests with non-finite logits.
        """
        return self.sample(bucket, slices, self.forward(bucket, slices))

    @torch.inference_mode()
    def forward(self, bucket: int, slices: Sequence[Slice], fed: Fed | None = None) -> Draws:
        """Run the first half of `run`, up to the logits; return what `sample` takes.

        fed: where tokens of the slices are pending.

        Collective where the model is: every rank must call with the same bucket.
        """
        captured = self._buckets[bucket]
        draws = fill_inputs(captured.inputs, slices, self._vocab, fed)
        captured.forward.replay()
        return draws

    @torch.inference_mode()
    def choose(self, bucket: int, slices: Sequence[Slice], draws: Draws) -> torch.Tensor | None:
        """Return the tokens as `choose_tokens` does, int64, on the device, which no replay
        overwrites; None where no graph samples such rows.
        """
        sampler = self._buckets[bucket].samplers.get(draws)
        if sampler is None:
            return None
        sampler.replay()
        return sampler.made[: len(slices)].clone()

    @torch.inference_mode()
    def sample(self, bucket: int, slices: Sequence[Slice], draws: Draws) -> Sampled:
        """Run the second half of `run`, on a rank that samples."""
        captured = self._buckets[bucket]
        if not slices:
            return Sampled([], None, None)
        sampler = captured.samplers.get(draws)
        if sampler is None:
            return _sample_eagerly(captured.forward.made[: len(slices)], slices)
        sampler.replay()
        # SYNC: the host needs the tokens to see which sequences end and to schedule the next step.
        tokens = sampler.made[: len(slices)].tolist()
        if NEEDS_ALL in tokens:
            tokens = self._sort_all(captured.forward.made, slices, tokens)
        if NOT_FINITE in tokens:
            rows = [row for row, token in enumerate(tokens) if token == NOT_FINITE]
            names = [repr(slices[row].seq.request.id) for row in rows]
            raise NonFiniteLogitsError(rows, names, tokens, None)
        return Sampled(tokens, None, None)

    def _sort_all(
        self, logits_BV: torch.Tensor, slices: Sequence[Slice], tokens: list[int]
    ) -> list[int]:
        """Return the tokens, with those of rows whose top_p needs all tokens sorted."""
        tokens = list(tokens)
        for row, token in enumerate(tokens):
            if token == NEEDS_ALL:  # rare
                request, length = slices[row].seq.request, slices[row].start + 1
                logits_1V = logits_BV[row : row + 1]
                (tokens[row],) = sample_rows(
                    logits_1V, [request.params], [length], [request.key]
                ).tokens
        return tokens


def _sample_eagerly(logits_SV: torch.Tensor, slices: Sequence[Slice]) -> Sampled:
    """Sample rows for which no graph was captured, for what it would keep."""
    sequences = [piece.seq for piece in slices]
    return sample_rows(
        logits_SV,
        [seq.request.params for seq in sequences],
        [piece.start + 1 for piece in slices],
        [seq.request.key for seq in sequences],
        [seq.request.id for seq in sequences],
    )
