"""LayoutPolicy: which of a layer's ways to travel a call takes, from agreed numbers alone.

A layer may cut its rows into chunks or not (`overlap.py`), and send a token's row once a rank or
once an expert (`dedup.py`). What a call's counts decide, its layout decides; what must be settled
before the counts are exchanged is settled here: whether to cut, and whether to count unique rows.
Both follow from the settings and from the step's tokens over all ranks.

Counting unique rows is a dozen small operations, and under `quota` consensus with scope `expert`
one more all-gather, because quotas say how many rows a rank keeps and not of which tokens. So a
step is only tried where the saving to be expected, with every choice of experts as likely, is
larger than that. Under every other consensus the numbers are free: they ride along with the counts,
and under `global` by gather every rank works them out from the claims it has of all others.

Worked example, top-8 of 64 experts on 8 ranks: a token touches 5.4 ranks, so 32% of the rows out
are saved; 4,096 tokens over all ranks with D = 2048 in bfloat16 save 512 * 7/8 * (8 - 5.4) * 4 KiB
= 4.6 MiB a rank. The same on 2 ranks: 2.0 of 8, 75%.

With `moe.overlap.chunks: auto` the number of chunks is the tuner's (`tuner.py`), shared by the
layers of a model; the ranks add up what they measured here.

Legend: E experts, K top-k, W expert-parallel ranks.
"""

from __future__ import annotations

import torch

from engine.config import MoEConfig
from engine.distributed.collectives import COLLECTIVE_BYTES, Collectives
from engine.moe.dispatch.buffers import Slot
from engine.moe.dispatch.chunk_layout import By, ExpertLayout, fills_chunks
from engine.moe.dispatch.chunk_tuner import CANDIDATES, ChunkTuner, Trial
from engine.moe.dispatch.dedup import expected_unique
from engine.moe.dispatch.row_format import RowFormats


class LayoutPolicy:
    """A layer's layouts, made when first needed. Build it with the same arguments on every rank.

    first_experts: W + 1 boundaries. rows: what travels.
    """

    def __init__(
        self,
        first_experts: list[int],
        top_k: int,
        rows: RowFormats,
        config: MoEConfig,
    ) -> None:
        overlap, dispatch = config.overlap, config.dispatch
        self._first_experts, self._top_k, self._rows = first_experts, top_k, rows
        pairs = zip(first_experts, first_experts[1:], strict=False)
        self._sizes = [end - start for start, end in pairs]
        self._by: str = overlap.by
        self._deduplicates = dispatch.deduplicate and self._could_save()
        self._made: dict[tuple[int, bool], ExpertLayout] = {}
        self._touched: dict[int, float] = {}
        self._chunks = 1 if overlap.chunks == "auto" else overlap.chunks
        self._tunes = overlap.chunks == "auto" and len(self.candidates(None)) > 1
        self.tuner: ChunkTuner | None = None
        self.two_batch = overlap.two_batch and len(self._sizes) > 1

    def splits(self, group_tokens: int) -> bool:
        """Whether a step of so many tokens over all ranks is run as two half batches: each has as
        many rows as pay for a chunk.
        """
        return self.two_batch and fills_chunks(group_tokens * self._top_k, len(self._sizes), 2)

    def tune(self, layer: int, tuner: ChunkTuner, control: Collectives) -> None:
        """Let the tuner choose the number of chunks, where the settings leave it open and there is
        something to cut. control: where ranks add up what they measured.
        """
        if self._tunes:
            tuner.register(layer)
            self.tuner, self._layer, self._control = tuner, layer, control

    @property
    def num_chunks(self) -> int:
        """Most chunks of any call."""
        if self._tunes:
            return max(self.candidates(None))
        return self.layout(self._chunks).num_chunks

    @property
    def max_collectives(self) -> int:
        """Collectives of a step at most that the phase clock is told of: one to agree, two for each
        chunk; in a step of two half batches, which are not cut, twice three.
        """
        return max(1 + 2 * self.num_chunks, 6 if self.two_batch else 0)

    @property
    def choices(self) -> dict[int, int]:
        """What moe.overlap.chunks: auto has chosen so far, by bucket; see `ChunkTuner.choices`."""
        return {} if self.tuner is None else self.tuner.choices

    def reset(self) -> None:
        """Costs have changed, between steps and alike on every rank: measure anew."""
        if self.tuner is not None:
            self.tuner.reset()

    def candidates(self, group_tokens: int | None) -> list[int]:
        """Numbers of chunks that may be tried with so many tokens over all ranks; None: with any
        number. 1 always comes first.
        """
        return [
            number
            for number in CANDIDATES
            if (layout := self.layout(number)).num_chunks == number
            and (number == 1 or group_tokens is None or layout.pays(group_tokens, self._top_k))
        ]

    def buffer_sizes(self, send_rows: int, received_rows: int) -> dict[Slot, int]:
        """Bytes of the row buffers for at most so many assignments sent and received in a call."""
        numbers = self.candidates(None) if self._tunes else (self._chunks, 1)
        widest = max(self.layout(number).unique_row_bytes for number in numbers)
        out_bytes = self._rows.out_bytes if len(self._sizes) > 1 else 0
        row_bytes = max(widest, out_bytes, self._rows.home_bytes)
        slack = 16 * self.num_chunks  # wire rows of each chunk begin at multiples of 16
        return {
            Slot.SEND: send_rows * row_bytes + slack,
            Slot.ARRIVED: received_rows * row_bytes + slack,
            Slot.GROUPED: received_rows * self._rows.home_bytes,
        }

    def layout(self, num_chunks: int, deduplicate: bool | None = None) -> ExpertLayout:
        """The layout of at most so many chunks. deduplicate: by default as configured."""
        counts = self._deduplicates if deduplicate is None else deduplicate
        key = (num_chunks, counts)
        if key not in self._made:
            self._made[key] = ExpertLayout(
                self._first_experts,
                num_chunks,
                self._way(num_chunks),
                self._rows,
                deduplicate=counts,
            )
        return self._made[key]

    def choose(
        self,
        group_tokens: int | None,
        chunks: int | None = None,
        *,
        costs_exchange: bool = False,
    ) -> ExpertLayout:
        """The layout of one call. group_tokens: tokens of the call over all ranks, the same on
        every rank; None: as configured, as long as it costs no collective. chunks: what the tuner
        says. costs_exchange: unique rows can only be learnt by one more collective.
        """
        if group_tokens is None:
            return self.layout(self._chunks, self._deduplicates and not costs_exchange)
        if chunks is None:
            chunks = self._chunks
            if not self.layout(chunks).pays(group_tokens, self._top_k):
                chunks = 1
        least = COLLECTIVE_BYTES * (2 if costs_exchange else 1)
        return self.layout(chunks, self.saved_bytes(group_tokens, chunks) >= least)

    def begin_trial(self, group_tokens: int | None, tunes: bool = True) -> Trial:
        """What the tuner says of one call; nothing, where nobody asks it. tunes: whether the call
        is like those of other layers in its step; one that is not has one chunk and teaches
        nothing. Collective over EP: every rank must call.
        """
        tuner = self.tuner
        if tuner is None or group_tokens is None:
            return Trial()
        if not tunes:
            return Trial(1)
        if (costs := tuner.due(self._layer, group_tokens)) is not None:
            totals = self._control.all_reduce(torch.tensor(costs)).wait().tolist()
            tuner.choose(group_tokens, totals)
        return tuner.begin_trial(self._layer, group_tokens, self.candidates)

    def saved_bytes(self, group_tokens: int, num_chunks: int = 1) -> float:
        """Bytes that the mean rank may expect to save by deduplication, 0 where it is off."""
        if not self._deduplicates:
            return 0.0
        rows, layout, top_k = self._rows, self.layout(num_chunks), self._top_k
        if num_chunks not in self._touched:
            self._touched[num_chunks] = expected_unique(layout.group_sizes, top_k)
        once = self._touched[num_chunks]
        home = once if rows.partial else top_k
        saved = top_k * rows.out_bytes - once * layout.unique_row_bytes
        saved += (top_k - home) * rows.home_bytes
        num_ranks = len(self._sizes)
        return max(0.0, group_tokens / num_ranks * (num_ranks - 1) / num_ranks * saved)

    def _could_save(self) -> bool:
        return len(self._sizes) > 1 and max(self._sizes) > 1 and self._top_k > 1

    def _way(self, num_chunks: int) -> By:
        if self._by == "auto":
            return "experts" if min(self._sizes) >= num_chunks else "tokens"
        return "tokens" if self._by == "tokens" else "experts"
