"""Late step: a step whose tokens the host reads once the next step is queued behind it.

The host would otherwise wait for the device before it can schedule, and the device for the host
after. What the next step does not need from the host, the ids of its tokens, stays on the device:

    host      schedule 2   launch 2   read 1, commit 1   schedule 3   launch 3   read 2 ..
    device    step 1 ......................  step 2 ...........................  step 3 ..

So a sequence that ends with step 1 by its tokens is already in step 2: that row is surplus, and its
result is left out. `scheduler.py` says what it schedules while ids are pending, `loop.py` when.

Legend: S rows that sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.generation.runner import Fed
from engine.generation.sampling.sampler import (
    NUCLEUS_CANDIDATES,
    NonFiniteLogitsError,
    sample_rows,
)
from engine.generation.sampling.static_sampler import (
    NEEDS_ALL,
    NOT_FINITE,
    Draws,
    choose_tokens,
    draws_of,
    needs_host,
    sampling_table,
)
from engine.generation.sampling.step_outcome import StepOutcome
from engine.generation.sequence import Status
from engine.generation.step import Slice, Step
from engine.ops.to_device import queue_copy_out, to_device
from engine.request import SamplingParams


def can_be_late(step: Step, vocab: int, *, takes_back: bool) -> bool:
    """Return whether the step samples, and the next one needs none of it on the host.

    Args:
        step: of this rank.
        vocab: tokens of the vocabulary.
        takes_back: whether a token that was fed on may turn out to be another: recurrent states
            cannot take one back, and a graph's logits are gone by then.
    """
    if not step.sampling or step.prompt_rows:
        return False
    for piece in step.sampling:
        is_final = takes_back or not _may_need_all(piece.seq.request.params, vocab)
        if not is_final or needs_host(piece.seq, vocab):
            return False
    return True


def _may_need_all(params: SamplingParams, vocab: int) -> bool:
    """Return whether a row may turn out to need more tokens sorted than the device sorts."""
    is_nucleus = params.top_p < 1 and not 0 < params.top_k < vocab
    return not params.greedy and is_nucleus and vocab > NUCLEUS_CANDIDATES


@dataclass(slots=True)
class LateStep:
    """One step in flight."""

    step: Step
    void: Collection[int]  # slices whose rows ran on a wrong token, for `Scheduler.commit`
    fed: Fed  # its new tokens, for the step behind it
    _chosen_S: Tensor  # int64, as `choose_tokens` returns them
    # Of rows that may need all tokens sorted; None: no row does, and a graph has made them, which
    # its next replay overwrites.
    _logits_SV: Tensor | None
    _copied: tuple[Tensor, torch.cuda.Event] | None = field(default=None)

    @classmethod
    def launch(cls, step: Step, logits_SV: Tensor) -> LateStep:
        """Choose the new tokens on the device.

        Args:
            step: as `can_be_late` wants it.
            logits_SV: float32, of `step.sample_rows`.
        """
        vocab, device = logits_SV.shape[1], logits_SV.device
        requests = [piece.seq.request for piece in step.sampling]
        params = [request.params for request in requests]
        draws, sampling_5S = draws_of(params, vocab), logits_SV.new_empty(5, 0)
        if draws is not Draws.GREEDY:
            table = sampling_table(
                params,
                [_position(piece) for piece in step.sampling],
                [request.key for request in requests],
                vocab,
            )
            sampling_5S = to_device(torch.from_numpy(table), device)
        with torch.inference_mode():
            chosen_S = choose_tokens(logits_SV, sampling_5S, draws)
        return cls.of_chosen(step, chosen_S, logits_SV)

    @classmethod
    @torch.inference_mode()
    def of_chosen(cls, step: Step, chosen_S: Tensor, logits_SV: Tensor | None = None) -> LateStep:
        """Return the step in flight whose tokens are chosen.

        Args:
            step: as `can_be_late` wants it.
            chosen_S: int64, as `choose_tokens` returns them, in the order of `step.sampling`.
            logits_SV: float32; None where no row may need all tokens sorted.
        """
        # A row without a token runs on any: its result is left out.
        tokens_S = chosen_S.clamp(min=0)
        row_of = {id(piece.seq): row for row, piece in enumerate(step.sampling)}
        return cls(step, (), Fed(tokens_S, row_of), chosen_S, logits_SV)

    def copy_out(self) -> None:
        """Queue the copy to the host, behind all else of the step that the host reads late."""
        if self._chosen_S.device.type == "cpu":
            return
        self._copied = queue_copy_out(self._chosen_S)

    @torch.inference_mode()
    def read(self) -> tuple[StepOutcome, list[Slice]]:
        """Wait for the tokens; return the outcome, and the slices whose token fed on was wrong.

        Rows that are surplus or void have any token and no error.
        """
        chosen_S = self._chosen_S
        if self._copied is not None:
            chosen_S, event = self._copied
            # SYNC: once per step, with the next one queued behind it, for the tokens that decide
            # which sequences end.
            event.synchronize()
        tokens = chosen_S.tolist()  # SYNC: of the host's memory
        outcome = StepOutcome(tokens)
        if min(tokens) >= 0:
            return outcome, []
        wrong: list[Slice] = []
        failed: list[int] = []
        index_of = {id(piece): index for index, piece in enumerate(self.step.slices)}
        for row, piece in enumerate(self.step.sampling):
            index, token = index_of[id(piece)], tokens[row]
            if token >= 0 or piece.seq.status is not Status.RUNNING or index in self.void:
                continue
            if token == NEEDS_ALL:  # rare
                request = piece.seq.request
                assert self._logits_SV is not None, "`can_be_late` lets no such row through"
                try:
                    (tokens[row],) = sample_rows(
                        self._logits_SV[row : row + 1],
                        [request.params],
                        [_position(piece)],
                        [request.key],
                    ).tokens
                    wrong.append(piece)
                    continue
                except NonFiniteLogitsError:
                    tokens[row] = NOT_FINITE
            failed.append(row)
        if failed:
            slices = [self.step.sampling[row] for row in failed]
            names = [repr(piece.seq.request.id) for piece in slices]
            message = str(NonFiniteLogitsError(failed, names, tokens, None))
            outcome.errors = {index_of[id(piece)]: message for piece in slices}
        return outcome, wrong


def _position(piece: Slice) -> int:
    """Return the position of the slice's new token in its sequence."""
    return piece.start + piece.length
