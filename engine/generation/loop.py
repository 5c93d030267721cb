"""The generation loop: all ranks of an expert-parallel group step together until nobody has work.

One turn on every rank:

    1. admit      pull requests while the scheduler has room       (tensor rank 0, for its peers)
                  and nobody was asked to stop
    2. schedule   decode tokens first, then chunks of prompts      scheduler.py
    3. agree      control words: is there a step, is anybody busy  control.py
    4. forward    tensors -> model; without tokens, with none      runner.py, competition.py
    5. sample     next tokens, log probabilities                   sampler.py
    6. commit     sequences grow, finished ones leave through the sink

A rank never leaves the loop alone: step 3 gives all of them the same answer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from engine.config import RequestPhase
from engine.distributed.collectives import broadcast_object
from engine.distributed.groups import Topology
from engine.generation.control import ControlMessage, ControlPlane
from engine.generation.detokenizer import TokenDecoder
from engine.generation.interrupts import Stopped, StopRequest
from engine.generation.moe_step import build_moe_step, capacity_uses, count_competing
from engine.generation.request_source import RequestSource, Sink
from engine.generation.runner import Hidden, Runner
from engine.generation.sampler import NonFiniteLogitsError, sample, token_logprobs
from engine.generation.scheduler import Scheduler
from engine.generation.sequence import Sequence
from engine.generation.step import Step
from engine.generation.step_profiler import StepProfiler
from engine.models.decoder import GroupTokens
from engine.profiling.phase_clock import Phase
from engine.profiling.report import StepReport
from engine.profiling.telemetry import Telemetry
from engine.request import CapacityUse, Completion, Request

# Rows whose prompt logprobs are taken at once: a whole chunk of logits over a large vocabulary is
# gigabytes.
_PROMPT_ROWS = 256

# Collectives of a step outside of the model: the control words; in a tensor group requests,
# outcomes and, under a capacity policy, what was dropped.
NUM_COLLECTIVES, NUM_TENSOR_COLLECTIVES = 1, 3

OnStep = Callable[[StepReport], None]


@dataclass(slots=True)
class Totals:
    """What one rank counted over a run."""

    steps: int = 0
    tokens_prefill: int = 0
    tokens_decode: int = 0
    finished: int = 0


class GenerationLoop:
    """Runs requests to completion on one rank, in lockstep with its group."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        control: ControlPlane,
        topology: Topology,
        telemetry: Telemetry,
        meter: StepProfiler,
        *,
        tokenizer: TokenDecoder | None,
        eos_token_ids: Collection[int],
        top_k: Seq[int],
        capacity_phases: Collection[RequestPhase] = (),
    ) -> None:
        """meter: takes every step's measurements. top_k: experts of a token in each layer.
        capacity_phases: the phases whose tokens compete for expert capacity; none without a
        capacity policy.
        """
        self.totals = Totals()
        self.meter = meter
        self._runner = runner
        self._scheduler = scheduler
        self._control = control
        self._topology = topology
        self._telemetry = telemetry
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._routed_before, self._routed_last = sum(top_k[:-1]), top_k[-1]
        self._phases = tuple(capacity_phases)
        self._leads = topology.tensor.rank == 0

    def run(
        self,
        source: RequestSource,
        sink: Sink,
        on_step: OnStep | None = None,
        stop: Callable[[], StopRequest] = StopRequest,
    ) -> None:
        """Run until every rank's source is dry and all its sequences have finished.

        sink: called on the leading rank of each tensor group with the completions of a step, before
        the next begins. stop: asked before every step whether this rank is to stop. Once one rank
        is, nobody pulls requests any more. Collective over EP: every rank must call.

        Raises:
            Stopped: a rank was asked to stop with requests left, and all that ran have finished or
            it may not wait for them; on all ranks, before the same step.
        """
        began, exhausted, asked = time.monotonic(), False, 0
        clock, loads = self._telemetry.clock, self._telemetry.loads
        while True:
            clock.enter(Phase.OTHER)
            exhausted = self._admit(source, sink, closed=bool(asked)) or exhausted
            step = self._scheduler.schedule()
            everyone = self._agree(step, exhausted, stop())
            asked = max(words.signal for words in everyone)
            at_work = any(words.running + words.waiting for words in everyone)
            if not at_work and all(words.exhausted for words in everyone):
                break
            if any(words.stop_now for words in everyone) or (asked and not at_work):
                raise Stopped(asked)
            self._deliver(self._advance(step, everyone), sink)
            self._telemetry.decisions.next_step()
            self.totals.steps += 1
            report = _report(self.totals.steps, everyone, loads.reset_step(), began)
            self.meter.update(report)
            if on_step is not None:
                on_step(report)
            clock.close_step()
        clock.close_step()
        self.meter.finish()

    def _admit(self, source: RequestSource, sink: Sink, closed: bool) -> bool:
        """Fill the scheduler's room from the source, unless closed; True when the source is dry."""
        arrivals: list[Request] = []
        failed: list[Completion] = []
        exhausted = False
        scheduler = self._scheduler
        if self._leads and closed:
            exhausted = source.is_exhausted()
        elif self._leads:
            in_flight = scheduler.num_running + scheduler.num_waiting
            # One at a time: whatever cannot start at once is left to the other ranks.
            while in_flight < source.limit and scheduler.room() > 0:
                item = source.take()
                if item is None:
                    exhausted = True
                    break
                if isinstance(item, Completion):
                    failed.append(item)
                elif (failure := self._add(item)) is not None:
                    failed.append(failure)
                else:
                    arrivals.append(item)
                    in_flight += 1
        arrivals, exhausted = self._share((arrivals, exhausted))
        if not self._leads:
            for request in arrivals:
                self._add(request)
        elif failed:
            self.totals.finished += len(failed)
            sink(failed)
        return exhausted

    def _add(self, request: Request) -> Completion | None:
        """Hand a request to the scheduler; return its failure when it can never run."""
        try:
            self._scheduler.add(
                Sequence(request, tokenizer=self._tokenizer, eos_token_ids=self._eos_token_ids)
            )
        except ValueError as error:
            return Completion.failure(
                request.index,
                request.id,
                str(error),
                prompt_tokens=len(request.prompt_token_ids),
            )
        return None

    def _agree(self, step: Step, exhausted: bool, stop: StopRequest) -> list[ControlMessage]:
        scheduler = self._scheduler
        leads = int(self._leads)  # a tensor group's requests count once
        words = ControlMessage(
            tokens_prefill=(step.num_tokens - step.num_decode) * leads,
            tokens_decode=step.num_decode * leads,
            running=scheduler.num_running * leads,
            waiting=scheduler.num_waiting * leads,
            finished=self.totals.finished * leads,
            exhausted=exhausted,
            competing=count_competing(step, self._phases) * leads,
            signal=stop.signal,
            stop_now=stop.now,
            pace=self.meter.read(),
            tokens_read=step.num_read * leads,
        )
        self.totals.tokens_prefill += words.tokens_prefill
        self.totals.tokens_decode += words.tokens_decode
        return self.meter.exchange(self._control, words)

    def _advance(self, step: Step, everyone: list[ControlMessage]) -> list[Sequence]:
        """Run one step; return the sequences that finished."""
        moe_step = None
        if self._phases:
            moe_step = build_moe_step(
                step, everyone, self._phases, self._topology, self.meter.shares_W
            )
        # Of each tensor group only the leader's words count.
        group = GroupTokens(
            all=sum(words.tokens_prefill + words.tokens_decode for words in everyone),
            read=sum(words.tokens_read for words in everyone),
        )
        may_split = any(words.running > 1 for words in everyone)
        hidden = self._runner.forward(step, moe_step, group, may_split)
        outcome = self._sample(step, hidden) if self._leads else None
        tokens, logprobs, of_prompt, errors = self._share(outcome)
        for piece in step.slices:
            run = piece.length - piece.num_recomputed
            in_last = run if moe_step is not None else min(run, piece.num_read)
            routed = run * self._routed_before + in_last * self._routed_last
            piece.seq.capacity.add(CapacityUse(routed))
        if moe_step is not None:
            clock = self._telemetry.clock
            uses = capacity_uses(step, moe_step, self._topology, clock)
            clock.enter(Phase.OTHER)
            for piece, use in zip(step.slices, uses, strict=True):
                piece.seq.capacity.add(use)
        failed = [step.slices[index].seq for index in errors]
        for sequence, message in zip(failed, errors.values(), strict=True):
            self._scheduler.abort(sequence, message)
        return failed + self._scheduler.commit(step, tokens, logprobs, of_prompt)

    def _share(self, value: Any) -> Any:
        """What the leader of the tensor group has. Collective over TP."""
        tensor, clock = self._topology.tensor, self._telemetry.clock
        if tensor.size == 1:
            return value
        clock.enter_collective(Phase.TENSOR)
        value = broadcast_object(value, tensor)
        clock.enter(Phase.OTHER)
        return value

    def _sample(
        self, step: Step, hidden: Hidden
    ) -> tuple[list[int], list[float] | None, list[float], dict[int, str]]:
        """Return next tokens, their logprobs, the prompt rows' logprobs, and the failures.

        Failures map the index of a slice whose logits are not finite to what to tell its user.
        """
        of_prompt: list[float] = []
        for start in range(0, len(step.prompt_rows), _PROMPT_ROWS):
            part = slice(start, start + _PROMPT_ROWS)
            logits = self._runner.logits(hidden, step.prompt_rows[part])
            of_prompt += token_logprobs(logits, step.prompt_targets[part]).tolist()
        errors = _prompt_failures(step, of_prompt)
        if not step.sampling:
            return [], None, of_prompt, errors
        requests = [piece.seq.request for piece in step.sampling]
        try:
            tokens, logprobs = sample(
                self._runner.logits(hidden, step.sample_rows),
                [request.params for request in requests],
                [len(piece.seq.token_ids) for piece in step.sampling],
                [request.index for request in requests],
                [request.id for request in requests],
            )
        except NonFiniteLogitsError as error:
            tokens, logprobs = error.tokens, error.logprobs
            failed = {id(step.sampling[row]) for row in error.rows}
            for index, piece in enumerate(step.slices):
                if id(piece) in failed:
                    errors.setdefault(index, str(error))
        return tokens, logprobs, of_prompt, errors

    def _deliver(self, finished: list[Sequence], sink: Sink) -> None:
        self.totals.finished += len(finished)
        if finished and self._leads:
            sink([sequence.completion() for sequence in finished])


def _prompt_failures(step: Step, of_prompt: list[float]) -> dict[int, str]:
    """Slices with a prompt logprob that is not a number, by index, and what to tell their user."""
    failures: dict[int, str] = {}
    taken = 0
    for index, piece in enumerate(step.slices):
        count = len(piece.prompt_logprob_rows)
        if count and not all(map(math.isfinite, of_prompt[taken : taken + count])):
            failures[index] = str(NonFiniteLogitsError([], [repr(piece.seq.request.id)], [], None))
        taken += count
    return failures


def _report(
    step: int, everyone: list[ControlMessage], max_over_mean: float, began: float
) -> StepReport:
    return StepReport(
        step=step,
        tokens_prefill=sum(words.tokens_prefill for words in everyone),
        tokens_decode=sum(words.tokens_decode for words in everyone),
        running=sum(words.running for words in everyone),
        waiting=sum(words.waiting for words in everyone),
        finished=sum(words.finished for words in everyone),
        max_over_mean=max_over_mean,
        elapsed=time.monotonic() - began,
    )
