"""One scheduler step: which tokens of which sequences run."""

from __future__ import annotations

from dataclasses import dataclass

from engine.generation.sequence import Sequence


@dataclass(slots=True)
class Slice:
    """Tokens `seq.token_ids[start : start + length]`, run in one step."""

    seq: Sequence
    start: int
    length: int
    samples: bool  # whether the logits of its last token choose the sequence's next one

    @property
    def is_decode(self) -> bool:
        """Whether this is the newest generated token alone, not prompt nor recomputation."""
        return self.samples and self.length == 1 and self.start >= self.seq.num_prompt

    @property
    def num_recomputed(self) -> int:
        """How many of the tokens ran before, until a preemption threw their keys and values away.

        They are the leading ones; statistics that count a token once leave them out.
        """
        return min(max(self.seq.num_computed_before - self.start, 0), self.length)

    @property
    def prompt_logprob_rows(self) -> range:
        """Rows of this slice whose logits give the logprob of the next prompt token, still unknown.

        Row i holds position start + i and speaks of the token at start + i + 1.
        """
        known = self.seq.prompt_logprobs
        if known is None:
            return range(0)
        first = max(self.start, len(known) - 1)
        last = min(self.start + self.length, self.seq.num_prompt - 1)
        return range(first - self.start, max(first, last) - self.start)

    @property
    def num_read(self) -> int:
        """How many of the last tokens have a final hidden state that is read, for logits, counted
        from the first such one.
        """
        of_prompt = self.prompt_logprob_rows
        return self.length - of_prompt.start if of_prompt else int(self.samples)

    @property
    def logit_rows(self) -> list[int]:
        """Rows of this slice whose logits are needed: the sampled one, then those of the prompt."""
        sampled = [self.length - 1] if self.samples else []
        return sampled + list(self.prompt_logprob_rows)


@dataclass(slots=True)
class Step:
    """What runs now: `num_decode` decode slices, then prefill. Rows are numbered over the step."""

    slices: list[Slice]
    num_decode: int
    num_tokens: int
    sampling: list[Slice]  # the slices that sample, in order
    sample_rows: list[int]  # the row of each one's last token
    prompt_rows: list[int]  # rows for prompt logprobs
    prompt_targets: list[int]  # the token whose logprob each of them gives
    num_read: int  # rows whose final hidden state is read

    @property
    def logit_rows(self) -> list[int]:
        """Rows whose logits are needed: `sample_rows`, then `prompt_rows`; no row is in both."""
        return self.sample_rows + self.prompt_rows if self.prompt_rows else self.sample_rows

    @classmethod
    def of(cls, slices: list[Slice], num_decode: int) -> Step:
        """Number the rows of `slices`. Decode rows take no work: slice i is row i and samples."""
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
