"""Generation loop: all ranks of an expert-parallel group step together until none has work.

One iteration on every rank:

    1. admit      pull requests from the source while the           request_source.py,
                  scheduler has room and no rank is to stop         admission.py
                  (tensor rank 0, which broadcasts them)
    2. schedule   decode tokens first, then chunks of prompts       scheduler.py
    3. control    exchange control messages: is there a step,       control.py
                  does any rank have work
    4. forward    run the model, also with zero tokens              runner.py, moe_step.py
    5. sample     next tokens, log probabilities                    sampling/
    6. commit     append tokens; pass finished requests to the sink scheduler.py, sequence.py

With asynchronous scheduling the tokens of a step stay on the device until the next is queued behind
it, where none of its sequences needs them on the host: its commit comes after step 5 of the next
iteration (`late/flight.py`). Each rank decides so for itself, the order of its collectives is the
same. It commits first where the next step would be empty or preempt, or no more requests are taken.

A rank never leaves the loop alone: step 3 has the same outcome on all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

from engine.config import RequestPhase
from engine.distributed.collectives import broadcast_object
from engine.distributed.groups import Topology
from engine.generation.admission import Admission
from engine.generation.control import ControlMessage, ControlPlane
from engine.generation.detokenizer import TokenDecoder
from engine.generation.graphs.steps import GraphSteps
from engine.generation.interrupts import Stopped, StopRequest
from engine.generation.late.flight import Flight
from engine.generation.late.late_step import LateStep
from engine.generation.late.record import Routed, record
from engine.generation.moe_step import (
    CopiesUse,
    ExchangeWay,
    LayerPhases,
    build_moe_step,
    capacity_uses,
    count_eligible,
    static_bucket,
)
from engine.generation.replanner import Replanner
from engine.generation.request_source import RequestSource, Sink
from engine.generation.runner import Runner
from engine.generation.sampling.step_outcome import read_step
from engine.generation.scheduler import Scheduler
from engine.generation.sequence import ChoiceGroup, Sequence
from engine.generation.step import Step
from engine.generation.step_profiler import StepProfiler
from engine.generation.totals import OnStep, Totals, step_report
from engine.models.decoder import GroupTokens
from engine.profiling.phase_clock import Phase
from engine.profiling.telemetry import Telemetry
from engine.request import Completion, Request

# Collectives of a step outside of the model: the control message; in a tensor group the requests,
# the outcomes and, under a capacity policy or with low-bit copies, the dropped assignments and the
# copies' in the last layer.
NUM_COLLECTIVES, NUM_TENSOR_COLLECTIVES = 1, 4


class GenerationLoop:
    """Runs requests to completion on one rank, in lockstep with its group."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        control: ControlPlane,
        topology: Topology,
        telemetry: Telemetry,
        step_profiler: StepProfiler,
        *,
        tokenizer: TokenDecoder | None,
        eos_token_ids: Collection[int],
        top_k: list[int],
        capacity_phases: Collection[RequestPhase] = (),
        layer_phases: LayerPhases | None = None,
        copies: CopiesUse | None = None,
        replanner: Replanner | None = None,
        exchange: ExchangeWay = "counted",
        graphs: GraphSteps | None = None,
        asynchronous: bool = False,
    ) -> None:
        """Build the loop of one run.

        Args:
            step_profiler: records every step's measurements.
            tokenizer: None leaves the text of completions empty.
            top_k: experts per token in each layer.
            capacity_phases: the phases whose tokens are subject to expert capacity; empty without a
                capacity policy.
            layer_phases: the same layer by layer, where they may differ (moe.policy); None: all
                layers have the same.
            copies: when experts' copies take rows; None: there are none.
            replanner: changes the copies as the job runs; None: they stay.
            exchange: moe.dispatch.exchange.
            graphs: run decode steps; None: all steps are eager.
            asynchronous: whether steps may be scheduled before the one ahead is committed; not in
                a tensor group, with capacity phases, low-bit copies or a replanner.
        """
        self._graphs = graphs
        self._exchange: ExchangeWay = exchange
        self._replanner = replanner
        self.totals = Totals()
        self._step_profiler = step_profiler
        self._runner = runner
        self._scheduler = scheduler
        self._control = control
        self._topology = topology
        self._telemetry = telemetry
        self._admission = Admission(scheduler, runner.model.vocab_size, tokenizer, eos_token_ids)
        self._limited, self._copies = bool(capacity_phases), copies
        self._counts_copies = copies is not None and copies.low_bit
        self._phases = self._counted_phases = tuple(capacity_phases)
        self._layer_phases = layer_phases if self._limited else None
        if self._layer_phases is not None:
            self._counted_phases = self._layer_phases.counted
        if copies is not None and copies.low_bit and not self._limited:
            self._phases = self._counted_phases = tuple(copies.phases)
        self._is_leader = topology.tensor.rank == 0
        apart = topology.tensor.size == 1 and not self._phases and replanner is None
        assert apart or not asynchronous, "a step needs what the host reads of the one before"
        self._routed = Routed(sum(top_k[:-1]), top_k[-1], runner.model.runs_last_whole)
        self._flight = Flight(runner, scheduler, self._routed, self.totals, enabled=asynchronous)

    def run(
        self,
        source: RequestSource,
        sink: Sink,
        on_step: OnStep | None = None,
        stop: Callable[[], StopRequest] = StopRequest,
    ) -> None:
        """Run until every rank's source is exhausted and all its sequences have finished.

        Args:
            sink: called on the first rank of each tensor group with the completions of a step,
                before the next begins, or the one after it where the step was late.
            on_step: called after every step.
            stop: called before every step; returns whether this rank is to stop. Once one rank is,
                no rank pulls requests any more.

        Collective over EP: every rank must call.

        Raises:
            Stopped: a rank was asked to stop with requests left, and all running requests have
                finished or it must not wait for them; on all ranks, before the same step.
        """
        started_at, exhausted, stop_signal = time.monotonic(), False, 0
        self._scheduler.prefixes.clear()  # a run's results follow from its own requests alone
        clock, loads = self._telemetry.clock, self._telemetry.loads
        while True:
            clock.enter(Phase.OTHER)
            was_open = self._flight.is_open
            if was_open and (stop_signal or not self._scheduler.can_look_ahead()):
                self._deliver(self._flight.land(), sink)
            exhausted = self._admit(source, sink, closed=bool(stop_signal)) or exhausted
            step = self._scheduler.schedule()
            if self._flight.is_open and not step.slices:  # the room for others is known late
                self._deliver(self._flight.land(), sink)
                exhausted = self._admit(source, sink, closed=bool(stop_signal)) or exhausted
                step = self._scheduler.schedule()
            messages = self._exchange_control(step, exhausted, stop())
            stop_signal = max(message.signal for message in messages)
            has_work = any(message.running + message.waiting for message in messages)
            if not has_work and all(message.exhausted for message in messages):
                break
            if any(message.stop_now for message in messages) or (stop_signal and not has_work):
                self._deliver(self._flight.land(), sink)
                raise Stopped(stop_signal)
            if self._replanner is not None:
                self._replanner.advance(messages, loads)
            if has_work:  # else the lines taken have all failed
                self._deliver(self._run_step(step, messages), sink)
            self._telemetry.decisions.next_step()
            self.totals.steps += 1
            loads.end_step(waited=self._has_waited(step, was_open))
            self._flight.copy_out()
            report = step_report(self.totals.steps, messages, loads.reset_step(), started_at)
            self._step_profiler.update(report)
            if on_step is not None:
                on_step(report)
            clock.close_step()
        clock.close_step()
        loads.late.flush()
        self._step_profiler.finish()

    def _admit(self, source: RequestSource, sink: Sink, closed: bool) -> bool:
        """Admit requests while the scheduler has room, none if closed, for a limited time; return
        whether the source is exhausted.
        """
        arrivals: list[Request] = []
        failed: list[Completion] = []
        exhausted = False
        if self._is_leader and closed:
            exhausted = source.is_exhausted()
        elif self._is_leader:
            arrivals, failed, exhausted = self._admission.take(source)
        arrivals, exhausted = self._broadcast((arrivals, exhausted))
        if not self._is_leader:
            for request in arrivals:
                self._admission.add(request)
        elif failed:
            self.totals.finished += len(failed)
            sink(failed)
        return exhausted

    def _exchange_control(
        self, step: Step, exhausted: bool, stop: StopRequest
    ) -> list[ControlMessage]:
        """Send this rank's control message; return those of all ranks. Collective over EP."""
        scheduler = self._scheduler
        leads = int(self._is_leader)  # a tensor group's requests count once
        message = ControlMessage(
            tokens_prefill=(step.num_tokens - step.num_decode) * leads,
            tokens_decode=step.num_decode * leads,
            running=len(scheduler.running) * leads,
            waiting=len(scheduler.waiting) * leads,
            finished=self.totals.finished * leads,
            exhausted=exhausted,
            tokens_eligible=count_eligible(step, self._counted_phases) * leads,
            signal=stop.signal,
            stop_now=stop.now,
            time_per_row=self._step_profiler.read(),
            tokens_read=step.num_read * leads,
            replan=0 if self._replanner is None else self._replanner.stage,
            graph_bucket=0 if self._graphs is None else self._graphs.wanted(step),
        )
        self.totals.tokens_prefill += message.tokens_prefill
        self.totals.tokens_decode += message.tokens_decode
        return self._step_profiler.exchange(self._control, message)

    def _run_step(self, step: Step, messages: list[ControlMessage]) -> list[Sequence]:
        """Run one step; return the sequences that finished."""
        moe_step = None
        if self._phases:
            weights_W = self._step_profiler.weights_W
            moe_step = build_moe_step(
                step,
                messages,
                self._phases,
                self._topology,
                weights_W,
                limited=self._limited,
                layers=self._layer_phases,
            )
        bucket = None
        if self._graphs is not None and moe_step is None:
            bucket = self._graphs.agreed(messages)
        flight, outcome, late = self._flight, None, None
        if self._graphs is not None and bucket is not None:
            ran = self._graphs.run(
                step,
                bucket,
                samples=self._is_leader,
                fed=flight.fed,
                late=flight.may_leave(step, in_graph=True),
            )
            late, outcome = (ran, None) if isinstance(ran, LateStep) else (None, ran)
            finished, void = flight.land_behind(step)
        else:
            group = self._group_of(messages)
            may_split = any(message.running > 1 for message in messages)
            hidden = self._runner.forward(step, moe_step, group, may_split, flight.fed)
            late = flight.launch(step, hidden)
            finished, void = flight.land_behind(step)
            if late is None and self._is_leader:
                outcome = read_step(step, lambda rows: self._runner.logits(hidden, rows))
        if late is not None:
            flight.put(late, void)
            return finished
        outcome = self._broadcast(outcome)
        if finished or void:
            self._flight.drop_surplus(step, void)
        # Where no token is subject to capacity the last layer runs only the rows that are read
        # (`CausalLM.forward`).
        whole = moe_step is not None and moe_step.runs_last_whole
        self._routed.count(step, whole=whole, void=void)
        if moe_step is not None:
            clock = self._telemetry.clock
            uses = capacity_uses(
                step, moe_step, self._topology, clock, counts_copies=self._counts_copies
            )
            clock.enter(Phase.OTHER)
            for piece, use in zip(step.slices, uses, strict=True):
                piece.seq.capacity.add(use)
        return finished + record(self._scheduler, step, outcome, void=void)

    def _group_of(self, messages: list[ControlMessage]) -> GroupTokens:
        """Return the tokens of a step over all ranks."""
        # Of each tensor group only the first rank's counts are not 0.
        return GroupTokens(
            all=sum(message.tokens_prefill + message.tokens_decode for message in messages),
            read=sum(message.tokens_read for message in messages),
            use_copies=self._copies is not None and self._copies.take_rows(messages),
            bucket=static_bucket(messages, self._topology.tensor.size, self._exchange),
        )

    def _has_waited(self, step: Step, was_open: bool) -> bool:
        """Return whether the host has read tokens of a step behind what late loads were copied in.

        was_open: whether a step was in flight as the iteration began, which is read in it.
        """
        reads = step.sampling or step.prompt_rows
        return self._is_leader and (was_open or (bool(reads) and not self._flight.is_open))

    def _broadcast(self, value: Any) -> Any:
        """Return the value of the first rank of the tensor group. Collective over TP."""
        tensor, clock = self._topology.tensor, self._telemetry.clock
        if tensor.size == 1:
            return value
        clock.enter_collective(Phase.TENSOR)
        value = broadcast_object(value, self._topology.host_tensor)
        clock.enter(Phase.OTHER)
        return value

    def _deliver(self, finished: list[Sequence], sink: Sink) -> None:
        """Count the finished sequences and pass their completions to the sink."""
        lines: list[Sequence | ChoiceGroup] = []
        queue = list(finished)
        for sequence in queue:
            group = sequence.group
            if group is None:
                lines.append(sequence)
                continue
            if sequence.error is not None:  # the line has failed
                for other in group.unfinished():
                    self._scheduler.abort(other, sequence.error)
                    queue.append(other)
            if group.finish(sequence):
                lines.append(group)
        self.totals.finished += len(lines)
        if lines and self._is_leader:
            sink([line.completion() for line in lines])
