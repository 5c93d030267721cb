"""Step: which tokens of which sequences run in one forward pass, and which of them are read.

Chosen by `scheduler.py`; `runner.py` turns it into tensors. The tokens of a step are numbered as
rows: slice after slice, decode slices first, and within a slice by position.

Worked example, A decodes at position 6; B's prompt of 5 tokens runs whole; of C's prompt the first
3 tokens of 8:

    slices     A 6..6   B 0..4        C 0..2
    rows       0        1 2 3 4 5     6 7 8
    samples    yes      yes           no
    read       0        5             none       (prompt logprobs would read more)
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.generation.sequence import Sequence


@dataclass(slots=True)
class Slice:
    """Tokens `seq.token_ids[start : start + length]`, run in one step."""

    seq: Sequence
    start: int  # position of the first token; all before it are in the KV cache
    length: int  # tokens, at least 1
    samples: bool  # whether the logits of its last token choose the sequence's next one

    @property
    def is_pending(self) -> bool:
        """Whether the host has not read the id of its only token yet (`late/late_step.py`)."""
        return self.start == len(self.seq.token_ids)

    @property
    def is_decode(self) -> bool:
        """Whether this is one generated token, the newest: neither prompt nor recomputation."""
        return self.samples and self.length == 1 and self.start >= self.seq.num_prompt

    @property
    def num_recomputed(self) -> int:
        """How many leading tokens ran before a preemption freed their keys and values.

        Statistics that count a token once exclude them.
        """
        return min(max(self.seq.num_computed_before - self.start, 0), self.length)

    @property
    def prompt_logprob_rows(self) -> range:
        """Rows of this slice whose logits give a prompt logprob that is still unknown.

        Row i holds position start + i; its logits give the logprob of the token at start + i + 1.
        """
        known = self.seq.prompt_logprobs
        if known is None:
            return range(0)
        first = max(self.start, len(known) - 1)
        last = min(self.start + self.length, self.seq.num_prompt - 1)
        return range(first - self.start, max(first, last) - self.start)

    @property
    def num_read(self) -> int:
        """How many of the last tokens have their final hidden state read, for logits.

        Counted from the first token that is read: the rows read are contiguous.
        """
        of_prompt = self.prompt_logprob_rows
        return self.length - of_prompt.start if of_prompt else int(self.samples)


@dataclass(slots=True)
class Step:
    """The slices of one forward pass; row numbers count over the whole step."""

    slices: list[Slice]  # decode slices first, then prefill
    num_decode: int  # decode slices, of one token each
    num_tokens: int  # rows of the step
    sampling: list[Slice]  # the slices that sample, in order
    sample_rows: list[int]  # the row of the last token of each of `sampling`
    prompt_rows: list[int]  # rows for prompt logprobs, none of them in `sample_rows`
    prompt_targets: list[int]  # the token whose logprob each of them gives
    num_read: int  # rows whose final hidden state is read

    @classmethod
    def of(cls, slices: list[Slice], num_decode: int) -> Step:
        """Build a step and number its rows. A decode slice i is row i and samples."""
        sampling = slices[:num_decode]
        sample_rows = list(range(num_decode))
        prompt_rows: list[int] = []
        targets: list[int] = []
        row = num_read = num_decode
        for piece in slices[num_decode:]:
            rows = piece.prompt_logprob_rows
            if rows:
                prompt_rows.extend(range(row + rows.start, row + rows.stop))
                after = piece.start + 1
                targets += piece.seq.token_ids[after + rows.start : after + rows.stop]
            row += piece.length
            num_read += piece.num_read
            if piece.samples:
                sampling.append(piece)
                sample_rows.append(row - 1)
        return cls(slices, num_decode, row, sampling, sample_rows, prompt_rows, targets, num_read)
