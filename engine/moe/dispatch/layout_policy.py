"""Layout policy: which chunk layout a call uses, from numbers that all ranks agree on.

A layer may cut its rows into chunks (`chunk_layout.py`), and send a token once per rank instead of
once per assignment (`dedup.py`). What follows from a call's counts is decided by its layout; what
must be fixed before the counts are exchanged is decided here: whether to cut, and whether to count
unique rows. Both follow from the settings and from the step's tokens over all ranks.

Counting unique rows costs a few dozen small operations, and under `quota` consensus with scope
`expert` one more all-gather, because quotas determine how many rows a rank keeps and not of which
tokens. So a step counts them only where the expected saving, with every choice of experts equally
likely, is larger than that: than `COLLECTIVE_BYTES`, or on CUDA, where the link was measured
(`link.py`), than what it carries in the time of the launches. Within a node that is most of a
hundred megabytes, so only large steps are deduplicated there. Under every other consensus the
counts cost no collective: they are sent with the loads, and under `global` by gather every rank
computes them from the claims of all ranks. A chunk, too, needs rows that take as long as the
all-to-alls and launches that it adds.

Worked example, top-8 of 64 experts on 8 ranks: a token touches 5.4 ranks, so 32% of the dispatched
rows are saved; 4,096 tokens over all ranks with D = 2048 in bfloat16 save 512 * 7/8 * (8 - 5.4) *
4 KiB = 4.6 MiB per rank. The same on 2 ranks: 2.0 of 8, 75%.

With `moe.overlap.chunks: auto` the number of chunks comes from the tuner (`chunk_tuner.py`), which
the layers of a model share; the ranks add their times here.

Legend: E experts, K top-k, W expert-parallel ranks.
"""

from __future__ import annotations

import torch

from engine.config import MoEConfig
from engine.distributed.collectives import COLLECTIVE_BYTES, Collectives
from engine.distributed.groups import Link
from engine.moe.dispatch.buffers import Slot
from engine.moe.dispatch.chunk_layout import ExpertLayout, Granularity, fills_chunks
from engine.moe.dispatch.chunk_tuner import CANDIDATES, ChunkTuner, Trial
from engine.moe.dispatch.dedup import expected_unique
from engine.moe.dispatch.row_format import RowFormats
from engine.moe.dispatch.shared_rows import SharedRows

# Launches that a deduplicated call has more than another, and a chunk: the rows of the table in
# tests/gpu/emulated/budgets.txt, which a test compares.
DEDUP_LAUNCHES, CHUNK_LAUNCHES = 6, 13


class LayoutPolicy:
    """Chooses among a layer's layouts, which are made when first needed.

    Build it with the same arguments on every rank.

    Args:
        first_experts: W + 1 boundaries.
        top_k: K.
        rows: the formats that rows may be sent in.
        config: moe.overlap and moe.dispatch are read.
        link: of the ranks, where it was measured.
        shared: lets shared rows move; None: they stay.
    """

    def __init__(
        self,
        first_experts: list[int],
        top_k: int,
        rows: RowFormats,
        config: MoEConfig,
        link: Link | None = None,
        shared: SharedRows | None = None,
    ) -> None:
        self._link, self._shared = link, shared
        overlap, dispatch = config.overlap, config.dispatch
        self._first_experts, self._top_k, self._rows = first_experts, top_k, rows
        pairs = zip(first_experts, first_experts[1:], strict=False)
        self._sizes = [end - start for start, end in pairs]
        self._by: str = overlap.by
        self._deduplicates = dispatch.deduplicate and self._could_save()
        self._layouts: dict[tuple[int, bool], ExpertLayout] = {}
        self._unique_rows: dict[int, float] = {}  # expected per token, by number of chunks
        self._chunks = 1 if overlap.chunks == "auto" else overlap.chunks
        self._tunes = overlap.chunks == "auto" and len(self.candidates(None)) > 1
        self.tuner: ChunkTuner | None = None
        self.two_batch = overlap.two_batch and len(self._sizes) > 1

    def splits_batch(self, group_tokens: int) -> bool:
        """Return whether a step of so many tokens over all ranks is run as two micro-batches: where
        each has as many rows as pay for a chunk.
        """
        group_rows = group_tokens * self._top_k
        return self.two_batch and fills_chunks(group_rows, len(self._sizes), 2, self._least_rows())

    def tune(self, layer: int, tuner: ChunkTuner, control: Collectives) -> None:
        """Let the tuner choose the number of chunks, where the settings leave it open and there is
        something to cut.

        Args:
            layer: the layer's index.
            tuner: shared by the layers of a model.
            control: the host-side collectives on which ranks add their times.
        """
        self._control = control
        if self._tunes:
            tuner.register(layer)
            self.tuner, self._layer = tuner, layer

    @property
    def moves_shared(self) -> bool:
        """Whether some layout lets shared rows move."""
        return self._shared is not None and self._deduplicates

    @property
    def most_local_experts(self) -> int:
        """The experts of the rank that has most."""
        return max(self._sizes)

    @property
    def num_chunks(self) -> int:
        """The largest number of chunks of any call."""
        if self._tunes:
            return max(self.candidates(None))
        return self.layout(self._chunks).num_chunks

    @property
    def max_collectives(self) -> int:
        """Upper bound of the collectives per step that the phase clock enters: one to agree, two
        per chunk; in a step of two micro-batches, which are not cut, twice three.
        """
        return max(1 + 2 * self.num_chunks, 6 if self.two_batch else 0)

    @property
    def choices(self) -> dict[int, int]:
        """The choices of moe.overlap.chunks: auto so far, by bucket; see `ChunkTuner.choices`."""
        return {} if self.tuner is None else self.tuner.choices

    def reset(self) -> None:
        """Discard the tuner's times and choices, between steps and alike on every rank."""
        if self.tuner is not None:
            self.tuner.reset()

    def candidates(self, group_tokens: int | None) -> list[int]:
        """Return the numbers of chunks that may be tried with so many tokens over all ranks, 1
        first; None: with any number of tokens.
        """
        return [
            number
            for number in CANDIDATES
            if (layout := self.layout(number)).num_chunks == number
            and (
                number == 1
                or group_tokens is None
                or layout.is_worthwhile(group_tokens, self._top_k, self._least_rows())
            )
        ]

    def buffer_sizes(self, send_rows: int, received_rows: int) -> dict[Slot, int]:
        """Return the bytes of the row buffers for at most so many assignments sent and received in
        a call.
        """
        numbers = self.candidates(None) if self._tunes else (self._chunks, 1)
        widest = max(self.layout(number).unique_row_bytes for number in numbers)
        dispatch_bytes = self._rows.dispatch_bytes if len(self._sizes) > 1 else 0
        row_bytes = max(widest, dispatch_bytes, self._rows.combine_bytes)
        slack = 16 * self.num_chunks  # packed rows of each chunk begin at multiples of 16
        return {
            Slot.SEND: send_rows * row_bytes + slack,
            Slot.RECV: received_rows * row_bytes + slack,
            Slot.EXPERT: received_rows * self._rows.combine_bytes,
        }

    def layout(self, num_chunks: int, deduplicate: bool | None = None) -> ExpertLayout:
        """Return the layout of at most so many chunks. deduplicate: by default as configured."""
        counts = self._deduplicates if deduplicate is None else deduplicate
        key = (num_chunks, counts)
        if key not in self._layouts:
            self._layouts[key] = ExpertLayout(
                self._first_experts,
                num_chunks,
                self._granularity(num_chunks),
                self._rows,
                deduplicate=counts,
                shared=self._shared,
            )
        return self._layouts[key]

    def choose(
        self,
        group_tokens: int | None,
        chunks: int | None = None,
        *,
        costs_exchange: bool = False,
    ) -> ExpertLayout:
        """Return the layout of one call.

        Args:
            group_tokens: tokens of the call over all ranks, the same on every rank; None: as
                configured, as far as it costs no collective.
            chunks: the tuner's choice.
            costs_exchange: counting unique rows needs one more collective.
        """
        if group_tokens is None:
            return self.layout(self._chunks, self._deduplicates and not costs_exchange)
        if chunks is None:
            chunks = self._chunks
            layout = self.layout(chunks)
            if not layout.is_worthwhile(group_tokens, self._top_k, self._least_rows()):
                chunks = 1
        least = self._dedup_bytes(costs_exchange)
        return self.layout(chunks, self.saved_bytes(group_tokens, chunks) >= least)

    def begin_trial(self, group_tokens: int | None, tunes: bool = True) -> Trial:
        """Return the tuner's number of chunks for one call, or none where it has no choice.

        Collective over EP: every rank must call.

        Args:
            group_tokens: tokens of the call over all ranks.
            tunes: whether the call has the shape of the other layers' calls in its step; one that
                has not gets one chunk and is not timed.
        """
        tuner = self.tuner
        if tuner is None or group_tokens is None:
            return Trial()
        if not tunes:
            return Trial(1)
        if (costs := tuner.due(self._layer, group_tokens)) is not None:
            tuner.choose(group_tokens, self.add_times(costs))
        return tuner.begin_trial(self._layer, group_tokens, self.candidates)

    def add_times(self, costs: list[int]) -> list[int]:
        """Return the sums of all ranks' costs. Collective over EP: every rank must call."""
        return self._control.all_reduce(torch.tensor(costs)).wait().tolist()

    def saved_bytes(self, group_tokens: int, num_chunks: int = 1) -> float:
        """Return the bytes that deduplication is expected to save on the mean rank, 0 if off."""
        if not self._deduplicates:
            return 0.0
        rows, layout, top_k = self._rows, self.layout(num_chunks), self._top_k
        if num_chunks not in self._unique_rows:
            self._unique_rows[num_chunks] = expected_unique(layout.group_sizes, top_k)
        unique = self._unique_rows[num_chunks]
        combined = unique if rows.pre_reduced else top_k
        saved = top_k * rows.dispatch_bytes - unique * layout.unique_row_bytes
        saved += (top_k - combined) * rows.combine_bytes
        num_ranks = len(self._sizes)
        return max(0.0, group_tokens / num_ranks * (num_ranks - 1) / num_ranks * saved)

    def _dedup_bytes(self, costs_exchange: bool) -> float:
        """Return the bytes that deduplication has to save: what it costs."""
        link = self._link
        if link is None:
            return COLLECTIVE_BYTES * (2 if costs_exchange else 1)
        seconds = DEDUP_LAUNCHES * link.launch_s + (link.latency_s if costs_exchange else 0.0)
        return seconds * link.bytes_per_s

    def _least_rows(self) -> float:
        """Return the rows of a chunk from which their transfer takes as long as what it adds."""
        link = self._link
        if link is None:
            return 0.0
        seconds = 2 * link.latency_s + CHUNK_LAUNCHES * link.launch_s
        return seconds * link.bytes_per_s / (self._rows.dispatch_bytes + self._rows.combine_bytes)

    def _could_save(self) -> bool:
        return len(self._sizes) > 1 and max(self._sizes) > 1 and self._top_k > 1

    def _granularity(self, num_chunks: int) -> Granularity:
        if self._by == "auto":
            return "experts" if min(self._sizes) >= num_chunks else "tokens"
        return "tokens" if self._by == "tokens" else "experts"
