"""Sequence: one request while it runs. Its tokens, its KV cache blocks, and how it ended.

    waiting --admitted--> running --stop or length--> finished
       ^---- preempted ------'

`scheduler.py` changes the status; its `abort` finishes a waiting or running sequence with reason
"error".
"""

from __future__ import annotations

import time
from collections.abc import Collection
from enum import Enum

from engine.generation.detokenizer import StopChecker, TokenDecoder, decode
from engine.generation.sampling.logit_adjustments import History
from engine.request import (
    CapacityUse,
    Completion,
    FinishReason,
    Request,
    RequestError,
    Timing,
    TopLogprobs,
    error_record,
)


class Status(Enum):
    """Status of a sequence; a preempted one is waiting again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """The state of one request.

    Its length, the places of its tokens and its blocks never depend on the id of a token, so its
    newest one may be pending: chosen on the device, its id not read yet (`late/late_step.py`).

    Written from outside: `num_computed`, `num_computed_before`, `num_cached`, `num_pending`,
    `block_ids`, `state_row`, `status` and `max_length` by the scheduler, `block_hashes`,
    `num_expected` and `num_published` by its prefix cache too, `prompt_logprobs` and
    `prompt_top_logprobs` (extended) by its `commit`, `capacity` by the loop. Everything else is
    written by this class alone.

    Raises:
        RequestError: for stop strings without a tokenizer.
    """

    __slots__ = (
        "block_hashes", "block_ids", "capacity", "error", "finish_reason", "group", "history",
        "logprobs", "max_length", "num_cached", "num_computed", "num_computed_before",
        "num_expected", "num_pending", "num_prompt", "num_published", "prompt_logprobs",
        "prompt_top_logprobs", "request", "state_row", "status", "stopper", "timing", "token_ids",
        "tokenizer", "top_logprobs",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        *,
        tokenizer: TokenDecoder | None = None,
        eos_token_ids: Collection[int] = (),
    ) -> None:
        params = request.params
        self.request = request
        self.token_ids = list(request.prompt_token_ids)  # prompt, then generated
        self.num_prompt = len(self.token_ids)
        self.max_length = self.num_prompt + params.max_new_tokens  # at most, in tokens
        self.num_computed = 0  # leading tokens whose keys and values are in the cache
        self.num_computed_before = 0  # the same before a preemption; these run a second time
        self.num_cached = 0  # leading prompt tokens that the cache had when it first started
        self.num_pending = 0  # 0 or 1: tokens behind `token_ids` whose ids the host has not read
        self.num_expected = 0  # the same while it waits, an estimate
        self.num_published = 0  # leading blocks that others may share
        self.block_hashes: list[bytes] = []  # of its leading full blocks, as far as computed
        self.block_ids: list[int] = []  # block i holds tokens [i * block_size, (i+1) * block_size)
        self.state_row: int | None = None  # of the recurrent states, while it runs
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.error: RequestError | None = None
        self.logprobs: list[float] | None = [] if params.logprobs else None
        self.prompt_logprobs: list[float | None] | None = [None] if params.prompt_logprobs else None
        self.top_logprobs: list[TopLogprobs] | None = [] if params.top_logprobs else None
        self.prompt_top_logprobs: list[TopLogprobs | None] | None = None
        if params.prompt_top_logprobs:
            self.prompt_top_logprobs = [None]
        self.tokenizer = tokenizer
        self.group: ChoiceGroup | None = None  # of a line with several choices; set by the group
        self.capacity = CapacityUse()
        self.timing = Timing(arrived=time.monotonic())
        self.stopper = StopChecker(
            params,
            tokenizer=tokenizer,
            eos_token_ids=eos_token_ids,
            context=request.prompt_token_ids,
        )
        # What adjusts its logits; None: nothing does.
        self.history = History.of(params, self.token_ids, self.num_prompt, self.stopper.stop_ids)

    @property
    def num_generated(self) -> int:
        """Tokens sampled so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_tokens(self) -> int:
        """Tokens so far, a pending one included."""
        return len(self.token_ids) + self.num_pending

    @property
    def text(self) -> str:
        """The generated text so far: whole characters, without the stop string."""
        return self.stopper.text

    def append(
        self, token_id: int, logprob: float | None = None, top: TopLogprobs | None = None
    ) -> None:
        """Append a sampled token and check whether it ends the request.

        A token that the tokenizer cannot decode ends it with an error.

        Args:
            logprob: required, and kept, when the request asked for logprobs.
            top: the likeliest tokens, the same.
        """
        self.token_ids.append(token_id)
        if self.logprobs is not None:
            assert logprob is not None, "the request asked for logprobs"
            self.logprobs.append(logprob)
        if self.top_logprobs is not None:
            assert top is not None, "the request asked for top_logprobs"
            self.top_logprobs.append(top)
        if self.timing.first_token is None:
            self.timing.first_token = time.monotonic()
        try:
            reason = self.stopper.check(token_id, full=len(self.token_ids) >= self.max_length)
        except RequestError as problem:
            self.finish("error", problem)
            return
        if reason is not None:
            self.finish(reason)

    def finish(self, reason: FinishReason, error: RequestError | None = None) -> None:
        """End the sequence; does not free its blocks."""
        assert self.finish_reason is None, f"request {self.request.id!r} finishes twice"
        self.finish_reason = reason
        self.error = error
        self.status = Status.FINISHED
        self.timing.finished = time.monotonic()

    def completion(self) -> Completion:
        """Return the outcome of a finished sequence; an error where its text cannot be decoded."""
        assert self.finish_reason is not None, f"request {self.request.id!r} is not finished"
        prompt_text = ""
        try:
            prompt_text = self._prompt_text()
            text = self.text
        except RequestError as problem:
            text = self.stopper.decoded_text
            self.finish_reason, self.error = "error", self.error or problem
        return Completion(
            index=self.request.index,
            id=self.request.id,
            text=prompt_text + text,
            token_ids=self.token_ids[self.num_prompt :],
            finish_reason=self.finish_reason,
            prompt_tokens=self.num_prompt,
            completion_tokens=self.num_generated,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            top_logprobs=self.top_logprobs,
            prompt_top_logprobs=self.prompt_top_logprobs,
            stop_reason=self.stopper.stop_reason if self.finish_reason == "stop" else None,
            prompt_text=prompt_text,
            capacity=self.capacity,
            error=None if self.error is None else error_record(self.error),
            timing=self.timing,
            request=self.request,
            cached_tokens=self.num_cached,
        )

    def _prompt_text(self) -> str:
        """Return the prompt's text where the request asks for it, "" otherwise.

        Raises:
            RequestError: the tokenizer cannot decode it.
        """
        if not self.request.params.echo or self.tokenizer is None:
            return ""
        if self.request.prompt_text is not None:
            return self.request.prompt_text
        return decode(self.tokenizer, self.token_ids[: self.num_prompt])


class ChoiceGroup:
    """The sequences of a line that asks for several completions, in the order of its choices."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self._sequences = sequences
        self._num_left = len(sequences)
        self._failed: Sequence | None = None  # the first choice that failed
        for sequence in sequences:
            sequence.group = self

    def unfinished(self) -> list[Sequence]:
        """Return the sequences that still run or wait."""
        return [each for each in self._sequences if each.status is not Status.FINISHED]

    def finish(self, sequence: Sequence) -> bool:
        """Count a finished sequence; return whether it was the last."""
        if sequence.error is not None and self._failed is None:
            self._failed = sequence
        self._num_left -= 1
        return self._num_left == 0

    def completion(self) -> Completion:
        """Return the line's completion; an error, with no text, where a choice has failed."""
        first, *others = [each.completion() for each in self._sequences]
        # The end of a text is decoded only now, and may fail too.
        failed = [self._failed] if self._failed is not None else self._sequences
        for each in failed:
            if each.error is not None:
                message = f"choice {each.request.choice}: {each.error}"
                error = RequestError(each.error.code, message, each.num_prompt)
                record = Completion.failure(first.index, first.id, error)
                record.request = first.request
                return record
        first.others = others
        return first
