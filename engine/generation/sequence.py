"""One request while it runs: its tokens, its place in the KV cache, and how it ended.

    waiting --admitted--> running --stop or length--> finished
       ^---- preempted ------'

The scheduler moves it along; the runner reads `token_ids`, `block_ids` and `num_computed`.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from enum import Enum

from engine.generation.detokenizer import StopChecker, TokenDecoder
from engine.request import CapacityUse, Completion, FinishReason, Request, Timing


class Status(Enum):
    """Where a sequence stands; a preempted one waits again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """The state of one request. Raises ValueError for stop strings without a tokenizer.

    Who writes what: the scheduler `num_computed`, `block_ids`, `status`, `max_length`; the runner
    `capacity`; everything else only this class.
    """

    __slots__ = (
        "block_ids", "capacity", "error", "finish_reason", "logprobs", "max_length", "num_computed",
        "num_computed_before", "num_prompt", "prompt_logprobs", "request", "status", "stopper",
        "timing", "token_ids",
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
        self.num_computed = 0  # leading tokens whose keys and values stand in the cache
        self.num_computed_before = 0  # the same before a preemption: these are run a second time
        self.block_ids: list[int] = []  # block i holds tokens [i * block_size, (i+1) * block_size)
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
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
        """The generated text so far, in whole characters and without a stop string."""
        return self.stopper.text

    def append(self, token_id: int, logprob: float | None = None) -> None:
        """Add a sampled token and see whether it is the last; `logprob` is kept when asked for."""
        self.token_ids.append(token_id)
        if self.logprobs is not None:
            assert logprob is not None, "the request asked for logprobs"
            self.logprobs.append(logprob)
        if self.timing.first_token is None:
            self.timing.first_token = time.monotonic()
        reason = self.stopper.check(token_id, full=len(self.token_ids) >= self.max_length)
        if reason is not None:
            self.finish(reason)

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """End the sequence; its blocks are the scheduler's to free."""
        assert self.finish_reason is None, f"request {self.request.id!r} finishes twice"
        self.finish_reason = reason
        self.error = error
        self.status = Status.FINISHED
        self.timing.finished = time.monotonic()

    def completion(self) -> Completion:
        """The outcome, once finished."""
        assert self.finish_reason is not None, f"request {self.request.id!r} is not finished"
        return Completion(
            index=self.request.index,
            id=self.request.id,
            text=self.text,
            token_ids=self.token_ids[self.num_prompt :],
            finish_reason=self.finish_reason,
            prompt_tokens=self.num_prompt,
            completion_tokens=self.num_generated,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            capacity=self.capacity,
            error=None if self.error is None else {"message": self.error, "line": None},
            timing=self.timing,
        )
