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

from engine.generation.detokenizer import StopChecker, TokenDecoder
from engine.request import (
    CapacityUse,
    Completion,
    FinishReason,
    Request,
    RequestError,
    Timing,
    error_record,
)


class Status(Enum):
    """Status of a sequence; a preempted one is waiting again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """The state of one request.

    Written from outside: `num_computed`, `num_computed_before`, `num_cached`, `block_ids`, `status`
    and `max_length` by the scheduler, `block_hashes`, `num_expected` and `num_published` by its
    prefix cache too, `prompt_logprobs` (extended) by its `commit`, `capacity` by the loop.
    Everything else is written by this class alone.

    Raises:
        RequestError: for stop strings without a tokenizer.
    """

    __slots__ = (
        "block_hashes", "block_ids", "capacity", "error", "finish_reason", "logprobs", "max_length",
        "num_cached", "num_computed", "num_computed_before", "num_expected", "num_prompt",
        "num_published", "prompt_logprobs", "request", "status", "stopper", "timing", "token_ids",
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
        self.num_expected = 0  # the same while it waits, an estimate
        self.num_published = 0  # leading blocks that others may share
        self.block_hashes: list[bytes] = []  # of its leading full blocks, as far as computed
        self.block_ids: list[int] = []  # block i holds tokens [i * block_size, (i+1) * block_size)
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.error: RequestError | None = None
        self.logprobs: list[float] | None = [] if params.logprobs else None
        self.prompt_logprobs: list[float | None] | None = [None] if params.prompt_logprobs else None
        self.capacity = CapacityUse()
        self.timing = Timing(arrived=time.monotonic())
        self.stopper = StopChecker(
            params,
            tokenizer=tokenizer,
            eos_token_ids=eos_token_ids,
            context=request.prompt_token_ids,
        )

    @property
    def num_generated(self) -> int:
        """Tokens sampled so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def text(self) -> str:
        """The generated text so far: whole characters, without the stop string."""
        return self.stopper.text

    def append(self, token_id: int, logprob: float | None = None) -> None:
        """Append a sampled token and check whether it ends the request.

        A token that the tokenizer cannot decode ends it with an error.

        Args:
            logprob: required, and kept, when the request asked for logprobs.
        """
        self.token_ids.append(token_id)
        if self.logprobs is not None:
            assert logprob is not None, "the request asked for logprobs"
            self.logprobs.append(logprob)
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
        try:
            text = self.text
        except RequestError as problem:
            text = self.stopper.decoded_text
            self.finish_reason, self.error = "error", self.error or problem
        return Completion(
            index=self.request.index,
            id=self.request.id,
            text=text,
            token_ids=self.token_ids[self.num_prompt :],
            finish_reason=self.finish_reason,
            prompt_tokens=self.num_prompt,
            completion_tokens=self.num_generated,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            capacity=self.capacity,
            error=None if self.error is None else error_record(self.error),
            timing=self.timing,
            request=self.request,
            cached_tokens=self.num_cached,
        )
