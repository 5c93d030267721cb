"""Admission: requests from a rank's source become sequences of its scheduler, or fail."""

from __future__ import annotations

import time
from collections.abc import Collection

from engine.generation.detokenizer import TokenDecoder
from engine.generation.request_source import RequestSource
from engine.generation.scheduler import Scheduler
from engine.generation.sequence import ChoiceGroup, Sequence
from engine.request import Completion, Request, RequestError, check_logit_bias, check_token_ids

# Most requests that a rank takes from its source before one step, and for how long: the other ranks
# wait for it, and errors reach the sink only afterwards. One line may take a slow tokenizer long.
_MAX_TAKEN, _MAX_TAKING_S = 1024, 0.1


class Admission:
    """Takes requests from a source and adds them to the scheduler of one rank."""

    def __init__(
        self,
        scheduler: Scheduler,
        vocab_size: int,
        tokenizer: TokenDecoder | None,
        eos_token_ids: Collection[int],
    ) -> None:
        self._scheduler = scheduler
        self._vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids

    def take(self, source: RequestSource) -> tuple[list[Request], list[Completion], bool]:
        """Add requests while the scheduler has room, for a limited time.

        Returns:
            The requests that were added, the failures of those that cannot run, and whether the
            source is exhausted.
        """
        arrivals: list[Request] = []
        failed: list[Completion] = []
        scheduler = self._scheduler
        num_left, until = _MAX_TAKEN, time.monotonic() + _MAX_TAKING_S
        in_flight = len(scheduler.running) + len(scheduler.waiting)
        # One at a time: a request that cannot start at once is left to the other ranks.
        while in_flight < source.limit and scheduler.room() > 0 and num_left:
            item = source.take()
            num_left = num_left - 1 if time.monotonic() < until else 0
            if item is None:
                return arrivals, failed, True
            if isinstance(item, Completion):
                failed.append(item)
            elif (failure := self.add(item)) is not None:
                failed.append(failure)
            else:
                arrivals.append(item)
                in_flight += len(item.choices)
        return arrivals, failed, False

    def add(self, request: Request) -> Completion | None:
        """Add a request to the scheduler, all its choices or none; return its failure when it can
        never run.
        """
        added: list[Sequence] = []
        try:
            for each in request.choices:
                added.append(self._add_choice(each))
        except RequestError as error:
            error.prompt_tokens = len(request.prompt_token_ids)
            for sequence in added:
                self._scheduler.abort(sequence, error)
            failed = Completion.failure(request.index, request.id, error)
            failed.request = request
            return failed
        if request.others:
            ChoiceGroup(added)
        return None

    def _add_choice(self, request: Request) -> Sequence:
        """Add one choice to the scheduler. Raises RequestError when it can never run."""
        # A source of a user's own may give what no parser has checked.
        check_token_ids(
            f"request {request.id!r}: prompt_token_ids",
            request.prompt_token_ids,
            self._vocab_size,
        )
        check_logit_bias(request.params, self._vocab_size)
        sequence = Sequence(request, tokenizer=self._tokenizer, eos_token_ids=self._eos_token_ids)
        self._scheduler.add(sequence)
        return sequence
